"""Synthetic test sets: LR images of HR images by the degradation of the paper (section 4.1), the same everywhere."""

import hashlib
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..checks import is_integer
from ..files import write_atomically
from ..image_files import TEMPORARY_PREFIX, find_images, plan_outputs, save_image, temporary_name
from .pairs import read_rgb


SETTINGS_FILE = "settings.json"
LR_FOLDER, HR_FOLDER = "lq", "gt"
VERSIONS = ("diffusers-invsr", "torch", "kornia", "pillow")


def image_seed(seed: int, name: str) -> int:
    r"""
    The seed of one image of a set, from 0 to 2^63 - 1: it hangs on the set's seed and the image's name, on no other
    image.

    Args:
        seed (`int`): The set's seed.
        name (`str`): The image's path below the HR folder without the extension, with `/` between its parts.
    """
    # File systems differ in how they write accented letters.
    text = f"{seed}:{unicodedata.normalize('NFC', name)}"
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8]) >> 1


def degrade_folder(
    hr: str | Path,
    out: str | Path,
    setting: Literal["test", "training"] = "test",
    size: int | None = 512,
    scale: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
    on_image: Callable[[Path, str | None], None] | None = None,
) -> dict[str, dict]:
    r"""
    Make a test set: `lq/` and `gt/` with PNG files of equal names, and `settings.json` with all that was drawn.

    An image's draws follow from `seed` and its name (see [`image_seed`]), so they are the same whatever else is in the
    folder. The pixels are computed in float64 on the CPU, so that processors and numbers of threads, which round
    differently, come to the same 8 bits; `settings.json` has the SHA-256 of each LR image's pixels to compare.

    Args:
        hr (`str` or `Path`): Folder of HR images, searched with its subfolders, which the set keeps.
        out (`str` or `Path`): Folder of the set.
        setting (`str`, defaults to `"test"`): `"test"` for the lighter degradation of the paper's test sets,
            `"training"` for that of its training.
        size (`int`, *optional*, defaults to 512): Side of the square that is cut out of the middle of each HR image;
            `None` for the whole image, cut down at its ends to multiples of the scale.
        scale (`int`, defaults to 4): HR size over LR size.
        seed (`int`, defaults to 0): Seed of the set.
        overwrite (`bool`, defaults to `False`): Whether to replace the set that `out` holds.
        progress (`bool`, defaults to `False`): Whether to show a progress bar.
        on_image (`Callable`, *optional*): Called with each HR file when it is done; also with what was wrong with it
            where it, or a folder of such files, had to be left out.

    Returns:
        `dict[str, dict]`: For each image, by its name in both folders, what `settings.json` says.

    Raises:
        ImportError: If kornia or scipy is not installed.
        FileExistsError: If `out` exists and is not empty, unless it is a set and `overwrite` is set.
        ValueError: If an argument is out of range or no image could be degraded; nothing is written then.
    """
    from ..degradation import Degradation, DegradationSettings, EvaluationDegradationSettings

    kinds = {"test": EvaluationDegradationSettings, "training": DegradationSettings}
    if setting not in kinds:
        raise ValueError(f"`setting` has to be 'test' or 'training', but is {setting!r}.")
    if not is_integer(seed) or seed < 0:
        raise ValueError(f"`seed` has to be an integer of 0 or more, but is {seed!r}.")
    degradation = Degradation(kinds[setting](), scale)
    if size is not None and (not is_integer(size) or size < degradation.min_size or size % scale):
        raise ValueError(
            f"`size` has to be None or a multiple of {scale} and at least {degradation.min_size}, but is {size!r}."
        )
    hr, out = Path(hr), Path(out).resolve()  # of a link, what it shows is written to
    if not hr.is_dir():
        raise ValueError(f"`hr` has to be a folder of images, but {hr} is none.")
    if out.exists() and not (out.is_dir() and not names_in(out)) and not (overwrite and is_test_set(out)):
        raise FileExistsError(
            f"`out` has to be a new or empty folder, or a test set to replace with `overwrite`, but {out} exists"
            f"{' and is no test set' if overwrite else ''}."
        )
    if hr.resolve().is_relative_to(out):
        raise ValueError(f"`out` has to be outside of what it replaces, but {out} holds `hr` ({hr}).")
    sources, missing, *_ = find_images([str(hr)], out)

    # Inside of a folder that exists already: it may be another disk
    work = (out if out.exists() else out.parent) / temporary_name()
    images = {}
    work.mkdir(parents=True)
    try:
        if sources and on_image is not None:
            for path, problem in missing.items():
                on_image(Path(path), problem)
        targets = plan_outputs(sources, work, "png").items()
        for source, target in tqdm(targets, unit="image", disable=None if progress else True):
            name = target.relative_to(work)
            try:
                image = crop_middle(read_rgb(source), size, scale, degradation.min_size)
                key = sources[source].with_suffix("").as_posix()
                lr, record = degrade_image(degradation, image, image_seed(seed, key))
            except Exception as error:  # of many kinds, from Pillow's decoders: one file, the others go on
                problem = str(error) or type(error).__name__
            else:
                save_image(image, work / HR_FOLDER / name, image)
                save_image(lr, work / LR_FOLDER / name, lr)
                images[name.as_posix()] = {"source": sources[source].as_posix(), **record}
                problem = None
            if on_image is not None:
                on_image(source, problem)
        if not images:
            raise ValueError(
                f"`hr` has to have images that can be read, of {size or degradation.min_size} pixels a side or more,"
                f" but {hr} has none."
            )
        description = {
            "setting": setting,
            "scale": scale,
            "size": size,
            "seed": seed,
            "versions": {name: version(name) for name in VERSIONS},
            "degradation": asdict(degradation.settings),
            "images": dict(sorted(images.items())),
        }
        write_atomically(work / SETTINGS_FILE, json.dumps(description, indent=2) + "\n")
        if work.parent == out:
            replace_entries(out, work)
        else:
            os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return description["images"]


def is_test_set(folder: Path) -> bool:
    """Whether a folder holds what [`degrade_folder`] writes, and nothing else."""
    return names_in(folder) == {SETTINGS_FILE, LR_FOLDER, HR_FOLDER}


def names_in(folder: Path) -> set[str]:
    """What a folder holds, but for what was left by a kill."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(TEMPORARY_PREFIX)}


def replace_entries(folder: Path, new: Path):
    """Puts what the folder `new`, inside of `folder`, holds in the place of what that does. All or nothing."""
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


def crop_middle(image: Image.Image, size: int | None, scale: int, min_size: int) -> Image.Image:
    """The middle of an image: a square, or all but what does not divide by the scale."""
    width, height = (side - side % scale for side in image.size) if size is None else (size, size)
    if min(image.size) < (size or min_size):
        raise ValueError(f"it is {image.width}x{image.height}, but {size or min_size} pixels a side are needed.")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def degrade_image(degradation: torch.nn.Module, image: Image.Image, seed: int) -> tuple[Image.Image, dict]:
    r"""
    Degrade one image.

    Args:
        degradation ([`~diffusers_invsr.training.Degradation`]): The degradation.
        image (`PIL.Image.Image`): The HR image, RGB.
        seed (`int`): Seed of everything that is drawn.

    Returns:
        `tuple[PIL.Image.Image, dict]`: The LR image; the seed, all that was drawn and the digest of its pixels.
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
