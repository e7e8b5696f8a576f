"""What an evaluation keeps on disk to resume at the image where it was stopped."""

import json
import re
import shutil
from pathlib import Path

from ..files import write_atomically


SETTINGS_FILE = "settings.json"
RECORDS_FILE = "records.jsonl"
IMAGES_FOLDER = "images"
SHEETS_FOLDER, PLOT_FILE = "grids", "psnr.png"
TABLE_FILES = ("results.json", "results.csv", "results.md")
RUN_NAME = r"bicubic|\d+(-\d+)*|\d+-steps-from-\d+-[0-9a-f]{8}"


class Records:
    r"""
    The measurements of one run, appended to `records.jsonl` as they are made.

    Args:
        folder (`Path`): Folder of the run.

    Attributes:
        values (`dict[str, dict[str, float]]`): Values by image and metric.
        digests (`dict[str, dict[str, str]]`): SHA-256 of the measured files, by image and argument.
    """

    def __init__(self, folder: Path):
        self.file = folder / RECORDS_FILE
        self.values, self.digests = {}, {}
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        lines = text.splitlines()
        kept = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # incomplete, since the program was killed
                break
            kept.append(line)
            self._take(record)
        if len(kept) < len(lines) or (text and not text.endswith("\n")):
            write_atomically(self.file, "".join(line + "\n" for line in kept))

    def _take(self, record: dict):
        self.values.setdefault(record["image"], {}).update(record["values"])
        self.digests.setdefault(record["image"], {}).update(record["digests"])

    def append(self, image: str, values: dict[str, float], digests: dict[str, str]):
        """Add the values of an image. An infinite PSNR is written as `Infinity`, as Python's JSON does."""
        record = {"image": image, "values": values, "digests": digests}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self._take(record)


def open_folder(out: Path, settings: dict, overwrite: bool):
    r"""
    Begin an evaluation in a folder, or resume the one in it.

    Args:
        out (`Path`): The folder.
        settings (`dict`): What results depend on. It must be the same as when the evaluation was begun.
        overwrite (`bool`): Whether to remove an earlier evaluation.

    Raises:
        FileExistsError: If the folder contains something other than an evaluation.
        ValueError: If the settings differ; the message names the first that does.
    """
    file = out / SETTINGS_FILE
    earlier = None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))["evaluation"]
        except (OSError, ValueError, KeyError, TypeError):
            raise FileExistsError(f"`out` must be a new folder or that of an evaluation, got {out}.") from None
    if earlier is not None and overwrite:
        for path in out.iterdir():
            killed_at_once = re.fullmatch(RUN_NAME, path.name) and (path / IMAGES_FOLDER).is_dir()
            if (path / RECORDS_FILE).is_file() or killed_at_once or path.name == SHEETS_FOLDER:
                shutil.rmtree(path)
            elif path.is_file() and path.name in (PLOT_FILE, *TABLE_FILES):
                path.unlink()
        earlier = None
    if earlier is not None:
        for name in (*settings, *earlier):
            if settings.get(name) != earlier.get(name):
                raise ValueError(
                    f"`{name}` must be the same as when {out} was begun, {earlier.get(name)!r}, got"
                    f" {settings.get(name)!r}: choose another folder, or replace the evaluation with `overwrite`."
                )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"evaluation": settings}, indent=2) + "\n")
