"""Latents of a frozen VAE in two steps: the posterior, which can be cached, and a sample of it."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ..devices import dtype_of
from ..noise_predictor import draw
from .latent_cache import LatentCache


@torch.no_grad()
def encode_posterior(
    vae: AutoencoderKL | AutoencoderTiny,
    image: torch.Tensor,
    cache: LatentCache | None = None,
    keys: list[str] | None = None,
) -> torch.Tensor:
    r"""
    Parameters of the VAE's posterior.

    Args:
        vae (`AutoencoderKL` or `AutoencoderTiny`): The frozen VAE.
        image (`torch.Tensor`): Images `(B, 3, H, W)`, in [0, 1].
        cache ([`LatentCache`], *optional*): Where posteriors are looked up and stored.
        keys (`list[str]`, *optional*): The images' keys in the cache.

    Returns:
        `torch.Tensor`: Mean and log-variance, `(B, 2C, h, w)`; for an autoencoder without a posterior, such as
        `AutoencoderTiny`, the latents `(B, C, h, w)`. Not scaled.
    """
    kept = [None] * len(image) if cache is None else cache.get(keys)
    missing = [i for i, posterior in enumerate(kept) if posterior is None]
    if missing:
        encoded = vae.encode((2 * image[missing] - 1).to(dtype_of(vae)))
        new = encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latents
        if cache is not None:
            cache.put([keys[i] for i in missing], new)
        for i, posterior in zip(missing, new):
            kept[i] = posterior
    return torch.stack([posterior.to(image.device) for posterior in kept])


def draw_latents(vae: AutoencoderKL | AutoencoderTiny, posterior: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    r"""
    Sample the posterior: z = c · (mean + std · ξ), with the VAE's scaling factor c.

    Args:
        vae (`AutoencoderKL` or `AutoencoderTiny`): The frozen VAE.
        posterior (`torch.Tensor`): From [`encode_posterior`].
        noise (`torch.Tensor`): ξ, standard Gaussian noise `(B, C, h, w)`.

    Returns:
        `torch.Tensor`: Scaled latents `(B, C, h, w)` in float32.
    """
    latents = posterior.float()
    if latents.shape[1] == 2 * noise.shape[1]:
        latents = draw(DiagonalGaussianDistribution(latents), noise)
    return vae.config.scaling_factor * latents
