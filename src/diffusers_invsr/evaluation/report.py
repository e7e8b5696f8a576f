"""The results of an evaluation, and their tables: JSON, CSV and Markdown."""

import csv
import io
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..files import write_atomically
from ..tables import markdown_table
from .metric_suite import METRICS
from .records import TABLE_FILES


@dataclass
class Run:
    r"""
    The measurements of one run: a schedule of the model, bicubic upscaling, or given results.

    Args:
        name (`str`): The schedule, such as `"200-100-50"`; `"bicubic"`; or `"results"`.
        timesteps (`list[int]`, *optional*): The schedule.
        images (`dict[str, dict[str, float]]`): Values by image and metric, without those that are unavailable.
        of_set (`dict[str, float]`): Values of metrics of the whole set.
        reasons (`dict[tuple[str | None, str], str]`):
            Why a value is missing, by image (`None` for the set) and metric.
    """

    name: str
    timesteps: list[int] | None = None
    images: dict[str, dict[str, float]] = field(default_factory=dict)
    of_set: dict[str, float] = field(default_factory=dict)
    reasons: dict[tuple[str | None, str], str] = field(default_factory=dict)

    def mean(self, metric: str) -> float | None:
        """Mean over the images that have a value, or the value of the whole set; `None` if there is none."""
        if METRICS[metric].of_set:
            return self.of_set.get(metric)
        values = [values[metric] for values in self.images.values() if metric in values]
        return sum(values) / len(values) if values else None

    def reason(self, metric: str) -> str | None:
        """Why the mean is missing, or is not over all images; `None` if neither is the case."""
        reasons = [text for (_, name), text in self.reasons.items() if name == metric]
        if not reasons or METRICS[metric].of_set:
            return reasons[0] if reasons else None
        count = sum(metric in values for values in self.images.values())
        return f"over {count} of {len(self.images)} images: {reasons[0]}" if count else reasons[0]


@dataclass
class Evaluation:
    r"""
    The results of an evaluation.

    Args:
        settings (`dict`): What the results depend on, and the folders of the images.
        metrics (`list[str]`): The requested metrics, names from `METRICS`.
        unavailable (`dict[str, str]`): Those that are unavailable, with the reason.
        runs (`list[Run]`): Bicubic upscaling, if it was measured, and each schedule or the given results.
        failed (`dict[tuple[str, str], str]`): Errors of images that failed, by run and image.
    """

    settings: dict
    metrics: list[str]
    unavailable: dict[str, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The content of `results.json`. Values that are missing or not finite are `None`, with a reason."""
        runs = {}
        for run in self.runs:
            means = {name: run.mean(name) for name in self.metrics}
            reasons = {}
            for name, value in means.items():
                reason = self.unavailable.get(name) or run.reason(name)
                if value is None or not math.isfinite(value) or reason:
                    reasons[name] = reason or "infinite: an image equals its HR image"
            runs[run.name] = {
                "timesteps": run.timesteps,
                "num_images": len(run.images),
                "mean": {name: _finite(value) for name, value in means.items()},
                "reasons": reasons,
                "images": {
                    image: {name: _finite(values.get(name)) for name in self.metrics if not METRICS[name].of_set}
                    for image, values in run.images.items()
                },
            }
        return {
            "settings": self.settings,
            "metrics": {
                name: {
                    "label": METRICS[name].label,
                    "better": METRICS[name].better,
                    "implementation": METRICS[name].implementation,
                    "unavailable": self.unavailable.get(name),
                }
                for name in self.metrics
            },
            "runs": runs,
            "failed": [{"run": run, "image": image, "error": text} for (run, image), text in self.failed.items()],
        }

    def to_csv(self) -> str:
        """One line per image, and one per run with the image name `mean`. Missing values are empty."""
        stream = io.StringIO()
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["run", "image", *self.metrics])
        for run in self.runs:
            for image, values in run.images.items():
                table.writerow([run.name, image, *(values.get(name, "") for name in self.metrics)])
            means = (run.mean(name) for name in self.metrics)
            table.writerow([run.name, "mean", *("" if value is None else value for value in means)])
        return stream.getvalue()

    def to_markdown(self, images: bool = True) -> str:
        """A table of means, one table of images per run, and footnotes on missing values."""
        notes = Footnotes()
        parts = [self._means(notes)]
        failed = Counter(run for run, _ in self.failed)
        parts += [f"{run}: {count} of the images failed and are not included." for run, count in failed.items()]
        if images:
            parts += [self._images(run, notes) for run in self.runs]
        parts += [notes.text] if notes.text else []
        return "\n\n".join(parts) + "\n"

    def _means(self, notes: "Footnotes") -> str:
        rows = []
        for run in self.runs:
            cells = []
            for name in self.metrics:
                reason = self.unavailable.get(name) or run.reason(name)
                cells.append(notes.cell(run.mean(name), METRICS[name].digits, reason))
            rows.append([run.name, str(len(run.images)), *cells])
        return markdown_table(["mean", "images", *(METRICS[name].heading for name in self.metrics)], rows)

    def _images(self, run: Run, notes: "Footnotes") -> str:
        names = [name for name in self.metrics if not METRICS[name].of_set]
        rows = []
        for image, values in run.images.items():
            reasons = [self.unavailable.get(name) or run.reasons.get((image, name)) for name in names]
            cells = (notes.cell(values.get(name), METRICS[name].digits, text) for name, text in zip(names, reasons))
            rows.append([image, *cells])
        return markdown_table([run.name, *(METRICS[name].heading for name in names)], rows)

    def save(self, out: Path):
        """Write `results.json`, `results.csv` and `results.md`."""
        tables = (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", self.to_csv(), self.to_markdown())
        for name, text in zip(TABLE_FILES, tables, strict=True):
            write_atomically(out / name, text)


class Footnotes:
    """Numbered footnotes below a table, each listed once."""

    def __init__(self):
        self.reasons = []

    def cell(self, value: float | None, digits: int, reason: str | None) -> str:
        """A formatted value, or `n/a`, with a reference to the footnote if there is a reason."""
        text = "n/a" if value is None else f"{value:.{digits}f}"
        if reason is None:
            return text
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"{text} [{self.reasons.index(reason) + 1}]"

    @property
    def text(self) -> str:
        return "\n".join(f"[{number}] {reason}  " for number, reason in enumerate(self.reasons, 1))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
