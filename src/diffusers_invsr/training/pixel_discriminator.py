"""A small discriminator in pixels: whether the fine texture of an image is that of a photograph, and where."""

import torch
import torch.nn.functional as F
from torch import nn


WINDOW = 5  # pixels; means over it are taken away, for colours and shading are left to the other losses
GAIN = 16.0  # brings what is left to about the range from -1 to 1


class BoundedConv2d(nn.Conv2d):
    """
    A convolution whose kernels, as a matrix, have a largest singular value of 1 (spectral normalization,
    https://arxiv.org/abs/1802.05957). It is computed each time rather than tracked, so there is no state besides
    the weights.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            with torch.no_grad():
                left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -1]
                right = F.normalize(left @ matrix, dim=0)
            weight = self.weight / (left @ matrix @ right)
        return self._conv_forward(images, weight, self.bias)


class PixelDiscriminator(nn.Module):
    r"""
    Tells photographs from results by their fine texture.

    The pixels that belong to one pixel of the latents are the channels of what it sees, so it works at the resolution
    of the latents, which is cheap, and what a decoder repeats from patch to patch is plain to it: perceptual networks
    hardly see such a weave.

    Args:
        period (`int`, defaults to 4): Pixels of the image to a pixel of the latents.
        width (`int`, defaults to 64): Channels of its layers.
        num_layers (`int`, defaults to 4): Convolutions; each adds a patch on every side to what a logit depends on.
    """

    def __init__(self, period: int = 4, width: int = 64, num_layers: int = 4):
        super().__init__()
        self.period, layers, channels = period, [], 3 * period**2
        for _ in range(num_layers - 1):
            layers += [BoundedConv2d(channels, width, kernel_size=3, padding=1), nn.LeakyReLU(0.2)]
            channels = width
        self.layers = nn.Sequential(*layers, BoundedConv2d(channels, 1, kernel_size=3, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        A logit map `(B, 1, h, w)` at the resolution of the latents, for images `(B, 3, H, W)` in [0, 1]; the larger,
        the more like a photograph.
        """
        padded = F.pad(images, (WINDOW // 2,) * 4, mode="reflect")
        details = GAIN * (images - F.avg_pool2d(padded, WINDOW, stride=1))
        return self.layers(F.pixel_unshuffle(details, self.period))
