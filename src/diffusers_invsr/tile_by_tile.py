"""
How a pipeline works through the tiles of its images. Each stage hands its results on to the next one:

    draw_tiles        cuts tiles and draws their noise, when they are needed
    TileBatches       puts tiles of one shape together
    _enlarge_batches  has them enlarged, in halves where memory is too small
    fetch_results     brings results to the CPU, one batch late
    enlarge_tiles     repeats in float32 what overflowed
    blend             sums them up, and yields finished images

and `enlarge_images` starts all of it again with smaller tiles where a single one does not fit into memory.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby, product

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers.utils import logging
from tqdm.auto import tqdm

from .call_arguments import MAX_SCALE, MIN_SCALE, CallArguments
from .checks import is_auto
from .color_fix import apply_color_fix
from .devices import dtype_of, in_float32
from .group_norm import ExactGroupNorm
from .image_processor import InputImage
from .tile_batches import Tile, TileBatches, TileMemoryError, blend, fetch_results, is_out_of_memory
from .tiling import TileBlender, TileGrid


logger = logging.get_logger(__name__)


class TileByTileMixin:
    """Cuts images into tiles, has the pipeline's `enlarge_batch` work on them, and blends them."""

    def compile(self, **kwargs):
        r"""
        Compile the networks in place. From then on `tile_size="auto"` is the pipeline's own for every image, so that
        all tiles have one shape and no image compiles anything again, but for a last batch with fewer tiles. Where
        tiles had another size before, other noise is drawn and the image differs.

        Args:
            kwargs: Arguments of `torch.compile`, such as `mode="reduce-overhead"` for CUDA graphs.
        """
        options = kwargs.pop("options", None)
        for network in self._networks_to_compile:
            network.compile(**kwargs, options=options and dict(options))  # PyTorch takes entries out of it

    @property
    def is_compiled(self) -> bool:
        """Whether [`~InvSRPipeline.compile`] or `torch.compile(network)` made each shape of tiles a compilation."""
        return any(
            hasattr(network, "_orig_mod") or network._compiled_call_impl is not None
            for network in self._networks_to_compile
        )

    @property
    def _networks_to_compile(self) -> tuple[torch.nn.Module, ...]:
        return self.noise_predictor, self.unet, self.vae.encoder, self.vae.decoder

    def enlarge_images(
        self, images: list[InputImage], call: CallArguments, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """
        Enlarge images tile by tile. Where a single tile does not fit into memory, all images start again with smaller
        tiles, those that were yielded included.

        Yields:
            `tuple[int, torch.Tensor]`: Number of an image, and its pixels `(1, 3, height, width)` in [0, 1] or its
            latents, as soon as it is finished. Last come those that an interruption left unfinished.

        Raises:
            FloatingPointError: If a result is not finite in float32.
            torch.OutOfMemoryError: If the smallest tile does not fit into memory.
        """
        states = [generator.get_state() for generator in call.generators]
        while True:
            try:
                yield from self._enlarge_in_tiles(images, call, device)
                return
            except TileMemoryError as error:
                call = self._with_smaller_tiles(call, error)
            clear_device_cache(garbage_collection=True)  # only now: the error kept the attempt's tensors alive
            for generator, state in zip(call.generators, states):
                generator.set_state(state)

    def _enlarge_in_tiles(
        self, images: list[InputImage], call: CallArguments, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        grids = self.cut_into_tiles(images, call)
        blenders = {number: self.prepare_blender(grid, call) for numbers, grid in grids.items() for number in numbers}
        num_tiles = sum(blender.tiles_left for blender in blenders.values())
        with self.progress_bar(total=num_tiles * len(call.scheduler.timesteps)) as progress_bar:
            results = self.enlarge_tiles(self.draw_tiles(grids, call, device), call, device, progress_bar)
            for number, blended in blend(results, blenders):
                if call.color_fix is not None:
                    numbers, grid = next(item for item in grids.items() if number in item[0])
                    apply_color_fix(blended, partial(grid.enlarged_rows, image=number - numbers.start), call.color_fix)
                elif call.output_type != "latent":
                    blended.clamp_(0, 1)  # the weights of tiles sum to 1 but for rounding
                yield number, blended
                del blended  # or else memory holds it beside the next one

    def _with_smaller_tiles(self, call: CallArguments, error: TileMemoryError) -> CallArguments:
        """The call with tiles that are smaller than the one that did not fit; the error itself if there are none."""
        # The whole image or tiles larger than the default, then those of the default, then halves
        default = self.config.tile_size
        larger = (call.tile_size is None or is_auto(call.tile_size)) and default is not None and default < error.side
        size = default if larger else error.side // 2
        size -= size % self.size_multiple
        if size == 0:
            raise error
        logger.warning(f"A tile does not fit into memory: starting again with `tile_size={size}`.")
        overlap = None if call.tile_overlap is None else min(call.tile_overlap, size // 2)
        return replace(call, tile_size=size, tile_overlap=overlap)

    def cut_into_tiles(self, images: list[InputImage], call: CallArguments) -> dict[range, TileGrid]:
        r"""
        The tiles of all images, by the numbers of the images: images of one size and dtype that follow one
        another share a grid.

        Raises:
            ValueError: If `target_size` is not 1 to 8 times the size of an image.
        """
        grids = {}
        for _, members in groupby(range(len(images)), key=lambda i: (images[i].pixels.shape, images[i].pixels.dtype)):
            members = list(members)
            numbers = range(members[0], members[-1] + 1)
            pixels = [images[i].pixels for i in numbers]
            pixels = torch.stack(pixels) if len(pixels) > 1 else pixels[0][None]  # (B, 3, height, width)
            auto = is_auto(call.tile_size)
            grids[numbers] = TileGrid(
                pixels,
                self._target_size(tuple(pixels.shape[-2:]), call),
                self.config.scale,
                self.config.tile_size if auto else call.tile_size,
                call.tile_overlap,
                self.size_multiple,
                call.tile_window,
                even=auto and not self.is_compiled,
            )
        return grids

    def _target_size(self, size: tuple[int, int], call: CallArguments) -> tuple[int, int]:
        if call.target_size is None:
            scale = self.config.scale if call.scale is None else call.scale
            return tuple(int(side * scale + 0.5) for side in size)
        target = tuple(int(side) for side in call.target_size)
        if not all(MIN_SCALE * before <= after <= MAX_SCALE * before for before, after in zip(size, target)):
            raise ValueError(
                f"`target_size` must be {MIN_SCALE} to {MAX_SCALE} times the height and width of the image, {size},"
                f" got {target}."
            )
        return target

    def prepare_blender(self, grid: TileGrid, call: CallArguments) -> TileBlender:
        """Sums up the tiles of an image: `(1, 3, height, width)`, or latents with the padding."""
        if call.output_type == "latent":
            return TileBlender(grid, self.vae.config.latent_channels, self.latents_per_lr, crop=False)
        return TileBlender(grid, 3, self.config.scale)

    def draw_tiles(self, grids: dict[range, TileGrid], call: CallArguments, device: torch.device) -> Iterator[Tile]:
        """
        Cut tiles and draw their noise, tile by tile, so that results do not depend on how tiles are batched. Images
        come one after another; but where one generator serves several of one size, it draws the same tile of all of
        them at once, and all are on their way together. Without a generator, noise is drawn on `device`.
        """
        shared = isinstance(call.generator, torch.Generator)
        if call.generators:
            device = call.generators[0].device  # from which noise goes to the network's device with its batch
        for numbers, grid in grids.items():
            size = len(numbers) if shared else 1
            for first, (top, left) in product(numbers[::size], grid):
                in_grid = first - numbers.start
                lr, enlarged = grid.cut(top, left, slice(in_grid, in_grid + size))
                generator = call.generator if shared or call.generator is None else call.generator[first]
                noise = self.prepare_noise(size, *lr.shape[-2:], call.num_noise_maps, generator, device)
                for i in range(size):
                    part = slice(i, i + 1)
                    yield Tile(
                        first + i, top, left, lr[part], None if enlarged is None else enlarged[part], noise[:, part]
                    )

    def enlarge_tiles(
        self, tiles: Iterable[Tile], call: CallArguments, device: torch.device, progress_bar: tqdm
    ) -> Iterator[tuple[Tile, torch.Tensor]]:
        """
        Enlarge tiles batch by batch, fetched one batch late, so that the device never waits. Tiles whose result is not
        finite in half precision come last: a second pass computes them in float32.

        Yields:
            `tuple[Tile, torch.Tensor]`: A tile and its result `(1, channels, height, width)`, on the CPU.

        Raises:
            FloatingPointError: If a result is not finite in float32 either.
            TileMemoryError: If a single tile does not fit into memory.
        """
        networks = (self.noise_predictor, self.unet, self.vae)
        half = {dtype_of(network) for network in networks} - {torch.float32}
        # A callback gets, and may replace, one image's embeddings
        changes = () if call.callback_on_step_end is None else call.callback_tensors
        embeds = {"prompt_embeds": call.prompt_embeds, "negative_prompt_embeds": call.negative_prompt_embeds}
        by_image = any(embeds.get(name) is not None and len(embeds[name]) > 1 for name in changes)
        batches = TileBatches(tiles, call.tile_batch_size, by_image)
        overflowed = []
        for tile, result, is_finite in fetch_results(self._enlarge_batches(batches, call, device, progress_bar)):
            if is_finite:
                yield tile, result
            elif half:
                overflowed.append(tile)
            else:
                raise FloatingPointError("A tile is not finite: the weights may be damaged.")

        if overflowed:
            logger.warning(f"Tiles that are not finite in {half.pop()}: {len(overflowed)}. Computing them in float32.")
            progress_bar.total += len(overflowed) * len(call.scheduler.timesteps)
        with in_float32(*(networks if overflowed else ())):
            again = self._enlarge_batches(TileBatches(overflowed, 1), call, device, progress_bar)
            for tile, result, is_finite in fetch_results(again):
                if not is_finite:
                    raise FloatingPointError(
                        "The result of a tile is not finite in float32: the weights may be damaged."
                    )
                yield tile, result

    def _enlarge_batches(
        self, batches: TileBatches, call: CallArguments, device: torch.device, progress_bar: tqdm
    ) -> Iterator[tuple[list[Tile], torch.Tensor]]:
        """Results `(B, channels, height, width)`, on the device. A batch that does not fit into memory is halved."""
        for tiles in batches:
            if self.interrupt:
                return
            before = progress_bar.n
            try:
                results = self.enlarge_batch(tiles, call, device, progress_bar)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(tiles) == 1:
                    raise TileMemoryError(str(error), max(tiles[0].lr.shape[-2:])) from error
                results = None
            if results is not None:
                yield tiles, results
                continue
            # Outside of `except`, where the error would keep the tensors of the failed attempt alive
            clear_device_cache(garbage_collection=True)
            progress_bar.update(before - progress_bar.n)
            batches.put_back(tiles)
            logger.warning(f"{len(tiles)} tiles at once do not fit into memory: trying {batches.batch_size}.")

    def upcast_vae(self) -> AbstractContextManager[None]:
        """Runs a VAE in float32 whose configuration says that it overflows in float16."""
        overflows = dtype_of(self.vae) == torch.float16 and self.vae.config.get("force_upcast")
        return in_float32(self.vae) if overflows else in_float32()

    def exact_group_norm(self, device: torch.device) -> AbstractContextManager[None]:
        """Computes GroupNorm exactly on a CPU, where tiles are channels_last; what is compiled does so by itself."""
        return ExactGroupNorm() if device.type == "cpu" and not self.is_compiled else nullcontext()
