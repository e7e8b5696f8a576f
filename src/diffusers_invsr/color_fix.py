"""Colour fixes: the result's detail with the colours of the LR image. All take images `(batch, 3, height, width)`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


WAVELET_LEVELS = 5
BAND_HEIGHT = 64

# RGB in [0, 1] to Y, Cb, Cr of BT.601 in studio range, without the offsets (16, 128, 128) / 255, which cancel.
RGB_TO_YCBCR = torch.tensor([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255


def wavelet_low_frequencies(image: torch.Tensor) -> torch.Tensor:
    """Five levels of the 3x3 binomial blur, dilated by 1, 2, 4, 8 and 16, with replicate padding."""
    channels = image.shape[1]
    binomial = torch.tensor([0.25, 0.5, 0.25], dtype=image.dtype, device=image.device)
    kernel = binomial.outer(binomial).expand(channels, 1, 3, 3)
    for level in range(WAVELET_LEVELS):
        dilation = 2**level
        padded = F.pad(image, [dilation] * 4, mode="replicate")
        image = F.conv2d(padded, kernel, dilation=dilation, groups=channels)
    return image


def wavelet_color_fix(content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """High frequencies of `content` and low frequencies of `style`, in one pass, as these are linear."""
    return content + wavelet_low_frequencies(style - content)


def ycbcr_color_fix(content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """Luma of `content` and chroma of `style` (BT.601, studio range), clamped to [0, 1]."""
    matrix = RGB_TO_YCBCR.to(content)
    ycbcr = torch.einsum("ij,bjhw->bihw", matrix, style)
    ycbcr[:, :1] = torch.einsum("ij,bjhw->bihw", matrix[:1], content)
    return torch.einsum("ij,bjhw->bihw", torch.linalg.inv(matrix), ycbcr).clamp(0, 1)


def adain_color_fix(content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """`content` with each channel's mean and standard deviation (unbiased variance + 1e-5) of `style`."""
    (content_mean, content_std), (style_mean, style_std) = _mean_and_std([content]), _mean_and_std([style])
    return (content - content_mean) / content_std * style_std + style_mean


def _mean_and_std(bands) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sqrt(unbiased variance + 1e-5) of each image and channel, over bands of rows, in float64."""
    count, total, squares = 0, 0, 0
    for band in bands:
        for row in band.split(16, dim=-2):
            row = row.double()
            count += row.shape[-2] * row.shape[-1]
            total = total + row.sum(dim=(-2, -1), keepdim=True)
            squares = squares + row.square().sum(dim=(-2, -1), keepdim=True)
    mean = total / count
    std = ((squares - count * mean**2).clamp(min=0) / max(count - 1, 1) + 1e-5).sqrt()
    return mean.float(), std.float()


# Fixes that look at a few rows, with the number of rows that they need above and below each one
LOCAL_FIXES = {"wavelet": (wavelet_color_fix, 2**WAVELET_LEVELS - 1), "ycbcr": (ycbcr_color_fix, 0)}
COLOR_FIXES = (*LOCAL_FIXES, "adain")


def apply_color_fix(image: torch.Tensor, style_rows: Callable[[int, int], torch.Tensor], method: str) -> torch.Tensor:
    r"""
    Apply a colour fix in place, band by band, so that it needs little memory beyond the image.

    Args:
        image (`torch.Tensor`): Results of shape `(batch, 3, height, width)`, float32 in [0, 1].
        style_rows (`Callable`): Returns rows `start` to `stop` of the images that give the colours.
        method (`str`): One of `COLOR_FIXES`.

    Returns:
        `torch.Tensor`: `image`, in [0, 1].
    """
    height = image.shape[-2]
    bands = [(start, min(start + BAND_HEIGHT, height)) for start in range(0, height, BAND_HEIGHT)]
    if method == "adain":
        content_mean, content_std = _mean_and_std([image])
        style_mean, style_std = _mean_and_std(style_rows(*band) for band in bands)
        return image.sub_(content_mean).div_(content_std).mul_(style_std).add_(style_mean).clamp_(0, 1)

    fix, halo = LOCAL_FIXES[method]
    above = image[..., :0, :]  # rows above the band as they were before the fix
    for start, stop in bands:
        first, last = max(start - halo, 0), min(stop + halo, height)
        content = torch.cat([above, image[..., start:last, :]], dim=-2)
        above = image[..., max(stop - halo, 0) : stop, :].clone()
        fixed = fix(content, style_rows(first, last))
        image[..., start:stop, :] = fixed[..., start - first : stop - first, :].clamp_(0, 1)
    return image
