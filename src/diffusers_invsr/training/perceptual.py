"""A learned perceptual distance in pixels, and a discriminator on the same features."""

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


# Convolutions of each level of features, as (channels, kernel size); between levels the resolution is halved
TRUNKS = {
    "vgg": (((64, 3),) * 2, ((128, 3),) * 2, ((256, 3),) * 3, ((512, 3),) * 3, ((512, 3),) * 3),
    "alex": (((64, 11),), ((192, 5),), ((384, 3),), ((256, 3),), ((256, 3),)),
}
PADDING = {3: 1, 5: 2, 11: 2}


class Blur(nn.Module):
    """Halves the resolution after a binomial blur, with reflected borders."""

    def __init__(self, channels: int):
        super().__init__()
        taps = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filt", (taps[:, None] * taps).expand(channels, 1, 3, 3).clone())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        filt = self.filt.to(images.dtype)
        return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), filt, stride=2, groups=len(filt))


class ShiftTolerantLPIPS(nn.Module):
    r"""
    LPIPS whose networks blur before they halve the resolution (https://arxiv.org/abs/2207.13686): how different two
    images look, fairly independent of shifts by a pixel.

    Written anew for the weights of the package `stlpips-pytorch` (BSD-2), whose code is not run: parts of it are not
    for commercial use, and it needs packages that it does not declare.

    Args:
        net (`str`, defaults to `"vgg"`): `"vgg"` for training (VGG16) or `"alex"` for measuring.

    Raises:
        ImportError: If `stlpips-pytorch` is not installed.
        ValueError: If there is no such `net`.
    """

    def __init__(self, net: str = "vgg"):
        super().__init__()
        if net not in TRUNKS:
            raise ValueError(f"`net` must be one of {', '.join(TRUNKS)}, got {net!r}.")
        self.levels, channels, number = nn.ModuleList(), 3, 0
        for level, convolutions in enumerate(TRUNKS[net]):
            layers = nn.Sequential()

            def add(layer: nn.Module, layers: nn.Sequential = layers):
                nonlocal number
                layers.add_module(str(number), layer)
                number += 1

            if level in (1, 2) or (level and net == "vgg"):
                add(nn.MaxPool2d(2 if net == "vgg" else 3, stride=1))
                add(Blur(channels))
            for out_channels, kernel in convolutions:
                add(nn.Conv2d(channels, out_channels, kernel, padding=PADDING[kernel]))
                if level == 0 and net == "alex":
                    add(Blur(out_channels))
                add(nn.ReLU())
                channels = out_channels
            self.levels.append(layers)
        self.channels = tuple(convolutions[-1][0] for convolutions in TRUNKS[net])
        self.weights = nn.ParameterList(torch.empty(1, channels, 1, 1) for channels in self.channels)
        self.register_buffer("shift", torch.empty(1, 3, 1, 1))
        self.register_buffer("scale", torch.empty(1, 3, 1, 1))
        self.load_state_dict(read_weights(net))
        self.requires_grad_(False).eval()

    def features(self, images: torch.Tensor, num_levels: int | None = None) -> list[torch.Tensor]:
        """Features of RGB images `(B, 3, H, W)` in [0, 1], level by level, as in `channels`."""
        features = [(2 * images - 1 - self.shift) / self.scale]
        for level in self.levels[:num_levels]:
            features.append(level(features[-1]))
        return features[1:]

    def distance(self, features: list[torch.Tensor], others: list[torch.Tensor]) -> torch.Tensor:
        """The distance of each pair of images, `(B,)`, from their [`~ShiftTolerantLPIPS.features`]."""
        total = 0
        for weight, feature, other in zip(self.weights, features, others):
            difference = F.normalize(feature.float(), eps=1e-10) - F.normalize(other.float(), eps=1e-10)
            total = total + (weight * difference.square()).sum(dim=1).mean(dim=(1, 2))
        return total

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The distance of each pair of RGB images `(B, 3, H, W)` in [0, 1]: `(B,)`, 0 for equal ones."""
        return self.distance(self.features(images), self.features(others))


def read_weights(net: str) -> dict[str, torch.Tensor]:
    """The weights of `stlpips-pytorch`, by the names of [`ShiftTolerantLPIPS`]."""
    spec = find_spec("stlpips_pytorch")
    if spec is None:
        raise ImportError("The shift-tolerant LPIPS needs its weights: pip install stlpips-pytorch")
    folder = Path(spec.submodule_search_locations[0])
    published = torch.load(folder / "weights" / "vST0.0" / f"{net}_shift_tolerant.pth", map_location="cpu")
    weights = {}
    for name, value in published.items():
        if name.startswith("net.slice"):  # net.slice1.0.weight
            level, _, rest = name.removeprefix("net.slice").partition(".")
            weights[f"levels.{int(level) - 1}.{rest}"] = value
        elif name.startswith("lin"):  # lin0.model.1.weight
            weights[f"weights.{name[3]}"] = value
        else:
            weights[name.removeprefix("scaling_layer.")] = value
    return weights


class BoundedConv2d(nn.Conv2d):
    """
    A convolution whose kernels, as a matrix, have a largest singular value of 1 (spectral normalization,
    https://arxiv.org/abs/1802.05957). It is computed anew each time rather than tracked, so there is no state besides
    the weights.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            with torch.no_grad():
                left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -1]
                right = F.normalize(left @ matrix, dim=0)
            weight = self.weight / (left @ matrix @ right)
        return self._conv_forward(images, weight.to(images.dtype), self.bias.to(images.dtype))


class FeatureDiscriminator(nn.Module):
    r"""
    Tells photographs from results by the features of a network that is not trained ("projected",
    https://arxiv.org/abs/2111.01007): it learns from far fewer images than one that starts from pixels.

    Args:
        photographs (`list[torch.Tensor]`):
            Features of a few photographs, of each level that it is to see. They set the scale of each level, for those
            of [`ShiftTolerantLPIPS`] are small, and spectral norms would not let it grow.
        width (`int`, defaults to 64): Channels of its own.
    """

    def __init__(self, photographs: list[torch.Tensor], width: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                BoundedConv2d(feature.shape[1], width, kernel_size=1),
                nn.LeakyReLU(0.2),
                BoundedConv2d(width, width, kernel_size=3, padding=1),
                nn.LeakyReLU(0.2),
                BoundedConv2d(width, 1, kernel_size=3, padding=1),
            )
            for feature in photographs
        )
        scales = torch.stack([feature.float().square().mean().rsqrt() for feature in photographs])
        self.register_buffer("scales", scales)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """A logit map `(B, 1, h, w)` for each level; the larger, the more real."""
        return [head(scale * level) for head, scale, level in zip(self.heads, self.scales, features, strict=True)]
