"""What suits a device."""

import subprocess
import sys

import pytest
import torch

from diffusers_invsr import auto_dtype, keep_freed_memory


def test_auto_dtype_is_one_that_the_device_computes_in():
    assert auto_dtype("mps") == torch.float32
    assert auto_dtype("cpu") in (torch.float32, torch.bfloat16)
    assert auto_dtype("cuda") in ((torch.float32, torch.bfloat16) if torch.cuda.is_available() else (torch.float32,))


COUNT_PAGE_FAULTS = """
import resource, sys, torch
from diffusers_invsr import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("this C library does not let one choose")
torch.ones(64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is on Linux")
def test_freed_memory_is_kept_for_the_next_tensors():
    """By how many pages the system has to give while a tensor of 64 MB comes and goes, after one of 256 MB."""
    faults = {}
    for memory in ("returned", "kept"):
        process = subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS, memory], text=True, capture_output=True)
        if "does not let one choose" in process.stderr:
            pytest.skip("this C library does not let one choose")
        assert process.returncode == 0, process.stderr
        faults[memory] = int(process.stdout)
    assert faults["kept"] < faults["returned"] / 10


def test_other_systems_keep_their_ways(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert not keep_freed_memory()
