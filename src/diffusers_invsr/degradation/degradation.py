"""The degradation that makes LR images: Real-ESRGAN's second-order pipeline (https://arxiv.org/abs/2107.10833)."""

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

# What each kind of setting may be, by the last word of its name: a range within these bounds, ...
RANGE_BOUNDS = {"sigma": (0, 255), "beta": (0, 100), "factor": (0, 100), "scale": (0, 100), "quality": (1, 100)}
# ... of these, some may not begin at their lower bound, since they are divided by or are sizes, ...
POSITIVE_RANGES = ("blur_sigma", "second_blur_sigma", "resize_factor", "second_resize_factor")
# ... or as many probabilities as there are kinds.
NUM_PROBABILITIES = {"kernel": len(GAUSSIAN_KINDS), "resize": len(RESIZE_DIRECTIONS)}


def setting(default: float | int | list[float], help: str) -> Any:
    """A field that `transformers.HfArgumentParser` makes a command-line option of."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class DegradationSettings:
    """
    What the degradation draws from; the defaults are those of InvSR's training. Ranges are `[low, high]` and drawn
    from uniformly; `second_` are the settings of the second order, `final_` those after it.

    Raises:
        ValueError: If a probability is outside [0, 1], probabilities do not sum to 1, a range is empty or out of
            bounds, a range of resize factors does not contain 1, or a kernel size is not an odd integer of 5 or more.
    """

    blur_kernel_size: int = setting(21, "side of the frame of kernels, odd; supports are odd, from 3 to it less 2")
    blur_kernel_probabilities: list[float] = setting(
        [0.45, 0.25, 0.12, 0.03, 0.12, 0.03],
        "of isotropic and anisotropic Gaussian, generalized Gaussian and plateau kernels, in both orders, if not sinc",
    )
    blur_sigma: list[float] = setting([0.2, 3.0], "standard deviation of kernels in pixels")
    blur_generalized_beta: list[float] = setting([0.5, 4.0], "shape of generalized Gaussian kernels, in both orders")
    blur_plateau_beta: list[float] = setting([1.0, 2.0], "shape of plateau kernels, in both orders")
    blur_sinc_probability: float = setting(0.1, "of a sinc kernel")
    resize_probabilities: list[float] = setting([0.2, 0.7, 0.1], "of making larger, making smaller and keeping")
    resize_factor: list[float] = setting([0.15, 1.5], "size relative to the HR image")
    noise_gaussian_probability: float = setting(0.5, "of Gaussian noise, else Poisson noise")
    noise_sigma: list[float] = setting([1.0, 30.0], "standard deviation of Gaussian noise in levels of 255")
    noise_poisson_scale: list[float] = setting([0.05, 3.0], "factor on Poisson noise")
    noise_grey_probability: float = setting(0.4, "of noise that is the same in all channels")
    jpeg_quality: list[float] = setting([30.0, 95.0], "quality of the first compression")

    second_order_probability: float = setting(0.5, "of the second order, as a whole")
    second_blur_probability: float = setting(0.8, "of its blur")
    second_blur_kernel_size: int = setting(15, "as blur_kernel_size")
    second_blur_sigma: list[float] = setting([0.2, 1.5], "as blur_sigma")
    second_blur_sinc_probability: float = setting(0.1, "as blur_sinc_probability")
    second_resize_probabilities: list[float] = setting([0.3, 0.4, 0.3], "as resize_probabilities")
    second_resize_factor: list[float] = setting([0.3, 1.2], "size relative to the LR image")
    second_noise_gaussian_probability: float = setting(0.5, "as noise_gaussian_probability")
    second_noise_sigma: list[float] = setting([1.0, 25.0], "as noise_sigma")
    second_noise_poisson_scale: list[float] = setting([0.05, 2.5], "as noise_poisson_scale")
    second_noise_grey_probability: float = setting(0.4, "as noise_grey_probability")

    final_sinc_probability: float = setting(0.8, "of a sinc filter after resizing to the LR size")
    final_jpeg_quality: list[float] = setting([30.0, 95.0], "quality of the last compression, before or after that")

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
                _require(is_real(value) and 0 <= value <= 1, name, value, "a number in [0, 1]")
            elif kind == "probabilities":
                count = NUM_PROBABILITIES[name.rsplit("_", 2)[-2]]
                valid = _are_reals(value, count) and min(value) >= 0 and math.isclose(sum(value), 1, abs_tol=1e-6)
                _require(valid, name, value, f"{count} numbers of 0 or more that sum to 1")
            elif kind == "size":
                valid = is_integer(value) and value >= 5 and value % 2 == 1
                _require(valid, name, value, "an odd integer of 5 or more")
            else:
                low, high = RANGE_BOUNDS[kind]
                valid = _are_reals(value, 2) and low <= value[0] <= value[1] <= high
                if name in POSITIVE_RANGES:
                    _require(valid and value[0] > 0, name, value, f"[low, high] with {low} < low <= high <= {high}")
                _require(valid, name, value, f"[low, high] with {low} <= low <= high <= {high}")
                if kind == "factor":
                    _require(value[0] <= 1 <= value[1], name, value, "[low, high] with low <= 1 <= high")


def lighter(name: str, default: float | int | list[float]) -> Any:
    """A setting of training with another default."""
    return setting(default, DegradationSettings.__dataclass_fields__[name].metadata["help"])


@dataclass
class EvaluationDegradationSettings(DegradationSettings):
    """The lighter settings that InvSR's test sets are made with. What is not named here is as in training."""

    blur_kernel_size: int = lighter("blur_kernel_size", 13)
    blur_kernel_probabilities: list[float] = lighter("blur_kernel_probabilities", [0.6, 0.4, 0.0, 0.0, 0.0, 0.0])
    blur_sigma: list[float] = lighter("blur_sigma", [0.2, 0.8])
    resize_factor: list[float] = lighter("resize_factor", [0.5, 1.5])
    noise_sigma: list[float] = lighter("noise_sigma", [1.0, 15.0])
    noise_poisson_scale: list[float] = lighter("noise_poisson_scale", [0.05, 0.3])
    jpeg_quality: list[float] = lighter("jpeg_quality", [70.0, 95.0])
    second_order_probability: float = lighter("second_order_probability", 0.0)
    final_sinc_probability: float = lighter("final_sinc_probability", 0.2)
    final_jpeg_quality: list[float] = lighter("final_jpeg_quality", [80.0, 100.0])


