"""Batches of Real-ESRGAN's blur kernels (sections 3.2 and 3.4 of https://arxiv.org/abs/2107.10833)."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.special import j1


GAUSSIAN_KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
KERNEL_KINDS = (*GAUSSIAN_KINDS, "sinc", "identity")
SINC, IDENTITY = KERNEL_KINDS.index("sinc"), KERNEL_KINDS.index("identity")


class PerImage:
    """Base of dataclasses whose fields are tensors with one entry per image."""

    def __getitem__(self, index: torch.Tensor) -> "PerImage":
        """The entries of the images at the given indices."""
        return replace(self, **{name: value[index] for name, value in vars(self).items()})


@dataclass
class BlurKernels(PerImage):
    """
    The parameters of one kernel per image; every field has the shape `(batch,)`.

    Args:
        kind (`torch.Tensor`): Indices into `KERNEL_KINDS`.
        size (`torch.Tensor`): Odd side of the kernel's support in pixels; outside it, the kernel is zero.
        sigma_x, sigma_y (`torch.Tensor`): Standard deviation in pixels along the rotated axes; equal if isotropic.
        angle (`torch.Tensor`): Rotation of the axes in radians.
        beta (`torch.Tensor`): Shape parameter of the generalized and plateau kinds.
        cutoff (`torch.Tensor`): Cutoff frequency of sinc kernels in radians per pixel, up to pi.
    """

    kind: torch.Tensor
    size: torch.Tensor
    sigma_x: torch.Tensor
    sigma_y: torch.Tensor
    angle: torch.Tensor
    beta: torch.Tensor
    cutoff: torch.Tensor

    def render(self, frame: int) -> torch.Tensor:
        r"""
        Compute the kernels.

        Args:
            frame (`int`): Side of the result in pixels, odd.

        Returns:
            `torch.Tensor`: Kernels `(batch, frame, frame)`, float32, on the CPU. Each sums to 1.
        """
        offsets = torch.arange(frame, dtype=torch.float64) - frame // 2
        y, x = offsets[:, None], offsets[None, :]
        power = squared_distance(x, y, self.sigma_x, self.sigma_y, self.angle) ** per_pixel(self.beta)

        kind = per_pixel(self.kind)
        kernels = torch.exp(-0.5 * power)
        kernels = torch.where(kind >= KERNEL_KINDS.index("plateau_iso"), 1 / (1 + power), kernels)
        kernels = torch.where(kind == SINC, sinc(x, y, self.cutoff), kernels)
        kernels = torch.where(torch.maximum(x.abs(), y.abs()) <= per_pixel(self.size) // 2, kernels, 0)
        kernels = torch.where(kind == IDENTITY, ((x == 0) & (y == 0)).double(), kernels)
        return (kernels / kernels.sum(dim=(1, 2), keepdim=True)).float()

    def to_dict(self, index: int) -> dict[str, Any]:
        """The parameters that the kernel of one image depends on, as numbers and strings."""
        kind = KERNEL_KINDS[self.kind[index]]
        names = ["size"] * (kind != "identity") + ["cutoff"] * (kind == "sinc")
        if kind in GAUSSIAN_KINDS:
            names += ["sigma_x", "sigma_y", "angle"] if kind.endswith("aniso") else ["sigma_x"]
            names += ["beta"] if kind.startswith(("generalized", "plateau")) else []
        return {"kind": kind, **{name: getattr(self, name)[index].item() for name in names}}


def per_pixel(values: torch.Tensor) -> torch.Tensor:
    """Reshape `(batch,)` to `(batch, 1, 1)`, which broadcasts over the pixels of kernels."""
    return values[:, None, None]


def squared_distance(
    x: torch.Tensor, y: torch.Tensor, sigma_x: torch.Tensor, sigma_y: torch.Tensor, angle: torch.Tensor
) -> torch.Tensor:
    """Squared distance to the center in standard deviations: the quadratic form of the inverse covariance."""
    cos, sin = per_pixel(angle.cos()), per_pixel(angle.sin())
    return ((cos * x + sin * y) / per_pixel(sigma_x)) ** 2 + ((cos * y - sin * x) / per_pixel(sigma_y)) ** 2


def sinc(x: torch.Tensor, y: torch.Tensor, cutoff: torch.Tensor) -> torch.Tensor:
    """The circular low-pass filter (equation 6): w J1(w r) / (2 pi r), whose limit at r = 0 is w^2 / (4 pi)."""
    radius, cutoff = torch.hypot(x, y), per_pixel(cutoff).double()
    bessel = torch.from_numpy(j1((cutoff * radius).numpy()))
    # Any positive radius will do at the center, where it is not used
    return torch.where(
        radius == 0, cutoff**2 / (4 * math.pi), cutoff * bessel / (2 * math.pi * radius.clamp(min=1e-3))
    )


def draw_blur(
    probability: float,
    frame: int,
    sigma: list[float],
    sinc_probability: float,
    probabilities: list[float],
    generalized_beta: list[float],
    plateau_beta: list[float],
    n: int,
    generator: torch.Generator | None,
) -> BlurKernels:
    """Draw `n` kernels, each the identity with 1 - `probability`; other arguments are as in `DegradationSettings`."""
    kind = choice(n, probabilities, generator)
    isotropic, family = kind % 2 == 0, kind // 2
    sigma_x, sigma_y = (uniform(n, *sigma, generator) for _ in range(2))
    angle = uniform(n, -math.pi, math.pi, generator)
    generalized, plateau = (uniform(n, *bounds, generator) for bounds in (generalized_beta, plateau_beta))
    size = odd_size(n, frame, generator)
    # Small kernels cannot represent as low cutoff frequencies as large ones
    lowest = torch.where(size < 13, math.pi / 3, math.pi / 5)
    kind = torch.where(chance(n, sinc_probability, generator), SINC, kind)
    return BlurKernels(
        kind=torch.where(chance(n, probability, generator), kind, IDENTITY),
        size=size,
        sigma_x=sigma_x,
        sigma_y=torch.where(isotropic, sigma_x, sigma_y),
        angle=torch.where(isotropic, 0, angle),
        beta=torch.where(family == 0, 1, torch.where(family == 1, generalized, plateau)),
        cutoff=lowest + (math.pi - lowest) * uniform(n, 0, 1, generator),
    )


def draw_sinc(probability: float, frame: int, n: int, generator: torch.Generator | None) -> BlurKernels:
    """Draw `n` sinc kernels, each the identity with 1 - `probability`."""
    ones = torch.ones(n, dtype=torch.float64)
    return BlurKernels(
        kind=torch.where(chance(n, probability, generator), SINC, IDENTITY),
        size=odd_size(n, frame, generator),
        sigma_x=ones,
        sigma_y=ones,
        angle=0 * ones,
        beta=ones,
        cutoff=uniform(n, math.pi / 3, math.pi, generator),
    )


# Numbers are drawn on the generator's device; the results are on the CPU


def uniform(n: int, low: float, high: float, generator: torch.Generator | None) -> torch.Tensor:
    """`n` float64 numbers, uniform in [`low`, `high`)."""
    device = "cpu" if generator is None else generator.device
    return low + (high - low) * torch.rand(n, generator=generator, device=device).cpu().double()


def chance(n: int, probability: float, generator: torch.Generator | None) -> torch.Tensor:
    """`n` booleans that are true with a given probability."""
    return uniform(n, 0, 1, generator) < probability


def choice(n: int, probabilities: list[float], generator: torch.Generator | None) -> torch.Tensor:
    """`n` indices with given probabilities."""
    bounds = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)
    # Rounding can leave the last bound below 1, but indices with probability 0 must not be drawn
    last = max(index for index, probability in enumerate(probabilities) if probability > 0)
    return torch.searchsorted(bounds, uniform(n, 0, 1, generator), right=True).clamp(max=last)


def odd_size(n: int, frame: int, generator: torch.Generator | None) -> torch.Tensor:
    """`n` odd sizes from 3 to `frame` - 2."""
    return 3 + 2 * uniform(n, 0, (frame - 3) // 2, generator).long()
