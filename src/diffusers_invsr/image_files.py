"""Image files of the command line: which ones to read, where their results go, and what they carry besides pixels."""

import glob
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from PIL import ExifTags, Image, ImageOps


# Formats that are written, by the suffix of the file, with Pillow's settings for them.
FORMATS = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
# The longest side that a format can hold, in pixels.
MAX_SIDES = {"JPEG": 65500, "WEBP": 16383}
# With what names begin until a file or folder is finished.
TEMPORARY_PREFIX = ".diffusers-invsr-"
# The longest file name on usual file systems, and the longest EXIF data in a JPEG.
MAX_NAME_BYTES = 255
MAX_JPEG_EXIF_BYTES = 65533
# What is taken for an image where a folder or a pattern is searched. A file that is named is read whatever its suffix.
IMAGE_SUFFIXES = {*FORMATS, ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".pgm", ".ppm", ".tga", ".tif", ".tiff"}
# Tags of a TIFF that tell how its pixels are stored, not what the picture is.
TIFF_LAYOUT_TAGS = {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339, 347}
TIFF_PAYLOAD_TAGS = {700, 34675}  # XMP, ICC profile
# Colour spaces, as an ICC profile's header names them, that the pixels we write are not in.
FOREIGN_COLOR_SPACES = {"L": (b"RGB ", b"CMYK", b"Lab "), "RGB": (b"GRAY", b"CMYK", b"Lab ")}


def find_images(
    inputs: list[str], out: Path, suffix: str = ""
) -> tuple[dict[Path, Path], dict[str, str], set[Path], set[Path]]:
    r"""
    Find the files that the inputs stand for, each once, in the order of the inputs.

    Args:
        inputs (`list[str]`):
            Files; folders, which are searched for images with all their subfolders; and patterns with `*`, `?`,
            `[...]` and `**`. What is hidden is left out, and subfolders that are links are not searched.
        out (`Path`): Where results go. If it lies inside a folder that is searched, it is left out.
        suffix (`str`, *optional*):
            What is added to the names of results. Where `out` is itself a folder that is searched, files there with
            the name of a result of one of the images are taken for that and left out.

    Returns:
        `dict[Path, Path]`: For each file, its name below the output folder. Files in a folder keep their subfolder, as
        do files that a pattern matched, below its part without wildcards.
        `dict[str, str]`: For each input for which there is nothing, and each path that cannot be read, the reason.
        `set[Path]`: Files that were left out as results.
        `set[Path]`: Files that were left out as links, or the like, to images that are found by another name.
    """
    found, missing, seen, beside, others = {}, {}, set(), set(), set()
    out = out.resolve()

    def unreadable(error: OSError):
        missing[os.fspath(error.filename)] = f"cannot be read ({error.strerror})"

    for text in inputs:
        path, num_missing = Path(text if os.path.lexists(text) else os.path.expanduser(text)), len(missing)
        root, files = _files_of(path, unreadable) if text else (path, [])
        if root.resolve() in out.parents:
            files = [file for file in files if path == file or out not in file.resolve().parents]
        elif root.resolve() == out and files != [path]:
            beside |= {Path(os.path.abspath(file)) for file in files}
        # Links can show one file under many names: it is taken once, itself if possible, but for those that were named
        for file in sorted(files, key=Path.is_symlink):
            name, identity = file.relative_to(root), _identity(file, of_name=True)
            if path != file and identity in seen:
                others.add(Path(os.path.abspath(file)))
                continue
            seen.add(identity)
            found.setdefault(Path(os.path.abspath(file)), Path(name.name) if ".." in name.parts else name)
        if not files and len(missing) == num_missing:
            missing[text] = "no such image"
    results = set()
    if suffix and beside:
        name_of_result = re.compile(rf"(.+){re.escape(suffix)}(_\d+)?")
        names = {name.with_suffix("") for name in found.values()}
        for file in beside & found.keys():
            match = name_of_result.fullmatch(found[file].stem)
            if match and found[file].with_name(match[1]) in names:
                results.add(file)
    images = {file: name for file, name in found.items() if file not in results}
    return images, missing, results, others - found.keys()


