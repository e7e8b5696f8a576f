"""Folders of images that belong together by name: LR images, results, HR images."""

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ..image_files import images_below, read_image
from ..image_processor import InvSRImageProcessor


MAX_LISTED = 10


def read_rgb(path: Path) -> Image.Image:
    """An image file of any kind as an upright RGB image of 8 bits, without its transparency."""
    pixels = InvSRImageProcessor().preprocess(read_image(path)[0])[0].pixels
    if pixels.is_floating_point():
        pixels = (255 * pixels).round().byte()
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file when upright, from its header alone."""
    with Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.size[::-1] if turned else image.size


def list_some(items: list[str]) -> str:
    """A list for a message, cut off where it gets long."""
    rest = len(items) - MAX_LISTED
    return ", ".join(items[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def find_named(folder: Path, argument: str) -> dict[str, Path]:
    r"""
    The images below a folder by their names: the path below it without the extension, such as `"night/street"`.

    Args:
        folder (`Path`): The folder.
        argument (`str`): What messages call it.

    Raises:
        ValueError: If it is no folder or has no images, or two of them differ in nothing but the extension.
    """
    if not folder.is_dir():
        raise ValueError(f"`{argument}` has to be a folder of images, but {folder} is none.")

    def refuse(error: OSError):
        raise ValueError(
            f"`{argument}` has to be a folder of images, but {error.filename} in it cannot be read ({error.strerror})."
        )

    named, twice = {}, []
    for path in images_below(folder, refuse):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in named:
            twice.append(name)
        named[name] = path
    if not named:
        raise ValueError(f"`{argument}` has to be a folder of images, but {folder} has none.")
    if twice:
        raise ValueError(f"`{argument}` has several images of one name but for the extension: {list_some(twice)}.")
    return named


def match_by_name(folders: dict[str, Path]) -> dict[str, dict[str, Path]]:
    r"""
    Match the images of folders.

    Args:
        folders (`dict[str, Path]`): Folders by the argument that named them, such as `"lq"` and `"gt"`.

    Returns:
        `dict[str, dict[str, Path]]`: For each image, in the order of names, its file in each folder.

    Raises:
        ValueError: If an image is missing in one of them; the message lists such images.
    """
    found = {argument: find_named(folder, argument) for argument, folder in folders.items()}
    names = sorted(set().union(*found.values()))
    for argument, files in found.items():
        missing = [name for name in names if name not in files]
        if missing:
            others = " or ".join(f"`{other}`" for other in found if other != argument)
            raise ValueError(
                f"`{argument}` ({folders[argument]}) has to have an image for each in {others}, but has none for"
                f" {list_some(missing)}."
            )
    return {name: {argument: files[name] for argument, files in found.items()} for name in names}


def check_sizes(pairs: dict[str, dict[str, Path]], scale: float | None):
    r"""
    Compare the sizes of images that belong together: HR images and results with each other, and with the LR image
    times the scale (rounded). Images whose header cannot be read are left out.

    Args:
        pairs (`dict[str, dict[str, Path]]`): Files by argument for each image, from [`match_by_name`].
        scale (`float`, *optional*): HR size over LR size. Without one, LR images are not compared.

    Raises:
        ValueError: If sizes do not fit; the message lists the images with their sizes.
    """
    wrong = []
    for name, files in pairs.items():
        try:
            sizes = {argument: image_size(path) for argument, path in files.items()}
        except Exception:  # of many kinds, from Pillow's decoders; reading it whole later tells what is wrong
            continue
        large = {size for argument, size in sizes.items() if argument != "lq"}
        if "lq" in sizes and scale is not None:
            large.add(tuple(int(side * scale + 0.5) for side in sizes["lq"]))
        if len(large) > 1:
            wrong.append(f"{name} ({', '.join(f'{key} {w}x{h}' for key, (w, h) in sizes.items())})")
    if wrong:
        arguments = " and ".join(f"`{argument}`" for argument in next(iter(pairs.values())))
        times = f" at scale {scale:g}" if scale is not None and "lq" in next(iter(pairs.values())) else ""
        raise ValueError(f"The sizes in {arguments} have to fit{times}, but do not for {list_some(wrong)}.")
