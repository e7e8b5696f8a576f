"""HR crops for training (section 4.1 of the paper), from folders, lists and streams, in a reproducible order."""

import io
import itertools
import os
import signal
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..checks import is_integer
from ..image_files import read_image
from ..image_processor import InvSRImageProcessor
from .errors import TrainingError
from .sources import STREAM_PREFIXES, BadImage, check_sources, list_files, open_shards, reason_of


# First entry of every generator's seed, so that order, crops and shuffle buffer draw independent numbers.
ORDER, CROP, BUFFER = range(3)
NAMED_FILES = 3  # per reason, in a report

Sample = dict[str, Any]


def make_dataset(
    sources: Sequence[str],
    crop_size: int,
    seed: int = 0,
    crops_per_image: int | None = None,
    horizontal_flip: bool = True,
    shuffle_buffer: int = 256,
) -> "CropDataset | CropStream":
    r"""
    The dataset for the given sources: [`CropStream`] if they are streams, else [`CropDataset`].

    Args:
        sources (`list[str]`):
            Either any number of
            - folders, which are searched with all their subfolders, in the order of the paths;
            - text files with one path per line, relative to the text file's folder;

            each with an optional limit (`"ffhq[:20000]"`, the first 20,000 images or all if there are fewer);
            or any number of
            - `"webdataset:shards/{000..123}.tar"`, tar files on a local disk or wherever `fsspec` reads
              (`https://`, `s3://`, ...);
            - `"datasets:name"` or `"datasets:name:split"`, a dataset of the Hub or a local folder that the library
              `datasets` streams. Its first column of type `Image` is taken, and the split `train` where none is named.

            A source that is named twice counts twice.
        crop_size, seed, crops_per_image, horizontal_flip, shuffle_buffer: As in the datasets.

    Returns:
        [`CropDataset`] or [`CropStream`]: The dataset.

    Raises:
        TrainingError: If streams are mixed with folders or lists, or a source is missing or has no images.
        ValueError: If another argument is out of range.
    """
    sources = check_sources(sources)
    streamed = [source.startswith(STREAM_PREFIXES) for source in sources]
    if not any(streamed):
        return CropDataset(sources, crop_size, seed, crops_per_image, horizontal_flip)
    return CropStream(sources, crop_size, seed, crops_per_image, horizontal_flip, shuffle_buffer)


class CropDataset(Dataset):
    r"""
    Random HR crops of image files, as an endless sequence with random access.

    A sample depends only on the seed and its position, so a run resumes at the next position. Position `p` is in epoch
    `p // len(dataset)`, and every epoch is another permutation of the files. A file that is damaged, no image or
    smaller than the crop is replaced by the next good one of the permutation.

    A sample is a dictionary:
    - `"hr"`: uint8 tensor `(3, crop_size, crop_size)` in [0, 255]; transparency is dropped, 16 bits are scaled to 8;
    - `"key"`: identifies the file (path, size, modification time), the crop's box and the flip;
    - `"skipped"`: `(file, reason)` of each file that it replaces, for [`SkipReport`].

    Args:
        sources (`list[str]`): Folders and lists, as in [`make_dataset`].
        crop_size (`int`): Height and width of the crops in pixels.
        seed (`int`, defaults to 0): Seed of the order, the crops and the flips.
        crops_per_image (`int`, *optional*):
            Number of different crops per image, used in turn, epoch after epoch, so that a
            [`~diffusers_invsr.training.latent_cache.LatentCache`] pays off. By default every crop is a new one.
        horizontal_flip (`bool`, defaults to `True`): Whether crops are flipped with a probability of 1/2.

    Raises:
        TrainingError: If a source is missing, has no images or is a stream; from `dataset[position]`, if no file is
            usable.
        ValueError: If another argument is out of range.
    """

    def __init__(
        self,
        sources: Sequence[str],
        crop_size: int,
        seed: int = 0,
        crops_per_image: int | None = None,
        horizontal_flip: bool = True,
    ):
        self.cropper = _Cropper(crop_size, seed, crops_per_image, horizontal_flip)
        self.files = [file for source in check_sources(sources) for file in list_files(source)]
        self._order = (-1, np.empty(0, dtype=int))
        self._bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> Sample:
        _check_integer("position", position, 0)
        epoch, first = divmod(int(position), len(self.files))
        order, skipped = self._permutation(epoch), {}
        for index in itertools.chain(order[first:], order[:first]):
            file = self.files[index]
            try:
                if index in self._bad:
                    raise BadImage(self._bad[index])
                hr, crop = self.cropper(Path(file), os.path.basename(file), (position,), epoch)
                status = os.stat(file)
            except (BadImage, OSError) as error:  # OSError: the file has just gone
                self._bad[index] = skipped[file] = reason_of(error)
                continue
            key = f"{file}|{status.st_size}|{status.st_mtime_ns}|{crop}"
            return {"hr": hr, "key": key, "skipped": list(skipped.items())}
        raise TrainingError(_no_image(skipped))

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            rng = np.random.default_rng((ORDER, self.cropper.seed, epoch))
            self._order = (epoch, rng.permutation(len(self.files)))
        return self._order[1]


