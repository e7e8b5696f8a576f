"""What becomes of tiles that do not fit into memory or whose result is not finite."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers.utils import logging

from .checks import OUT_OF_MEMORY, is_auto
from .devices import dtype_of
from .tile_batches import Tile, TilePool


logger = logging.get_logger(__name__)


class TileMemoryError(torch.OutOfMemoryError):
    """A single tile, of `side` LR pixels at most, does not fit into memory; smaller ones may."""

    def __init__(self, message: str, side: int):
        super().__init__(message)
        self.side = side


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU, had too little memory."""
    # accelerate leaves out errors of CUDA's own allocations and of CPUs on Windows, and knows others besides
    return should_reduce_batch_size(error) or any(sign in str(error) for sign in OUT_OF_MEMORY)


def enlarge_within_memory(
    enlarge: Callable[[list[Tile]], torch.Tensor], tiles: list[Tile], pool: TilePool
) -> torch.Tensor:
    r"""
    `enlarge(tiles)`, half of them at a time where memory is exhausted, and so on down to single tiles.

    Args:
        enlarge (`Callable`): Gives the results `(tiles, channels, height, width)`.
        tiles (`list[Tile]`): A batch.
        pool ([`TilePool`]): Where it comes from; its following batches get no larger than what fitted.

    Raises:
        TileMemoryError: If a single tile does not fit.
    """
    # Tiles that had to wait may be more than fit by now
    results, first, size = [], 0, min(len(tiles), pool.batch_size)
    while first < len(tiles):
        try:
            results.append(enlarge(tiles[first : first + size]))
            first += size
            continue
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise TileMemoryError(str(error), max(tiles[first].lr.shape[-2:])) from error
        # Outside of `except`, where the error would keep the tensors of the failed attempt alive
        clear_device_cache(garbage_collection=True)
        logger.warning(f"{size} tiles at once do not fit into memory: going on with {size // 2}.")
        size = pool.batch_size = size // 2
    return results[0] if len(results) == 1 else torch.cat(results)


def smaller_tiles_within_memory(call: Callable) -> Callable:
    """A pipeline's `__call__` that begins again with tiles of half the size where a single tile does not fit."""
    signature = inspect.signature(call)

    @wraps(call)
    def wrapper(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        generator = arguments["generator"]
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        states = [(item, item.get_state()) for item in generators if isinstance(item, torch.Generator)]
        while True:
            try:
                return call(*bound.args, **bound.kwargs)
            except TileMemoryError as error:  # not for want of memory elsewhere, such as for the output
                # The whole image or tiles larger than the default, then those of the default, then halves
                chosen, default = arguments["tile_size"], self.config.tile_size
                larger = (chosen is None or is_auto(chosen)) and default is not None and default < error.side
                size = default if larger else error.side // 2
                size -= size % self.size_multiple
                if size == 0:
                    raise
            clear_device_cache(garbage_collection=True)
            logger.warning(f"A tile does not fit into memory: beginning again with `tile_size={size}`.")
            arguments["tile_size"] = size
            if arguments["tile_overlap"] is not None:
                arguments["tile_overlap"] = min(arguments["tile_overlap"], size // 2)
            for item, state in states:
                item.set_state(state)

    return wrapper


class Float32Mixin:
    """A pipeline whose components run in float32 for a while."""

    def upcast(self) -> AbstractContextManager[None]:
        """Runs in float32 what does so from the start: a VAE that says of itself that it overflows in float16."""
        overflows = dtype_of(self.vae) == torch.float16 and self.vae.config.get("force_upcast")
        return self.in_float32("vae") if overflows else self.in_float32()

    @contextmanager
    def in_float32(self, *names: str) -> Iterator[None]:
        """Runs the components `names` in float32; afterwards they have their own number types again."""
        dtypes = {name: getattr(self, name).dtype for name in names}
        try:
            for name in names:
                torch.nn.Module.to(getattr(self, name), torch.float32)  # diffusers' own warns of what it may lose
            yield
        finally:
            for name, dtype in dtypes.items():
                torch.nn.Module.to(getattr(self, name), dtype)

    def redo_in_float32(self, enlarge: Callable[[list[Tile]], torch.Tensor], tile: Tile) -> torch.Tensor:
        r"""
        The result of a tile that is not finite in the number type of the components.

        Raises:
            FloatingPointError: If it is not finite in float32 either.
        """
        names = ("noise_predictor", "unet", "vae")
        dtypes = {getattr(self, name).dtype for name in names} - {torch.float32}
        if dtypes:
            logger.warning(f"A tile's result is not finite in {dtypes.pop()}: it is computed again in float32.")
            with self.in_float32(*names):
                result = enlarge([tile])
            if result.isfinite().all():
                return result
        raise FloatingPointError("A tile's result is not finite, even in float32: are the weights damaged?")