def _files_of(path: Path, unreadable: Callable[[OSError], None]) -> tuple[Path, list[Path]]:
    """What an input stands for: the folder below which its files have their names, and these."""
    if os.path.isdir(path):
        return path, images_below(path, unreadable)
    if _is_file(path, unreadable):
        return path.parent, [path]
    root = Path(re.split(r"[^/\\]*[*?[]", str(path), maxsplit=1)[0])
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = []
    for match in matches:
        files += images_below(match, unreadable) if os.path.isdir(match) else _images_of([match], unreadable)
    return root, files


def images_below(folder: Path, unreadable: Callable[[OSError], None]) -> list[Path]:
    r"""
    The images in a folder and its subfolders, but for what is hidden, in the order of names.

    Args:
        folder (`Path`): The folder.
        unreadable (`Callable[[OSError], None]`): Told of what cannot be read, which is left out.
    """
    images = []
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += _images_of([Path(parent, name) for name in names if not name.startswith(".")], unreadable)
    return sorted(images)


def _images_of(paths: list[Path], unreadable: Callable[[OSError], None]) -> list[Path]:
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and _is_file(path, unreadable)]


def _is_file(path: Path, unreadable: Callable[[OSError], None]) -> bool:
    """Whether it is a file, or a link to one."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # such as in a folder whose names may be read, but not what they stand for
        unreadable(error)
        return False


def plan_outputs(
    images: dict[Path, Path], out: Path, image_format: str = "keep", suffix: str = ""
) -> dict[Path, Path]:
    r"""
    Choose a file for each result.

    Args:
        images (`dict[Path, Path]`): From [`find_images`].
        out (`Path`): Folder of the results.
        image_format (`str`, defaults to `"keep"`):
            `"png"`, `"jpg"`, `"webp"`, or `"keep"` for the input's where it is one of these, else PNG.
        suffix (`str`, *optional*): What is put between a file's name and its extension.

    Returns:
        `dict[Path, Path]`: For each input, its result. Where several would have one name, on a file system that knows
        no case either, those that change their extension and the later ones get `_2`, `_3`, ...

    Raises:
        ValueError: If a result would replace an input, or its name would be too long.
    """
    sources = {_identity(source): source for source in images}
    outputs, taken = {}, set()

    def extension_of(name: Path) -> str:
        keep = image_format == "keep" and name.suffix.lower() in FORMATS
        return name.suffix if keep else ".png" if image_format == "keep" else f".{image_format}"

    # Files that keep their extension come first: their names must not change when others join them.
    for source, name in sorted(images.items(), key=lambda item: extension_of(item[1]) != item[1].suffix):
        extension = extension_of(name)
        target, number = out / name.with_name(f"{name.stem}{suffix}{extension}"), 1
        while str(target).casefold() in taken:
            number += 1
            target = out / name.with_name(f"{name.stem}{suffix}_{number}{extension}")
        if target.exists() and _identity(target) in sources:
            raise ValueError(
                f"the result for {show(source)} would replace the input {show(sources[_identity(target)])}: choose"
                " another output folder, or another `--suffix`, such as `--suffix _x4`."
            )
        if len(os.fsencode(target.name)) > MAX_NAME_BYTES:
            raise ValueError(f"the name of the result for {show(source)} would be longer than {MAX_NAME_BYTES} bytes.")
        taken.add(str(target).casefold())
        outputs[source] = target
    return {source: outputs[source] for source in images}


def _identity(path: Path, of_name: bool = False) -> tuple:
    """The same for all links to a file; or, with `of_name`, for all but hard ones, which are files of their own."""
    status = path.stat()
    if of_name and status.st_nlink > 1:
        return (path.resolve(),)
    return status.st_dev, status.st_ino


def show(path: Path) -> str:
    """The path as a user would write it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def read_image(path: Path) -> tuple[Image.Image, int]:
    r"""
    Read an image file whole, so that a damaged one is known before any work is done on it.

    Args:
        path (`Path`): The file.

    Returns:
        `PIL.Image.Image`: The image (the first one, of an animation or a file of pages), upright. What
        [`save_image`] is to keep is in its `info`: `"icc_profile"` and `"exif"` (empty if it is damaged).
        `int`: Number of frames or pages in the file.

    Raises:
        Exception: Of many kinds, from Pillow's decoders, if the file is not a whole image or is too large.
    """
    with Image.open(path) as image:
        # The second picture that phones put into a JPEG (MPO) is a preview or a depth map, not a frame.
        num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if image.format != "TIFF":  # which is closed after it
            image.load()  # before its EXIF data: damage to the pixels of a PNG shows once only
        exif = _upright_exif(image)
        image.load()
        for name in ("exif", "Raw profile type exif"):  # or else they would be written anew
            image.info.pop(name, None)
        upright = ImageOps.exif_transpose(image)
        upright.info["exif"] = exif
        return upright, num_frames


