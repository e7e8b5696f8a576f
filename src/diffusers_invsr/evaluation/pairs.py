"""Folders of images that are matched by name: LR images, results, HR images."""

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ..image_files import images_below, read_image
from ..image_processor import InvSRImageProcessor


MAX_LISTED = 10


def read_rgb(path: Path) -> Image.Image:
    """Any image file as an upright 8-bit RGB image without transparency."""
    pixels = InvSRImageProcessor().preprocess(read_image(path)[0])[0].pixels
    if pixels.is_floating_point():
        pixels = (255 * pixels).round().byte()
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file when upright, read from its header."""
    with Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.size[::-1] if turned else image.size


def list_some(items: list[str]) -> str:
    """A comma-separated list for a message, of which at most the first `MAX_LISTED` items are shown."""
    rest = len(items) - MAX_LISTED
    return ", ".join(items[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def find_named(folder: Path, argument: str) -> dict[str, Path]:
    r"""
    The images below a folder by name.

    Args:
        folder (`Path`): The folder.
        argument (`str`): Name of the argument that gives it, for messages.

    Returns:
        `dict[str, Path]`: Files by their path below the folder without the extension, such as `"night/street"`.

    Raises:
        ValueError: If `folder` is not a readable folder with images, or two of them differ only in the extension.
    """
    if not folder.is_dir():
        raise ValueError(f"`{argument}` must be a folder of images, got {folder}.")
    paths, errors = images_below(folder)
    if errors:
        raise ValueError(f"`{argument}` contains {errors[0].filename}, which cannot be read ({errors[0].strerror}).")
    named, twice = {}, []
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in named:
            twice.append(name)
        named[name] = path
    if not named:
        raise ValueError(f"`{argument}` must be a folder of images, but {folder} contains none.")
    if twice:
        raise ValueError(f"`{argument}` contains images that differ only in the extension: {list_some(twice)}.")
    return named


def match_by_name(folders: dict[str, Path]) -> dict[str, dict[str, Path]]:
    r"""
    Match the images of several folders by name.

    Args:
        folders (`dict[str, Path]`): Folders by the argument that gives them, such as `"lq"` and `"gt"`.

    Returns:
        `dict[str, dict[str, Path]]`: The file of each image in each folder, sorted by name.

    Raises:
        ValueError: If an image is missing in a folder; the message lists the missing ones.
    """
    found = {argument: find_named(folder, argument) for argument, folder in folders.items()}
    names = sorted(set().union(*found.values()))
    for argument, files in found.items():
        missing = [name for name in names if name not in files]
        if missing:
            others = " or ".join(f"`{other}`" for other in found if other != argument)
            raise ValueError(
                f"`{argument}` ({folders[argument]}) must have the same images as {others}, but lacks"
                f" {list_some(missing)}."
            )
    return {name: {argument: files[name] for argument, files in found.items()} for name in names}


def check_sizes(pairs: dict[str, dict[str, Path]], scale: float | None):
    r"""
    Check that HR images and results have the same size: that of the LR image times the scale, rounded. Images whose
    headers cannot be read are skipped.

    Args:
        pairs (`dict[str, dict[str, Path]]`): Files by argument for each image, from [`match_by_name`].
        scale (`float`, *optional*): HR size divided by LR size. If not given, LR images are not checked.

    Raises:
        ValueError: If sizes do not match; the message lists the images with their sizes.
    """
    wrong = []
    for name, files in pairs.items():
        try:
            sizes = {argument: image_size(path) for argument, path in files.items()}
        except Exception:  # various exceptions of Pillow's decoders; reading the whole file later reports them
            continue
        large = {size for argument, size in sizes.items() if argument != "lq"}
        if "lq" in sizes and scale is not None:
            large.add(tuple(int(side * scale + 0.5) for side in sizes["lq"]))
        if len(large) > 1:
            wrong.append(f"{name} ({', '.join(f'{key} {w}x{h}' for key, (w, h) in sizes.items())})")
    if wrong:
        arguments = " and ".join(f"`{argument}`" for argument in next(iter(pairs.values())))
        times = f" at scale {scale:g}" if scale is not None and "lq" in next(iter(pairs.values())) else ""
        raise ValueError(f"The sizes of images in {arguments} do not match{times}: {list_some(wrong)}.")
