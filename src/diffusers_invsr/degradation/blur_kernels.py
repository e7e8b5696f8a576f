"""Blur kernels of Real-ESRGAN (sections 3.2 and 3.4 of https://arxiv.org/abs/2107.10833), a batch at a time."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.special import j1


GAUSSIAN_KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
KERNEL_KINDS = (*GAUSSIAN_KINDS, "sinc", "identity")
SINC, IDENTITY = KERNEL_KINDS.index("sinc"), KERNEL_KINDS.index("identity")


class PerImage:
    """Base of dataclasses whose fields are tensors with one entry an image."""

    def __getitem__(self, index: torch.Tensor) -> "PerImage":
        """The entries of some images, chosen by a tensor of indices."""
        return replace(self, **{name: value[index] for name, value in vars(self).items()})


@dataclass
class BlurKernels(PerImage):
    """
    The parameters of one kernel an image; every field has the shape `(batch,)`. [`~BlurKernels.render`] draws them.

    Args:
        kind (`torch.Tensor`): Indices into `KERNEL_KINDS`.
        size (`torch.Tensor`): Odd sides of the kernels' supports in pixels. Beyond it a kernel is zero.
        sigma_x, sigma_y (`torch.Tensor`): Standard deviations in pixels along the turned axes; equal if isotropic.
        angle (`torch.Tensor`): Turn of the axes in radians.
        beta (`torch.Tensor`): Shape parameters of the generalized and plateau kinds.
        cutoff (`torch.Tensor`): Cutoff frequencies of the sinc kernels in radians a pixel, up to pi.
    """

    kind: torch.Tensor
    size: torch.Tensor
    sigma_x: torch.Tensor
    sigma_y: torch.Tensor
    angle: torch.Tensor
    beta: torch.Tensor
    cutoff: torch.Tensor

    def render(self, frame: int) -> torch.Tensor:
        """
        Returns:
            `torch.Tensor`: Kernels of shape `(batch, frame, frame)`, float32, on the CPU. Each sums to 1.
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

    def describe(self, index: int) -> dict[str, Any]:
        """The parameters that matter to the kernel of one image, in numbers and strings."""
        kind = KERNEL_KINDS[self.kind[index]]
        names = ["size"] * (kind != "identity") + ["cutoff"] * (kind == "sinc")
        if kind in GAUSSIAN_KINDS:
            names += ["sigma_x", "sigma_y", "angle"] if kind.endswith("aniso") else ["sigma_x"]
            names += ["beta"] if kind.startswith(("generalized", "plateau")) else []
        return {"kind": kind, **{name: getattr(self, name)[index].item() for name in names}}


def per_pixel(values: torch.Tensor) -> torch.Tensor:
    """`(batch,)` to `(batch, 1, 1)`, which broadcasts over the pixels of kernels."""
    return values[:, None, None]


def squared_distance(
    x: torch.Tensor, y: torch.Tensor, sigma_x: torch.Tensor, sigma_y: torch.Tensor, angle: torch.Tensor
) -> torch.Tensor:
    """The quadratic form of the inverse covariance: squared distances to the center in standard deviations."""
    cos, sin = per_pixel(angle.cos()), per_pixel(angle.sin())
    return ((cos * x + sin * y) / per_pixel(sigma_x)) ** 2 + ((cos * y - sin * x) / per_pixel(sigma_y)) ** 2


def sinc(x: torch.Tensor, y: torch.Tensor, cutoff: torch.Tensor) -> torch.Tensor:
    """The circular low-pass filter (equation 6): w J1(w r) / (2 pi r), whose limit at r = 0 is w^2 / (4 pi)."""
    radius, cutoff = torch.hypot(x, y), per_pixel(cutoff).double()
    bessel = torch.from_numpy(j1((cutoff * radius).numpy()))
    # Any positive number will do for the radius at the center.
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
    """Draw `n` kernels that are applied with a probability; the arguments are as in `DegradationSettings`."""
    kind = choice(n, probabilities, generator)
    isotropic, family = kind % 2 == 0, kind // 2
    sigma_x, sigma_y = (uniform(n, *sigma, generator) for _ in range(2))
    angle = uniform(n, -math.pi, math.pi, generator)
    generalized, plateau = (uniform(n, *bounds, generator) for bounds in (generalized_beta, plateau_beta))
    size = odd_size(n, frame, generator)
    # Large kernels may cut off lower frequencies; small ones could not represent that.
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
    """Draw `n` sinc kernels that are applied with a probability."""
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


# Numbers are drawn where the generator lives; the results are on the CPU.


def uniform(n: int, low: float, high: float, generator: torch.Generator | None) -> torch.Tensor:
    """`n` numbers between two, float64."""
    device = "cpu" if generator is None else generator.device
    return low + (high - low) * torch.rand(n, generator=generator, device=device).cpu().double()


def chance(n: int, probability: float, generator: torch.Generator | None) -> torch.Tensor:
    """`n` truth values that are true with a probability."""
    return uniform(n, 0, 1, generator) < probability


def choice(n: int, probabilities: list[float], generator: torch.Generator | None) -> torch.Tensor:
    """`n` indices with given probabilities."""
    bounds = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)
    # Rounding may leave the last bound below 1, and what has no probability must not be drawn.
    last = max(index for index, probability in enumerate(probabilities) if probability > 0)
    return torch.searchsorted(bounds, uniform(n, 0, 1, generator), right=True).clamp(max=last)


def odd_size(n: int, frame: int, generator: torch.Generator | None) -> torch.Tensor:
    """`n` odd sizes from 3 to the frame's less 2."""
    return 3 + 2 * uniform(n, 0, (frame - 3) // 2, generator).long()
