"""Measures of how close a result is to the HR image, as in the super-resolution literature, and LPIPS."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    import torch


def luma(image: np.ndarray) -> np.ndarray:
    """BT.601 luma `(H, W)` in studio range, [16, 235], of an 8-bit RGB image `(H, W, 3)`."""
    return 16 + image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


def psnr(result: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of arrays with values in [0, 255]; infinite for equal arrays."""
    mse = np.mean((result.astype(np.float64) - target.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / mse)) if mse != 0 else float("inf")


def psnr_y(result: np.ndarray, target: np.ndarray) -> float:
    """PSNR in dB of the luma of 8-bit RGB images `(H, W, 3)`, borders included."""
    return psnr(luma(result), luma(target))


def ssim_y(result: np.ndarray, target: np.ndarray) -> float:
    """
    SSIM of the luma of 8-bit RGB images `(H, W, 3)`, with the Gaussian window of the SSIM paper (sigma 1.5).

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
    """Mean absolute difference of horizontal plus vertical luma neighbours, of an 8-bit RGB image `(H, W, 3)`."""
    y = luma(image)
    return float(np.abs(np.diff(y, axis=0)).mean() + np.abs(np.diff(y, axis=1)).mean())


def gradient_ratio(result: np.ndarray, target: np.ndarray) -> float:
    """
    Gradient energy of a result divided by that of the HR image, both 8-bit RGB `(H, W, 3)`. Below 1, the result is
    smoother; above 1, it is sharper or noisier. NaN if the HR image is uniform.
    """
    energy = gradient_energy(target)
    return gradient_energy(result) / energy if energy > 0 else float("nan")


def load_lpips() -> "torch.nn.Module":
    r"""
    Load LPIPS 0.1 with VGG16 (https://arxiv.org/abs/1801.03924), a network of two batches of RGB images `(B, 3, H, W)`
    in [-1, 1].

    Raises:
        ImportError: If `lpips` or torchvision is not installed, or their versions are incompatible.
        OSError: If VGG16's weights are not in torch's cache and cannot be downloaded.
        RuntimeError: If the downloaded weights are damaged.
    """
    import lpips
    import torch
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from torchvision.models import VGG16_Weights

    file = Path(torch.hub.get_dir(), "checkpoints", Path(VGG16_Weights.IMAGENET1K_V1.url).name)
    if HF_HUB_OFFLINE and not file.is_file():
        raise OSError(f"{file} is missing, and HF_HUB_OFFLINE is set")
    return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
