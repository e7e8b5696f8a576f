"""A degradation simpler than the paper's: blur, downsampling, Gaussian noise and JPEG, once each."""

import io

import numpy as np
from PIL import Image
from scipy.ndimage import convolve1d, gaussian_filter


SCALE = 4
BLUR_SIGMA = (0.2, 3.0)  # HR pixels, log-uniform; one for each axis of an anisotropic kernel
ANISOTROPIC_PROBABILITY = 0.5
NOISE_SIGMA = (1.0, 20.0)  # levels of 255, uniform
JPEG_QUALITY = (40, 95)  # inclusive
KERNEL_RADIUS = 9  # three times the largest sigma


def blur_kernel(sigma_x: float, sigma_y: float, angle: float) -> np.ndarray:
    """Normalised Gaussian kernel with the given standard deviations along axes turned by `angle` radians."""
    offsets = np.arange(-KERNEL_RADIUS, KERNEL_RADIUS + 1)
    x, y = np.meshgrid(offsets, offsets)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    kernel = np.exp(-0.5 * ((u / sigma_x) ** 2 + (v / sigma_y) ** 2))
    return kernel / kernel.sum()


def blur(image: np.ndarray, rng: np.random.Generator, sigma: tuple[float, float] = BLUR_SIGMA) -> np.ndarray:
    """Blur a float image (height, width, 3) by a random Gaussian kernel, isotropic or not, with mirrored borders."""
    low, high = np.log(sigma)
    sigma_x, sigma_y = np.exp(rng.uniform(low, high, size=2))
    if rng.random() >= ANISOTROPIC_PROBABILITY:
        return gaussian_filter(image, (sigma_x, sigma_x, 0), mode="mirror", radius=KERNEL_RADIUS)
    # A sum of separable kernels (SVD) is several times faster than the two-dimensional convolution.
    u, s, vt = np.linalg.svd(blur_kernel(sigma_x, sigma_y, rng.uniform(0, np.pi)))
    result = np.zeros_like(image)
    for k in range(int((s > 1e-3 * s[0]).sum())):
        rows = convolve1d(image, (u[:, k] * s[k]).astype(image.dtype), axis=0, mode="mirror")
        result += convolve1d(rows, vt[k].astype(image.dtype), axis=1, mode="mirror")
    return result


def simple_degradation(
    hr: np.ndarray,
    rng: np.random.Generator,
    scale: int = SCALE,
    blur_sigma: tuple[float, float] = BLUR_SIGMA,
    noise_sigma: tuple[float, float] = NOISE_SIGMA,
    jpeg_quality: tuple[int, int] = JPEG_QUALITY,
) -> np.ndarray:
    r"""
    Make the LR version of an image. The embedded model was trained on such images at first.

    Args:
        hr (`np.ndarray`): HR image of shape `(height, width, 3)`, uint8 RGB. Both sides are multiples of `scale`.
        rng (`np.random.Generator`): Source of all randomness.
        scale (`int`, defaults to 4): HR size over LR size.
        blur_sigma (`tuple[float, float]`, defaults to `(0.2, 3.0)`):
            Range of the blur's standard deviation in HR pixels, at most 3.
        noise_sigma (`tuple[float, float]`, defaults to `(1.0, 20.0)`):
            Range of the noise's standard deviation in levels of 255.
        jpeg_quality (`tuple[int, int]`, defaults to `(40, 95)`): Range of the JPEG quality, both ends included.

    Returns:
        `np.ndarray`: LR image of shape `(height // scale, width // scale, 3)`, uint8 RGB.

    Raises:
        ValueError: If `hr` is not a uint8 RGB array or a side is not a multiple of `scale`.
    """
    if hr.dtype != np.uint8 or hr.ndim != 3 or hr.shape[2] != 3 or hr.shape[0] % scale or hr.shape[1] % scale:
        raise ValueError(
            f"`hr` must be a uint8 RGB array whose sides are multiples of {scale}, got {hr.dtype} of shape {hr.shape}."
        )
    height, width = hr.shape[0] // scale, hr.shape[1] // scale
    image = blur(hr.astype(np.float32), rng, blur_sigma)
    if rng.random() < 0.5:
        image = image.reshape(height, scale, width, scale, 3).mean(axis=(1, 3))
    else:  # Pillow's bicubic is antialiased; mode "F" keeps the fractions
        planes = [Image.fromarray(image[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        image = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    image = image + rng.normal(0, rng.uniform(*noise_sigma), size=image.shape)
    image = Image.fromarray(np.clip(np.round(image), 0, 255).astype(np.uint8))

    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=int(rng.integers(jpeg_quality[0], jpeg_quality[1] + 1)))
    return np.asarray(Image.open(buffer).convert("RGB"))
