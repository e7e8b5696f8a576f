"""Validation during training: metrics and pictures of a fixed set of images."""

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..degradation import Degradation, EvaluationDegradationSettings
from ..image_files import read_image
from ..image_processor import InvSRImageProcessor
from ..metrics import load_lpips, psnr_y, ssim_y
from ..pipeline_invsr import InvSRPipeline
from .errors import TrainingError


logger = logging.getLogger(__name__)

STEPS = {"1_step": 1, "3_steps": 3}
LABEL_HEIGHT = 16
MULTIPLE = 64  # of the HR height and width, so that every level of VAE and UNet halves evenly


def load_lpips_if_possible() -> torch.nn.Module | None:
    """LPIPS (VGG) of RGB images, or `None` with a warning if it is unavailable: training continues without it."""
    try:
        return load_lpips()
    except (ImportError, OSError, RuntimeError) as error:  # torchvision is missing or does not fit; no network
        logger.warning(f"LPIPS is unavailable, and missing from the validation ({error}).")
        return None


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as `(1, 3, H, W)` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def to_image(pixels: torch.Tensor) -> Image.Image:
    """`(1, 3, H, W)` in [0, 1] as an 8-bit RGB image."""
    return Image.fromarray((pixels[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy())


class ValidationSet:
    r"""
    Central HR crops of photographs, and their LR versions by the degradation of test sets (section 4.1 of the paper).

    Args:
        files (`list[str]`): Photographs.
        crop_size (`int`):
            Height and width of the HR crops in pixels. The crop of a smaller photograph is smaller; sides are rounded
            down to multiples of 64.
        scale (`int`, defaults to 4): Scale factor.
        seed (`int`, defaults to 0): Seed of the degradation (with the image's number) and of sampling.

    Raises:
        TrainingError: If a photograph could not be read or is smaller than 64 pixels.
    """

    def __init__(self, files: list[str], crop_size: int, scale: int = 4, seed: int = 0):
        self.seed, self.lpips = seed, load_lpips_if_possible()
        self._bicubic: list[dict[str, float]] = []
        degradation = Degradation(EvaluationDegradationSettings(), scale)
        self.pairs = []
        for number, file in enumerate(files):
            try:
                pixels = InvSRImageProcessor().preprocess(read_image(Path(file))[0])[0].pixels
            except Exception as error:  # of many kinds, from Pillow's decoders
                raise TrainingError(f"The validation image {file!r} could not be read: {error}") from error
            size = [min(side, crop_size) // MULTIPLE * MULTIPLE for side in pixels.shape[1:]]
            if not all(size):
                raise TrainingError(
                    f"The validation image {file!r} must be at least {MULTIPLE} pixels high and wide, got"
                    f" {pixels.shape[1]}x{pixels.shape[2]}."
                )
            top, left = ((side - cropped) // 2 for side, cropped in zip(pixels.shape[1:], size))
            hr = pixels[None, :, top : top + size[0], left : left + size[1]]
            hr = to_image(hr if hr.is_floating_point() else hr / 255)
            lr = to_image(degradation(to_tensor(hr), torch.Generator().manual_seed(seed + number)))
            self.pairs.append((f"{number:03d}-{Path(file).stem}", lr, hr))

    def measure(self, pipe: InvSRPipeline) -> tuple[dict[str, float], list[Image.Image]]:
        r"""
        Upscale the LR images in one step, in three steps and by bicubic interpolation, and compare with the HR images.

        Args:
            pipe ([`InvSRPipeline`]): The model.

        Returns:
            `tuple[dict[str, float], list[Image.Image]]`: Mean metrics by name, such as `"psnr_y/1_step"`; and per
            image a row LR | bicubic | 1 step | 3 steps | HR.
        """
        if self.lpips is not None:
            self.lpips.to(pipe.device)
        scores, rows = {}, []
        for number, (_, lr, hr) in enumerate(self.pairs):
            results = {"bicubic": lr.resize(hr.size, Image.Resampling.BICUBIC)}
            if len(self._bicubic) == number:
                self._bicubic.append(self._compare(results["bicubic"], hr, pipe.device))
            values = {"bicubic": self._bicubic[number]}
            for name, num_steps in STEPS.items():
                generator = torch.Generator().manual_seed(self.seed)
                results[name] = pipe(lr, num_steps=num_steps, tile_size=None, generator=generator).images[0]
                values[name] = self._compare(results[name], hr, pipe.device)
            for name, metrics in values.items():
                for metric, value in metrics.items():
                    scores.setdefault(f"{metric}/{name}", []).append(value)
            rows.append(row({"lr": lr.resize(hr.size, Image.Resampling.NEAREST), **results, "hr": hr}))
        return {name: float(np.mean(values)) for name, values in scores.items()}, rows

    @torch.no_grad()
    def _compare(self, result: Image.Image, hr: Image.Image, device: torch.device) -> dict[str, float]:
        pixels = np.array(result), np.array(hr)
        metrics = {"psnr_y": psnr_y(*pixels), "ssim_y": ssim_y(*pixels)}
        if self.lpips is not None:
            metrics["lpips"] = self.lpips(*(2 * to_tensor(image).to(device) - 1 for image in (result, hr))).item()
        return metrics


def row(images: dict[str, Image.Image]) -> Image.Image:
    """Images of one size side by side, with their names above."""
    width, height = next(iter(images.values())).size
    sheet = Image.new("RGB", (width * len(images), height + LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, image) in enumerate(images.items()):
        draw.text((number * width + 3, 1), name.replace("_", " "), fill="black", font_size=12)
        sheet.paste(image, (number * width, LABEL_HEIGHT))
    return sheet
