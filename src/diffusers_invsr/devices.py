"""What suits a device."""

import torch


def auto_dtype(device: torch.device | str) -> torch.dtype:
    r"""
    The number type that is fastest on a device without trouble: bfloat16 where the device computes in it (CUDA from
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
