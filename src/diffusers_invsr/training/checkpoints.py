"""Checkpoints that are either complete or absent, whenever the run is interrupted."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from ..files import file_digest
from .errors import TrainingError


logger = get_logger(__name__)

MANIFEST = "manifest.json"


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or `None`. Its files are compared with the digests in its manifest."""
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
    The checkpoints of a run: folders `checkpoint-<iteration>` in its output folder.

    A checkpoint is written under another name, with the digest of each file, and renamed when it is complete.

    Args:
        folder (`Path`): The run's output folder.
        accelerator (`Accelerator`): Every process takes part in saving, and gets the same answer when loading.
        keep (`int`, *optional*): How many are kept, the one just saved included; all by default.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int | None = None):
        self.folder, self.accelerator, self.keep = Path(folder), accelerator, keep

    def path(self, iteration: int) -> Path:
        """Where the checkpoint of an iteration is, or would be."""
        return self.folder / f"checkpoint-{iteration}"

    def list(self) -> list[Path]:
        """All checkpoints, oldest first."""
        numbered = [
            (int(match[1]), path)
            for path in self.folder.glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
        ]
        return [path for _, path in sorted(numbered)]

    @contextmanager
    def save(self, iteration: int) -> Iterator[Path]:
        r"""
        A context that saves a checkpoint: `with checkpoints.save(100) as folder:` gives every process the folder to
        write to. At its end the checkpoint replaces one that this iteration has already, perhaps a damaged one, and
        checkpoints that are too old or of later iterations are removed. After an exception nothing is saved.

        Args:
            iteration (`int`): Finished iterations.
        """
        checkpoint = self.path(iteration)
        temporary = self.folder / f".checkpoint-{iteration}.tmp"
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob(".checkpoint-*.tmp"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        yield temporary
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

    def remove_later(self, iteration: int):
        """
        Remove the checkpoints of later iterations, which a run has abandoned by resuming from an earlier one. Only
        the main process may call it.
        """
        for checkpoint in self.list():
            if int(checkpoint.name.rpartition("-")[2]) > iteration:
                logger.warning(f"Removing {checkpoint}: the run was resumed from an earlier checkpoint.")
                shutil.rmtree(checkpoint)

    def find(self, name: str) -> Path | None:
        r"""
        The checkpoint to resume from.

        Args:
            name (`str`): A checkpoint's folder, or `"latest"` for the newest one that is undamaged.

        Returns:
            `Path`: The checkpoint, or `None` if the latest is asked for and there are none.

        Raises:
            TrainingError: If the checkpoint that is named, or every one, is missing or damaged.
        """
        found, faults = None, []
        if self.accelerator.is_main_process:
            for candidate in self.list()[::-1] if name == "latest" else [Path(name)]:
                fault = damage(candidate) if candidate.is_dir() else "there is no such folder"
                if fault is None:
                    found = candidate
                    break
                faults.append(f"{candidate}: {fault}")
                if name == "latest":
                    logger.warning(f"Skipping the checkpoint {faults[-1]}.")
        found, faults = broadcast_object_list([found, faults])
        if found is None and faults:
            raise TrainingError(f"`resume={name!r}` has no undamaged checkpoint ({'; '.join(faults)}).")
        return found
