"""Sources of HR images: files of folders and lists, and shards that are streamed, local or remote."""

import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image, UnidentifiedImageError

from ..image_files import IMAGE_SUFFIXES, images_below
from .errors import TrainingError


STREAM_PREFIXES = ("webdataset:", "datasets:")


class BadImage(Exception):
    """An image that is skipped. Its text is the reason, short and the same for all images of one kind."""


def reason_of(error: Exception) -> str:
    if isinstance(error, BadImage):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "with too many pixels"
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, OSError) and error.errno is not None:
        return "unreadable"
    if isinstance(error, EOFError) or re.search("truncat|unexpected end", str(error), re.IGNORECASE):
        return "truncated"
    return "damaged"


def check_sources(sources: Sequence[str]) -> list[str]:
    sources = [sources] if isinstance(sources, str) else list(sources)
    if not sources or not all(isinstance(source, str) and source for source in sources):
        raise TrainingError(f"`sources` must be a list of at least one folder, list or stream, got {sources!r}.")
    streams = [source for source in sources if source.startswith(STREAM_PREFIXES)]
    if streams and len(streams) < len(sources):
        files = next(source for source in sources if source not in streams)
        raise TrainingError(
            f"`sources` must be either streams, or folders and lists, but mixes {streams[0]!r} and {files!r}."
        )
    return sources


def list_files(source: str) -> list[str]:
    r"""
    The image files of a folder or of a list, with an optional limit.

    Args:
        source (`str`): As in [`make_dataset`].

    Returns:
        `list[str]`: Absolute paths. Those of a folder are sorted and exist; those of a list are not checked.

    Raises:
        TrainingError: If the source is a stream, is missing or has no images, or its limit is not `[:N]` with N >= 1.
    """
    if source.startswith(STREAM_PREFIXES):
        raise TrainingError(f"A folder or a list is required, got the stream {source!r}.")
    path, limit = Path(source).expanduser(), None
    if not path.exists() and (match := re.fullmatch(r"(.+)\[(.*)\]", source)):
        path = Path(match[1]).expanduser()
        if not (number := re.fullmatch(r":0*([1-9]\d*)", match[2])):
            raise TrainingError(f"The limit in {source!r} must be [:N] with N >= 1, got [{match[2]}].")
        limit = int(number[1])
    if path.is_dir():
        files, errors = images_below(path)
        for error in errors:
            warnings.warn(f"Skipped {error.filename}, which could not be read: {error.strerror}", stacklevel=2)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        raise TrainingError(f"A folder, list or stream is required, got the image file {source!r}.")
    elif path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise TrainingError(f"The list {source!r} must be a text file with one path per line.") from None
        files = [path.parent / Path(line.strip()).expanduser() for line in lines if line.strip()]
    else:
        raise TrainingError(f"There is no folder or list {source!r}.")
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise TrainingError(f"{source!r} has no images ({suffixes}).")
    return [os.path.abspath(file) for file in files[:limit]]


@dataclass
class TarShard:
    """`(name, content)` of the images in a tar file, wherever `fsspec` finds it."""

    url: str

    def __iter__(self) -> Iterator[tuple[str, bytes | Exception]]:
        with fsspec.open(self.url, "rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r|*") as archive:
                    for member in archive:
                        name = os.path.basename(member.name)
                        suffix = os.path.splitext(name)[1].lower()
                        if member.isfile() and suffix in IMAGE_SUFFIXES and not name.startswith("."):
                            yield f"{self.url}/{member.name}", archive.extractfile(member).read()
            except (tarfile.TarError, zlib.error, EOFError) as error:
                # What came before is kept. An error of the storage is not caught, or the rounds would differ.
                yield self.url, error


@dataclass
class DatasetShard:
    """`(name, content)` of the images in one shard of a `datasets` dataset."""

    dataset: Any
    name: str
    column: str
    index: int

    def __iter__(self) -> Iterator[tuple[str, bytes | Exception]]:
        shard = self.dataset.shard(self.dataset.num_shards, self.index)
        # By `iter`, since plain iteration would divide the shard among the loader's workers once more.
        for number, rows in enumerate(shard.iter(batch_size=1)):
            image = rows[self.column][0] or {}
            name = f"{self.name}/{self.index}/{number}"
            if image.get("path"):
                name += "/" + os.path.basename(image["path"])
            data = image.get("bytes")
            if data is None and image.get("path"):
                try:
                    with fsspec.open(image["path"], "rb") as file:
                        data = file.read()
                except FileNotFoundError as error:
                    data = error
            yield name, BadImage("missing") if data is None else data


def open_shards(source: str) -> list[TarShard] | list[DatasetShard]:
    prefix, _, name = source.partition(":")
    if f"{prefix}:" not in STREAM_PREFIXES:
        raise TrainingError(f"A stream is required, got {source!r}.")
    if prefix == "webdataset":
        urls = expand_braces(name)
        missing = next((url for url in urls if "://" not in url and not os.path.isfile(url)), None)
        if missing is not None:
            raise TrainingError(f"There is no tar file {missing!r}, which {source!r} names.")
        return [TarShard(url if "://" in url else os.path.abspath(url)) for url in urls]

    try:
        import datasets
    except ImportError:
        raise ImportError(
            f'{source!r} requires the library `datasets`: pip install "diffusers-invsr[training]"'
        ) from None
    split = "train"
    if match := re.fullmatch(r"(.+):(\w+)", name):
        name, split = match.groups()
    try:
        dataset = datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # of many kinds, from the Hub's client as well
        raise TrainingError(f"{source!r} could not be opened: {error}") from error
    columns = [key for key, feature in (dataset.features or {}).items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise TrainingError(f"{source!r} has no column of type Image, only {list(dataset.features or {})}.")
    dataset = dataset.select_columns(columns[0]).cast_column(columns[0], datasets.Image(decode=False))
    return [DatasetShard(dataset, f"{name}:{split}", columns[0], index) for index in range(dataset.num_shards)]


def expand_braces(text: str) -> list[str]:
    """`"a/{08..10}.tar"` to `"a/08.tar"`, `"a/09.tar"`, `"a/10.tar"`; `"{a,b}"` to `"a"`, `"b"`."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = bounds.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    if not choices or choices == [""]:
        raise TrainingError(f"The range {match[0]} in {text!r} is empty.")
    return [
        f"{text[: match.start()]}{choice}{rest}" for choice in choices for rest in expand_braces(text[match.end() :])
    ]
