"""Image files: finding, reading and writing them, with the metadata that they carry besides pixels."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from PIL import ExifTags, Image, ImageOps


# Output formats by file suffix, with Pillow's settings for them.
FORMATS = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
# The longest side that a format can store, in pixels.
MAX_SIDES = {"JPEG": 65500, "WEBP": 16383}
# Prefix of the names of unfinished files and folders.
TEMPORARY_PREFIX = ".diffusers-invsr-"
# The longest file name on common file systems, and the longest EXIF data in a JPEG.
MAX_NAME_BYTES = 255
MAX_JPEG_EXIF_BYTES = 65533
# Suffixes of image files in folders and patterns. A file that is named explicitly is read whatever its suffix.
IMAGE_SUFFIXES = {*FORMATS, ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".pgm", ".ppm", ".tga", ".tif", ".tiff"}
# TIFF tags that describe how pixels are stored rather than the picture.
TIFF_LAYOUT_TAGS = {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339, 347}
TIFF_PAYLOAD_TAGS = {700, 34675}  # XMP, ICC profile
# Colour spaces in an ICC profile's header that do not apply to the pixels written, by the mode of the image.
FOREIGN_COLOR_SPACES = {"L": (b"RGB ", b"CMYK", b"Lab "), "RGB": (b"GRAY", b"CMYK", b"Lab ")}


def images_below(folder: Path) -> tuple[list[Path], list[OSError]]:
    r"""
    Find the image files in a folder and its subfolders, except hidden ones.

    Args:
        folder (`Path`): The folder.

    Returns:
        `tuple[list[Path], list[OSError]]`: The files, sorted by path; and the errors of folders and files that cannot
        be read.
    """
    images, errors = [], []
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        files, unreadable = existing_files(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
        images += files
        errors += unreadable
    return sorted(images), errors


def existing_files(paths: Iterable[Path]) -> tuple[list[Path], list[OSError]]:
    """Those of the paths that are files or links to files, and the errors of those that cannot be looked up."""
    files, errors = [], []
    for path in paths:
        try:
            if stat.S_ISREG(path.stat().st_mode):
                files.append(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:  # such as in a folder that may be listed, but not entered
            errors.append(error)
    return files, errors


def read_image(path: Path) -> tuple[Image.Image, int]:
    r"""
    Read an image file completely, so that damage is found before any work is done on it.

    Args:
        path (`Path`): The file.

    Returns:
        `PIL.Image.Image`: The upright image; of an animation or a multi-page file the first frame. Its `info` has the
        metadata that [`save_image`] keeps: `"icc_profile"` and `"exif"` (empty if it is damaged).
        `int`: Number of frames or pages in the file.

    Raises:
        Exception: Various exceptions of Pillow's decoders, if the file is damaged, too large or not an image.
    """
    with Image.open(path) as image:
        # The second picture in a phone's JPEG (MPO) is a preview or a depth map, not a frame.
        num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if image.format != "TIFF":  # loading closes a TIFF, and its EXIF data with it
            image.load()  # before the EXIF data: Pillow reports damaged pixels of a PNG only once
        exif = _upright_exif(image)
        image.load()
        for name in ("exif", "Raw profile type exif"):  # which would be written again
            image.info.pop(name, None)
        upright = ImageOps.exif_transpose(image)
        upright.info["exif"] = exif
        return upright, num_frames


def _upright_exif(image: Image.Image) -> bytes | None:
    """EXIF data of an open file, for the upright image: `None` if there is none, empty if it is damaged."""
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
    except Exception:  # Pillow raises various exceptions; the pixels may be intact
        return b""
    finally:
        if orientation is not None:  # `exif_transpose` still needs it
            exif[ExifTags.Base.Orientation] = orientation


def check_side(path: Path, side: int):
    """Raise a `ValueError` if the format of the file `path` cannot store an image with a side of `side` pixels."""
    name = FORMATS[path.suffix.lower()][0]
    if side > MAX_SIDES.get(name, side):
        raise ValueError(f"{name} supports at most {MAX_SIDES[name]} pixels per side, got {side}; use PNG.")


def save_image(image: Image.Image, path: Path, source: Image.Image) -> str:
    r"""
    Write an image with the ICC profile and the EXIF data of its source. The file is complete or not written at all.

    Args:
        image (`PIL.Image.Image`): The image. JPEG does not support transparency and shows it on white.
        path (`Path`):
            The file, whose suffix determines the format. It is replaced if it exists; missing folders are created.
        source (`PIL.Image.Image`):
            Image from [`read_image`]. Its ICC profile is left out if it does not apply to the pixels written (a CMYK
            profile), and its orientation is reset, since the image is upright.

    Returns:
        `str`: What had to be left out, as a remark for the user; usually empty.
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
    """A unique hidden name for an unfinished file or folder."""
    return f"{TEMPORARY_PREFIX}{uuid4().hex}.tmp"


def _with_size(data: bytes, size: tuple[int, int]) -> bytes:
    """EXIF data with the size of the image updated, if it contains one."""
    exif = Image.Exif()
    exif.load(data)
    details = exif.get_ifd(ExifTags.IFD.Exif) if ExifTags.IFD.Exif in exif else {}
    for tag, side in zip((ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight), size):
        if tag in details:
            details[tag] = side
    return exif.tobytes()
