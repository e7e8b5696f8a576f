"""TorchInductor with PyTorch's own kernel for GroupNorm, which on a CPU is faster than the one that it generates."""

from typing import Any

import torch
from torch import Tensor
from torch._inductor import list_mode_options
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.nn.functional import group_norm


# With a flexible layout Inductor passes on what it has, mostly NHWC, instead of a copy in the layout that it traced
@torch.library.custom_op("diffusers_invsr::group_norm", mutates_args=(), tags=torch.Tag.flexible_layout)
def opaque_group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """
    `torch.nn.functional.group_norm`, by its names of parameters, as one operation into which no compiler looks. It has
    no gradient.
    """
    return group_norm(input, num_groups, weight, bias, eps)


@opaque_group_norm.register_fake
def _(input: Tensor, num_groups: int, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    # The kernel keeps NHWC and makes all else contiguous, which PyTorch's own fake kernel does not always do
    return torch.empty_like(input, memory_format=torch._prims_common.suggest_memory_format(input))


class KeepGroupNorm(CustomGraphPass):
    """
    Replaces GroupNorm on a CPU by one operation that Inductor does not take apart. Where gradients are asked for it
    does nothing, as the operation has none.
    """

    def __call__(self, graph: torch.fx.Graph):
        if torch.is_grad_enabled():
            return
        for node in graph.find_nodes(op="call_function", target=group_norm):
            value = node.meta.get("example_value")
            if value is not None and value.device.type == "cpu":
                node.target = torch.ops.diffusers_invsr.group_norm.default

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))  # part of the key under which Inductor caches what it compiled


KEEP_GROUP_NORM = KeepGroupNorm()  # one for all, or else Dynamo takes each for another compiler


def keep_group_norm(arguments: dict[str, Any]) -> dict[str, Any]:
    r"""
    The same compilation with PyTorch's GroupNorm on a CPU, if Inductor is what compiles.

    Args:
        arguments (`dict`): Keyword arguments of `torch.compile`.

    Returns:
        `dict`: The keyword arguments to give it instead.
    """
    mode, options = arguments.get("mode"), arguments.get("options")
    backend = arguments.get("backend") or torch.compiler.get_default_backend()
    if backend != "inductor" or None not in (mode, options):  # PyTorch refuses these two together
        return arguments
    options = {"pre_grad_custom_pass": KEEP_GROUP_NORM} | list_mode_options(mode or "default") | (options or {})
    return arguments | {"mode": None, "options": options}
