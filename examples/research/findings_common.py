"""What the scripts of this folder share: photographs, LR images, scores kept in a file, paired differences.

Needs `pip install ".[examples,training]"`.
"""

import argparse
import copy
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import t

from diffusers_invsr import InvSRPipeline
from diffusers_invsr.degradation import Degradation, DegradationSettings, EvaluationDegradationSettings
from diffusers_invsr.degradation.simple import simple_degradation
from diffusers_invsr.files import module_fingerprint, write_atomically
from diffusers_invsr.metrics import gradient_ratio, psnr, psnr_y, ssim_y
from diffusers_invsr.training.validation import to_image, to_tensor


CONFIDENCE = 0.95  # of the interval that must exclude 0 for a difference to be clear
# Metric: function, heading, digits of a mean, digits of a difference
METRICS = {
    "psnr_rgb": (psnr, "PSNR RGB", 2, 3),
    "psnr_y": (psnr_y, "PSNR Y", 2, 3),
    "ssim_y": (ssim_y, "SSIM Y", 4, 4),
    "gradient_ratio": (gradient_ratio, "gradient ratio", 3, 3),
}

PAPER_DEGRADATIONS = {"test": EvaluationDegradationSettings, "training": DegradationSettings}
# Arguments of `simple_degradation`
SIMPLE_DEGRADATIONS = {
    "simple": {},
    "blur": {"blur_sigma": (2.0, 3.0), "noise_sigma": (0.0, 1.0), "jpeg_quality": (95, 95)},
    "noise": {"blur_sigma": (0.2, 0.4), "noise_sigma": (12.0, 20.0), "jpeg_quality": (95, 95)},
}
DEGRADATIONS = ("test", "simple")  # of most tables


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--hr", type=Path, required=True, help="folder of HR photographs")
    parser.add_argument(
        "--patterns", nargs="+", default=["*.png"], help="which of its files, such as 'kodim1[789].png' 'kodim2?.png'"
    )
    parser.add_argument("--crop", type=int, help="side of a crop from the middle, in pixels (default: whole images)")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the results; a stopped run resumes there"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the degradation and of the sampling")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="torch device (default: %(default)s)")


@dataclass(frozen=True)
class Photograph:
    """An HR image (8-bit RGB). Its number among those that were asked for seeds its degradation."""

    number: int
    name: str
    hr: Image.Image


def read_photographs(arguments: argparse.Namespace) -> list[Photograph]:
    """The photographs of a folder in the order of their names, or the crops from their middle."""
    folder, patterns, crop = arguments.hr, arguments.patterns, arguments.crop
    if crop is not None and crop < 1:
        raise SystemExit(f"`--crop` must be a positive integer, got {crop}.")
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if not paths:
        raise SystemExit(f"The folder {folder} holds no file {' or '.join(patterns)}.")
    photographs = []
    for number, path in enumerate(paths):
        hr = Image.open(path).convert("RGB")
        if crop is not None:
            width, height = min(crop, hr.width), min(crop, hr.height)
            left, top = (hr.width - width) // 2, (hr.height - height) // 2
            hr = hr.crop((left, top, left + width, top + height))
        photographs.append(Photograph(number, path.stem, hr))
    return photographs


def crop_to_multiple(hr: Image.Image, multiple: int) -> Image.Image:
    """The largest part from the top left corner whose sides are multiples of `multiple`."""
    if min(hr.size) < multiple:
        raise SystemExit(f"An HR image must be at least {multiple} pixels high and wide, got {hr.size}.")
    return hr.crop((0, 0, hr.width - hr.width % multiple, hr.height - hr.height % multiple))


def make_lr(degradation: str, hr: Image.Image, seeds: list[int], scale: int = 4) -> Image.Image:
    r"""
    The LR version of an image.

    Args:
        degradation (`str`): A key of `PAPER_DEGRADATIONS` or `SIMPLE_DEGRADATIONS`.
        hr (`PIL.Image.Image`): RGB image whose sides are multiples of the scale.
        seeds (`list[int]`): The same seeds give the same LR image.
        scale (`int`, defaults to 4): HR size over LR size.

    Returns:
        `PIL.Image.Image`: RGB image of the size of `hr` divided by the scale.
    """
    if degradation in SIMPLE_DEGRADATIONS:
        rng = np.random.default_rng(seeds)
        return Image.fromarray(simple_degradation(np.array(hr), rng, scale, **SIMPLE_DEGRADATIONS[degradation]))
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    lr = Degradation(PAPER_DEGRADATIONS[degradation](), scale)(to_tensor(hr), torch.Generator().manual_seed(seed))
    return to_image(lr)


