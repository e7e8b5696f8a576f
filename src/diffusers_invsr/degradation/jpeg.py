"""JPEG compression and decompression of batches on any device, with a quality per image."""

from functools import cache

import torch
from torch.nn.functional import avg_pool2d, interpolate, pad


# Quantisation tables of quality 50 (ITU-T T.81, annex K.1)
LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
# JFIF, with chroma centred at 0
RGB_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
YCC_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def jpeg_codec(images: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    r"""
    Compress and decompress images, with chroma at half the resolution. Unlike libjpeg, pixels are not rounded to
    8 bits. Unlike `kornia.enhance.jpeg_codec_differentiable`, which softens the rounding of quantisation, it rounds as
    JPEG does and is not differentiable.

    Args:
        images (`torch.Tensor`): RGB images `(B, 3, H, W)` in [0, 1], float32 or float64.
        quality (`torch.Tensor`): Quality of each image in [1, 100], `(B,)`, with the dtype of the images.

    Returns:
        `torch.Tensor`: The decompressed images `(B, 3, H, W)` in [0, 1], with the dtype and device of `images`.
    """
    to_ycc, to_rgb, luma_table, chroma_table, transform = _constants(images.dtype, images.device)
    height, width = images.shape[-2:]
    pixels = 255 * pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    ycc = torch.einsum("cd,bdhw->bchw", to_ycc, pixels)

    # Percentage of the quantisation steps at quality 50, an integer as in libjpeg
    percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality).floor().to(images)[:, None]
    luma_steps, chroma_steps = (
        (percent * table / 100).add(0.5).floor().clamp(1, 255) for table in (luma_table, chroma_table)
    )
    luma = quantize(ycc[:, :1] - 128, luma_steps, transform) + 128
    chroma = quantize(avg_pool2d(ycc[:, 1:], 2), chroma_steps, transform)
    chroma = interpolate(chroma, scale_factor=2, mode="bilinear")

    pixels = torch.einsum("cd,bdhw->bchw", to_rgb, torch.cat([luma, chroma], dim=1))
    return (pixels[..., :height, :width] / 255).clamp(0, 1)


@cache
def _constants(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """RGB to YCC and back `(3, 3)`, both tables `(64,)`, and the cosine transform of a block `(64, 64)`."""
    index = torch.arange(8, dtype=torch.float64)
    transform = torch.cos((index + 0.5) * index[:, None] * torch.pi / 8) / 2
    transform[0] /= 2**0.5  # orthonormal
    tables = (torch.tensor(table).flatten() for table in (LUMA_TABLE, CHROMA_TABLE))
    colors = (torch.tensor(matrix, dtype=torch.float64) for matrix in (RGB_TO_YCC, YCC_TO_RGB))
    constants = (*colors, *tables, torch.kron(transform, transform))
    return tuple(constant.to(device, dtype) for constant in constants)


def quantize(channels: torch.Tensor, steps: torch.Tensor, transform: torch.Tensor) -> torch.Tensor:
    """Round the `transform` of each 8x8 block of channels `(B, C, H, W)` to multiples of `steps` `(B, 64)`."""
    blocks = channels.unfold(2, 8, 8).unfold(3, 8, 8).flatten(-2)  # (B, C, H / 8, W / 8, 64)
    steps = steps[:, None, None, None]
    # Halves, which occur in flat areas, are rounded away from zero as in libjpeg. The bias exceeds the rounding errors
    # of float64, which differ between machines
    multiples = blocks @ transform.T / steps
    coefficients = (multiples.abs() + 0.5 + 1e-6).floor() * multiples.sign() * steps
    return (coefficients @ transform).unflatten(-1, (8, 8)).transpose(3, 4).reshape(channels.shape)