class CropStream(IterableDataset):
    r"""
    Random HR crops of images in tar files or in a `datasets` dataset, local or remote, read sequentially.

    The shards are divided among `parts` readers (processes times loader workers), and no two readers yield the same
    image. With fewer shards than readers, readers share a shard and take turns in it. A reader repeats its part
    endlessly, each time with its shards in another order and its images shuffled in a buffer. Readers with fewer
    images repeat them sooner, so the number of shards should be a multiple of the number of readers.

    The n-th sample depends only on the seed, the part and n: it is the n-th image, or the next good one. To resume, a
    reader skips what it has yielded without decoding it, at most two rounds whatever `start` is. This requires the
    same number of parts as before. Samples are those of [`CropDataset`], with the image's location in `"key"` and a
    checksum of its content.

    Args:
        sources (`list[str]`): Streams, as in [`make_dataset`].
        crop_size, seed, crops_per_image, horizontal_flip: As in [`CropDataset`].
        shuffle_buffer (`int`, defaults to 256): Encoded images that each reader holds in memory to shuffle.

    Raises:
        TrainingError: If a source could not be opened; while reading, if a part has no usable image.
        ValueError: If another argument is out of range.
        ImportError: If the library for a source is not installed.
    """

    def __init__(
        self,
        sources: Sequence[str],
        crop_size: int,
        seed: int = 0,
        crops_per_image: int | None = None,
        horizontal_flip: bool = True,
        shuffle_buffer: int = 256,
    ):
        self.cropper = _Cropper(crop_size, seed, crops_per_image, horizontal_flip)
        _check_integer("shuffle_buffer", shuffle_buffer, 1)
        self.shuffle_buffer = shuffle_buffer
        self.shards = [shard for source in check_sources(sources) for shard in open_shards(source)]

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        return self.samples() if worker is None else self.samples(worker.id, worker.num_workers)

    def samples(self, part: int = 0, parts: int = 1, start: int = 0) -> Iterator[Sample]:
        r"""
        The endless samples of one of `parts` readers.

        Args:
            part (`int`, defaults to 0): The reader, from 0 to `parts - 1`.
            parts (`int`, defaults to 1): Number of readers.
            start (`int`, defaults to 0): Samples that this reader has yielded before.
        """
        bad, skipped, waiting, first_bad = {}, {}, [], 0
        for position, (epoch, name, data) in enumerate(self._endless(part, parts, start), start):
            first_bad = first_bad if waiting else epoch
            waiting.append(position)
            try:
                if name in bad:
                    raise BadImage(bad[name])
                if isinstance(data, Exception):
                    raise BadImage(reason_of(data))
                crops = [self.cropper(io.BytesIO(data), name, (part, parts, position), epoch) for position in waiting]
            except BadImage as error:
                bad[name] = skipped[name] = str(error)
                if epoch > first_bad + 1:  # a whole round without one good image
                    raise TrainingError(_no_image(skipped)) from None
                continue
            # A bad image has a position too, at which this image replaces it: so positions are skipped undecoded.
            content = f"{name}|{len(data)}|{zlib.crc32(data):08x}"
            for hr, crop in crops:
                yield {"hr": hr, "key": f"{content}|{crop}", "skipped": list(skipped.items())}
                skipped = {}
            waiting = []

    def _endless(self, part: int, parts: int, start: int) -> Iterator[tuple[int, str, bytes | Exception]]:
        """`(epoch, name, content)` of each image from a position on."""
        epoch = 0
        while True:
            length = 0
            for length, (name, data) in enumerate(self._round(part, parts, epoch), 1):
                if length > start:
                    yield epoch, name, data
            if length == 0:
                raise TrainingError(
                    f"Reader {part + 1} of {parts} has no images in {len(self.shards)} shards: use fewer processes or"
                    " fewer loader workers."
                )
            # All rounds of a part have the same length, so the first one tells how many can be skipped.
            rounds, start = divmod(max(0, start - length), length)
            epoch += 1 + rounds

    def _round(self, part: int, parts: int, epoch: int) -> Iterator[tuple[str, bytes | Exception]]:
        count = len(self.shards)
        mine = np.arange(part % count, count, parts)  # one shard where there are fewer than parts
        turn, turns = part // count, len(range(part % count, parts, count))
        rng = np.random.default_rng((BUFFER, self.cropper.seed, part, epoch))
        buffer = []
        for shard in rng.permutation(mine):
            for item in itertools.islice(self.shards[shard], turn, None, turns):
                if len(buffer) < self.shuffle_buffer:
                    buffer.append(item)
                    continue
                place = rng.integers(len(buffer))
                yield buffer[place]
                buffer[place] = item
        yield from (buffer[place] for place in rng.permutation(len(buffer)))


