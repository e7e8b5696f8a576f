"""SD-Turbo's shapes with random weights, where its cost is wanted and not its pictures: benchmarks and tests."""

from math import gcd
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .noise_predictor import InvSRNoisePredictor
from .pipeline_invsr import InvSRPipeline
from .prompt_embeds import InvSRPromptEmbeds
from .scheduling_invsr import InvSRScheduler


UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),  # heads, by diffusers' old name for them
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE = {
    "sample_size": 768,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
NOISE_PREDICTOR = {"block_out_channels": (256, 512), "temb_channels": 512}  # the rest as published: its defaults

HEAD_DIM, NORM_GROUPS = 64, 32
WIDTHS = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)


def make_tokenizer() -> CLIPTokenizer:
    """A tokenizer of letters, of which the last one of a word is another token. It pads to 77 tokens, as CLIP's."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _num_heads(channels: int) -> int:
    """Heads of 64 channels, or of the next larger number of channels that divides `channels`."""
    return next(heads for heads in range(max(channels // HEAD_DIM, 1), 0, -1) if channels % heads == 0)


def scaled_configs(width: float = 1.0) -> dict[str, dict[str, Any]]:
    r"""
    The configurations of SD-Turbo and the noise predictor with `width` times the channels, by component.

    Depth, resolutions and the 77 tokens stay. Heads have 64 channels where that divides a level's channels, else the
    next larger number that does (80 at 1/2 for the UNet's first level), or all of a level that has fewer. GroupNorms
    have 32 groups, or the largest number that divides all levels' channels.

    Args:
        width (`float`, defaults to 1.0): 1, 1/2, 1/4, 1/8 or 1/16.

    Raises:
        ValueError: If `width` is another number.
    """
    if width not in WIDTHS:
        raise ValueError(f"`width` has to be one of {', '.join(f'{w:g}' for w in WIDTHS)}, but is {width!r}.")
    unet, vae, predictor = (
        tuple(int(channels * width) for channels in config["block_out_channels"])
        for config in (UNET, VAE, NOISE_PREDICTOR)
    )
    hidden = int(TEXT_ENCODER["hidden_size"] * width)
    return {
        "unet": UNET
        | {
            "block_out_channels": unet,
            "attention_head_dim": tuple(_num_heads(channels) for channels in unet),
            "norm_num_groups": gcd(NORM_GROUPS, *unet),
            "cross_attention_dim": hidden,
        },
        "vae": VAE | {"block_out_channels": vae, "norm_num_groups": gcd(NORM_GROUPS, *vae)},
        "text_encoder": TEXT_ENCODER
        | {
            "hidden_size": hidden,
            "intermediate_size": int(TEXT_ENCODER["intermediate_size"] * width),
            "num_attention_heads": _num_heads(hidden),
        },
        "noise_predictor": NOISE_PREDICTOR
        | {
            "block_out_channels": predictor,
            "temb_channels": int(NOISE_PREDICTOR["temb_channels"] * width),
            "attention_head_dim": gcd(HEAD_DIM, *predictor),
            "norm_num_groups": gcd(NORM_GROUPS, *predictor),
        },
        "scheduler": SCHEDULER,
    }


def build_pipeline(width: float = 1.0, seed: int = 0, text: bool = True) -> InvSRPipeline:
    r"""
    A pipeline of SD-Turbo's and the published noise predictor's shapes with random weights, in float32 on the default
    device.

    Args:
        width (`float`, defaults to 1.0): Factor of the channel counts; see [`scaled_configs`].
        seed (`int`, defaults to 0): The same seed gives the same weights. The global random state is left as it is.
        text (`bool`, defaults to `True`):
            Whether the pipeline has a text encoder, with a tokenizer of letters. Otherwise it holds (random)
            embeddings of the fixed prompts.

    Returns:
        [`InvSRPipeline`]: The pipeline, in evaluation mode.

    Raises:
        ValueError: If `width` is not 1, 1/2, 1/4, 1/8 or 1/16.
    """
    configs = scaled_configs(width)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        components = {
            "noise_predictor": InvSRNoisePredictor(**configs["noise_predictor"]),
            "unet": UNet2DConditionModel(**configs["unet"]),
            "vae": AutoencoderKL(**configs["vae"]),
            "text_encoder": None,
        }
        if text:
            tokenizer = make_tokenizer()
            special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
            components["text_encoder"] = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"], **special))
        else:
            tokenizer = None
            components["fixed_prompt"] = InvSRPromptEmbeds(embed_dim=configs["unet"]["cross_attention_dim"])
            for embeds in components["fixed_prompt"].parameters():
                torch.nn.init.normal_(embeds)
    components = {name: part and part.eval() for name, part in components.items()}
    return InvSRPipeline(tokenizer=tokenizer, scheduler=InvSRScheduler(**configs["scheduler"]), **components)
