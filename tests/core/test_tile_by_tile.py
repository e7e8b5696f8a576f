"""Tiles that do not fit into memory, or overflow."""

import pytest
import torch
from helpers import TILES, generator, needs_cuda, photo

from diffusers_invsr.tile_batches import Tile, TileBatches, is_out_of_memory


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


def tiles_of(*sides: int) -> list[Tile]:
    """Tiles of these sides, each of another image."""
    return [Tile(i, 0, 0, torch.zeros(1, 3, side, side), None, torch.zeros(2)) for i, side in enumerate(sides)]


def test_a_batch_that_is_put_back_comes_again_in_halves_and_so_do_the_others():
    batches, seen = TileBatches(tiles_of(4, 4, 4, 8, 8, 8, 4, 8), 4), []
    for tiles in batches:
        seen.append([tile.image for tile in tiles])
        if len(tiles) > 2:
            batches.put_back(tiles)
    assert seen == [[0, 1, 2, 6], [0, 1], [2, 6], [3, 4], [5, 7]]


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
        assert text.endswith(f"starting again with `tile_size={side}`.")


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


@pytest.fixture
def overflowing(pipe):
    """In float16, and the VAE's decoder overflows there."""
    pipe.pipeline.vae.register_to_config(force_upcast=False)
    pipe.pipeline.vae.decoder.conv_in.weight.mul_(3e4)
    pipe.pipeline.to(dtype=torch.float16)
    return pipe


def test_a_tile_that_does_not_fit_in_float32_becomes_smaller(overflowing, warnings):
    expected = overflowing(photo(40, 56), tile_size=16, num_steps=1)

    def hook(module, arguments):
        if arguments[0].dtype == torch.float32 and arguments[0].shape[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    overflowing.pipeline.unet.register_forward_pre_hook(hook)
    result = overflowing(photo(40, 56), tile_size=32, num_steps=1)
    torch.testing.assert_close(result, expected, atol=0.05, rtol=0)
    assert any("`tile_size=16`" in text for text in warnings())
    assert {overflowing.pipeline.unet.dtype, overflowing.pipeline.vae.dtype} == {torch.float16}


def test_an_interruption_ends_the_pass_in_float32_too(overflowing):
    calls = []

    def callback(pipeline, step, timestep, kwargs):
        calls.append(step)
        pipeline._interrupt = len(calls) == 5  # of four tiles, the first one of the second pass
        return {}

    result = overflowing(photo(), tile_size=16, tile_overlap=0, callback_on_step_end=callback)
    assert calls == [0] * 5 and result[..., :64, :64].max() > 0
    assert result[..., 64:, 64:].abs().max() == 0
    assert overflowing.pipeline.unet.dtype == torch.float16


def test_an_error_elsewhere_leaves_the_components_as_they_were(overflowing, monkeypatch):
    """Though the error is kept, and with it what was on its way."""

    def postprocess(*arguments):
        raise RuntimeError("no more of this")

    monkeypatch.setattr(overflowing.pipeline.image_processor, "postprocess", postprocess)
    with pytest.raises(RuntimeError, match="no more of this") as error:
        overflowing(photo(), tile_size=16)
    assert overflowing.pipeline.unet.dtype == overflowing.pipeline.vae.dtype == torch.float16
    del error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_damaged_weights_are_an_error_not_a_black_image(pipe, dtype):
    pipe.pipeline.vae.decoder.conv_out.bias.fill_(torch.nan)
    pipe.pipeline.to(dtype=dtype)
    with pytest.raises(FloatingPointError, match="not finite"):
        pipe(photo(), num_steps=1)


def test_batches_have_tiles_of_one_shape():
    tiles = tiles_of(4, 8, 4, 4, 8, 4, 4)
    assert [[tile.image for tile in batch] for batch in TileBatches(tiles, 2)] == [[0, 2], [1, 4], [3, 5], [6]]
    assert all(len(batch) == 1 for batch in TileBatches(tiles, 2, by_image=True))