def make_loader(
    dataset: CropDataset | CropStream,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    start_batch: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    r"""
    An endless loader of one process's micro-batches.

    Of a [`CropDataset`], micro-batch `n` of process `r` has the `batch_size` positions from
    `(n * num_processes + r) * batch_size` on: two processes see in one micro-batch each what one process sees in two,
    and a resumed run may have another number of workers. A run with a [`CropStream`] only continues exactly with the
    same number of processes and workers.

    Args:
        dataset (`CropDataset` or `CropStream`): What to read.
        batch_size (`int`): Images in a micro-batch.
        process_index (`int`, defaults to 0): This process.
        num_processes (`int`, defaults to 1): Number of processes.
        start_batch (`int`, defaults to 0): Micro-batches that this process has consumed already.
        num_workers (`int`, defaults to 0): Worker processes that prefetch; with 0 this process loads the images.
        pin_memory (`bool`, defaults to `False`): Whether batches are copied to pinned memory.

    Returns:
        `DataLoader`: Yields dictionaries with `"hr"` (uint8 `(batch_size, 3, crop_size, crop_size)` in [0, 255]),
        `"keys"` (a list) and `"skipped"` (of all samples). Every iteration over it starts at `start_batch`. Workers
        ignore SIGINT, so that the main process ends them.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_integer("batch_size", batch_size, 1)
    _check_integer("num_processes", num_processes, 1)
    _check_integer("process_index", process_index, 0)
    _check_integer("start_batch", start_batch, 0)
    _check_integer("num_workers", num_workers, 0)
    if process_index >= num_processes:
        raise ValueError(f"`process_index` must be less than `num_processes` ({num_processes}), got {process_index}.")
    if isinstance(dataset, CropStream):
        dataset = _StreamPart(dataset, batch_size, process_index, num_processes, start_batch)
        batching = {"batch_size": batch_size}
    else:
        batching = {"batch_sampler": _Positions(batch_size, process_index, num_processes, start_batch)}
    return DataLoader(
        dataset,
        **batching,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=_leave_process_group,
    )


@dataclass
class _Positions:
    """Positions in the stream of a [`CropDataset`] of each micro-batch of a process."""

    batch_size: int
    process_index: int
    num_processes: int
    start_batch: int

    def __iter__(self) -> Iterator[range]:
        for number in itertools.count(self.start_batch):
            first = (number * self.num_processes + self.process_index) * self.batch_size
            yield range(first, first + self.batch_size)


class _StreamPart(IterableDataset):
    """What one process reads of a [`CropStream`], in one loader worker or more."""

    def __init__(self, stream: CropStream, batch_size: int, process_index: int, num_processes: int, start_batch: int):
        self.stream = stream
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        # Micro-batch n is from reader n % count, but a loader asks its worker 0 first wherever it starts.
        reader = (self.start_batch + index) % count
        consumed = len(range(reader, self.start_batch, count))
        part = self.process_index * count + reader
        return self.stream.samples(part, self.num_processes * count, consumed * self.batch_size)


def _collate(samples: list[Sample]) -> dict[str, Any]:
    return {
        "hr": torch.stack([sample["hr"] for sample in samples]),
        "keys": [sample["key"] for sample in samples],
        "skipped": [skip for sample in samples for skip in sample["skipped"]],
    }


def _leave_process_group(worker: int):
    """Ctrl-C and launchers signal the whole group, but the training needs its workers until it has stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class SkipReport:
    """Which files were skipped and why, from the `"skipped"` of each batch."""

    def __init__(self):
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, skipped: Iterable[tuple[str, str]]):
        """Add `(file, reason)` of each file; a file counts once."""
        for file, reason in skipped:
            self.reasons.setdefault(file, reason)

    def summary(self) -> str:
        """One line with the number of files per reason and the names of a few."""
        kinds = []
        for reason, count in Counter(self.reasons.values()).most_common():
            names = sorted(os.path.basename(file) for file, why in self.reasons.items() if why == reason)
            more = ", ..." if count > NAMED_FILES else ""
            kinds.append(f"{count} {reason} ({', '.join(names[:NAMED_FILES])}{more})")
        return f"Skipped {len(self)} files: {', '.join(kinds)}"

    def state_dict(self) -> dict[str, Any]:
        return {"reasons": dict(self.reasons)}

    def load_state_dict(self, state_dict: dict[str, Any]):
        self.reasons = dict(state_dict["reasons"])


