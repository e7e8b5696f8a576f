"""The installed program in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path


SCRIPT = (str(Path(sys.executable).parent / "diffusers-invsr"),)
MODULE = (sys.executable, "-m", "diffusers_invsr")


def start_program(home: Path, *arguments, program: tuple[str, ...] = SCRIPT, **variables) -> subprocess.Popen:
    """Start the program without this process's settings, caches and network; `variables` are its environment's."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {
        "HF_HOME": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_XET": "1",
        **variables,
    }
    return subprocess.Popen(
        [*program, *(str(argument) for argument in arguments)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A background job of a shell script ignores Ctrl-C, and so would the programs that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
