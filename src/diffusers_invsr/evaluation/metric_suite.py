"""The metrics of an evaluation: their names, what computes them, and whether they are available."""

import contextlib
import math
import os
import shutil
import socket
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..checks import is_integer
from ..metrics import gradient_ratio, load_lpips, psnr_y, ssim_y


# Seconds without a response after which a download fails; those of torch and pyiqa have no timeout of their own.
DOWNLOAD_TIMEOUT = 60
NEEDS_GT = "requires `gt`"
MIN_FID_IMAGES = 2


class MetricUnavailable(Exception):
    """A metric is unavailable, for the reason in the message."""


@dataclass(frozen=True)
class Metric:
    r"""
    A metric of an image, or of a whole set.

    Args:
        label (`str`): Name in tables.
        better (`str`): Which values are better: `"higher"`, `"lower"` or `"near 1"`.
        implementation (`str`): What computes it.
        digits (`int`, defaults to 4): Decimal places in tables.
        needs_gt (`bool`, defaults to `True`): Whether it compares with the HR image.
        of_set (`bool`, defaults to `False`): Whether it is a single value for all images.
        package (`str`, *optional*): Package that it requires beyond this package's dependencies.
        extra (`str`, *optional*): Extra of this package that installs it.
    """

    label: str
    better: str
    implementation: str
    digits: int = 4
    needs_gt: bool = True
    of_set: bool = False
    package: str | None = None
    extra: str | None = None

    @property
    def heading(self) -> str:
        return self.label + {"higher": " ↑", "lower": " ↓"}.get(self.better, "")


def _pyiqa(label: str, better: str, model: str, digits: int, **settings) -> Metric:
    return Metric(label, better, f"pyiqa {model}", digits, package="pyiqa", extra="metrics", **settings)


METRICS = {
    "psnr_y": Metric("PSNR-Y", "higher", "diffusers_invsr.metrics.psnr_y", 2),
    "ssim_y": Metric("SSIM-Y", "higher", "diffusers_invsr.metrics.ssim_y", package="scikit-image", extra="evaluation"),
    "gradient_ratio": Metric("gradient ratio", "near 1", "diffusers_invsr.metrics.gradient_ratio", 3),
    "lpips": Metric("LPIPS", "lower", "lpips 0.1, VGG16", package="lpips", extra="evaluation"),
    "dists": _pyiqa("DISTS", "lower", "dists", 4),
    "niqe": _pyiqa("NIQE", "lower", "niqe", 2, needs_gt=False),
    "clipiqa": _pyiqa("CLIPIQA", "higher", "clipiqa", 3, needs_gt=False),
    "musiq": _pyiqa("MUSIQ", "higher", "musiq", 2, needs_gt=False),
    "maniqa": _pyiqa("MANIQA", "higher", "maniqa", 4, needs_gt=False),
    "fid": _pyiqa("FID", "lower", "fid", 2, of_set=True),
}
DEFAULT_METRICS = ("psnr_y", "ssim_y", "gradient_ratio", "lpips")
DEFAULT_METRICS_WITHOUT_GT = ("niqe", "clipiqa", "musiq", "maniqa")
PIXEL_METRICS = {"psnr_y": psnr_y, "ssim_y": ssim_y, "gradient_ratio": gradient_ratio}
CROPPED_METRICS = ("psnr_y", "ssim_y")


