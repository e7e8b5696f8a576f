"""The weave, a pattern with the period of the latents' pixels that perceptual losses do not see: a loss, a measure."""

import numpy as np
import torch
import torch.nn.functional as F

from ..metrics import luma


WINDOW = 8  # latent pixels over which the loss looks for a pattern that repeats
BLOCK = 32  # pixels of a block of the measure's spectra


def lattice_loss(estimate: torch.Tensor, target: torch.Tensor, period: int = 4) -> torch.Tensor:
    r"""
    Energy of what repeats, with the period of the latents' pixels, in the difference of two images. Missing texture
    hardly counts, since its mean over a window is about zero at each place of the lattice.

    Args:
        estimate (`torch.Tensor`): Images `(B, C, H, W)` with sides that are multiples of `period`.
        target (`torch.Tensor`): HR images of the same shape.
        period (`int`, defaults to 4): Pixels of the image to a pixel of the latents.

    Returns:
        `torch.Tensor`: A loss for each image, `(B,)`.
    """
    places = F.pixel_unshuffle(estimate - target, period)
    window = min(WINDOW, *places.shape[-2:])
    means = F.avg_pool2d(places, window, stride=max(1, window // 2)).unflatten(1, (-1, period**2))
    return (means - means.mean(dim=2, keepdim=True)).square().flatten(1).mean(dim=1)


def lattice_ratio(result: np.ndarray, target: np.ndarray, period: int = 4) -> float:
    r"""
    How much the lattice's frequencies stand out of a result's spectrum, over how much they do in the HR image: about 1
    without a weave, whether the result is smooth or not.

    The energy at the multiples of 1 / `period` cycles a pixel is divided by that of the frequencies around them, for
    the luma of overlapping blocks under a Hann window.

    Args:
        result (`np.ndarray`), target (`np.ndarray`): 8-bit RGB images `(H, W, 3)`, at least 32 pixels high and wide.
        period (`int`, defaults to 4): Pixels of the image to a pixel of the latents; it divides 32.

    Returns:
        `float`: The ratio, NaN for an HR image of one colour.
    """
    expected = _prominence(luma(target), period)
    return _prominence(luma(result), period) / expected if expected > 0 else float("nan")


def _prominence(image: np.ndarray, period: int) -> float:
    """Energy at the lattice's frequencies over the mean energy of those two steps away, which the window separates."""
    blocks = np.lib.stride_tricks.sliding_window_view(image, (BLOCK, BLOCK))[:: BLOCK // 2, :: BLOCK // 2]
    blocks = (blocks - blocks.mean(axis=(-2, -1), keepdims=True)).reshape(-1, BLOCK, BLOCK)
    window = np.hanning(BLOCK + 1)[:-1]
    power = (np.abs(np.fft.fft2(blocks * window[:, None] * window)) ** 2).mean(axis=0)
    steps = range(0, BLOCK, BLOCK // period)
    lattice = [(y, x) for y in steps for x in steps if (y, x) != (0, 0)]
    ring = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if max(abs(y), abs(x)) == 2]
    around = sum(power[(y + dy) % BLOCK, (x + dx) % BLOCK] for y, x in lattice for dy, dx in ring) / len(ring)
    return float(sum(power[place] for place in lattice) / around) if around > 0 else float("nan")