def load_pipeline(model: str, device: str) -> InvSRPipeline:
    pipe = InvSRPipeline.from_pretrained(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_constant_noise(pipe: InvSRPipeline, logvar: float) -> InvSRPipeline:
    """The same pipeline with a noise map of mean 0 and this log-variance for any image. With 0 it is random noise."""
    predictor = copy.deepcopy(pipe.noise_predictor)
    conv = predictor.encoder.conv_out
    torch.nn.init.zeros_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    torch.nn.init.constant_(conv.bias[conv.out_channels // 2 :], logvar)
    other = InvSRPipeline(**{**pipe.components, "noise_predictor": predictor}, scale=pipe.config.scale)
    other.set_progress_bar_config(disable=True)
    return other


def measure(result: Image.Image, hr: Image.Image) -> dict[str, float]:
    """All `METRICS` of the 8-bit images, borders included."""
    return {name: function(np.array(result), np.array(hr)) for name, (function, *_) in METRICS.items()}


def to_cells(means: dict[str, float]) -> list[str]:
    """Means by metric as cells of a table."""
    return [f"{mean:.{METRICS[metric][2]}f}" for metric, mean in means.items()]


class Scores:
    r"""
    Scores by key in a JSON-lines file. They are appended as they are made, so a stopped run resumes where it was.

    Args:
        file (`Path`): The file. Its first line holds the settings.
        settings (`dict`): All that the scores depend on besides their keys.

    Raises:
        SystemExit: If the file holds scores of other settings.
    """

    def __init__(self, file: Path, settings: dict):
        self.file = file
        records = list(self._read())
        if records and records[0] != {"settings": settings}:
            before = records[0].get("settings", {})
            changed = [name for name in before | settings if before.get(name) != settings.get(name)]
            raise SystemExit(f"{file} holds scores of another {' and '.join(changed)}: choose another --output.")
        self.values = {tuple(record["key"]): record["scores"] for record in records[1:]}
        file.parent.mkdir(parents=True, exist_ok=True)
        # Without a last line that was cut off
        lines = records or [{"settings": settings}]
        write_atomically(file, "".join(json.dumps(record) + "\n" for record in lines))

    def _read(self) -> Iterator[dict]:
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else ():
            try:
                yield json.loads(line)
            except ValueError:
                return

    def __contains__(self, key: tuple) -> bool:
        return key in self.values

    def __getitem__(self, key: tuple) -> dict[str, float]:
        return self.values[key]

    def add(self, key: tuple, scores: dict[str, float]):
        self.values[key] = scores
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": key, "scores": scores}) + "\n")


def settings_of(pipe: InvSRPipeline, photographs: list[Photograph], seed: int) -> dict:
    """What scores depend on: the weights, the HR images in their order, the seed."""
    return {
        "model": [module_fingerprint(model) for model in (pipe.vae, pipe.unet, pipe.noise_predictor)],
        "photographs": [[photo.name, *photo.hr.size, zlib.crc32(photo.hr.tobytes())] for photo in photographs],
        "seed": seed,
    }


@dataclass(frozen=True)
class Difference:
    """The mean difference of pairs, its standard error and the number of pairs."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: list[float], others: list[float]) -> "Difference":
        differences = np.subtract(values, others)
        count = len(differences)
        error = float(np.std(differences, ddof=1) / math.sqrt(count)) if count > 1 else math.nan
        return cls(float(np.mean(differences)), error, count)

    @property
    def direction(self) -> int | None:
        """1 or -1 if the confidence interval (Student's t) is all above or below 0, else 0. `None` for one pair."""
        if self.count < 2:
            return None
        margin = t.ppf(0.5 + CONFIDENCE / 2, self.count - 1) * self.error
        return int(self.mean > margin) - int(self.mean < -margin)

    def to_text(self, metric: str) -> str:
        digits = METRICS[metric][3]
        words = {1: "higher", -1: "lower", 0: "not clear", None: "one pair only"}
        return f"{self.mean:+.{digits}f} ± {self.error:.{digits}f} ({words[self.direction]})"