class MetricSuite:
    r"""
    Metrics of 8-bit RGB images. Their networks are loaded once.

    Args:
        names (`Iterable[str]`): Names from `METRICS`.
        has_gt (`bool`): Whether there are HR images.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where networks run.
        crop_border (`int`, defaults to 0): Border in pixels that PSNR and SSIM exclude.

    Attributes:
        names (`list[str]`): The metrics, each once.
        available (`list[str]`): Those of them that are available.
        unavailable (`dict[str, str]`): The others, with the reason.

    Raises:
        ValueError: If a name is unknown or `crop_border` is negative.
    """

    def __init__(self, names: Iterable[str], has_gt: bool, device: str | torch.device = "cpu", crop_border: int = 0):
        self.names, self.device, self.crop_border = list(dict.fromkeys(names)), torch.device(device), crop_border
        unknown = [name for name in self.names if name not in METRICS]
        if unknown:
            raise ValueError(f"`metrics` must be among {', '.join(METRICS)}, got {', '.join(unknown)}.")
        if not is_integer(crop_border) or crop_border < 0:
            raise ValueError(f"`crop_border` must be a non-negative integer, got {crop_border!r}.")
        self.unavailable, self._networks = {}, {}
        for name in self.names:
            try:
                self._load(name, has_gt)
            except MetricUnavailable as error:
                self.unavailable[name] = str(error)

    @property
    def available(self) -> list[str]:
        return [name for name in self.names if name not in self.unavailable]

    def _load(self, name: str, has_gt: bool):
        metric = METRICS[name]
        if metric.needs_gt and not has_gt:
            raise MetricUnavailable(NEEDS_GT)
        try:
            if name == "ssim_y":
                import skimage.metrics  # noqa: F401  (so that it fails before any image is processed)
            elif metric.package is not None:
                with _download_timeout(), contextlib.redirect_stdout(sys.stderr):
                    self._networks[name] = self._load_network(name)
        except ImportError as error:
            install = f"pip install 'diffusers-invsr[{metric.extra}]'"
            raise MetricUnavailable(f"{metric.package} is unavailable ({_shorten(error)}): {install}") from error
        except OSError as error:  # includes URLError and the Hub's errors
            raise MetricUnavailable(f"weights could not be downloaded ({_shorten(error)})") from error
        except Exception as error:  # third-party code: damaged files, incompatible packages
            raise MetricUnavailable(f"could not be loaded ({type(error).__name__}: {_shorten(error)})") from error

    def _load_network(self, name: str) -> torch.nn.Module:
        if name == "lpips":
            return load_lpips().to(self.device)
        import pyiqa

        return pyiqa.create_metric(name, device=self.device)

    def of_image(self, name: str, result: np.ndarray, hr: np.ndarray | None) -> float:
        r"""
        Measure one image.

        Args:
            name (`str`): An available metric of images.
            result (`np.ndarray`): The result, uint8 of shape `(height, width, 3)`.
            hr (`np.ndarray`, *optional*): The HR image, of the same type and shape.

        Returns:
            `float`: The value, which is infinite for the PSNR of equal images.

        Raises:
            MetricUnavailable: If this image cannot be measured, for example because it is too small.
        """
        if name in PIXEL_METRICS:
            if name in CROPPED_METRICS:
                result, hr = (self._crop(image) for image in (result, hr))
            try:
                value = PIXEL_METRICS[name](result, hr)
            except ValueError as error:  # scikit-image: the image is smaller than the window
                raise MetricUnavailable(_shorten(error)) from error
        else:
            try:
                value = self._run_network(name, result, hr)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # third-party code, which raises various exceptions for small images
                raise MetricUnavailable(f"{type(error).__name__}: {_shorten(error)}") from error
        if math.isnan(value) or (math.isinf(value) and name != "psnr_y"):
            raise MetricUnavailable(f"is not finite ({value})")
        return value

    @torch.no_grad()
    def _run_network(self, name: str, result: np.ndarray, hr: np.ndarray | None) -> float:
        images = [_to_tensor(image, self.device) for image in (result, hr) if image is not None]
        if name == "lpips":
            return self._networks[name](*images, normalize=True).item()
        images = images if METRICS[name].needs_gt else images[:1]
        return float(self._networks[name](*images))

    def _crop(self, image: np.ndarray) -> np.ndarray:
        border = self.crop_border
        if 2 * border >= min(image.shape[:2]):
            raise MetricUnavailable(f"`crop_border={border}` is too large for {image.shape[1]}x{image.shape[0]}")
        return image[border : image.shape[0] - border, border : image.shape[1] - border]

    def of_set(self, name: str, results: list[Path], hrs: list[Path]) -> float:
        r"""
        Measure a whole set: the FID between the results and the HR images.

        Args:
            name (`str`): An available metric of sets.
            results (`list[Path]`): Files of the results.
            hrs (`list[Path]`): Files of the HR images.

        Returns:
            `float`: The value.

        Raises:
            MetricUnavailable: If there are too few images or the result is not finite.
        """
        if len(results) < MIN_FID_IMAGES:
            raise MetricUnavailable(f"requires at least {MIN_FID_IMAGES} images")
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            # pyiqa measures all files of two folders
            for part, files in (("results", results), ("hr", hrs)):
                Path(folder, part).mkdir()
                for number, file in enumerate(files):
                    _link(file, Path(folder, part, f"{number:06}{file.suffix.lower()}"))
            folders = [str(Path(folder, part)) for part in ("results", "hr")]
            try:
                value = float(self._networks[name](*folders, num_workers=0, verbose=False))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # third-party code
                raise MetricUnavailable(f"{type(error).__name__}: {_shorten(error)}") from error
        if not math.isfinite(value):
            raise MetricUnavailable(f"is not finite ({value})")
        return value


def _to_tensor(image: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())[None].to(device).float() / 255


def _link(file: Path, link: Path):
    try:
        link.symlink_to(file.absolute())
    except OSError:  # Windows restricts links
        shutil.copy(file, link)


@contextlib.contextmanager
def _download_timeout():
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _shorten(error: BaseException) -> str:
    return textwrap.shorten(str(error).replace(os.linesep, " "), 160) or type(error).__name__