def _are_reals(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and all(map(is_real, value))


def _require(valid: bool, name: str, value: Any, accepted: str) -> None:
    if not valid:
        raise ValueError(f"`{name}` has to be {accepted}, but is {value!r}.")


@dataclass
class Resize:
    """
    One resize, the same for all images of a batch.

    Args:
        direction (`str`): `"up"`, `"down"` or `"keep"`.
        factor (`float`): Size relative to the HR image, or the LR image in the second order.
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
        gaussian (`torch.Tensor`): Whether it is Gaussian noise; else it is Poisson noise.
        level (`torch.Tensor`): Standard deviations in levels of 255, or factors on Poisson noise.
        grey (`torch.Tensor`): Whether it is the same in all channels.
    """

    gaussian: torch.Tensor
    level: torch.Tensor
    grey: torch.Tensor

    def describe(self, index: int) -> dict[str, Any]:
        """The noise of one image, in numbers and strings."""
        kind, level = ("gaussian", "sigma") if self.gaussian[index] else ("poisson", "scale")
        return {"kind": kind, level: self.level[index].item(), "grey": self.grey[index].item()}


@dataclass
class DegradationDraw:
    """
    Everything that is drawn for a batch but the noise maps. Resizes are drawn for the batch, all else for each image;
    tensors are on the CPU and begin with `(batch,)`. What the second order draws has no effect on images without it.

    Args:
        blur, second_blur, final_sinc ([`BlurKernels`]): Kernels; the identity where no blur is applied.
        resize, second_resize ([`Resize`]): Resizes.
        noise, second_noise ([`Noise`]): Noise.
        jpeg_quality, final_jpeg_quality (`torch.Tensor`): Qualities in [1, 100], not rounded.
        second_order (`torch.Tensor`): Whether the second order is applied.
        final_resize_mode (`str`): Interpolation of the resize to the LR size.
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
        """The settings of each image as a dictionary for JSON; `"second_order"` is `None` where it is not applied."""
        return [self._describe(index) for index in range(len(self))]

    def _describe(self, index: int) -> dict[str, Any]:
        second = {
            "blur": self.second_blur.describe(index),
            "resize": vars(self.second_resize).copy(),
            "noise": self.second_noise.describe(index),
        }
        return {
            "blur": self.blur.describe(index),
            "resize": vars(self.resize).copy(),
            "noise": self.noise.describe(index),
            "jpeg_quality": self.jpeg_quality[index].item(),
            "second_order": second if self.second_order[index] else None,
            "final_resize_mode": self.final_resize_mode,
            "final_sinc": self.final_sinc.describe(index),
            "final_jpeg_quality": self.final_jpeg_quality[index].item(),
            "final_jpeg_first": self.final_jpeg_first[index].item(),
        } | {
            name: getattr(self, name)[index].item()
            for name in ("color_noise", "sharpening", "recompression_quality")
            if getattr(self, name)[index]
        }


class Degradation(nn.Module):
    r"""
    Makes LR images of HR images: blur, resize, noise and JPEG, all of random strength; the same a second time for some
    images; then a resize to the LR size, a sinc filter and JPEG.

    Resizes are drawn for the batch, all else for each image. [`PairPool`] mixes the batches afterwards.

    Args:
        settings ([`DegradationSettings`], *optional*): What to draw from, by default that of InvSR's training.
        scale (`int`, defaults to 4): HR size over LR size.

    Raises:
        ValueError: If `settings` or `scale` is not of its type, or `scale` is less than 1.
    """

    def __init__(self, settings: DegradationSettings | None = None, scale: int = 4):
        super().__init__()
        settings = DegradationSettings() if settings is None else settings
        if not isinstance(settings, DegradationSettings):
            raise ValueError(f"`settings` have to be `DegradationSettings`, but are of type {type(settings)}.")
        _require(is_integer(scale) and scale >= 1, "scale", scale, "an integer of 1 or more")
        self.settings, self.scale = settings, int(scale)

    @property
    def min_size(self) -> int:
        """The smallest HR side, a multiple of the scale: padding reflects half a frame of kernels at every size."""
        s, half = self.settings, self.settings.blur_kernel_size // 2
        lr_size = half + 1
        if s.second_order_probability > 0:
            # The second blur works at the first resize's size.
            lr_size = max(lr_size, math.ceil((s.second_blur_kernel_size // 2 + 1) / s.resize_factor[0] / self.scale))
        return lr_size * self.scale

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> DegradationDraw:
        """
        Draw the settings of a batch.

        Args:
            batch_size (`int`): Number of images.
            generator (`torch.Generator`, *optional*): Source of every draw, on any device. By default the CPU's.

        Returns:
            [`DegradationDraw`]

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
        Degrade with given settings. In the number type of `hr` whatever autocast says, and without gradients.

        Float64 is for test sets that have to be the same everywhere: in float32, the last bits, which differ between
        processors and numbers of threads, decide in some images to which level a value is rounded.

        Args:
            hr (`torch.Tensor`): HR images of shape `(batch, 3, height, width)`, float32 or float64, in [0, 1].
            draw ([`DegradationDraw`]): Settings, of [`~Degradation.draw`].
            generator (`torch.Generator`, *optional*):
                Source of the noise. A CPU generator gives the same noise for images on any device. By default that of
                the images' device.

        Returns:
            `torch.Tensor`: LR images of shape `(batch, 3, height // scale, width // scale)`, multiples of 1/255 in
            [0, 1], with the number type and on the device of `hr`.

        Raises:
            ValueError: If `hr` has another type, shape or range, a side that is not a multiple of the scale or less
                than [`~Degradation.min_size`], or another batch size than `draw`.
        """
        self._check_hr(hr)
        if len(draw) != len(hr):
            raise ValueError(f"`draw` has to have settings for {len(hr)} images, but has them for {len(draw)}.")
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

            # Images with and without the second order have different sizes from here to the last resize.
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
        """Draw settings and degrade with them. Arguments, result and errors are those of [`~Degradation.apply`]."""
        self._check_hr(hr)
        return self.apply(hr, self.draw(len(hr), generator), generator)

    def _check_hr(self, hr: torch.Tensor) -> None:
        if not isinstance(hr, torch.Tensor) or hr.dtype not in (torch.float32, torch.float64):
            dtype = getattr(hr, "dtype", type(hr))
            raise ValueError(f"`hr` has to be a float32 or float64 tensor, but is of type {dtype}.")
        if hr.ndim != 4 or hr.shape[1] != 3 or len(hr) == 0:
            raise ValueError(f"`hr` has to have the shape (batch, 3, height, width), but has {tuple(hr.shape)}.")
        if any(side % self.scale or side < self.min_size for side in hr.shape[-2:]):
            raise ValueError(
                f"`hr` has to have sides that are multiples of {self.scale} and at least {self.min_size}, but has the"
                f" shape {tuple(hr.shape)}."
            )
        low, high = (bound.item() for bound in hr.aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"`hr` has to be in [0, 1], but its values go from {low:g} to {high:g}.")


def resize(images: torch.Tensor, size: tuple[int, int], factor: float, mode: str) -> torch.Tensor:
    """Resize images to `factor` times a size, without antialiasing, as Real-ESRGAN does."""
    return interpolate(images, size=tuple(max(1, int(side * factor)) for side in size), mode=mode)


def add_noise(images: torch.Tensor, noise: Noise, generator: torch.Generator | None) -> torch.Tensor:
    """Add to each image of shape `(batch, 3, height, width)` its noise, and clamp to [0, 1]."""
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
    """Normal noise with a standard deviation of one level of 255."""
    device = images.device if generator is None else generator.device
    noise = torch.randn(images.shape, generator=generator, device=device, dtype=images.dtype)
    return noise.to(images.device) / 255


def poisson_noise(images: torch.Tensor, grey: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Shot noise: a pixel counts as many photons on average as the image, or its grey version, has distinct levels."""
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
    """Compress images, or those that `mask` chooses, each with its quality in [1, 100]; clamped to [0, 1] before."""
    index = torch.arange(len(images)) if mask is None else mask.nonzero().flatten()
    if len(index) == 0:
        return images
    quality, index = quality[index].to(images.dtype).to(images.device), index.to(images.device)
    return images.index_copy(0, index, jpeg_codec(images[index].clamp(0, 1), quality))


def _fork(generator: torch.Generator | None, count: int) -> list[torch.Generator | None]:
    """
    Independent generators from one. How many numbers a Poisson draw takes hangs on the last bits of an image, which
    differ between devices; so no later draw may come from the same stream.
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
