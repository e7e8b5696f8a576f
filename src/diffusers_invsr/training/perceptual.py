"""A learned perceptual distance in pixels."""

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

    Written for the weights of the package `stlpips-pytorch` (BSD-2), whose code is not run: parts of it are not
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