@dataclass
class _Cropper:
    """Takes a crop of an image file. Arguments as in [`CropDataset`]."""

    crop_size: int
    seed: int
    crops_per_image: int | None
    horizontal_flip: bool

    def __post_init__(self):
        _check_integer("crop_size", self.crop_size, 2)
        _check_integer("seed", self.seed, 0)
        if self.crops_per_image is not None:
            _check_integer("crops_per_image", self.crops_per_image, 1)

    def __call__(
        self, file: Path | io.BytesIO, name: str, position: tuple[int, ...], epoch: int
    ) -> tuple[torch.Tensor, str]:
        """The crop and its name, or a BadImage error."""
        if self.crops_per_image is not None:
            # Without the folder, so that moving the data does not change the crops.
            name = os.path.basename(name)
            position = (
                self.crops_per_image,
                zlib.crc32(name.encode(errors="surrogatepass")),
                epoch % self.crops_per_image,
            )
        rng = np.random.default_rng((CROP, self.seed, *position))
        size = self.crop_size
        try:
            image = read_image(file)[0]
            if min(image.size) < size:
                raise BadImage(f"smaller than {size}")
            left, top = (int(rng.integers(side - size + 1)) for side in image.size)
            flip = self.horizontal_flip and bool(rng.random() < 0.5)
            box = (left, top, left + size, top + size)
            if image.mode[0] in "IF":  # numbers that can be out of range, which must not depend on the crop
                pixels = InvSRImageProcessor().preprocess(image)[0].pixels[:, top : box[3], left : box[2]]
            else:
                pixels = InvSRImageProcessor().preprocess(image.crop(box))[0].pixels
        except (BadImage, MemoryError):
            raise
        except Exception as error:  # decoders raise many kinds
            raise BadImage(reason_of(error)) from error
        if pixels.is_floating_point():
            pixels = (255 * pixels).round().to(torch.uint8)
        pixels = pixels.flip(-1) if flip else pixels
        return pixels.contiguous().clone(), f"{left},{top},{size}|{'flipped' if flip else 'upright'}"


def _no_image(skipped: dict[str, str]) -> str:
    reasons = Counter(skipped.values()).most_common()
    return f"`sources` has no usable image: {', '.join(f'{count} {reason}' for reason, count in reasons)}."


def _check_integer(name: str, value: int, minimum: int):
    if not is_integer(value) or value < minimum:
        raise ValueError(f"`{name}` must be an integer greater than or equal to {minimum}, got {value!r}.")
