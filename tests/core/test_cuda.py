"""What only a CUDA device can show. Left out where there is none."""

import pytest
import torch
from helpers import EXAMPLES, FIXTURES, TILES, generator, needs_cuda, photo

from diffusers_invsr import TINY, InvSRPipeline
from diffusers_invsr.metrics import psnr


pytestmark = needs_cuda


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def tiny() -> InvSRPipeline:
    pipe = InvSRPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_reference_pipeline_gives_what_it_gives_on_the_cpu(pipe):
    expected = pipe(photo(40, 56), **TILES)
    pipe.pipeline.to("cuda")
    torch.testing.assert_close(pipe(photo(40, 56), **TILES), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype, at_least", [(torch.float32, 80), (torch.bfloat16, 40), (torch.float16, 55)])
@pytest.mark.parametrize("tile_batch_size", [1, 3])
def test_the_embedded_model_gives_what_it_gives_on_the_cpu(tiny, dtype, at_least, tile_batch_size):
    """Two images of two sizes, whose tiles share batches."""
    images = [photo(40, 56)[0], photo(72, 48)[0]]
    options = {"tile_size": 32, "tile_batch_size": tile_batch_size, "output_type": "np"}
    expected = tiny(images, **options, generator=generator()).images
    tiny.to("cuda", dtype)
    for result, reference in zip(tiny(images, **options, generator=generator()).images, expected, strict=True):
        assert psnr(255 * result, 255 * reference) > at_least


def test_nothing_waits_for_the_device_by_the_way(tiny):
    """Neither copies nor numbers that are read off it; only the blending does, by events."""
    tiny.to("cuda")
    expected = tiny(photo(72, 72), tile_size=32, output_type="pt", generator=generator()).images
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = tiny(photo(72, 72), tile_size=32, output_type="pt", generator=generator()).images
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_memory_that_is_really_short_halves_the_batch(tiny, warnings):
    tiny.to("cuda")
    options = {"tile_size": 64, "tile_overlap": 8, "output_type": "pt"}
    expected = tiny(photo(200, 200), **options, generator=generator()).images
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:  # of float32 activations at the HR size, a tile of 256x256 pixels takes 12 MB a layer
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200 * 2**20) / total)
        result = tiny(photo(200, 200), **options, tile_batch_size=16, generator=generator()).images
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert warnings()[0] == "16 tiles at once do not fit into memory: going on with 8."
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}])
def test_compiled_networks_give_the_same_and_compile_once(tiny, options):
    """With CUDA graphs too, whose outputs are overwritten by the next tile."""
    tiny.to("cuda", torch.bfloat16)
    images = [photo(40, 56)[0], photo(72, 48)[0]]
    settings = {"tile_size": 32, "output_type": "np"}
    expected = [tiny(image, **settings, generator=generator()).images for image in images]
    tiny.compile(**options)
    tiny(images[0], **settings)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for image, reference in zip(images, expected):
            assert psnr(255 * tiny(image, **settings, generator=generator()).images, 255 * reference) > 40


def test_degradation_draws_the_same_from_a_cpu_generator():
    degradation = pytest.importorskip("diffusers_invsr.training").Degradation()
    hr = torch.rand(4, 3, 96, 96, generator=generator())
    expected = degradation(hr, generator())
    result = degradation.to("cuda")(hr.cuda(), generator()).cpu()
    assert (result - expected).abs().mean() < 1e-3  # some values are rounded to another level


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_networks_that_wait_on_the_cpu_run_on_the_device(tiny, offload):
    expected = tiny(photo(40, 56), output_type="pt", generator=generator()).images
    getattr(tiny, offload)()
    assert tiny._execution_device.type == "cuda"
    result = tiny(photo(40, 56), output_type="pt", generator=generator()).images
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision, tolerance", [("no", 3e-3), ("bf16", 2e-2)])
def test_networks_learn_as_cuda_graphs_what_they_learn_without(
    tmp_path, monkeypatch, fresh_accelerator, precision, tolerance
):
    finetune = pytest.importorskip("finetune_in_pixels")
    read_log = pytest.importorskip("diffusers_invsr.training.logs").read_log
    command = [str(EXAMPLES / "training" / "configs" / "tiny_degradation.yaml"), "--model", "tiny"]
    command += ["--train_data", str(FIXTURES / "photos")]
    command += ["--crop_size", "64", "--batch_size", "2", "--num_workers", "0", "--max_iterations", "6"]
    command += ["--warmup_iterations", "0", "--log_every", "1", "--mixed_precision", precision]
    replays, replay, norms, step, losses = [], torch.cuda.CUDAGraph.replay, [], finetune.clipped_step, {}
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: [replays.append(graph), replay(graph)][1])
    monkeypatch.setattr(finetune, "clipped_step", lambda *args: norms.append(step(*args)) or norms[-1])
    for name, option in (("graphs", "--cuda_graphs"), ("eager", "--no_cuda_graphs")):
        finetune.main([*command, option, "--output_dir", str(tmp_path / name)])
        log = read_log(tmp_path / name / "log.jsonl")
        losses[name] = [record["mse"] for record in log if "mse" in record]
        assert len(replays) == 2 * 6  # forward and backward
    assert losses["graphs"] == pytest.approx(losses["eager"], rel=tolerance)
    assert norms[:6] == pytest.approx(norms[6:], rel=3 * tolerance)  # AdamW does not see the gradients' scale


def test_batches_that_are_prepared_aside_are_the_same(monkeypatch):
    """While the device is busy with the one before."""
    prefetch = pytest.importorskip("finetune_in_pixels").prefetch
    weight, device = torch.randn(1024, 1024, device="cuda"), torch.device("cuda")

    def prepare(number: int) -> tuple[torch.Tensor, ...]:
        batch = torch.full((1024, 1024), float(number), device="cuda")
        return batch, (batch @ weight).sum(dim=1)

    expected = [tuple(tensor.cpu() for tensor in prepare(number)) for number in range(4)]
    results = []
    for batch in prefetch(map(prepare, range(4)), device):
        for _ in range(50):
            weight @ weight
        results.append(tuple(tensor.clone() for tensor in batch))
    for result, reference in zip(results, expected, strict=True):
        for tensor, other in zip(result, reference):
            assert torch.equal(tensor.cpu(), other)