def _upright_exif(image: Image.Image) -> bytes | None:
    """EXIF data of an open file, as of the upright image: `None` if there is none, empty if it is damaged."""
    orientation = None
    try:
        exif = image.getexif()
        for part in {ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo} & set(exif):
            exif.get_ifd(part)
        layout = TIFF_LAYOUT_TAGS | TIFF_PAYLOAD_TAGS if image.format == "TIFF" else set()
        for tag in layout & set(exif):
            del exif[tag]
        orientation = exif.get(ExifTags.Base.Orientation)
        if orientation is not None:
            exif[ExifTags.Base.Orientation] = 1
        return exif.tobytes() if exif else None
    except Exception:  # Pillow raises of many kinds; the pixels may be sound all the same
        return b""
    finally:
        if orientation is not None:  # it has still to be applied
            exif[ExifTags.Base.Orientation] = orientation


def check_side(path: Path, side: int):
    """Raises a ValueError if the format of `path` cannot hold an image with a side of so many pixels."""
    name = FORMATS[path.suffix.lower()][0]
    if side > MAX_SIDES.get(name, side):
        raise ValueError(f"{name} holds at most {MAX_SIDES[name]} pixels a side, but {side} are asked for; use PNG.")


def save_image(image: Image.Image, path: Path, source: Image.Image) -> str:
    r"""
    Write an image with the ICC profile and the EXIF data of its source, all or nothing.

    Args:
        image (`PIL.Image.Image`): The image. JPEG, which has no transparency, gets it on white.
        path (`Path`): The file; it is replaced if it exists. The suffix tells the format. Missing folders are made.
        source (`PIL.Image.Image`): What [`read_image`] gave. Its profile is left out where it is for other pixels than
            are written (a CMYK profile), and its orientation has been applied.

    Returns:
        `str`: What had to be left out, for the user; usually nothing.
    """
    note = ""
    name, options = FORMATS[path.suffix.lower()]
    if name == "JPEG" and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert(image.mode.removesuffix("A"))
    profile = source.info.get("icc_profile")
    space = "L" if image.mode in ("L", "LA") and name != "WEBP" else "RGB"  # WebP stores grey as RGB
    if profile and profile[16:20] not in FOREIGN_COLOR_SPACES[space]:
        options = {**options, "icc_profile": profile}
    if source.info.get("exif") == b"":
        note = ", without its EXIF data, which is damaged"
    elif source.info.get("exif"):
        exif = _with_size(source.info["exif"], image.size)
        if name == "JPEG" and len(exif) > MAX_JPEG_EXIF_BYTES:
            note = ", without its EXIF data, which is too long for JPEG"
        else:
            options = {**options, "exif": exif}

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name())
    try:
        with open(temporary, "wb") as file:
            image.save(file, format=name, **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return note


def temporary_name() -> str:
    """A name for what is not finished: hidden, and no other's."""
    return f"{TEMPORARY_PREFIX}{uuid4().hex}.tmp"


def _with_size(data: bytes, size: tuple[int, int]) -> bytes:
    """EXIF data that states the size of the image, where it states one."""
    exif = Image.Exif()
    exif.load(data)
    details = exif.get_ifd(ExifTags.IFD.Exif) if ExifTags.IFD.Exif in exif else {}
    for tag, side in zip((ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight), size):
        if tag in details:
            details[tag] = side
    return exif.tobytes()
