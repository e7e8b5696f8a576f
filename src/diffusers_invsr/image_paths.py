"""Which image files the inputs of a command stand for, and where the results go."""

import glob
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from .image_files import FORMATS, IMAGE_SUFFIXES, MAX_NAME_BYTES, existing_files, images_below


@dataclass
class FoundImages:
    r"""
    What [`find_images`] found.

    Args:
        images (`dict[Path, Path]`):
            For each file, its name below the output folder. Files in a folder keep their subfolder, and so do files
            that match a pattern, relative to the part of the pattern without wildcards.
        problems (`dict[str, str]`): For each input without images, and each path that cannot be read, the reason.
        results (`set[Path]`): Files left out because they are named like results.
        duplicates (`set[Path]`): Files left out because they are links to images found under another name.
    """

    images: dict[Path, Path] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    results: set[Path] = field(default_factory=set)
    duplicates: set[Path] = field(default_factory=set)


def find_images(inputs: list[str], out: Path, suffix: str = "") -> FoundImages:
    r"""
    Find the image files that the inputs stand for, each once, in the order of the inputs.

    Args:
        inputs (`list[str]`):
            Files; folders, which are searched with all their subfolders; and patterns with `*`, `?`, `[...]` and
            `**`. Hidden files are left out, and subfolders that are links are not searched.
        out (`Path`): Folder of the results. If it lies inside a folder that is searched, it is left out.
        suffix (`str`, *optional*):
            Suffix added to the names of results. If `out` is itself searched, files in it that are named like the
            result of one of the images are left out.

    Returns:
        [`FoundImages`]: The images, and what was left out.
    """
    found = FoundImages()
    out, seen, beside_results = out.resolve(), set(), set()
    for text in inputs:
        path = Path(text if os.path.lexists(text) else os.path.expanduser(text))
        root, files, errors = _files_of(path) if text else (path, [], [])
        found.problems |= {os.fspath(error.filename): f"cannot be read ({error.strerror})" for error in errors}
        if root.resolve() in out.parents:
            files = [file for file in files if path == file or out not in file.resolve().parents]
        elif root.resolve() == out and files != [path]:
            beside_results |= {Path(os.path.abspath(file)) for file in files}
        # A file can have many names through links. It is taken once, preferably by its own; named files always are.
        for file in sorted(files, key=Path.is_symlink):
            name, identity = file.relative_to(root), _identity(file, of_name=True)
            if path != file and identity in seen:
                found.duplicates.add(Path(os.path.abspath(file)))
                continue
            seen.add(identity)
            found.images.setdefault(Path(os.path.abspath(file)), Path(name.name) if ".." in name.parts else name)
        if not files and not errors:
            found.problems[text] = "no such image"
    if suffix:
        result_stem = re.compile(rf"(.+){re.escape(suffix)}(_\d+)?")
        names = {name.with_suffix("") for name in found.images.values()}
        for file in beside_results & found.images.keys():
            match = result_stem.fullmatch(found.images[file].stem)
            if match and found.images[file].with_name(match[1]) in names:
                found.results.add(file)
    found.duplicates -= found.images.keys()
    found.images = {file: name for file, name in found.images.items() if file not in found.results}
    return found


def _files_of(path: Path) -> tuple[Path, list[Path], list[OSError]]:
    """What an input stands for: the folder to which names are relative, the files, and what cannot be read."""
    if os.path.isdir(path):
        return path, *images_below(path)
    files, errors = existing_files([path])
    if files or errors:
        return path.parent, files, errors
    root = Path(re.split(r"[^/\\]*[*?[]", str(path), maxsplit=1)[0])
    for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
        if os.path.isdir(match):
            more_files, more_errors = images_below(match)
        else:
            more_files, more_errors = existing_files([match] if match.suffix.lower() in IMAGE_SUFFIXES else [])
        files += more_files
        errors += more_errors
    return root, files, errors


def plan_outputs(
    images: dict[Path, Path], out: Path, image_format: str = "keep", suffix: str = ""
) -> dict[Path, Path]:
    r"""
    Choose a file for each result.

    Args:
        images (`dict[Path, Path]`): Input files and their names, from [`find_images`].
        out (`Path`): Folder of the results.
        image_format (`str`, defaults to `"keep"`):
            `"png"`, `"jpg"`, `"webp"`, or `"keep"` for the format of the input if it is one of these, else PNG.
        suffix (`str`, *optional*): Inserted between a file's name and its extension.

    Returns:
        `dict[Path, Path]`: The result of each input. If several would have the same name (ignoring case), `_2`, `_3`,
        ... is appended to the names of those whose extension changes, and of later ones.

    Raises:
        ValueError: If a result would replace an input, or its name would be too long.
    """
    sources = {_identity(source): source for source in images}
    extensions = {source: _output_extension(name, image_format) for source, name in images.items()}
    outputs, taken = {}, set()
    # Files that keep their extension come first: their results must not be renamed when other files are added.
    for source, name in sorted(images.items(), key=lambda item: extensions[item[0]] != item[1].suffix):
        target, number = out / name.with_name(f"{name.stem}{suffix}{extensions[source]}"), 1
        while str(target).casefold() in taken:
            number += 1
            target = out / name.with_name(f"{name.stem}{suffix}_{number}{extensions[source]}")
        if target.exists() and _identity(target) in sources:
            raise ValueError(
                f"the result for {display_path(source)} would replace the input"
                f" {display_path(sources[_identity(target)])}: choose another output folder, or a suffix such as"
                " `--suffix _x4`."
            )
        if len(os.fsencode(target.name)) > MAX_NAME_BYTES:
            raise ValueError(
                f"the name of the result for {display_path(source)} would be longer than {MAX_NAME_BYTES} bytes."
            )
        taken.add(str(target).casefold())
        outputs[source] = target
    return {source: outputs[source] for source in images}


def _output_extension(name: Path, image_format: str) -> str:
    if image_format != "keep":
        return f".{image_format}"
    return name.suffix if name.suffix.lower() in FORMATS else ".png"


def _identity(path: Path, of_name: bool = False) -> tuple:
    """Equal for all links to a file; with `of_name`, hard links count as files of their own."""
    status = path.stat()
    if of_name and status.st_nlink > 1:
        return (path.resolve(),)
    return status.st_dev, status.st_ino


def display_path(path: Path) -> str:
    """The path relative to the working directory if it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
