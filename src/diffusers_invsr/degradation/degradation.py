"""Real-ESRGAN's second-order degradation of HR to LR images (https://arxiv.org/abs/2107.10833)."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import filter2d
from torch import nn
from torch.nn.functional import interpolate, pad

from ..checks import is_integer, is_real
from .blur_kernels import GAUSSIAN_KINDS, BlurKernels, PerImage, chance, choice, draw_blur, draw_sinc, uniform
from .jpeg import jpeg_codec


RESIZE_DIRECTIONS = ("up", "down", "keep")
RESIZE_MODES = ("area", "bilinear", "bicubic")

# Bounds of ranges, by the last word of the setting's name
RANGE_BOUNDS = {"sigma": (0, 255), "beta": (0, 100), "factor": (0, 100), "scale": (0, 100), "quality": (1, 100)}
# Ranges that must not begin at their lower bound, since their values are divisors or sizes
POSITIVE_RANGES = ("blur_sigma", "second_blur_sigma", "resize_factor", "second_resize_factor")
# Number of probabilities, by the word before the last
NUM_PROBABILITIES = {"kernel": len(GAUSSIAN_KINDS), "resize": len(RESIZE_DIRECTIONS)}


def setting(default: float | int | list[float], help: str) -> Any:
    """A field that `transformers.HfArgumentParser` turns into a command-line option."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class DegradationSettings:
    """
    The distributions of the degradation's parameters; the defaults are those of InvSR's training. Ranges are
    `[low, high]` and sampled uniformly. The prefix `second_` marks the second order, `final_` the steps after it. The
    description of each setting is the `help` in its field's metadata.

    Raises:
        ValueError: If a probability is outside [0, 1], probabilities do not sum to 1, a range is empty or out of
            bounds, a range of resize factors does not contain 1, or a kernel size is not an odd integer of at least 5.
    """

    blur_kernel_size: int = setting(
        21, "side of the kernels in pixels, odd; their supports are odd sizes from 3 to this minus 2"
    )
    blur_kernel_probabilities: list[float] = setting(
        [0.45, 0.25, 0.12, 0.03, 0.12, 0.03],
        "probabilities of isotropic and anisotropic Gaussian, generalized Gaussian and plateau kernels, both orders",
    )
    blur_sigma: list[float] = setting([0.2, 3.0], "standard deviation of kernels in pixels")
    blur_generalized_beta: list[float] = setting([0.5, 4.0], "shape of generalized Gaussian kernels, in both orders")
    blur_plateau_beta: list[float] = setting([1.0, 2.0], "shape of plateau kernels, in both orders")
    blur_sinc_probability: float = setting(0.1, "probability of a sinc kernel")
    resize_probabilities: list[float] = setting(
        [0.2, 0.7, 0.1], "probabilities of enlarging, reducing and keeping the size"
    )
    resize_factor: list[float] = setting([0.15, 1.5], "size relative to the HR image")
    noise_gaussian_probability: float = setting(0.5, "probability of Gaussian noise instead of Poisson noise")
    noise_sigma: list[float] = setting([1.0, 30.0], "standard deviation of Gaussian noise in levels of 255")
    noise_poisson_scale: list[float] = setting([0.05, 3.0], "factor on Poisson noise")
    noise_grey_probability: float = setting(0.4, "probability of noise that is the same in all channels")
    jpeg_quality: list[float] = setting([30.0, 95.0], "quality of the first compression")

    second_order_probability: float = setting(0.5, "probability of the second order as a whole")
    second_blur_probability: float = setting(0.8, "probability of its blur")
    second_blur_kernel_size: int = setting(15, "as blur_kernel_size")
    second_blur_sigma: list[float] = setting([0.2, 1.5], "as blur_sigma")
    second_blur_sinc_probability: float = setting(0.1, "as blur_sinc_probability")
    second_resize_probabilities: list[float] = setting([0.3, 0.4, 0.3], "as resize_probabilities")
    second_resize_factor: list[float] = setting([0.3, 1.2], "size relative to the LR image")
    second_noise_gaussian_probability: float = setting(0.5, "as noise_gaussian_probability")
    second_noise_sigma: list[float] = setting([1.0, 25.0], "as noise_sigma")
    second_noise_poisson_scale: list[float] = setting([0.05, 2.5], "as noise_poisson_scale")
    second_noise_grey_probability: float = setting(0.4, "as noise_grey_probability")

    final_sinc_probability: float = setting(0.8, "probability of a sinc filter after resizing to the LR size")
    final_jpeg_quality: list[float] = setting(
        [30.0, 95.0], "quality of the last compression, which comes before or after that filter"
    )

    # What cameras and the web add to that, beyond the paper and by default not at all
    color_noise_probability: float = setting(0.0, "of coarse noise in the colours alone, after the sinc filter")
    color_noise_sigma: list[float] = setting([1.0, 15.0], "standard deviation of that noise in levels of 255")
    sharpening_probability: float = setting(0.0, "of sharpening that leaves halos, after that noise")
    sharpening_scale: list[float] = setting([0.0, 1.5], "strength of that sharpening")
    recompression_probability: float = setting(0.0, "of a second last compression, its blocks at other places")
    recompression_quality: list[float] = setting([30.0, 95.0], "quality of that compression")

    def __post_init__(self):
        for name in (f.name for f in fields(self)):
            value, kind = getattr(self, name), name.rsplit("_", 1)[-1]
            if kind == "probability":
                _require(is_real(value) and 0 <= value <= 1, name, value, "between 0 and 1")
            elif kind == "probabilities":
                count = NUM_PROBABILITIES[name.rsplit("_", 2)[-2]]
                valid = _are_reals(value, count) and min(value) >= 0 and math.isclose(sum(value), 1, abs_tol=1e-6)
                _require(valid, name, value, f"{count} non-negative numbers that sum to 1")
            elif kind == "size":
                valid = is_integer(value) and value >= 5 and value % 2 == 1
                _require(valid, name, value, "an odd integer of at least 5")
            else:
                low, high = RANGE_BOUNDS[kind]
                valid = _are_reals(value, 2) and low <= value[0] <= value[1] <= high
                if name in POSITIVE_RANGES:
                    _require(valid and value[0] > 0, name, value, f"[low, high] with {low} < low <= high <= {high}")
                _require(valid, name, value, f"[low, high] with {low} <= low <= high <= {high}")
                if kind == "factor":
                    _require(value[0] <= 1 <= value[1], name, value, "[low, high] with low <= 1 <= high")


