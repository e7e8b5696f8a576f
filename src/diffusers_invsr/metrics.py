"""Results against HR images: PSNR and SSIM as the super-resolution literature measures them, and sharpness."""

import numpy as np
from skimage.metrics import structural_similarity


def luma(image: np.ndarray) -> np.ndarray:
    """Y of BT.601 in studio range, 16 ... 235, of an 8-bit RGB image `(H, W, 3)`."""
    return 16 + image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


def psnr(result: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB for values on a scale of 0 ... 255; infinite for equal images."""
    mse = np.mean((result.astype(np.float64) - target.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / mse)) if mse > 0 else float("inf")


def psnr_y(result: np.ndarray, target: np.ndarray) -> float:
    """PSNR in dB over the luma of 8-bit RGB images `(H, W, 3)`, no border cut off."""
    return psnr(luma(result), luma(target))


def ssim_y(result: np.ndarray, target: np.ndarray) -> float:
    """SSIM over the luma of 8-bit RGB images `(H, W, 3)`, with the Gaussian window of its paper (sigma 1.5)."""
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


def gradient_ratio(result: np.ndarray, target: np.ndarray) -> float:
    """
    Sharpness of `result` relative to `target`, 8-bit RGB images `(H, W, 3)`: the ratio of their mean absolute luma
    differences between neighbouring pixels, horizontal and vertical. Below 1 the result is smoother.
    """

    def mean_gradient(image: np.ndarray) -> float:
        return float(np.mean([np.abs(np.diff(luma(image), axis=axis)).mean() for axis in (0, 1)]))

    return mean_gradient(result) / mean_gradient(target)
