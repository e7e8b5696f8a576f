"""Run a function in a fresh interpreter: with another Hub, another cache, or without the package under test."""

import inspect
import json
import os
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any


TESTS = Path(__file__).parent
HELPERS = [str(TESTS), str(TESTS.parent / "examples" / "benchmarks")]


def run(function: Callable, *args, home: Path, hub: str | None = None, python: str | Path = sys.executable) -> Any:
    r"""
    Call a function in a subprocess.

    Args:
        function (`Callable`):
            Only its own source goes there, so it imports all that it needs. The helpers of the tests are on the
            path.
        args: Its arguments, which JSON can hold.
        home (`Path`): Folder for the Hub's cache and the function's files; its working directory.
        hub (`str`, *optional*): Address of the Hub. Without one, the client is offline.
        python (`str` or `Path`, *optional*): The interpreter.

    Returns:
        `Any`: What it returned, which JSON can hold.

    Raises:
        AssertionError: If it failed. The message is what it wrote.
    """
    home.mkdir(parents=True, exist_ok=True)
    dropped = ("PYTHONPATH", "HF_", "HUGGING", "TRANSFORMERS_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    env |= {"HF_HOME": str(home / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"OMP_NUM_THREADS": "1"}  # several threads only slow such small models down
    env |= {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_test"} if hub else {"HF_HUB_OFFLINE": "1"}
    program = f"""
import json, sys
sys.path += {HELPERS!r}
{inspect.getsource(function)}
result = {function.__name__}(*json.loads(sys.argv[1]))
print()
print(json.dumps(result))
"""
    command = [python, "-c", program, json.dumps(args)]
    process = subprocess.run(command, cwd=home, env=env, text=True, capture_output=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def make_environment_without(package: str, folder: Path) -> Path:
    r"""
    Make a virtual environment with links to all that is installed here, except one package.

    Args:
        package (`str`): Its import name.
        folder (`Path`): Where the environment is made.

    Returns:
        `Path`: Its interpreter.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    target = Path(subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip())
    sources = [Path(path) for path in (*site.getsitepackages(), site.getusersitepackages()) if path in sys.path]
    for entry in (entry for source in sources for entry in source.iterdir()):
        # A .pth file can put a checkout of the package on the path.
        if package not in entry.name and entry.suffix != ".pth" and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)
    return python
