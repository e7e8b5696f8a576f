"""What `InvSRPipeline.compile` does on a CPU: TorchInductor, but with PyTorch's own kernel for GroupNorm."""

import pytest
import torch
from torch import nn

from diffusers_invsr.compilation import cpu_options, opaque_group_norm


NHWC = torch.channels_last


def kernels_of(function, *inputs) -> tuple[torch.Tensor, set[str]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function(*inputs)
    return result, {event.key for event in profile.key_averages()}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    images = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(0))
    return {
        "NCHW": images,
        "NHWC": images.to(memory_format=NHWC),
        "bfloat16": images.bfloat16().to(memory_format=NHWC),
        "sequence": images.flatten(2),
        "sequence of NHWC": images.to(memory_format=NHWC).flatten(2),
        "one pixel": images[..., :1, :1],
        "every second column": images.to(memory_format=NHWC)[..., ::2],
    }


@pytest.mark.parametrize(
    "layout", ["NCHW", "NHWC", "bfloat16", "sequence", "sequence of NHWC", "one pixel", "every second column"]
)
@pytest.mark.parametrize("affine", [True, False])
def test_the_operation_is_group_norm_and_tells_the_compiler_its_strides(inputs, layout, affine):
    x = inputs[layout]
    weight, bias = (torch.linspace(start, 2, 8, dtype=x.dtype) if affine else None for start in (1, -2))
    expected = nn.functional.group_norm(x, 4, weight, bias, 1e-3)
    result = opaque_group_norm(x, 4, weight, bias, 1e-3)
    assert torch.equal(result, expected) and result.stride() == expected.stride()
    torch.library.opcheck(opaque_group_norm, (x, 4, weight, bias, 1e-3), test_utils=("test_schema", "test_faketensor"))


class Block(nn.Module):
    """As in a VAE. A class of its own, as Dynamo of PyTorch 2.13 does not compile those of PyTorch by themselves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_keeps_its_kernel_and_the_rest_is_compiled(dtype):
    block = Block().to(dtype, memory_format=NHWC)
    x = torch.randn(1, 3, 16, 16, dtype=dtype).to(memory_format=NHWC)
    with torch.no_grad():
        expected, eager = kernels_of(block, x)
        block.compile(options=cpu_options(), fullgraph=True)
        block(x)
        result, compiled = kernels_of(block, x)
    torch.testing.assert_close(result, expected)
    assert {"aten::native_group_norm", "aten::silu"} <= eager
    assert "aten::native_group_norm" in compiled and "aten::silu" not in compiled


def test_gradients_go_through_what_inductor_makes_of_it():
    block, x = Block(), torch.randn(1, 3, 16, 16)
    (expected,) = torch.autograd.grad(block(x).square().sum(), block.layers[1].weight)
    block.compile(options=cpu_options())
    (result,) = torch.autograd.grad(block(x).square().sum(), block.layers[1].weight)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert "aten::native_group_norm" not in kernels_of(block, x)[1]


@pytest.mark.parametrize("arguments", [{"mode": "max-autotune"}, {"options": {"epilogue_fusion": False}}])
def test_the_pipeline_compiles_so_with_arguments_of_torch_compile(pipe, arguments):
    pipeline = pipe.pipeline
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = pipeline.vae.decoder(latents)
        pipeline.compile(fullgraph=True, **arguments)
        pipeline.vae.decoder(latents)
        result, kernels = kernels_of(pipeline.vae.decoder, latents)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert "diffusers_invsr::group_norm" in kernels


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"mode": "fastest"}, "Unrecognized mode=fastest"),
        ({"options": {"speed": 2}}, "Unexpected optimization option"),
    ],
)
def test_what_inductor_does_not_know_is_refused_at_once(pipe, arguments, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        pipe.pipeline.compile(**arguments)
