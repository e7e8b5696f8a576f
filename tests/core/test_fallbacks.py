"""Tiles that do not fit into memory, or overflow."""

import pytest
import torch
from helpers import TILES, generator, needs_cuda, photo

from diffusers_invsr.fallbacks import enlarge_within_memory, is_out_of_memory
from diffusers_invsr.tile_batches import Tile, TilePool


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def limit_memory(module: torch.nn.Module, images: int, latents: int) -> list[tuple[int, int]]:
    """Let a module run out of memory with more images, or larger ones; returns what it was called with."""
    seen = []

    def hook(module, arguments):
        count, side = arguments[0].shape[0], arguments[0].shape[-1]
        seen.append((count, side))
        if count > images or side > latents:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    module.register_forward_pre_hook(hook)
    return seen


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_batch_is_halved_until_it_fits(pipe, warnings, images):
    expected = pipe(photo(40, 56), **TILES)
    seen = limit_memory(pipe.pipeline.unet, images, 8)
    result = pipe(photo(40, 56), **TILES, tile_batch_size=8)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    failures = [count for count, _ in seen if count > images]
    assert failures == [8, 4, 2][: 3 if images == 1 else 2]  # and never again
    assert [f"{count} tiles at once" in text for count, text in zip(failures, warnings())] == [True] * len(failures)


def test_tiles_that_waited_get_no_larger_batch_than_what_fitted():
    sides = [4, 4, 4, 8, 8, 8, 4, 8]
    tiles = [Tile(torch.zeros(1, 3, side, side), None, torch.zeros(2), i, print) for i, side in enumerate(sides)]
    pool, seen = TilePool(tiles, 4), []

    def enlarge(batch):
        seen.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.cat([torch.full((1, 1), tile.image) for tile in batch])

    results = [enlarge_within_memory(enlarge, batch, pool).flatten().tolist() for batch in pool]
    assert results == [[0, 1, 2, 6], [3, 4, 5, 7]]
    assert seen == [4, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "tile_size, size, sides",
    [
        (None, (40, 56), [56, 32, 16]),
        (None, (24, 24), [24, 12]),
        ("auto", (40, 56), [32, 16]),
        ("auto", (36, 36), [36, 32, 16]),
        (32, (40, 56), [32, 16]),
    ],
)
def test_a_tile_is_halved_until_it_fits(pipe, warnings, tile_size, size, sides):
    expected = pipe(photo(*size), tile_size=sides[-1], num_steps=2)
    pipe.pipeline.register_to_config(tile_size=32)
    seen = limit_memory(pipe.pipeline.unet, 1, 8)
    result = pipe(photo(*size), tile_size=tile_size, num_steps=2)
    # The noise is that of a call with these tiles from the start
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    assert [2 * side for _, side in seen[: len(sides)]] == sides and seen[-1] == (1, sides[-1] // 2)
    for text, side in zip(warnings(), sides[1:], strict=True):
        assert text.endswith(f"beginning again with `tile_size={side}`.")


def test_an_image_that_fits_in_no_tile_is_an_error(pipe):
    limit_memory(pipe.pipeline.unet, 1, 0)
    with pytest.raises(torch.OutOfMemoryError):
        pipe(photo(), tile_size=16)


@pytest.mark.parametrize(
    "message, expected",
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be reported later", True),
        ("MPS backend out of memory (MPS allocated: 17.95 GB)", True),
        ("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: 1 bytes.", True),
        ("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory: 1 bytes.", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_messages_of_devices_without_memory(message, expected):
    assert is_out_of_memory(RuntimeError(message)) == expected


def test_memory_that_is_short_elsewhere_is_not_helped_by_smaller_tiles(pipe, warnings, monkeypatch):
    def postprocess(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(pipe.pipeline.image_processor, "postprocess", postprocess)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        pipe(photo(), tile_size=16)
    assert not warnings()


def test_other_errors_pass(pipe):
    def hook(module, arguments):
        raise RuntimeError("shapes differ")

    pipe.pipeline.unet.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="shapes differ"):
        pipe(photo(), **TILES, tile_batch_size=4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("force_upcast", [False, True])
def test_a_vae_that_overflows_in_float16(pipe, warnings, force_upcast, device):
    vae = pipe.pipeline.vae
    vae.register_to_config(force_upcast=force_upcast)
    vae.decoder.conv_in.weight.mul_(3e4)  # the norm after it takes the factor out again
    expected = pipe(photo(), **TILES)
    pipe.pipeline.to(device, torch.float16)
    with torch.autocast(device, enabled=False):
        latents = torch.randn(1, 4, 8, 8, generator=generator()).to(device)
        assert not pipe.pipeline.decode_image(latents).isfinite().all()
    result = pipe(photo(), **TILES)
    torch.testing.assert_close(result, expected, atol=0.05, rtol=0)
    assert vae.dtype == torch.float16 and pipe.pipeline.unet.dtype == torch.float16
    assert bool(warnings()) != force_upcast  # the VAE's own configuration knows better than to try


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_damaged_weights_are_an_error_not_a_black_image(pipe, dtype):
    pipe.pipeline.vae.decoder.conv_out.bias.fill_(torch.nan)
    pipe.pipeline.to(dtype=dtype)
    with pytest.raises(FloatingPointError, match="not finite, even in float32"):
        pipe(photo(), num_steps=1)


def test_pool_puts_tiles_of_one_shape_together():
    sides = [4, 8, 4, 4, 8, 4, 4]
    tiles = [Tile(torch.zeros(1, 3, side, side), None, torch.zeros(2), i, print) for i, side in enumerate(sides)]
    assert [[tile.image for tile in batch] for batch in TilePool(tiles, 2)] == [[0, 2], [1, 4], [3, 5], [6]]
    pool = TilePool(tiles, 4)
    batches = []
    for size, batch in zip((2, 1, 1, 1, 1), pool):  # lowered after each batch
        batches.append([tile.image for tile in batch])
        pool.batch_size = size
    assert batches == [[0, 2, 3, 5], [1, 4], [6]]
    pool, seen = TilePool(tiles[:4] + tiles[5:], 8), []
    for batch in pool:
        seen += [tile.image for tile in batch]
        pool.batch_size = max(pool.batch_size // 4, 1)
    assert sorted(seen) == [0, 1, 2, 3, 5, 6]
