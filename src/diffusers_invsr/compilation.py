"""TorchInductor with PyTorch's own kernel for GroupNorm, which on a CPU is faster than the one that it generates."""

from typing import Any

import torch
from torch import Tensor
from torch._inductor import list_mode_options
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.nn.functional import group_norm


@torch.library.custom_op("diffusers_invsr::group_norm", mutates_args=())
def opaque_group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm` as one operation, into which no compiler looks. It has no gradient."""
    return group_norm(input, num_groups, weight, bias, eps)


@opaque_group_norm.register_fake
def _(input: Tensor, num_groups: int, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    # The kernel keeps NHWC, and nothing else; PyTorch's own description of it has NCHW for both
    return torch.empty_like(input, memory_format=torch._prims_common.suggest_memory_format(input))


class KeepGroupNorm(CustomGraphPass):
    """Makes GroupNorm on a CPU one operation before Inductor takes it apart; where gradients are asked for it may."""

    def __call__(self, graph: torch.fx.Graph):
        if torch.is_grad_enabled():
            return
        for node in graph.find_nodes(op="call_function", target=group_norm):
            if node.meta["example_value"].device.type == "cpu":
                node.target = torch.ops.diffusers_invsr.group_norm.default

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))  # with what it compiled Inductor keeps it


def cpu_options(mode: str | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
    r"""
    The options with which Inductor suits a CPU.

    Args:
        mode (`str`, *optional*), options (`dict`, *optional*): As in `torch.compile`; options come first.

    Returns:
        `dict`: `options` of `torch.compile`, instead of these two.
    """
    return {"pre_grad_custom_pass": KeepGroupNorm()} | list_mode_options(mode or "default") | (options or {})
