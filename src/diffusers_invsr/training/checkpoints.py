"""Checkpoints that are complete or do not exist, and are found again after any interruption."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from ..files import file_digest


logger = get_logger(__name__)

MANIFEST = "manifest.json"


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or `None`: its files are compared with the digests of its manifest."""
    try:
        digests = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, digest in digests.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file_digest(file) != digest:
            return f"{name} has changed since it was written"
    return None


class Checkpoints:
    r"""
    The checkpoints of a run: folders `checkpoint-<iteration>` below its output folder.

    A checkpoint is written under another name, with the digest of each file, and renamed when it is whole.

    Args:
        folder (`Path`): The run's output folder.
        accelerator (`Accelerator`): Every process takes part in saving and gets the same answer in loading.
        keep (`int`, *optional*): How many stay, up to the one that is saved; all by default.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int | None = None):
        self.folder, self.accelerator, self.keep = Path(folder), accelerator, keep

    def list(self) -> list[Path]:
        """All checkpoints, oldest first."""
        numbered = [
            (int(match[1]), path)
            for path in self.folder.glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
        ]
        return [path for _, path in sorted(numbered)]

    def save(self, iteration: int, write: Callable[[Path], None]) -> Path:
        r"""
        Save a checkpoint, and remove those that are too old and those of later iterations.

        Args:
            iteration (`int`): Finished iterations.
            write (`Callable[[Path], None]`): Called in every process with the folder to write to.

        Returns:
            `Path`: The checkpoint. It takes the place of one that this iteration already has, a damaged one perhaps.
        """
        checkpoint = self.folder / f"checkpoint-{iteration}"
        temporary = self.folder / f".checkpoint-{iteration}.tmp"
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob(".checkpoint-*.tmp"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        write(temporary)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            files = sorted(file for file in temporary.rglob("*") if file.is_file())
            digests = {str(file.relative_to(temporary)): file_digest(file) for file in files}
            (temporary / MANIFEST).write_text(json.dumps(digests, indent=2), encoding="utf-8")
            if checkpoint.is_dir():
                shutil.rmtree(checkpoint)
            temporary.rename(checkpoint)
            self.remove_later(iteration)
            for other in self.list()[: -self.keep] if self.keep else ():
                shutil.rmtree(other)
        self.accelerator.wait_for_everyone()
        return checkpoint

    def remove_later(self, iteration: int):
        """
        Remove the checkpoints of later iterations: they are of a course that the run has left, by going on from an
        earlier one. One process does it for all.
        """
        for checkpoint in self.list():
            if int(checkpoint.name.rpartition("-")[2]) > iteration:
                logger.warning(f"{checkpoint} is of a course that was left, and is removed.")
                shutil.rmtree(checkpoint)

    def find(self, name: str) -> Path | None:
        r"""
        The checkpoint to resume from.

        Args:
            name (`str`): A checkpoint's folder, or `"latest"` for the newest one that is undamaged.

        Returns:
            `Path`: The checkpoint, or `None` if the newest is asked for and there is none at all.

        Raises:
            ValueError: If the checkpoint that is named, or every one, is damaged or does not exist.
        """
        found, faults = [None], []
        if self.accelerator.is_main_process:
            candidates = self.list()[::-1] if name == "latest" else [Path(name)]
            for candidate in candidates:
                fault = damage(candidate) if candidate.is_dir() else "there is no such folder"
                if fault is None:
                    found = [candidate]
                    break
                faults.append(f"{candidate}: {fault}")
                if name == "latest":
                    logger.warning(f"The checkpoint {faults[-1]}; trying the one before.")
        found, faults = broadcast_object_list([found[0], faults])
        if found is None and faults:
            raise ValueError(
                f"`resume={name!r}` cannot be used, because no checkpoint is whole ({'; '.join(faults)})."
            )
        return found
