"""Peak memory of a block of code: allocated by PyTorch on CUDA, resident on a CPU as Linux counts it."""

import ctypes
from pathlib import Path

import torch


STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def status(key: str) -> float:
    """A memory figure of this process in MB, as the kernel gives it: VmRSS now, VmHWM at its highest."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def return_free_memory():
    """Give freed memory back to the system, as far as the C library can. Otherwise it counts as held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakMemory:
    r"""
    Measures a `with` block: afterwards `growth` is the peak beyond what was held before, in MB (2**20 bytes), or
    `None` where the system has no such figure.

    Args:
        device (`torch.device`, defaults to `"cpu"`): The device whose memory counts.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device, self.growth = torch.device(device), None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2**20
        elif CLEAR_REFS.exists():
            CLEAR_REFS.write_text("5")  # resets VmHWM
            self.before = status("VmRSS")
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.growth = torch.cuda.max_memory_allocated(self.device) / 2**20 - self.before
        elif CLEAR_REFS.exists():
            self.growth = status("VmHWM") - self.before
