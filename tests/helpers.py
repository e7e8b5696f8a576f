"""What tests of several folders share."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FIXTURES = ROOT / "tests" / "fixtures"
TILES = {"tile_size": 16, "tile_overlap": 4, "num_steps": 2, "eta": 1.0}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(height: int = 32, width: int = 32, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Smooth colours `(batch, 3, height, width)` in [0, 1]."""
    noise = torch.rand(batch, 3, height // 8 + 2, width // 8 + 2, generator=generator(seed))
    return F.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 1)


def pixels(file: str | Path) -> np.ndarray:
    """The pixels of an image file."""
    return np.array(Image.open(file))


def reset_accelerate():
    """accelerate keeps its state for the life of a process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def run_command(*arguments, status: int = 0) -> str:
    """The output of a command of `diffusers-invsr`, run in this process, which must exit with the given status."""
    from diffusers_invsr.cli import app  # here: other helpers are used without the package too

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.output


def files_below(folder: str | Path) -> list[str]:
    """All files below a folder, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
