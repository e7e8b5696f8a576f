"""Bicubic resampling: the published enlargement, and any part of an image at any positions."""

import torch
import torch.nn.functional as F


POSITIONS_AT_ONCE = 128


def cubic_kernel(x: torch.Tensor, a: float) -> torch.Tensor:
    """Keys' cubic convolution kernel; `a` is -0.75 in PyTorch's plain bicubic and -0.5 in its antialiased one."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def cubic_weights(
    positions: torch.Tensor, length: int, a: float, stretch: float = 1.0, truncate: bool = False
) -> list[tuple[slice, torch.Tensor]]:
    r"""
    Bicubic interpolation along one axis at any positions, so that a part of a large enlargement can be computed
    without the rest.

    Args:
        positions (`torch.Tensor`): Sampling positions `(n,)`, float64, in pixels from the centre of the first one.
        length (`int`): Pixels of the axis.
        a (`float`): Parameter of [`cubic_kernel`].
        stretch (`float`, defaults to 1.0): Widening of the kernel; the shrinking factor where the image is shrunk.
        truncate (`bool`, defaults to `False`):
            Whether weights beyond the border are dropped (as antialiased interpolation does) rather than given to the
            border pixel.

    Returns:
        `list[tuple[slice, torch.Tensor]]`:
            For one piece of the positions after another, the pixels that are needed, and their weights `(positions,
            pixels)` in float64, in which no setting of PyTorch's makes matrix products inexact.
    """
    pieces = []
    for piece in positions.split(POSITIONS_AT_ONCE):  # in a matrix of them all, most weights would be 0
        taps = (piece - 2 * stretch).floor()[:, None] + torch.arange(int(4 * stretch) + 2, device="cpu")
        weights = cubic_kernel((taps - piece[:, None]) / stretch, a)
        if truncate:
            weights = weights * ((taps >= 0) & (taps < length))
        weights = weights / weights.sum(dim=1, keepdim=True)
        indices = taps.long().clamp(0, length - 1)
        first, last = int(indices.min()), int(indices.max())
        matrix = piece.new_zeros(len(piece), last + 1 - first).scatter_add_(1, indices - first, weights)
        pieces.append((slice(first, last + 1), matrix))
    return pieces


def resample(
    pixels: torch.Tensor, rows: list[tuple[slice, torch.Tensor]], columns: list[tuple[slice, torch.Tensor]]
) -> torch.Tensor:
    """Pixels `(..., height, width)` at other positions, in float32, by the [`cubic_weights`] of both axes."""
    bands = []
    for y, by_row in rows:
        band = [(by_row @ to_float(pixels[..., y, x]).double() @ by_column.T).float() for x, by_column in columns]
        bands.append(torch.cat(band, dim=-1))
    return torch.cat(bands, dim=-2)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels of 8 bits as float32 in [0, 1]; floats as they are."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def enlarge(lr: torch.Tensor, scale: int) -> torch.Tensor:
    """Bicubic enlargement, as published: no antialiasing, not clamped."""
    return F.interpolate(lr, scale_factor=scale, mode="bicubic", align_corners=False)