def override(name: str, default: float | int | list[float]) -> Any:
    """A setting of [`DegradationSettings`] with another default."""
    return setting(default, DegradationSettings.__dataclass_fields__[name].metadata["help"])


@dataclass
class EvaluationDegradationSettings(DegradationSettings):
    """The lighter settings of InvSR's synthetic test sets. All others are those of training."""

    blur_kernel_size: int = override("blur_kernel_size", 13)
    blur_kernel_probabilities: list[float] = override("blur_kernel_probabilities", [0.6, 0.4, 0.0, 0.0, 0.0, 0.0])
    blur_sigma: list[float] = override("blur_sigma", [0.2, 0.8])
    resize_factor: list[float] = override("resize_factor", [0.5, 1.5])
    noise_sigma: list[float] = override("noise_sigma", [1.0, 15.0])
    noise_poisson_scale: list[float] = override("noise_poisson_scale", [0.05, 0.3])
    jpeg_quality: list[float] = override("jpeg_quality", [70.0, 95.0])
    second_order_probability: float = override("second_order_probability", 0.0)
    final_sinc_probability: float = override("final_sinc_probability", 0.2)
    final_jpeg_quality: list[float] = override("final_jpeg_quality", [80.0, 100.0])


def _are_reals(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and all(map(is_real, value))


def _require(valid: bool, name: str, value: Any, accepted: str) -> None:
    if not valid:
        raise ValueError(f"`{name}` must be {accepted}, got {value!r}.")


@dataclass
class Resize:
    """
    A resize, the same for all images of a batch.

    Args:
        direction (`str`): `"up"`, `"down"` or `"keep"`.
        factor (`float`): Size relative to the HR image, or to the LR image in the second order.
        mode (`str`): `"area"`, `"bilinear"` or `"bicubic"`, without antialiasing.
    """

    direction: str
    factor: float
    mode: str


@dataclass
class Noise(PerImage):
    """
    The noise of each image; every field has the shape `(batch,)`.

    Args:
        gaussian (`torch.Tensor`): Whether the noise is Gaussian instead of Poisson noise.
        level (`torch.Tensor`): Standard deviation in levels of 255, or factor on Poisson noise.
        grey (`torch.Tensor`): Whether the noise is the same in all channels.
    """

    gaussian: torch.Tensor
    level: torch.Tensor
    grey: torch.Tensor

    def to_dict(self, index: int) -> dict[str, Any]:
        """The noise of one image, as numbers and strings."""
        kind, level = ("gaussian", "sigma") if self.gaussian[index] else ("poisson", "scale")
        return {"kind": kind, level: self.level[index].item(), "grey": self.grey[index].item()}


@dataclass
class DegradationDraw:
    """
    Everything that is drawn for a batch except the noise maps. Resizes are shared by the batch, everything else is
    drawn per image; tensors are on the CPU and have the shape `(batch,)`. The second order is also drawn for images to
    which it is not applied.

    Args:
        blur, second_blur, final_sinc ([`BlurKernels`]): Kernels; the identity for images that are not blurred.
        resize, second_resize ([`Resize`]): Resizes.
        noise, second_noise ([`Noise`]): Noise.
        jpeg_quality, final_jpeg_quality (`torch.Tensor`): Qualities in [1, 100], not rounded.
        second_order (`torch.Tensor`): Whether the second order is applied.
        final_resize_mode (`str`): Interpolation mode of the resize to the LR size, as in [`Resize`].
        final_jpeg_first (`torch.Tensor`): Whether the last compression comes before that resize and the sinc filter.
        color_noise (`torch.Tensor`): Standard deviations of the noise in the colours in levels of 255; 0 for none.
        sharpening (`torch.Tensor`): Strengths of the sharpening; 0 for none.
        recompression_quality (`torch.Tensor`): Qualities of the second last compression; 0 for none.
        recompression_shift (`tuple[int, int]`): Rows and columns by which its blocks are shifted, up to 7.
    """

    blur: BlurKernels
    resize: Resize
    noise: Noise
    jpeg_quality: torch.Tensor
    second_order: torch.Tensor
    second_blur: BlurKernels
    second_resize: Resize
    second_noise: Noise
    final_resize_mode: str
    final_sinc: BlurKernels
    final_jpeg_quality: torch.Tensor
    final_jpeg_first: torch.Tensor
    color_noise: torch.Tensor
    sharpening: torch.Tensor
    recompression_quality: torch.Tensor
    recompression_shift: tuple[int, int]

    def __len__(self) -> int:
        return len(self.second_order)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary for JSON per image; `"second_order"` is `None` if it is not applied."""
        return [self._to_dict(index) for index in range(len(self))]

    def _to_dict(self, index: int) -> dict[str, Any]:
        second = {
            "blur": self.second_blur.to_dict(index),
            "resize": vars(self.second_resize).copy(),
            "noise": self.second_noise.to_dict(index),
        }
        return {
            "blur": self.blur.to_dict(index),
            "resize": vars(self.resize).copy(),
            "noise": self.noise.to_dict(index),
            "jpeg_quality": self.jpeg_quality[index].item(),
            "second_order": second if self.second_order[index] else None,
            "final_resize_mode": self.final_resize_mode,
            "final_sinc": self.final_sinc.to_dict(index),
            "final_jpeg_quality": self.final_jpeg_quality[index].item(),
            "final_jpeg_first": self.final_jpeg_first[index].item(),
        } | {
            name: getattr(self, name)[index].item()
            for name in ("color_noise", "sharpening", "recompression_quality")
            if getattr(self, name)[index]
        }


class Degradation(nn.Module):
    r"""
    Degrades HR to LR images: blur, resize, noise and JPEG compression of random strength; a second order of the same
    for some images; then a resize to the LR size, a sinc filter and a last JPEG compression.

    Resizes are shared by a batch, everything else is drawn per image. In training, [`PairPool`] mixes batches.

    Args:
        settings ([`DegradationSettings`], *optional*):
            Distributions of the parameters, by default those of InvSR's training.
        scale (`int`, defaults to 4): HR size divided by LR size.

    Raises:
        ValueError: If `settings` is not a [`DegradationSettings`] or `scale` is not a positive integer.
    """

    def __init__(self, settings: DegradationSettings | None = None, scale: int = 4):
        super().__init__()
        settings = DegradationSettings() if settings is None else settings
        if not isinstance(settings, DegradationSettings):
            raise ValueError(f"`settings` must be a `DegradationSettings`, got {type(settings)}.")
        _require(is_integer(scale) and scale >= 1, "scale", scale, "a positive integer")
        self.settings, self.scale = settings, int(scale)

    @property
    def min_size(self) -> int:
        """The smallest side of HR images in pixels: at every size, padding reflects half the side of a kernel."""
        s, half = self.settings, self.settings.blur_kernel_size // 2
        lr_size = half + 1
        if s.second_order_probability > 0:
            # The second blur is applied at the size of the first resize
            lr_size = max(lr_size, math.ceil((s.second_blur_kernel_size // 2 + 1) / s.resize_factor[0] / self.scale))
        return lr_size * self.scale

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> DegradationDraw:
        """
        Draw the parameters for a batch.

        Args:
            batch_size (`int`): Number of images.
            generator (`torch.Generator`, *optional*): Generator on any device, by default PyTorch's on the CPU.

        Returns:
            [`DegradationDraw`]: The parameters.

        Raises:
            ValueError: If `batch_size` is not a positive integer.
        """
        _require(is_integer(batch_size) and batch_size > 0, "batch_size", batch_size, "a positive integer")
        s, n, g = self.settings, batch_size, generator
        shapes = {
            "probabilities": s.blur_kernel_probabilities,
            "generalized_beta": s.blur_generalized_beta,
            "plateau_beta": s.blur_plateau_beta,
            "n": n,
            "generator": g,
        }
        return DegradationDraw(
            blur=draw_blur(1.0, s.blur_kernel_size, s.blur_sigma, s.blur_sinc_probability, **shapes),
            resize=_draw_resize(s.resize_probabilities, s.resize_factor, g),
            noise=_draw_noise(
                s.noise_gaussian_probability, s.noise_sigma, s.noise_poisson_scale, s.noise_grey_probability, n, g
            ),
            jpeg_quality=uniform(n, *s.jpeg_quality, g),
            second_order=chance(n, s.second_order_probability, g),
            second_blur=draw_blur(
                s.second_blur_probability,
                s.second_blur_kernel_size,
                s.second_blur_sigma,
                s.second_blur_sinc_probability,
                **shapes,
            ),
            second_resize=_draw_resize(s.second_resize_probabilities, s.second_resize_factor, g),
            second_noise=_draw_noise(
                s.second_noise_gaussian_probability,
                s.second_noise_sigma,
                s.second_noise_poisson_scale,
                s.second_noise_grey_probability,
                n,
                g,
            ),
            final_resize_mode=_draw_mode(g),
            final_sinc=draw_sinc(s.final_sinc_probability, s.blur_kernel_size, n, g),
            final_jpeg_quality=uniform(n, *s.final_jpeg_quality, g),
            final_jpeg_first=chance(n, 0.5, g),
            color_noise=_draw_if(s.color_noise_probability, s.color_noise_sigma, n, g),
            sharpening=_draw_if(s.sharpening_probability, s.sharpening_scale, n, g),
            recompression_quality=_draw_if(s.recompression_probability, s.recompression_quality, n, g),
            recompression_shift=_draw_shift(s.recompression_probability, g),
        )

    @torch.no_grad()
    def apply(self, hr: torch.Tensor, draw: DegradationDraw, generator: torch.Generator | None = None) -> torch.Tensor:
        r"""
        Degrade images with given parameters, without gradients and in the dtype of `hr`, also under autocast.

        Use float64 for test sets that must be the same everywhere. In float32, rounding differences between processors
        and numbers of threads change some of the 8-bit results.

        Args:
            hr (`torch.Tensor`):
                HR images `(batch, 3, height, width)`, float32 or float64, RGB in [0, 1]. Height and width must be
                multiples of the scale and at least [`~Degradation.min_size`].
            draw ([`DegradationDraw`]): Parameters from [`~Degradation.draw`].
            generator (`torch.Generator`, *optional*):
                Generator of the noise, by default that of the images' device. A generator on the CPU gives the same
                noise for images on any device.

        Returns:
            `torch.Tensor`: LR images `(batch, 3, height // scale, width // scale)`, RGB in [0, 1] rounded to multiples
            of 1/255, with the dtype and device of `hr`.

        Raises:
            ValueError: If `hr` has another dtype, shape or range, or another batch size than `draw`.
        """
        self._check_hr(hr)
        if len(draw) != len(hr):
            raise ValueError(f"`draw` must be for {len(hr)} images, got {len(draw)}.")
        s, device = self.settings, hr.device
        # A third one only where it is needed, so that these settings change nothing where they are not used
        first, second, *third = _fork(generator, 3 if draw.color_noise.any() else 2)
        hr_size = hr.shape[-2:]
        lr_size = tuple(side // self.scale for side in hr_size)

        with torch.autocast(device.type, enabled=False):
            images = filter2d(hr, draw.blur.render(s.blur_kernel_size).to(device))
            images = resize(images, hr_size, draw.resize.factor, draw.resize.mode)
            images = add_noise(images, draw.noise, first)
            images = jpeg(images, draw.jpeg_quality)

            # Images with and without the second order have different sizes from here to the last resize
            lr = hr.new_empty(*hr.shape[:2], *lr_size)
            for index in (draw.second_order.nonzero().flatten(), (~draw.second_order).nonzero().flatten()):
                if len(index) == 0:
                    continue
                place = index.to(device)
                part = images[place]
                if draw.second_order[index[0]]:
                    part = filter2d(part, draw.second_blur[index].render(s.second_blur_kernel_size).to(device))
                    part = resize(part, lr_size, draw.second_resize.factor, draw.second_resize.mode)
                    part = add_noise(part, draw.second_noise[index], second)

                quality, jpeg_first = draw.final_jpeg_quality[index], draw.final_jpeg_first[index]
                part = jpeg(part, quality, jpeg_first)
                part = resize(part, lr_size, 1.0, draw.final_resize_mode)
                part = filter2d(part, draw.final_sinc[index].render(s.blur_kernel_size).to(device))
                if draw.color_noise.any():
                    part = add_color_noise(part, draw.color_noise[index], third[0])
                part = sharpen(part, draw.sharpening[index])
                part = jpeg(part, quality, ~jpeg_first)
                lr[place] = jpeg_again(part, draw.recompression_quality[index], draw.recompression_shift)
            return (255 * lr).round().clamp(0, 255) / 255

    def forward(self, hr: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        r"""
        Degrade images with parameters that are drawn for them.

        Args:
            hr (`torch.Tensor`):
                HR images `(batch, 3, height, width)`, float32 or float64, RGB in [0, 1]. Height and width must be
                multiples of the scale and at least [`~Degradation.min_size`].
            generator (`torch.Generator`, *optional*):
                Generator of parameters and noise, on any device. By default, parameters are drawn with PyTorch's
                generator on the CPU, and noise with that of the images' device.

        Returns:
            `torch.Tensor`: LR images `(batch, 3, height // scale, width // scale)`, RGB in [0, 1] rounded to multiples
            of 1/255, with the dtype and device of `hr`.

        Raises:
            ValueError: If `hr` has another dtype, shape or range.
        """
        self._check_hr(hr)
        return self.apply(hr, self.draw(len(hr), generator), generator)

    def _check_hr(self, hr: torch.Tensor) -> None:
        if not isinstance(hr, torch.Tensor) or hr.dtype not in (torch.float32, torch.float64):
            dtype = getattr(hr, "dtype", type(hr))
            raise ValueError(f"`hr` must be a float32 or float64 tensor, got {dtype}.")
        if hr.ndim != 4 or hr.shape[1] != 3 or len(hr) == 0:
            raise ValueError(f"`hr` must have the shape (batch, 3, height, width), got {tuple(hr.shape)}.")
        if any(side % self.scale or side < self.min_size for side in hr.shape[-2:]):
            raise ValueError(
                f"`hr` must have a height and width that are multiples of {self.scale} and at least {self.min_size},"
                f" got the shape {tuple(hr.shape)}."
            )
        low, high = (bound.item() for bound in hr.aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"`hr` must be in [0, 1], got values between {low:g} and {high:g}.")


def resize(images: torch.Tensor, size: tuple[int, int], factor: float, mode: str) -> torch.Tensor:
    """Resize images `(batch, 3, height, width)` to `factor` times `size`, without antialiasing as in Real-ESRGAN."""
    return interpolate(images, size=tuple(max(1, int(side * factor)) for side in size), mode=mode)


def add_noise(images: torch.Tensor, noise: Noise, generator: torch.Generator | None) -> torch.Tensor:
    """Add its noise to each image `(batch, 3, height, width)` and clamp to [0, 1]."""
    result = images.clone()
    for kind, function in ((noise.gaussian, gaussian_noise), (~noise.gaussian, poisson_noise)):
        if kind.any():
            index = kind.nonzero().flatten()
            grey, level = (values[index, None, None, None].to(images.device) for values in (noise.grey, noise.level))
            index = index.to(images.device)
            maps = function(images[index], grey, generator)
            result[index] += level.to(images.dtype) * torch.where(grey, maps[:, :1], maps)
    return result.clamp(0, 1)


def gaussian_noise(images: torch.Tensor, grey: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Gaussian noise of the images' shape with a standard deviation of 1/255."""
    device = images.device if generator is None else generator.device
    noise = torch.randn(images.shape, generator=generator, device=device, dtype=images.dtype)
    return noise.to(images.device) / 255


def poisson_noise(images: torch.Tensor, grey: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """
    Shot noise. A white pixel has as many photons on average as the image, or its grey version if `grey`, has distinct
    8-bit levels, rounded up to a power of two.
    """
    images = torch.where(grey, rgb_to_grayscale(images), images)
    images = (255 * images).round().clamp(0, 255)
    seen = torch.zeros(len(images), 256, device=images.device).scatter_(1, images.flatten(1).long(), 1.0)
    photons = 2 ** seen.sum(dim=1).log2().ceil()[:, None, None, None]
    images = images / 255
    rates = (images * photons).to(images.device if generator is None else generator.device)
    return torch.poisson(rates, generator=generator).to(images.device) / photons - images


def add_color_noise(images: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Add noise without luma, two pixels coarse, of a standard deviation for each image in levels of 255; clamped."""
    height, width = images.shape[-2:]
    noise = gaussian_noise(images[..., : (height + 1) // 2, : (width + 1) // 2], sigma, generator)
    noise = interpolate(noise - rgb_to_grayscale(noise), scale_factor=2, mode="bilinear")[..., :height, :width]
    return (images + sigma[:, None, None, None].to(images) * noise).clamp(0, 1)


def sharpen(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Add a strength for each image times what a binomial blur of 5 pixels takes away; clamped."""
    if not strength.any():
        return images
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    details = images - filter2d(images, (taps[:, None] * taps)[None].to(images))
    return (images + strength[:, None, None, None].to(images) * details).clamp(0, 1)


def jpeg_again(images: torch.Tensor, quality: torch.Tensor, shift: tuple[int, int]) -> torch.Tensor:
    """Compress the images whose quality is not 0, with blocks that begin `shift` rows and columns before the first."""
    if not quality.any():
        return images
    rows, columns = shift
    shifted = pad(images, (columns, 0, rows, 0), mode="replicate")
    return jpeg(shifted, quality, quality > 0)[..., rows:, columns:]


def jpeg(images: torch.Tensor, quality: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Compress images, or only those in `mask`, with a quality in [1, 100] per image; they are clamped to [0, 1]."""
    index = torch.arange(len(images)) if mask is None else mask.nonzero().flatten()
    if len(index) == 0:
        return images
    quality, index = quality[index].to(images.dtype).to(images.device), index.to(images.device)
    return images.index_copy(0, index, jpeg_codec(images[index].clamp(0, 1), quality))


def _fork(generator: torch.Generator | None, count: int) -> list[torch.Generator | None]:
    """
    Make independent generators from one. The number of random numbers that a Poisson sample consumes depends on
    rounding, which differs between devices, so nothing else may be drawn from the same generator afterwards.
    """
    if generator is None:
        return [None] * count
    seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]


def _draw_if(probability: float, bounds: list[float], n: int, generator: torch.Generator | None) -> torch.Tensor:
    """`n` numbers between two with a probability, else 0. Without a probability nothing is drawn."""
    if probability == 0:
        return torch.zeros(n, dtype=torch.float64)
    return torch.where(chance(n, probability, generator), uniform(n, *bounds, generator), 0)


def _draw_shift(probability: float, generator: torch.Generator | None) -> tuple[int, int]:
    if probability == 0:
        return 0, 0
    rows, columns = (8 * uniform(2, 0, 1, generator)).long().clamp(max=7).tolist()
    return rows, columns


def _draw_mode(generator: torch.Generator | None) -> str:
    return RESIZE_MODES[choice(1, [1 / 3] * 3, generator).item()]


def _draw_resize(probabilities: list[float], factors: list[float], generator: torch.Generator | None) -> Resize:
    direction = RESIZE_DIRECTIONS[choice(1, probabilities, generator).item()]
    low, high = {"up": (1, factors[1]), "down": (factors[0], 1), "keep": (1, 1)}[direction]
    return Resize(direction, uniform(1, low, high, generator).item(), _draw_mode(generator))


def _draw_noise(gaussian_probability, sigma, poisson_scale, grey_probability, n, generator) -> Noise:
    gaussian = chance(n, gaussian_probability, generator)
    return Noise(
        gaussian=gaussian,
        level=torch.where(gaussian, uniform(n, *sigma, generator), uniform(n, *poisson_scale, generator)),
        grey=chance(n, grey_probability, generator),
    )
