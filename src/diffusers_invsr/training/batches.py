"""What is random in a training batch, all of it from one generator, so that a resumed run draws the same again."""

import numpy as np
import torch

from ..degradation import Degradation
from ..pipeline_invsr import InvSRPipeline
from ..resampling import enlarge
from .errors import TrainingError
from .latents import draw_latents


def batch_generator(seed: int, number: int) -> torch.Generator:
    r"""
    The source of all randomness of one micro-batch of a run. Resuming requires no saved state.

    Args:
        seed (`int`): The run's seed.
        number (`int`): The micro-batch, counted over all processes.

    Returns:
        `torch.Generator`: On the CPU.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]))


def noise_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator for noise on the device itself, seeded by `generator`; on a CPU `generator` itself."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(torch.randint(2**62, (), generator=generator).item())


def check_crop_size(crop_size: int, degradation: Degradation):
    r"""
    Raises:
        TrainingError: If crops of this size in pixels are too small for the degradation, or no multiple of its scale.
    """
    if crop_size % degradation.scale or crop_size < degradation.min_size:
        raise TrainingError(
            f"`crop_size` must be a multiple of {degradation.scale} and at least {degradation.min_size}, got"
            f" {crop_size}."
        )


def degrade_batch(degradation: Degradation, hr: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    r"""
    LR images of a batch.

    Args:
        degradation ([`Degradation`]): Draws and applies the degradation of each image.
        hr (`torch.Tensor`): HR images `(B, 3, H, W)`, in [0, 1].
        generator (`torch.Generator`): Draws the settings, on the CPU; noise is drawn on the images' device.

    Returns:
        `torch.Tensor`: LR images `(B, 3, H / scale, W / scale)`, in [0, 1].
    """
    settings = degradation.draw(len(hr), generator)
    return degradation.apply(hr, settings, noise_generator(generator, hr.device))


def draw_starts(
    pipe: InvSRPipeline,
    lr: torch.Tensor,
    posterior: torch.Tensor,
    start_timesteps: list[int],
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    What the one-step estimate of each image starts from, and the latents it is compared with.

    Args:
        pipe ([`InvSRPipeline`]): Holds the VAE and the scale factor.
        lr (`torch.Tensor`): LR images `(B, 3, h, w)`, in [0, 1].
        posterior (`torch.Tensor`): The HR images' posterior, from [`encode_posterior`].
        start_timesteps (`list[int]`): Starting steps τ to draw from, counted from 1.
        generator (`torch.Generator`): Source of the draws, on the CPU.

    Returns:
        `tuple[torch.Tensor]`: `timesteps`, schedule indices τ − 1 `(B,)`; `noise`, the predictor's ξ₁
        `(B, C, H, W)`; `lr_latents` and `hr_latents`, scaled latents `(B, C, H, W)` in float32.
    """
    # ξ₁ for the predictor, ξ₂ and ξ₃ for the posteriors of the LR and the HR image
    shape = (3, len(lr), pipe.vae.config.latent_channels, *posterior.shape[-2:])
    source = noise_generator(generator, lr.device)
    noise = torch.randn(shape, generator=source, device=source.device)
    choices = torch.randint(len(start_timesteps), (len(lr),), generator=generator)
    timesteps = (torch.tensor(start_timesteps)[choices] - 1).to(lr.device)
    lr_latents = pipe.encode_image(enlarge(lr, pipe.config.scale), noise[1])
    return timesteps, noise[0], lr_latents, draw_latents(pipe.vae, posterior, noise[2])
