import pytest
import torch
import torch.nn.functional as F

from diffusers_invsr import resampling
from diffusers_invsr.resampling import enlarge
from diffusers_invsr.tiling import (
    TILE_WINDOWS,
    TileAxis,
    TileBlender,
    TileGrid,
    choose_overlap_and_window,
    even_tile_size,
    gaussian_window,
    raised_cosine_window,
)


@pytest.mark.parametrize(
    "length, overlap, starts",
    [
        (32, 16, [0]),
        (33, 16, [0, 8]),  # padded to 40; the last tile is moved back
        (56, 16, [0, 16, 24]),
        (64, 16, [0, 16, 32]),
        (64, 0, [0, 32]),
        (100, 8, [0, 24, 48, 72]),
    ],
)
def test_starts_cover_the_axis(length, overlap, starts):
    axis = TileAxis(length, 32, overlap, multiple=8)
    assert axis.starts == starts and axis.starts[-1] + 32 == axis.padded_length


@pytest.mark.parametrize("length", [2, 3, 5, 11, 20, 31])
def test_short_axis_is_reflected_on_both_ends(length):
    """Against torch's reflection padding, repeated until the tile is full."""
    axis = TileAxis(length, 32, 8, multiple=4)
    image = torch.arange(float(length))[None, None]
    while (current := image.shape[-1]) < 32:
        front = min((32 - current) // 2, current - 1)
        back = min(32 - current - front, current - 1)
        image = F.pad(image, (front, back), mode="reflect")
    assert axis.starts == [0] and axis.positions(0).tolist() == image[0, 0].tolist()


@pytest.mark.parametrize("size", [1, 2, 5, 8, 127, 128])
def test_gaussian_window(size):
    length = size + 1 if size % 2 == 0 else size
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    points = [torch.exp(torch.tensor(-((i - (length - 1) / 2) ** 2) / (2 * sigma**2))) for i in range(length)]
    torch.testing.assert_close(gaussian_window(size), torch.stack(points[length - size :]))


@pytest.mark.parametrize("size, ramp", [(1, 0), (8, 0), (8, 3), (128, 32), (128, 64)])
def test_raised_cosine_window(size, ramp):
    """Neighbours that share the ramp sum to 1, and beyond it the window is 1."""
    window = raised_cosine_window(size, ramp)
    torch.testing.assert_close(window[:ramp] + window[size - ramp :], torch.ones(ramp))
    torch.testing.assert_close(window[ramp : size - ramp], torch.ones(max(size - 2 * ramp, 0)))
    assert torch.equal(window, window.flip(0)) and (window.diff()[: size // 2 - 1] >= 0).all()


@pytest.mark.parametrize(
    "overlap, window, chosen",
    [
        (None, None, (8, "raised_cosine")),
        (None, "raised_cosine", (8, "raised_cosine")),
        # The published tiling, by either argument
        (None, "gaussian", (32, "gaussian")),
        (32, None, (32, "gaussian")),
        (40, None, (40, "gaussian")),
        (31, None, (31, "raised_cosine")),
        (0, None, (0, "raised_cosine")),
        (32, "raised_cosine", (32, "raised_cosine")),
        (8, "gaussian", (8, "gaussian")),
    ],
)
def test_defaults_of_overlap_and_window(overlap, window, chosen):
    assert choose_overlap_and_window(64, overlap, window) == chosen
    grid = TileGrid(torch.rand(1, 3, 80, 100), (320, 400), 4, 64, overlap, 4, window)
    assert all((axis.overlap, axis.window) == chosen for axis in (grid.rows, grid.columns))


@pytest.mark.parametrize("tile_size, overlap", [(4, 2), (12, 6), (16, 8), (48, 8), (64, 8), (128, 16), (256, 32)])
def test_default_overlap_grows_with_the_tile(tile_size, overlap):
    assert choose_overlap_and_window(tile_size, None, None) == (overlap, "raised_cosine")


@pytest.mark.parametrize(
    "length, multiple, side, count",
    [
        (20, 4, 96, 1),  # padded to three quarters
        (96, 4, 96, 1),
        (101, 4, 104, 1),
        (128, 16, 128, 1),
        (144, 4, 144, 1),
        (145, 4, 96, 2),
        (200, 4, 108, 2),
        (200, 16, 112, 2),
        (512, 4, 140, 4),
        (512, 16, 144, 4),
        (1024, 4, 144, 8),
    ],
)
def test_even_tiles_are_the_fewest_that_cover_the_axis(length, multiple, side, count):
    assert even_tile_size(length, 128, 16, multiple) == side
    assert len(TileAxis(length, side, 16, multiple).starts) == count


def test_even_tiles_stay_near_the_models_size_and_cover_every_axis():
    for length in range(2, 700):
        for tile_size, overlap, multiple in ((128, 16, 4), (128, 0, 16), (64, 8, 16), (128, 64, 4), (16, 8, 4)):
            side = even_tile_size(length, tile_size, overlap, multiple)
            axis = TileAxis(length, side, overlap, multiple)
            covered = [pixel for start in axis.starts for pixel in (start, start + side)]
            assert side % multiple == 0 and 3 * tile_size <= 4 * side and 8 * side <= 9 * tile_size
            assert covered[0] == 0 and covered[-1] == axis.padded_length >= length
            assert all(start + overlap <= end for start, end in zip(covered[2::2], covered[1:-1:2]))


@pytest.mark.parametrize("overlap, window", [(None, "gaussian"), (64, None), (80, None), (80, "raised_cosine")])
def test_tiles_of_the_published_tiling_keep_their_size(overlap, window):
    image = torch.rand(1, 3, 144, 512)
    grid = TileGrid(image, (576, 2048), 4, 128, overlap, 4, window, even=True)
    assert (grid.rows.tile_length, grid.columns.tile_length) == (128, 128)
    grid = TileGrid(image, (576, 2048), 4, 128, 16, 4, even=True)
    assert (grid.rows.tile_length, grid.columns.tile_length) == (144, 140)


@pytest.mark.parametrize("window", (None, *TILE_WINDOWS))
@pytest.mark.parametrize("overlap", (None, 0, 32, 100))
def test_without_tiles_overlap_and_window_have_no_effect(overlap, window):
    grid = TileGrid(torch.rand(1, 3, 32, 32), (128, 128), 4, None, overlap, 4, window)
    assert list(grid) == [(0, 0)] and torch.equal(grid.rows.weights(4)[0], torch.ones(128))


@pytest.mark.parametrize("window, even", [("gaussian", False), ("raised_cosine", False), ("raised_cosine", True)])
@pytest.mark.parametrize("size", [(20, 27), (32, 32), (37, 53), (64, 20), (36, 71), (70, 101)])
def test_blending_the_enlarged_tiles_gives_the_enlarged_image(size, window, even):
    """With the enlargement itself as the result, the seams must not show, whatever the overlap."""
    torch.manual_seed(0)
    image = F.interpolate(torch.rand(2, 3, 6, 6), size=size, mode="bilinear")
    expected = F.interpolate(image, scale_factor=4, mode="nearest")
    for overlap in (0, 8, 16, 28):
        grid = TileGrid(image, (4 * size[0], 4 * size[1]), 4, 32, overlap, 4, window, even)
        blender = TileBlender(grid, 3, 4)
        for corner in grid:
            lr, _ = grid.cut(*corner, slice(1, 2))
            blender.add(F.interpolate(lr, scale_factor=4, mode="nearest"), *corner)
        assert blender.tiles_left == 0
        torch.testing.assert_close(blender.sum, expected[1:])


@pytest.mark.parametrize("target", [(37, 53), (38, 60), (93, 133), (111, 159), (147, 211), (296, 424)])
def test_resampled_tiles_show_the_enlarged_image(target):
    torch.manual_seed(0)
    image = torch.rand(1, 3, 37, 53)
    grid = TileGrid(image, target, 4, 8, 2, 4)
    expected = F.interpolate(image, size=target, mode="bicubic", align_corners=False)
    blender = TileBlender(grid, 3, 4)
    for corner in grid:
        blender.add(grid.cut(*corner)[1], *corner)
    torch.testing.assert_close(blender.sum, expected, atol=1e-4, rtol=0)


def test_lr_tile_is_the_image_shrunk_to_the_models_scale():
    torch.manual_seed(0)
    image = F.interpolate(torch.rand(1, 3, 5, 5), size=(64, 96), mode="bicubic").clamp(0, 1)
    lr, _ = TileGrid(image, (64, 96), 4, None, 0, 4).cut(0, 0)  # x1: the predictor sees a quarter of the size
    expected = F.interpolate(image, size=(16, 24), mode="bicubic", antialias=True)
    torch.testing.assert_close(lr[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-5, rtol=0)


def test_native_and_resampled_paths_agree_inside():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 24, 24)
    grid = TileGrid(image, (96, 96), 4, None, 0, 4)
    lr, enlarged = grid.cut(0, 0)
    assert enlarged is None
    grid.native = False
    for ours, theirs in zip((lr, enlarge(lr, 4)), grid.cut(0, 0)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_tile_needs_no_more_of_the_image_than_it_shows(monkeypatch):
    converted = []
    monkeypatch.setattr(resampling, "to_float", lambda pixels: [converted.append(pixels.shape[-2:]), pixels][1])
    TileGrid(torch.rand(1, 3, 500, 600), (1000, 1200), 4, 64, 8, 4).cut(120, 80)
    assert converted and all(max(shape) < 64 * 2 + 10 for shape in converted)


@pytest.mark.parametrize("target", [(160, 160), (100, 120)])
def test_tiles_are_cut_and_blended_on_the_cpu_whatever_the_default_device(target):
    image = torch.rand(1, 3, 40, 40)
    with torch.device("meta"):
        grid = TileGrid(image, target, 4, 16, 4, 4)
        blender = TileBlender(grid, 3, 4)
        for corner in grid:
            lr, enlarged = grid.cut(*corner)
            blender.add(enlarge(lr, 4) if enlarged is None else enlarged, *corner)
        results = blender.sum, grid.enlarged_rows(0, target[0])
    assert all(result.device.type == "cpu" for result in results)


def test_resampling_is_exact_whatever_matrix_products_are():
    grid = TileGrid(torch.rand(1, 3, 40, 40), (100, 100), 4, None, 0, 4)
    expected = grid.cut(0, 0)[1]
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(grid.cut(0, 0)[1], expected)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("target", [(37, 53), (100, 91), (148, 212), (296, 1200)])
def test_enlarged_rows_are_those_of_antialiased_interpolation(target):
    torch.manual_seed(0)
    image = torch.rand(1, 3, 37, 53)
    grid = TileGrid(image, target, 4, None, 0, 4)
    rows = torch.cat([grid.enlarged_rows(0, 30), grid.enlarged_rows(30, target[0])], dim=-2)
    expected = F.interpolate(image, size=target, mode="bicubic", antialias=True)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=0)
