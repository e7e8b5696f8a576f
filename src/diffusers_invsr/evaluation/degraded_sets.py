"""Synthetic test sets: HR images, and LR images made of them by the paper's degradation (section 4.1)."""

import hashlib
import json
import os
import shutil
import unicodedata
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..checks import is_integer
from ..files import write_atomically
from ..image_files import TEMPORARY_PREFIX, save_image, temporary_name
from ..image_paths import display_path, find_images, plan_outputs
from .pairs import read_rgb


if TYPE_CHECKING:
    from ..degradation import Degradation


SETTINGS_FILE = "settings.json"
LR_FOLDER, HR_FOLDER = "lq", "gt"
VERSIONS = ("diffusers-invsr", "torch", "kornia", "pillow")


@dataclass
class DegradedSet:
    r"""
    What [`make_test_set`] made.

    Args:
        images (`dict[str, dict]`):
            For each image, by its file name in both folders (such as `"night/street.png"`), its entry in
            `settings.json`: its source, its seed, everything that was drawn, and the SHA-256 of the LR pixels.
        problems (`dict[Path, str]`): Files and folders that were left out, with the reason.
    """

    images: dict[str, dict] = field(default_factory=dict)
    problems: dict[Path, str] = field(default_factory=dict)


def make_test_set(
    hr: str | Path,
    out: str | Path,
    setting: Literal["test", "training"] = "test",
    size: int | None = 512,
    scale: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> DegradedSet:
    r"""
    Make a test set: the folders `lq` and `gt` with PNG files of the same names, and `settings.json` with everything
    that was drawn.

    The degradation of an image depends only on `seed` and the image's name (see [`image_seed`]), not on the other
    images. Pixels are computed in float64 on the CPU, so that rounding differences between processors and numbers of
    threads do not change the 8-bit results; `settings.json` has the SHA-256 of the LR pixels for comparison.

    Args:
        hr (`str` or `Path`): Folder of HR images, searched with its subfolders, which the set keeps.
        out (`str` or `Path`): Folder of the set.
        setting (`str`, defaults to `"test"`): `"test"` for the lighter degradation of the paper's test sets,
            `"training"` for the one used in training.
        size (`int`, *optional*, defaults to 512): Side of the centre crop of each HR image in pixels, a multiple of
            `scale`; `None` for the whole image, cropped to multiples of `scale`.
        scale (`int`, defaults to 4): HR size divided by LR size.
        seed (`int`, defaults to 0): Seed of the set, non-negative.
        overwrite (`bool`, defaults to `False`): Whether to replace the test set in `out`, if any.
        progress (`bool`, defaults to `False`): Whether to show a progress bar.

    Returns:
        [`DegradedSet`]: The images of the set, and what was left out.

    Raises:
        ImportError: If kornia or scipy is not installed.
        FileExistsError: If `out` is not empty, unless it is a test set and `overwrite` is set.
        ValueError: If an argument is out of range or no image could be degraded. Nothing is written then.
    """
    from ..degradation import Degradation, DegradationSettings, EvaluationDegradationSettings

    # 1. What to do
    settings = {"test": EvaluationDegradationSettings, "training": DegradationSettings}
    if setting not in settings:
        raise ValueError(f"`setting` must be 'test' or 'training', got {setting!r}.")
    if not is_integer(seed) or seed < 0:
        raise ValueError(f"`seed` must be a non-negative integer, got {seed!r}.")
    degradation = Degradation(settings[setting](), scale)
    if size is not None and (not is_integer(size) or size < degradation.min_size or size % scale):
        raise ValueError(
            f"`size` must be None or a multiple of {scale} and at least {degradation.min_size}, got {size!r}."
        )
    hr, out = Path(hr), Path(out).resolve()  # a link is not replaced, but the folder that it points to
    if not hr.is_dir():
        raise ValueError(f"`hr` must be a folder of images, got {hr}.")
    if out.exists() and not (out.is_dir() and not names_in(out)) and not (overwrite and is_test_set(out)):
        raise FileExistsError(
            f"`out` must be a new or empty folder, or a test set to replace with `overwrite`, but {out} exists"
            f"{' and is not a test set' if overwrite else ''}."
        )
    if hr.resolve().is_relative_to(out):
        raise ValueError(f"`out` must not contain `hr`, which it would replace, but {out} contains {hr}.")
    found = find_images([str(hr)], out)
    test_set = DegradedSet(problems={Path(path): problem for path, problem in found.problems.items()})

    # 2. The images, in a folder of their own; inside `out` if it exists, since that may be on another disk
    work = (out if out.exists() else out.parent) / temporary_name()
    work.mkdir(parents=True)
    try:
        targets = plan_outputs(found.images, work, "png")
        for source, target in tqdm(targets.items(), unit="image", disable=None if progress else True):
            name, hr_name = target.relative_to(work), found.images[source]
            try:
                image = crop_centre(read_rgb(source), size, scale, degradation.min_size)
                seed_of_image = image_seed(seed, hr_name.with_suffix("").as_posix())
                lr, record = degrade_image(degradation, image, seed_of_image)
            except Exception as error:  # various exceptions of Pillow's decoders; a bad file does not stop the others
                test_set.problems[source] = str(error) or type(error).__name__
            else:
                save_image(image, work / HR_FOLDER / name, image)
                save_image(lr, work / LR_FOLDER / name, lr)
                test_set.images[name.as_posix()] = {"source": hr_name.as_posix(), **record}
        if not test_set.images:
            problems = "; ".join(f"{display_path(path)}: {problem}" for path, problem in test_set.problems.items())
            raise ValueError(
                f"`hr` must contain readable images of at least {size or degradation.min_size} pixels per side, but"
                f" {hr} has none{f' ({problems})' if problems else ''}."
            )

        # 3. All or nothing
        test_set.images = dict(sorted(test_set.images.items()))
        description = {
            "setting": setting,
            "scale": scale,
            "size": size,
            "seed": seed,
            "versions": {name: version(name) for name in VERSIONS},
            "degradation": asdict(degradation.settings),
            "images": test_set.images,
        }
        write_atomically(work / SETTINGS_FILE, json.dumps(description, indent=2) + "\n")
        if work.parent == out:
            replace_entries(out, work)
        else:
            os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return test_set


def is_test_set(folder: Path) -> bool:
    """Whether a folder contains what [`make_test_set`] writes, and nothing else."""
    return names_in(folder) == {SETTINGS_FILE, LR_FOLDER, HR_FOLDER}


def names_in(folder: Path) -> set[str]:
    """Names of what a folder contains, except unfinished files that were left by an interruption."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(TEMPORARY_PREFIX)}


def replace_entries(folder: Path, new: Path):
    """Replace the contents of a folder by those of its subfolder `new`. All or nothing."""
    old = new.with_suffix(".old")
    moves = [(folder / name, old / name) for name in names_in(folder)]
    moves += [(path, folder / path.name) for path in new.iterdir()]
    old.mkdir()
    done = []
    try:
        for source, target in moves:
            done.append((source, target))
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(done):
            if target.exists() and not source.exists():
                os.replace(target, source)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def crop_centre(image: Image.Image, size: int | None, scale: int, min_size: int) -> Image.Image:
    """The square centre crop of an image, or without `size` the largest with sides divisible by `scale`."""
    width, height = (side - side % scale for side in image.size) if size is None else (size, size)
    if min(image.size) < (size or min_size):
        raise ValueError(f"{image.width}x{image.height} pixels, but at least {size or min_size} per side are required")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def image_seed(seed: int, name: str) -> int:
    r"""
    The seed of one image of a set, which depends only on the seed of the set and the image's name.

    Args:
        seed (`int`): Seed of the set.
        name (`str`): The image's path below the HR folder without the extension, with `/` as separator.

    Returns:
        `int`: The seed, between 0 and 2^63 - 1.
    """
    # File systems differ in how they store accented letters
    text = f"{seed}:{unicodedata.normalize('NFC', name)}"
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8]) >> 1


def degrade_image(degradation: "Degradation", image: Image.Image, seed: int) -> tuple[Image.Image, dict]:
    r"""
    Degrade one image.

    Args:
        degradation ([`Degradation`]): The degradation.
        image (`PIL.Image.Image`): The HR image, RGB.
        seed (`int`): Seed of everything that is drawn.

    Returns:
        `tuple[PIL.Image.Image, dict]`: The LR image; and its seed, everything that was drawn, and the SHA-256 of its
        pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = degradation.draw(1, generator)
    hr = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double() / 255
    pixels = (255 * degradation.apply(hr, draw, generator)[0]).round().byte().permute(1, 2, 0).contiguous().numpy()
    record = {
        "seed": seed,
        "lq_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "drawn": draw.to_dicts()[0],
    }
    return Image.fromarray(pixels), record
