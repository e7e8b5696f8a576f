"""The weave, a pattern with the period of the latents' pixels that perceptual losses do not see: a loss, a measure."""

import numpy as np
import torch
import torch.nn.functional as F

from ..metrics import luma


SMALLEST_AMPLITUDE = 1e-3  # of a weave, in [0, 1], that the loss still presses on as on larger ones
WINDOW = 8  # latent pixels over which the loss looks for a pattern that repeats
BLOCK = 32  # pixels of a block of the measure's spectra


def lattice_loss(estimate: torch.Tensor, target: torch.Tensor, period: int = 4) -> torch.Tensor:
    r"""
    Amplitude of what repeats, with the period of the latents' pixels, in the difference of two images. Missing texture
    counts little, since its mean over a window is about zero at each place of the lattice. Amplitude and not energy:
    what shows is a faint weave over flat parts, not a stronger one among textures.

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
    energy = (means - means.mean(dim=2, keepdim=True)).square().mean(dim=2)
    return (energy + SMALLEST_AMPLITUDE**2).sqrt().flatten(1).mean(dim=1) - SMALLEST_AMPLITUDE


def lattice_energy(result: np.ndarray, target: np.ndarray, period: int = 4) -> float:
    r"""
    Energy at the lattice's frequencies, the multiples of 1 / `period` cycles a pixel, of a result over that of the HR
    image: below 1 for a smooth result, above 1 where a weave adds what is not there.

    Args:
        result (`np.ndarray`), target (`np.ndarray`): 8-bit RGB images `(H, W, 3)`, at least 32 pixels high and wide.
        period (`int`, defaults to 4): Pixels of the image to a pixel of the latents; it divides 32.

    Returns:
        `float`: The ratio, NaN for an HR image of one colour.
    """
    energies = [sum(on for on, _ in _energies(image, period)) for image in (result, target)]
    return energies[0] / energies[1] if energies[1] > 0 else float("nan")


def lattice_prominence(result: np.ndarray, target: np.ndarray, period: int = 4) -> float:
    r"""
    How far the lattice's frequencies stand out of a result's spectrum, over how far they do in the HR image: about 1
    without a weave, however smooth the result is. A smooth one shows a weave of half a level of 255 by 30 and more.

    Arguments and result are those of [`lattice_energy`].
    """
    ratios = [
        np.mean([on / (around + 1e-12) for on, around in _energies(image, period)]) for image in (result, target)
    ]
    return float(ratios[0] / ratios[1]) if ratios[1] > 0 else float("nan")


def _energies(image: np.ndarray, period: int) -> list[tuple[float, float]]:
    """Energy of the luma at each of the lattice's frequencies and around it, over blocks under a Hann window."""
    blocks = np.lib.stride_tricks.sliding_window_view(luma(image), (BLOCK, BLOCK))[:: BLOCK // 2, :: BLOCK // 2]
    blocks = (blocks - blocks.mean(axis=(-2, -1), keepdims=True)).reshape(-1, BLOCK, BLOCK)
    window = np.hanning(BLOCK + 1)[:-1]
    power = (np.abs(np.fft.fft2(blocks * window[:, None] * window)) ** 2).mean(axis=0)
    steps = range(0, BLOCK, BLOCK // period)
    # Two steps away, which the window separates; a geometric mean, since spectra fall by orders of magnitude
    ring = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if max(abs(y), abs(x)) == 2]
    energies = []
    for y, x in ((y, x) for y in steps for x in steps if (y, x) != (0, 0)):
        around = np.array([power[(y + dy) % BLOCK, (x + dx) % BLOCK] for dy, dx in ring])
        energies.append((float(power[y, x]), float(np.exp(np.log(around + 1e-12).mean()))))
    return energies
