r"""
The objective of training (section 3.3 of the [InvSR paper](https://arxiv.org/abs/2412.09013)), all in latent space:

    L = L2(ẑ₀, z₀) + 2.0 · LPIPS(ẑ₀, z₀) + 0.1 · adversarial(ẑ₀)

Losses are returned per image, so that logs can be split by starting timestep; their mean is minimized. The latent
LPIPS is [`LatentLPIPS`].
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ..devices import dtype_of
from ..noise_predictor import InvSRNoisePredictor, draw
from ..scheduling_invsr import InvSRScheduler
from .errors import TrainingError


DISCRIMINATOR_RANGE = 10.0  # ẑ₀ is clamped to ±10 before the discriminator sees it


def one_step_estimate(
    noise_predictor: InvSRNoisePredictor | nn.Module,
    unet: nn.Module,
    scheduler: InvSRScheduler,
    lr: torch.Tensor,
    lr_latents: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    prompt_embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    The clean latents that the diffusion model predicts from the LR image in one step, differentiable in the predictor.

        n  = mean + exp(logvar / 2) · ξ₁                  (the predicted noise map)
        z  = √ᾱ · z_lr + √(1 − ᾱ) · n                     (the starting state)
        ẑ₀ = (z − √(1 − ᾱ) · ε(z)) / √ᾱ

    Args:
        noise_predictor ([`InvSRNoisePredictor`]): The trained network, wrapped or not.
        unet (`nn.Module`): The frozen diffusion model, which predicts ε.
        scheduler ([`InvSRScheduler`]): Holds ᾱ.
        lr (`torch.Tensor`): LR images `(B, 3, h, w)`, in [0, 1].
        lr_latents (`torch.Tensor`): z_lr, scaled latents `(B, C, H, W)` of the enlarged LR images.
        timesteps (`torch.Tensor`): Starting timestep of each image as schedule index (199 for step 200), `(B,)`.
        noise (`torch.Tensor`): ξ₁, standard Gaussian noise of the latents' shape.
        prompt_embeds (`torch.Tensor`, *optional*): Embeddings of the fixed prompt, `(1, tokens, width)`.

    Returns:
        `torch.Tensor`: ẑ₀ in float32, `(B, C, H, W)`.

    Raises:
        TrainingError: If the diffusion model does not predict ε.
    """
    if scheduler.config["prediction_type"] != "epsilon":
        raise TrainingError(
            f"`prediction_type` of the scheduler must be 'epsilon', got {scheduler.config['prediction_type']!r}."
        )
    alphas = scheduler.alphas_cumprod.to(lr.device)[timesteps].view(-1, 1, 1, 1)
    noise_map = draw(noise_predictor(2 * lr - 1, timesteps).latent_dist, noise)
    latents = alphas.sqrt() * lr_latents + (1 - alphas).sqrt() * noise_map
    if prompt_embeds is not None:
        prompt_embeds = prompt_embeds.expand(len(lr), -1, -1)
    epsilon = unet(latents.to(dtype_of(unet)), timesteps, encoder_hidden_states=prompt_embeds).sample.float()
    return (latents - (1 - alphas).sqrt() * epsilon) / alphas.sqrt()


def weights_by_start(weights: float | Mapping[int, float], timesteps: torch.Tensor) -> torch.Tensor:
    r"""
    The weight of a loss for each image, by its starting step: so that early starts may be trained for detail and late
    ones for fidelity, which goes beyond the paper.

    Args:
        weights (`float` or `Mapping[int, float]`):
            A weight by starting step, counted from 1: `{250: 2.0, 200: 1.0, 100: 0.0}`. Between two of them it is
            interpolated; beyond them it is that of the nearest. A number counts for all.
        timesteps (`torch.Tensor`): Starting steps as schedule indices (199 for step 200), `(B,)`.

    Returns:
        `torch.Tensor`: Weights `(B,)` in float32, on the device of `timesteps`.

    Raises:
        ValueError: If `weights` is empty.
    """
    if not isinstance(weights, Mapping):
        return torch.full(timesteps.shape, float(weights), device=timesteps.device)
    if not weights:
        raise ValueError("`weights` must have a weight for at least one starting step.")
    starts = sorted(weights)
    values = np.interp(timesteps.cpu().numpy() + 1, starts, [weights[start] for start in starts])
    return torch.from_numpy(values).float().to(timesteps.device)


def latent_l2(estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of (ẑ₀ − z₀)² per image, `(B,)`, of latents `(B, C, H, W)`."""
    return (estimate - target).square().flatten(1).mean(dim=1)


def hinge_generator(logits: list[torch.Tensor]) -> torch.Tensor:
    """−mean D(ẑ₀) per image, averaged over the discriminator's outputs: `(B,)`, of maps `(B, 1, h, w)`."""
    return -torch.stack([output.float().flatten(1).mean(dim=1) for output in logits]).mean(dim=0)


def hinge_discriminator(real_logits: list[torch.Tensor], fake_logits: list[torch.Tensor]) -> torch.Tensor:
    """½ (relu(1 − D(z₀)) + relu(1 + D(ẑ₀))) per image, averaged over outputs: `(B,)`, of maps `(B, 1, h, w)`."""
    losses = [
        0.5 * (torch.relu(1 - real.float()) + torch.relu(1 + fake.float())).flatten(1).mean(dim=1)
        for real, fake in zip(real_logits, fake_logits, strict=True)
    ]
    return torch.stack(losses).mean(dim=0)
