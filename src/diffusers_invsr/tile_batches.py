"""Tiles of all images on their way through the networks: put into batches, sent to the device, fetched, blended."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from accelerate.utils.memory import should_reduce_batch_size

from .checks import OUT_OF_MEMORY
from .resampling import enlarge
from .tiling import TileBlender


class TileMemoryError(torch.OutOfMemoryError):
    """A single tile, of `side` LR pixels at most, does not fit into memory; smaller ones may."""

    def __init__(self, message: str, side: int):
        super().__init__(message)
        self.side = side


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU, had too little memory."""
    # accelerate leaves out errors of CUDA's own allocations and of CPUs on Windows, and knows others besides
    return should_reduce_batch_size(error) or any(text in str(error) for text in OUT_OF_MEMORY)


@dataclass
class Tile:
    r"""
    One tile of one image.

    Args:
        image (`int`): Number of the image in the call.
        top (`int`), left (`int`): Corner of the tile in the padded image, in LR pixels.
        lr (`torch.Tensor`): What the noise predictor sees, `(1, 3, h, w)` in [0, 1], on the CPU.
        enlarged (`torch.Tensor`, *optional*): What the VAE sees; `None` where it is the enlargement of `lr`.
        noise (`torch.Tensor`): From [`~InvSRPipeline.prepare_noise`], `(maps, 1, channels, height, width)`.
    """

    image: int
    top: int
    left: int
    lr: torch.Tensor
    enlarged: torch.Tensor | None
    noise: torch.Tensor


class TileBatches:
    r"""
    Puts tiles of one shape together, whichever image they are of. Iterating gives lists of `batch_size` tiles, and
    what is left over at the end.

    Args:
        tiles (`Iterable[Tile]`): The tiles; they are cut when they are needed.
        batch_size (`int`): Tiles in a list.
        by_image (`bool`, defaults to `False`): Whether tiles of different images stay apart.
    """

    def __init__(self, tiles: Iterable[Tile], batch_size: int, by_image: bool = False):
        self.tiles, self.batch_size, self.by_image = tiles, batch_size, by_image
        self._waiting = {}

    def __iter__(self) -> Iterator[list[Tile]]:
        for tile in self.tiles:
            waiting = self._waiting_with(tile)
            waiting.append(tile)
            while len(waiting) >= self.batch_size:
                yield self._take(waiting)
        for waiting in self._waiting.values():
            while waiting:
                yield self._take(waiting)

    def put_back(self, tiles: list[Tile]):
        """Give back a batch that does not fit into memory: it comes again, in halves, and so do all after it."""
        self._waiting_with(tiles[0])[:0] = tiles
        self.batch_size = len(tiles) // 2

    def _waiting_with(self, tile: Tile) -> list[Tile]:
        key = (tile.lr.shape, tile.enlarged is None, tile.image if self.by_image else None)
        return self._waiting.setdefault(key, [])

    def _take(self, waiting: list[Tile]) -> list[Tile]:
        batch, waiting[:] = waiting[: self.batch_size], waiting[self.batch_size :]
        return batch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device; from pinned memory, without waiting, if that is a CUDA device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(tiles: list[Tile], scale: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LR images `(B, 3, h, w)`, enlarged images `(B, 3, H, W)` and noise `(maps, B, channels, height, width)` of tiles
    of one shape, on the device."""
    lr = to_device(torch.cat([tile.lr for tile in tiles]), device)
    if tiles[0].enlarged is None:
        enlarged = enlarge(lr, scale)
    else:
        enlarged = to_device(torch.cat([tile.enlarged for tile in tiles]), device)
    if device.type == "cpu":  # where convolutions are faster so; what they return is laid out alike
        lr, enlarged = (image.contiguous(memory_format=torch.channels_last) for image in (lr, enlarged))
    noise = to_device(torch.cat([tile.noise for tile in tiles], dim=1), device)
    return lr, enlarged, noise


def embeds_of(tiles: list[Tile], embeds: torch.Tensor | None) -> torch.Tensor | None:
    """Embeddings `(B, tokens, width)` of the tiles' images, from those of all images or of each; copies, as callbacks
    may change them."""
    if embeds is None:
        return None
    if len(embeds) == 1:
        return embeds.repeat(len(tiles), 1, 1)
    # Not by a list of indices: copying it to the device would wait for the batch before
    return torch.cat([embeds[tile.image : tile.image + 1] for tile in tiles])


def fetch_results(batches: Iterable[tuple[list[Tile], torch.Tensor]]) -> Iterator[tuple[Tile, torch.Tensor, bool]]:
    r"""
    Fetch results one batch late, so that the device computes the next batch meanwhile.

    Args:
        batches (`Iterable`): Tiles, and their results `(B, channels, height, width)` on the device.

    Yields:
        `tuple[Tile, torch.Tensor, bool]`: Each tile, its result `(1, channels, height, width)` on the CPU, and whether
        that is finite.
    """
    on_the_way = None
    for batch in chain(batches, [None]):
        arrived, on_the_way = on_the_way, None if batch is None else _start_fetching(*batch)
        del batch  # or else memory holds its results until there are the next ones
        if arrived is None:
            continue
        tiles, results, finite, event = arrived
        if event is not None:
            event.synchronize()
        yield from zip(tiles, results.split(1), finite.tolist())


def _start_fetching(tiles: list[Tile], results: torch.Tensor) -> tuple:
    # NaN and infinity survive in a sum, which takes one pass
    finite = results.sum(dim=(1, 2, 3), dtype=torch.float32).isfinite()
    if results.device.type != "cuda":
        return tiles, results.cpu(), finite.cpu(), None
    host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in (results, finite)]
    for target, tensor in zip(host, (results, finite)):
        target.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(results.device))
    return tiles, *host, event


def blend(
    results: Iterable[tuple[Tile, torch.Tensor]], blenders: dict[int, TileBlender]
) -> Iterator[tuple[int, torch.Tensor]]:
    r"""
    Blend results, and hand on each image as soon as its last tile is blended.

    Args:
        results (`Iterable`): Tiles and their results `(1, channels, height, width)`.
        blenders (`dict[int, TileBlender]`): That of each image; they are taken out with their images.

    Yields:
        `tuple[int, torch.Tensor]`: Number of an image and its pixels or latents `(1, channels, height, width)`. Last
        come those of which tiles are missing, after an interruption.
    """
    for tile, result in results:
        blenders[tile.image].add(result, tile.top, tile.left)
        if blenders[tile.image].tiles_left == 0:
            yield tile.image, blenders.pop(tile.image).sum
    while blenders:
        number = min(blenders)
        yield number, blenders.pop(number).sum
