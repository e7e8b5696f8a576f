"""How close a result is to the HR image: the measures that the super-resolution literature uses, and LPIPS."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    import torch


def luma(image: np.ndarray) -> np.ndarray:
    """Y of BT.601 in studio range, 16 ... 235, of an 8-bit RGB image `(H, W, 3)`."""
    return 16 + image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


def psnr(result: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB for values on a scale of 0 ... 255; infinite for equal images."""
    mse = np.mean((result.astype(np.float64) - target.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / mse)) if mse != 0 else float("inf")


def psnr_y(result: np.ndarray, target: np.ndarray) -> float:
    """PSNR in dB over the luma of 8-bit RGB images `(H, W, 3)`, no border cut off."""
    return psnr(luma(result), luma(target))


def ssim_y(result: np.ndarray, target: np.ndarray) -> float:
    """
    SSIM over the luma of 8-bit RGB images `(H, W, 3)`, with the Gaussian window of its paper (sigma 1.5).

    Raises:
        ImportError: If scikit-image is not installed.
    """
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            luma(result),
            luma(target),
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def gradient_energy(image: np.ndarray) -> float:
    """Mean absolute difference of horizontally and of vertically neighbouring luma, of an 8-bit RGB image."""
    y = luma(image)
    return float(np.abs(np.diff(y, axis=0)).mean() + np.abs(np.diff(y, axis=1)).mean())


def gradient_ratio(result: np.ndarray, target: np.ndarray) -> float:
    """
    Gradient energy of a result over that of the HR image, 8-bit RGB `(H, W, 3)`: below 1 it is smoother, above 1 it is
    sharper or noisier, in the right places or not. NaN for an HR image of one colour.
    """
    energy = gradient_energy(target)
    return gradient_energy(result) / energy if energy > 0 else float("nan")


def load_lpips() -> "torch.nn.Module":
    r"""
    LPIPS of RGB images `(B, 3, H, W)` in [-1, 1], with VGG16 (https://arxiv.org/abs/1801.03924), version 0.1.

    Raises:
        ImportError: If `lpips` or torchvision is not installed, or they do not fit together.
        OSError: If VGG16's weights are neither in torch's cache nor to be fetched.
        RuntimeError: If what was fetched is damaged.
    """
    import lpips
    import torch
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from torchvision.models import VGG16_Weights

    file = Path(torch.hub.get_dir(), "checkpoints", Path(VGG16_Weights.IMAGENET1K_V1.url).name)
    if HF_HUB_OFFLINE and not file.is_file():
        raise OSError(f"{file} is missing, and HF_HUB_OFFLINE is set")
    return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
