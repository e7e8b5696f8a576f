"""Means of losses by starting timestep, and the log file of a run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from ..files import write_atomically
from ..scheduling_invsr import START_TIMESTEPS


class StepwiseMeter:
    r"""
    Means of per-image losses, over all images and by starting timestep, since they were last computed.

    Args:
        start_timesteps (`Sequence[int]`, *optional*):
            Starting timesteps, counted from 1; by default the published ones.
    """

    def __init__(self, start_timesteps: Sequence[int] = START_TIMESTEPS):
        self.start_timesteps, self.sums = tuple(start_timesteps), {}

    def add(self, name: str, values: torch.Tensor, timesteps: torch.Tensor):
        r"""
        Add the losses of a batch. Values that are not finite are ignored.

        Args:
            name (`str`): Name of the loss.
            values (`torch.Tensor`): Its value per image, `(B,)`.
            timesteps (`torch.Tensor`): Starting timesteps as schedule indices, `(B,)`.
        """
        sums = self.sums.setdefault(name, torch.zeros(len(self.start_timesteps), 2, dtype=torch.float64))
        values, timesteps = values.detach().double().cpu(), timesteps.cpu()
        for row, start in zip(sums, self.start_timesteps):
            chosen = values[(timesteps == start - 1) & values.isfinite()]
            row += torch.tensor([chosen.sum(), len(chosen)])

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes, `name` and `name/<start>`, of what was added since the last call."""
        means = {}
        for name, sums in self.sums.items():
            # MPS has no float64
            sums = accelerator.reduce(sums.float().to(accelerator.device)).cpu().double()
            total, count = sums.sum(dim=0).tolist()
            means[name] = total / count if count else math.nan
            means |= {f"{name}/{start}": (s / n).item() for start, (s, n) in zip(self.start_timesteps, sums) if n}
        self.sums = {}
        return means

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.sums)

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        self.sums = dict(state)


class RunLog:
    r"""
    `log.jsonl`: one JSON object per line, each with its `iteration`. A value that is not finite is `null`.

    Args:
        file (`Path`): The file; it is appended to.
        iteration (`int`, *optional*):
            Where the run resumes. Later lines, left by a run that was killed, are removed; by default all are.
    """

    def __init__(self, file: Path, iteration: int | None = None):
        self.file = file
        kept = [] if iteration is None else read_log(file, iteration)
        write_atomically(file, "".join(json.dumps(record) + "\n" for record in kept))

    def append(self, iteration: int, values: dict[str, float]):
        """Write a line with these values by name."""
        # JSON has no NaN
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"iteration": iteration, **values}) + "\n")


def read_log(file: Path, last_iteration: float = math.inf) -> list[dict[str, float]]:
    """Records of a `log.jsonl` up to an iteration, without a last line that was cut off when the run was killed."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["iteration"] <= last_iteration:
            records.append(record)
    return records


def validation_table(records: Sequence[dict[str, float]]) -> str:
    """A Markdown table for the model card of the first and the last validation of a log, or an empty text."""
    validations = [record for record in records if any(key.startswith("psnr_y/") for key in record)]
    if not validations:
        return ""
    first, last = validations[0], validations[-1]
    # LPIPS is missing where a part of the run had no network; a value that was not finite is None
    names = [key for key in first if key != "iteration" and None not in (first[key], last.get(key))]
    rows = [f"| iteration | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for record in (first, last):
        rows.append(f"| {record['iteration']} | {' | '.join(f'{record[name]:.4f}' for name in names)} |")
    return "\n".join(rows)
