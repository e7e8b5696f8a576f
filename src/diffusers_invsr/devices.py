"""What suits a device, and what a network computes in."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from diffusers import ModelMixin


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
_DTYPES = WeakKeyDictionary()


def dtype_of(network: ModelMixin) -> torch.dtype:
    """
    `network.dtype`, but fast where it is asked for again and again: diffusers looks at all modules for casting by
    layers, which takes a UNet milliseconds each time.
    """
    first = next(module for module in network.modules() if module._parameters)
    # What changes with a conversion, and with casting by layers
    state = (next(iter(first._parameters.values())).dtype, hasattr(first, "_diffusers_hook"))
    known = _DTYPES.get(network)
    if known is None or known[0] != state:
        known = _DTYPES[network] = (state, network.dtype)
    return known[1]


@contextmanager
def in_float32(*networks: ModelMixin) -> Iterator[None]:
    """Run networks in float32 until the end of the block; afterwards they have their own dtypes again."""
    dtypes = [network.dtype for network in networks]
    try:
        for network in networks:
            torch.nn.Module.to(network, torch.float32)  # diffusers' own warns of what it may lose
        yield
    finally:
        for network, dtype in zip(networks, dtypes):
            torch.nn.Module.to(network, dtype)


def auto_dtype(device: torch.device | str) -> torch.dtype:
    r"""
    The dtype that is fastest on a device without trouble: bfloat16 where the device computes in it (CUDA from
    Ampere on; CPUs with AVX-512 BF16 or AMX), else float32. Not float16, in which a VAE can overflow.

    Args:
        device (`torch.device` or `str`): Where the pipeline is going to run.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):  # older ones only emulate it, slowly
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory() -> bool:
    r"""
    Have the C library keep the memory of tensors on the CPU for the next ones, until the process ends. Otherwise it
    returns large pieces to the system at once, and fetching them again, page by page, takes time wherever activations
    are large. What this saves and how much memory it holds is in `examples/benchmarks/README.md`. It has no effect
    in threads other than the main one; processes that are forked keep their memory, too.

    Returns:
        `bool`: Whether the C library can do so: glibc (most Linux systems) can.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return False
    # No piece is mapped by itself, and the heap is never cut
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
