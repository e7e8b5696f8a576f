"""Tiles of an image: where they lie, what they show, and how their results are blended."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from .resampling import cubic_weights, resample, to_float


TILE_WINDOWS = ("gaussian", "raised_cosine")


def choose_overlap_and_window(tile_size: int | None, overlap: int | None, window: str | None) -> tuple[int, str]:
    r"""
    Fills in what is `None`. Tiles that overlap by half or more are blended by the published Gaussian window, and tiles
    with such a window overlap by half; all others are blended by a raised cosine, by default over an eighth of the
    tile but no less than 8 pixels (half of a tile below 16): the smallest tried with tiles of 64 at which
    `examples/benchmarks/measure_seams.py` finds no more of a seam than with the published tiling, on the embedded
    model. That one has no attention; with models that have attention, the answer may differ.

    Args:
        tile_size (`int`, *optional*): LR pixels of a tile; without tiles nothing overlaps.
        overlap (`int`, *optional*): LR pixels that neighbouring tiles share.
        window (`str`, *optional*): `"gaussian"` or `"raised_cosine"`.
    """
    if tile_size is None:
        return 0, window or "gaussian"
    half = tile_size // 2
    if window is None:
        window = "gaussian" if overlap is not None and overlap >= half else "raised_cosine"
    if overlap is None:
        overlap = half if window == "gaussian" else max(tile_size // 8, min(8, half))
    return overlap, window


def gaussian_window(size: int) -> torch.Tensor:
    """The published blending window of `size` output pixels: for even sizes, points 1 ... size of one longer by 1."""
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    length = size + 1 if size % 2 == 0 else size
    x = torch.arange(length, dtype=torch.float32, device="cpu") - (length - 1) / 2
    return torch.exp(-(x**2) / (2 * sigma**2))[length - size :]


def raised_cosine_window(size: int, ramp: int) -> torch.Tensor:
    """A window of `size` output pixels that is 1, with cosine ramps of `ramp` pixels at both ends."""
    x = torch.arange(size, dtype=torch.float32, device="cpu") + 0.5
    distance = torch.minimum(x, size - x)  # from the tile's nearer end
    return torch.sin(0.5 * torch.pi * (distance / max(ramp, 0.5)).clamp(max=1)) ** 2


@dataclass(frozen=True)
class TileAxis:
    r"""
    The tiles along one axis of an image, in LR pixels at the model's own scale.

    An axis shorter than the tile is padded by reflection on both ends, any other one at its end only, to a multiple of
    what the networks can divide.

    Args:
        length (`int`): Pixels of the image.
        tile_size (`int`, *optional*): Pixels of a tile, a multiple of `multiple`; `None` for the whole axis.
        overlap (`int`): Pixels that neighbouring tiles share.
        multiple (`int`): Divisor of the padded length.
        window (`str`): How tiles are blended: `"gaussian"` (published) or `"raised_cosine"` over the overlap.
    """

    length: int
    tile_size: int | None
    overlap: int
    multiple: int
    window: str = "gaussian"

    @cached_property
    def padded_length(self) -> int:
        return max(self.tile_size or 0, -(-self.length // self.multiple) * self.multiple)

    @cached_property
    def front(self) -> int:
        return (self.tile_size - self.length) // 2 if self.tile_size and self.length < self.tile_size else 0

    @cached_property
    def tile_length(self) -> int:
        return self.tile_size or self.padded_length

    @cached_property
    def starts(self) -> list[int]:
        """First pixel of each tile in the padded axis. The last tile is moved back to end with the axis."""
        last = self.padded_length - self.tile_length
        return [*range(0, last, self.tile_length - self.overlap), last]

    def positions(self, start: int, pixels_per_lr: int = 1) -> torch.Tensor:
        """Where the pixels of the tile from `start` lie in the image, in LR pixels (float64).

        LR pixels of the padding are reflected at the centres of the first and the last one, as often as it takes;
        with several pixels an LR pixel, these run backwards inside a reflected one.
        """
        period = max(2 * (self.length - 1), 1)
        first, float64 = start - self.front, {"dtype": torch.float64, "device": "cpu"}
        pixel = torch.arange(first, first + self.tile_length, **float64) % period
        mirrored = pixel > period - pixel
        inside = (torch.arange(pixels_per_lr, **float64) + 0.5) / pixels_per_lr - 0.5
        pixel, inside = pixel[:, None], inside[None]
        return torch.where(mirrored[:, None], period - pixel - inside, pixel + inside).flatten()

    def weights(self, pixels_per_lr: float) -> dict[int, torch.Tensor]:
        """Blending weights of each tile by its start; at every output pixel those of all tiles sum to 1."""
        factor = int(self.tile_length * pixels_per_lr)
        if self.window == "gaussian":
            window = gaussian_window(factor)
        else:
            window = raised_cosine_window(factor, int(self.overlap * pixels_per_lr))
        total = torch.zeros(int(self.padded_length * pixels_per_lr), dtype=window.dtype, device=window.device)
        offsets = {start: int(start * pixels_per_lr) for start in self.starts}
        for offset in offsets.values():
            total[offset : offset + factor] += window
        return {start: window / total[offset : offset + factor] for start, offset in offsets.items()}


def even_tile_size(length: int, tile_size: int, overlap: int, multiple: int) -> int:
    r"""
    Side of the fewest equal tiles of at most nine eighths of `tile_size` that cover an axis, and of at least three
    quarters: a network that was trained at `tile_size` should see about as much. 200 pixels are two tiles of 108
    rather than two of 128, of which the second starts at pixel 72.

    Args:
        length (`int`), tile_size (`int`), overlap (`int`), multiple (`int`): As in [`TileAxis`].
    """
    largest = tile_size + tile_size // 8 // multiple * multiple
    count = max(-(-(length - overlap) // (largest - overlap)), 1)
    # `count` tiles cover count * side - (count - 1) * overlap pixels
    side = max(-(-(length + (count - 1) * overlap) // count), 3 * tile_size // 4)
    return -(-side // multiple) * multiple


class TileGrid:
    r"""
    Cuts images of one size into overlapping tiles and blends the tiles' results (published tiling, with any overlap).

    A tile consists of what the two networks see: the LR image at the model's own scale, and its enlargement to the
    target size. At the model's own scale (`target = scale * size`) these are the given pixels and their bicubic
    enlargement tile by tile, exactly as published. At any other one, both are resampled from the given pixels.

    Args:
        pixels (`torch.Tensor`): Images of shape `(batch, 3, height, width)`, uint8 or float32 in [0, 1].
        target_size (`tuple[int, int]`): Output height and width.
        scale (`int`): The scale factor that the model was trained for.
        tile_size (`int`, *optional*): Tile side in LR pixels; `None` for the whole image at once.
        tile_overlap (`int`, *optional*): LR pixels that neighbouring tiles share.
        multiple (`int`): LR pixels that the networks can divide a side by.
        window (`str`, *optional*):
            How tiles are blended: `"gaussian"` (published) or `"raised_cosine"` over the overlap. The defaults of this
            and of `tile_overlap` are those of [`choose_overlap_and_window`].
        even (`bool`, defaults to `False`):
            Whether the tiles of an axis have the size that suits it, by [`even_tile_size`]; not with
            `window="gaussian"`, nor where they overlap by more than half.
    """

    def __init__(
        self,
        pixels: torch.Tensor,
        target_size: tuple[int, int],
        scale: int,
        tile_size: int | None,
        tile_overlap: int | None,
        multiple: int,
        window: str | None = None,
        even: bool = False,
    ):
        self.pixels = pixels
        self.target_size = target_size
        self.scale = scale
        size = tuple(pixels.shape[-2:])
        self.native = target_size == (size[0] * scale, size[1] * scale)
        overlap, window = choose_overlap_and_window(tile_size, tile_overlap, window)
        self.source_per_target = tuple(length / target for length, target in zip(size, target_size))
        lengths = [-(-length // scale) for length in target_size]
        sides = [tile_size, tile_size]
        if even and tile_size is not None and window != "gaussian" and overlap <= tile_size // 2:
            sides = [even_tile_size(length, tile_size, overlap, multiple) for length in lengths]
        self.rows, self.columns = (
            TileAxis(length, side, overlap, multiple, window) for length, side in zip(lengths, sides)
        )

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Corners `(top, left)` of the tiles in the padded image, row by row."""
        return ((top, left) for top in self.rows.starts for left in self.columns.starts)

    def cut(self, top: int, left: int, images: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tile at a corner of some of the images, in float32: LR `(batch, 3, h, w)` and enlarged
        `(batch, 3, scale * h, scale * w)`.

        At the model's own scale the latter is `None`: it is [`enlarge`] of the former, best done on the device.
        """
        pixels = self.pixels[images]
        if self.native:
            rows, columns = self.rows.positions(top).long(), self.columns.positions(left).long()
            return to_float(pixels.index_select(-2, rows).index_select(-1, columns)), None
        return self._resample(pixels, top, left, 1), self._resample(pixels, top, left, self.scale)

    def _resample(self, pixels: torch.Tensor, top: int, left: int, pixels_per_lr: int) -> torch.Tensor:
        weights = []
        for axis, start, ratio, length in zip(
            (self.rows, self.columns), (top, left), self.source_per_target, pixels.shape[-2:]
        ):
            source_per_lr = self.scale * ratio
            positions = (axis.positions(start, pixels_per_lr) + 0.5) * source_per_lr - 0.5
            stretch = max(source_per_lr / pixels_per_lr, 1.0)
            weights.append(cubic_weights(positions, length, a=-0.5 if stretch > 1 else -0.75, stretch=stretch))
        return resample(pixels, *weights)

    def enlarged_rows(self, start: int, stop: int, image: int = 0) -> torch.Tensor:
        """Rows `start` to `stop` of one of the images, enlarged to the target size by antialiased bicubic
        interpolation: `(1, 3, stop - start, target width)`, not clamped.
        """
        rows = self._enlarging_weights(start, stop, -2)
        return resample(self.pixels[image : image + 1], rows, self._enlarging_columns)

    @cached_property
    def _enlarging_columns(self) -> list[tuple[slice, torch.Tensor]]:
        return self._enlarging_weights(0, self.target_size[1], -1)

    def _enlarging_weights(self, start: int, stop: int, dim: int) -> list[tuple[slice, torch.Tensor]]:
        positions = (torch.arange(start, stop, dtype=torch.float64, device="cpu") + 0.5) * self.source_per_target[
            dim
        ] - 0.5
        return cubic_weights(positions, self.pixels.shape[dim], a=-0.5, truncate=True)


class TileBlender:
    r"""
    Weighted sum of an image's tiles on the CPU in float32. Each tile's weights are normalised beforehand, so the sum
    is finished as soon as the last tile is added. It takes no memory before the first one is.

    Args:
        grid ([`TileGrid`]): The tiles.
        channels (`int`): Channels of the results.
        pixels_per_lr (`float`):
            Result pixels per LR pixel: the scale factor for images, that over the VAE's for latents.
        crop (`bool`): Whether the padding is cut off.
    """

    def __init__(self, grid: TileGrid, channels: int, pixels_per_lr: float, crop: bool = True):
        self.pixels_per_lr = pixels_per_lr
        self.axes = (grid.rows, grid.columns)
        # Along an axis of one tile they are 1
        self.weights = [axis.weights(pixels_per_lr) if len(axis.starts) > 1 else None for axis in self.axes]
        self.fronts = [int(axis.front * pixels_per_lr) if crop else 0 for axis in self.axes]
        size = grid.target_size if crop else [int(axis.padded_length * pixels_per_lr) for axis in self.axes]
        self.size = (1, channels, *size)
        self.tiles_left = len(grid)

    @cached_property
    def sum(self) -> torch.Tensor:
        """The blended image `(1, channels, height, width)`; 0 where no tile was added yet."""
        return torch.zeros(self.size, dtype=torch.float32, device="cpu")

    def add(self, tile: torch.Tensor, top: int, left: int):
        """Add the result `(1, channels, height, width)` of the tile at a corner."""
        region, tile = self.sum, tile.to("cpu", torch.float32)
        for start, weights, front, dim in zip((top, left), self.weights, self.fronts, (-2, -1)):
            offset = int(start * self.pixels_per_lr) - front
            first, stop = max(-offset, 0), min(region.shape[dim] - offset, tile.shape[dim])
            region, tile = region.narrow(dim, offset + first, stop - first), tile.narrow(dim, first, stop - first)
            if weights is not None:
                tile = tile * weights[start][first:stop].reshape(-1, *[1] * (-1 - dim))
        region += tile
        self.tiles_left -= 1
