"""What `InvSRPipeline.compile` does on a CPU: TorchInductor, but with PyTorch's own kernel for GroupNorm."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from diffusers_invsr.compilation import KEEP_GROUP_NORM, keep_group_norm, opaque_group_norm


NHWC = torch.channels_last
HEADER = Path(sysconfig.get_path("include"), "Python.h")
needs_compiler = pytest.mark.skipif(
    not (shutil.which(torch._inductor.config.cpp.cxx[-1]) and HEADER.is_file()),
    reason="no C++ compiler, or no headers of Python",
)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kernels_of(function, *inputs) -> tuple[torch.Tensor, set[str]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function(*inputs)
    return result, {event.key for event in profile.key_averages()}


LAYOUTS = {
    "NCHW": lambda images: images,
    "NHWC": lambda images: images.to(memory_format=NHWC),
    "bfloat16": lambda images: images.bfloat16().to(memory_format=NHWC),
    "sequence": lambda images: images.flatten(2),
    "sequence of NHWC": lambda images: images.to(memory_format=NHWC).flatten(2),
    "one pixel": lambda images: images[..., :1, :1],
    "every second column": lambda images: images.to(memory_format=NHWC)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [True, False])
def test_the_operation_is_group_norm_and_tells_the_compiler_its_strides(layout, affine):
    x = LAYOUTS[layout](torch.randn(2, 8, 5, 7))
    weight, bias = (torch.linspace(start, 2, 8, dtype=x.dtype) if affine else None for start in (1, -2))
    expected = nn.functional.group_norm(x, 4, weight, bias, 1e-3)
    result = opaque_group_norm(x, 4, weight, bias, 1e-3)
    assert torch.equal(result, expected) and result.stride() == expected.stride()
    torch.library.opcheck(opaque_group_norm, (x, 4, weight, bias, 1e-3), test_utils=("test_schema", "test_faketensor"))


class Block(nn.Module):
    """As in a VAE. A class of its own, as `nn.Sequential(...).compile()` of PyTorch 2.13 compiles nothing."""

    def __init__(self):
        super().__init__()
        norm = nn.GroupNorm(4, 8, eps=0.1)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.SiLU(), nn.Conv2d(8, 3, 3))
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

    def forward(self, x):
        return self.layers(x)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_group_norm_keeps_its_kernel_and_the_rest_is_compiled(dtype, memory_format, mode):
    block = Block().to(dtype, memory_format=memory_format)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    images = [torch.randn(batch, 3, 16, 16, dtype=dtype).to(memory_format=memory_format) for batch in (1, 2, 3)]
    with mode():
        expected = [kernels_of(block, x) for x in images]
        block.compile(**keep_group_norm({"fullgraph": True}))
        for x in images:
            block(x)
        results = [kernels_of(block, x) for x in images]
    for (result, compiled), (reference, eager) in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, **tolerance)
        assert {"aten::native_group_norm", "aten::silu"} <= eager
        assert "aten::native_group_norm" in compiled and "aten::silu" not in compiled


@needs_compiler
def test_gradients_go_through_what_inductor_makes_of_it():
    block, x = Block(), torch.randn(1, 3, 16, 16)
    (expected,) = torch.autograd.grad(block(x).square().sum(), block.layers[1].weight)
    block.compile(**keep_group_norm({}))
    (result,) = torch.autograd.grad(block(x).square().sum(), block.layers[1].weight)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert "aten::native_group_norm" not in kernels_of(block, x)[1]


@needs_compiler
def test_what_was_compiled_is_found_again():
    """By another compilation of this process, and by another process in the cache, with the operation in it."""
    block, x = Block(), torch.randn(1, 3, 16, 16)
    with torch.no_grad(), fresh_cache():
        block.compile(**keep_group_norm({}))
        expected = block(x)
        block.compile(**keep_group_norm({}))
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(block(x), expected)
        torch._dynamo.reset()
        hits = counters["aot_autograd"]["autograd_cache_hit"]
        assert torch.equal(block(x), expected)
        assert counters["aot_autograd"]["autograd_cache_hit"] == hits + 1
        assert "aten::native_group_norm" in kernels_of(block, x)[1]


@pytest.mark.parametrize("device, replaced", [("cpu", True), ("meta", False)])
def test_other_devices_keep_what_inductor_makes(device, replaced):
    graph = torch.fx.Graph()
    node = graph.call_function(nn.functional.group_norm, (graph.placeholder("x"), 4))
    node.meta["example_value"] = torch.empty(1, 8, 2, 2, device=device)
    with torch.no_grad():
        KEEP_GROUP_NORM(graph)
    assert (node.target == torch.ops.diffusers_invsr.group_norm.default) is replaced


def test_arguments_stay_what_they_are(monkeypatch):
    expected = {"pre_grad_custom_pass": KEEP_GROUP_NORM} | torch._inductor.list_mode_options("max-autotune")
    result = keep_group_norm({"mode": "max-autotune", "fullgraph": True})
    assert result == {"mode": None, "fullgraph": True, "options": expected}
    own = {"options": {"pre_grad_custom_pass": None, "epilogue_fusion": False}}
    assert keep_group_norm(own)["options"] == own["options"]
    for arguments in ({"backend": "eager"}, {"mode": "default", "options": {"epilogue_fusion": False}}):
        assert keep_group_norm(arguments) == arguments
    monkeypatch.setattr(torch.compiler, "get_default_backend", lambda: "eager")
    assert keep_group_norm({"fullgraph": True}) == {"fullgraph": True}


@needs_compiler
@pytest.mark.slow
def test_the_pipeline_compiles_so(pipe):
    """And gives all options to each network, here the last one."""
    pipeline, latents = pipe.pipeline, torch.randn(1, 4, 8, 8)
    filtered = []

    def keep_all(guards) -> list[bool]:
        filtered.append(guards)
        return [True] * len(guards)

    with torch.no_grad():
        expected = pipeline.vae.decoder(latents)
        pipeline.compile(fullgraph=True, options={"epilogue_fusion": False, "guard_filter_fn": keep_all})
        pipeline.vae.decoder(latents)
        result, kernels = kernels_of(pipeline.vae.decoder, latents)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert "diffusers_invsr::group_norm" in kernels and filtered


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"mode": "fastest"}, "Unrecognized mode=fastest"),
        ({"options": {"speed": 2}}, "Unexpected optimization option"),
        ({"mode": "default", "options": {"epilogue_fusion": False}}, "Either mode or options"),
    ],
)
def test_what_pytorch_does_not_take_is_refused_at_once(pipe, arguments, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        pipe.pipeline.compile(**arguments)
    assert not pipe.pipeline.is_compiled
