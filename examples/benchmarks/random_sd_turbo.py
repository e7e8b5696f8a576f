"""Models with SD-Turbo's shapes and random weights, for benchmarks and tests."""

from math import gcd
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline, InvSRPromptEmbeds, InvSRScheduler


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
    """A tokenizer of single letters, with separate tokens for the last letter of a word. It pads to 77 tokens."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def make_text_encoder(tokenizer: CLIPTokenizer, **config) -> CLIPTextModel:
    """A random text encoder that knows the special tokens of a tokenizer."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextModel(CLIPTextConfig(**config, **special))


def _num_heads(channels: int) -> int:
    """The number of heads: of 64 channels each, or the next larger number that divides `channels`."""
    return next(heads for heads in range(max(channels // HEAD_DIM, 1), 0, -1) if channels % heads == 0)


def scaled_configs(width: float = 1.0) -> dict[str, dict[str, Any]]:
    r"""
    The configurations of SD-Turbo and the noise predictor by component, with `width` times the channels.

    Depth, resolutions and the 77 tokens are unchanged. An attention head has 64 channels where that divides a level's
    channels, else the next larger number that does. GroupNorms have 32 groups, or the largest number that divides the
    channels of all levels.

    Args:
        width (`float`, defaults to 1.0): 1, 1/2, 1/4, 1/8 or 1/16.

    Raises:
        ValueError: If `width` is another number.
    """
    if width not in WIDTHS:
        raise ValueError(f"`width` must be one of {', '.join(f'{w:g}' for w in WIDTHS)}, got {width!r}.")
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
        width (`float`, defaults to 1.0): Factor on the channels; see [`scaled_configs`].
        seed (`int`, defaults to 0): Seed of the weights. The global random state does not change.
        text (`bool`, defaults to `True`):
            Whether the pipeline has a text encoder. Otherwise it holds random embeddings of the fixed prompts.

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
            components["text_encoder"] = make_text_encoder(tokenizer, **configs["text_encoder"])
        else:
            tokenizer = None
            components["fixed_prompt"] = InvSRPromptEmbeds(embed_dim=configs["unet"]["cross_attention_dim"])
            for embeds in components["fixed_prompt"].parameters():
                torch.nn.init.normal_(embeds)
    components = {name: part and part.eval() for name, part in components.items()}
    return InvSRPipeline(tokenizer=tokenizer, scheduler=InvSRScheduler(**configs["scheduler"]), **components)
