"""A folder like SD-Turbo's with tiny modules."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)


def save_sd_turbo(folder: Path, cases: dict):
    """Save a tiny `StableDiffusionPipeline` with modules as in `cases.json` and an Euler scheduler in `folder`."""
    from random_sd_turbo import make_text_encoder, make_tokenizer  # here: `enlarge` is used without the package too

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(
        tokenizer,
        vocab_size=len(tokenizer),
        hidden_size=cases["unet"]["cross_attention_dim"],
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    StableDiffusionPipeline(
        vae=AutoencoderKL(**cases["vae"]),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**cases["unet"]),
        scheduler=EulerDiscreteScheduler(**cases["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def enlarge(pipe: DiffusionPipeline, **arguments) -> torch.Tensor:
    """The result `(1, 3, 128, 128)` of a pipeline for an image and a seed that are always the same."""
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return pipe(image, tile_size=None, generator=torch.manual_seed(0), output_type="pt", **arguments).images
