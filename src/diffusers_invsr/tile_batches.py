"""Tiles of all images on their way through the networks: pooled into batches, sent to the device, fetched, blended."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from .resampling import enlarge


@dataclass
class Tile:
    r"""
    One tile of one image.

    Args:
        lr (`torch.Tensor`): What the noise predictor sees, `(1, 3, h, w)` in [0, 1], on the CPU.
        enlarged (`torch.Tensor`, *optional*): What the VAE sees; `None` where it is the enlargement of `lr`.
        noise (`torch.Tensor`): From [`~InvSRPipeline.prepare_noise`], `(maps, 1, channels, height, width)`.
        image (`int`): Number of the image in the call.
        blend (`Callable`): Takes the result `(1, channels, height, width)`; returns whether the image is complete.
    """

    lr: torch.Tensor
    enlarged: torch.Tensor | None
    noise: torch.Tensor
    image: int
    blend: Callable[[torch.Tensor], bool]


class TilePool:
    r"""
    Puts tiles of one shape together, whichever image they are of. Iterating gives lists of `batch_size` tiles, and
    what is left over at the end.

    Args:
        tiles (`Iterable[Tile]`): The tiles; they are made when they are needed.
        batch_size (`int`): Tiles in a list. It may be lowered meanwhile.
    """

    def __init__(self, tiles: Iterable[Tile], batch_size: int):
        self.tiles, self.batch_size = tiles, batch_size

    def __iter__(self) -> Iterator[list[Tile]]:
        waiting = {}
        for tile in self.tiles:
            key = (tile.lr.shape, tile.enlarged is None)
            waiting.setdefault(key, []).append(tile)
            if len(waiting[key]) >= self.batch_size:
                yield waiting.pop(key)
        for tiles in waiting.values():
            while tiles:
                batch, tiles = tiles[: self.batch_size], tiles[self.batch_size :]
                yield batch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device; from pinned memory, without waiting, if that is a CUDA device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(tiles: list[Tile], scale: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LR images, enlarged images and noise of tiles of one shape, as batches on the device."""
    lr = to_device(torch.cat([tile.lr for tile in tiles]), device)
    if tiles[0].enlarged is None:
        enlarged = enlarge(lr, scale)
    else:
        enlarged = to_device(torch.cat([tile.enlarged for tile in tiles]), device)
    if device.type == "cpu":  # where convolutions are faster so; what they return is laid out alike
        lr, enlarged = (image.contiguous(memory_format=torch.channels_last) for image in (lr, enlarged))
    noise = to_device(torch.cat([tile.noise for tile in tiles], dim=1), device)
    return lr, enlarged, noise


def select(embeds: torch.Tensor | None, tiles: list[Tile]) -> torch.Tensor | None:
    """Embeddings `(tiles, tokens, width)` of tiles' images, from those of all images or of each; copies, as callbacks
    may change them."""
    if embeds is None:
        return None
    if len(embeds) == 1:
        return embeds.repeat(len(tiles), 1, 1)
    # Not by a list of indices: copying it to the device would wait for the batch before
    return torch.cat([embeds[tile.image : tile.image + 1] for tile in tiles])


class TileResults:
    r"""
    Fetches results without waiting for the device, and while it computes the next ones, blends them and hands on the
    images that are complete.

    Args:
        redo (`Callable`): Computes a tile again whose result is not finite.
        on_complete (`Callable`): Takes the number of an image whose tiles are all blended.
    """

    def __init__(self, redo: Callable[[Tile], torch.Tensor], on_complete: Callable[[int], None]):
        self.redo, self.on_complete = redo, on_complete
        self._on_the_way = None

    def put(self, tiles: list[Tile], results: torch.Tensor):
        """Start fetching `results` `(tiles, channels, height, width)`, and blend those that were put before."""
        # NaN and infinity survive in a sum, which takes one pass
        finite = results.sum(dim=(1, 2, 3), dtype=torch.float32).isfinite()
        event, fetched = None, (results, finite)
        if results.device.type == "cuda":
            host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in fetched]
            for target, tensor in zip(host, fetched):
                target.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(results.device))
        else:
            host = [tensor.cpu() for tensor in fetched]
        before, self._on_the_way = self._on_the_way, (tiles, *host, event)
        self._blend(before)

    def flush(self):
        """Blend what is still on its way."""
        before, self._on_the_way = self._on_the_way, None
        self._blend(before)

    def _blend(self, fetched: tuple | None):
        if fetched is None:
            return
        tiles, results, finite, event = fetched
        if event is not None:
            event.synchronize()
        for tile, result, is_finite in zip(tiles, results.split(1), finite.tolist()):
            if tile.blend(result if is_finite else self.redo(tile).cpu()):
                self.on_complete(tile.image)
