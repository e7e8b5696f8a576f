"""The whole published procedure as a plain loop (section 3 of the paper, and its tiling), against the pipeline."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, photo


TILE, STRIDE = 16, 8  # half a tile
MULTIPLE = 4  # LR pixels: the reduction of the VAE over the scale, times 2 for the lower level of the UNet
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS = torch.cumprod(1 - BETAS, dim=0)


def enlarge_tile(pipe, lr: torch.Tensor, steps: list[int], noise, prompt_embeds: torch.Tensor) -> torch.Tensor:
    """From `(1, 3, h, w)` to `(1, 3, 4h, 4w)`, in [0, 1]."""
    xi = [torch.randn(1, 4, lr.shape[-2] // 2, lr.shape[-1] // 2, generator=noise) for _ in range(2)]
    predicted = pipe.noise_predictor(2 * lr - 1, steps[0] - 1).moments
    mean, logvar = predicted.chunk(2, dim=1)
    noise_map = mean + (0.5 * logvar.clamp(-30, 20)).exp() * xi[0]
    posterior = pipe.vae.encode(2 * F.interpolate(lr, scale_factor=4, mode="bicubic") - 1).latent_dist
    latents = pipe.vae.config.scaling_factor * (posterior.mean + posterior.std * xi[1])
    alpha = ALPHAS[steps[0] - 1]
    latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise_map
    for step, following in zip(steps, [*steps[1:], None]):
        epsilon = pipe.unet(latents, step - 1, encoder_hidden_states=prompt_embeds).sample
        alpha = ALPHAS[step - 1]
        latents = (latents - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()  # the clean ones
        if following is not None:
            alpha = ALPHAS[following - 1]
            latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * epsilon
    return (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def starts(length: int) -> list[int]:
    """Of the tiles along an axis; one that would pass the end is moved back."""
    return sorted({min(start, length - TILE) for start in range(0, length - TILE + STRIDE, STRIDE)})


def gaussian(size: int) -> torch.Tensor:
    """Points 1 ... size of a window of an even size that is longer by one."""
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    return torch.tensor([math.exp(-((i - size / 2) ** 2) / (2 * sigma**2)) for i in range(1, size + 1)])


@torch.no_grad()
def enlarge_as_published(pipe, image: torch.Tensor, steps: list[int], prompt_embeds: torch.Tensor) -> torch.Tensor:
    height, width = image.shape[-2:]
    fronts = [max(TILE - side, 0) // 2 for side in (height, width)]
    backs = [max(TILE - side, 0) - front for side, front in zip((height, width), fronts)]
    image = F.pad(image, (fronts[1], backs[1], fronts[0], backs[0]), mode="reflect")
    image = F.pad(image, (0, -image.shape[-1] % MULTIPLE, 0, -image.shape[-2] % MULTIPLE), mode="reflect")
    noise, total = generator(), torch.zeros(1, 3, *(4 * side for side in image.shape[-2:]))
    weights = torch.zeros_like(total)
    window = gaussian(4 * TILE)[:, None] * gaussian(4 * TILE)
    for top in starts(image.shape[-2]):
        for left in starts(image.shape[-1]):
            tile = image[..., top : top + TILE, left : left + TILE]
            place = (..., slice(4 * top, 4 * (top + TILE)), slice(4 * left, 4 * (left + TILE)))
            total[place] += window * enlarge_tile(pipe, tile, steps, noise, prompt_embeds)
            weights[place] += window
    top, left = (4 * front for front in fronts)
    return (total / weights)[..., top : top + 4 * height, left : left + 4 * width]


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (10, 33)], ids=["one tile", "whole tiles", "padded"])
@pytest.mark.parametrize("steps", [[200], [200, 100, 50]], ids=["1 step", "3 steps"])
def test_the_published_procedure_is_that_of_the_pipeline(pipe, prompt_embeds, size, steps):
    image = photo(*size)
    expected = enlarge_as_published(pipe.pipeline, image, steps, prompt_embeds["prompt_embeds"])
    result = pipe(image, num_steps=len(steps), tile_size=TILE, tile_window="gaussian")
    assert expected.std() > 0.05
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=0)
