"""The results of `benchmark.py`: what was measured, tables, JSON and a plot."""

import datetime
import json
import math
import platform
import statistics
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers
import torch
import transformers
from benchmark_common import speed_up
from benchmark_variants import Calls, Variant
from matplotlib.figure import Figure

import diffusers_invsr
from diffusers_invsr.tables import markdown_table


@dataclass
class MeasuredPart:
    """A component: its calls in one run, and the operations and the seconds of the first of them."""

    calls: Calls
    flops: int
    times: list[float] = field(default_factory=list)

    @property
    def flops_of_run(self) -> float:
        return self.flops / self.calls.batch * self.calls.items


@dataclass
class Measured:
    r"""
    A variant at a workload.

    Args:
        variant ([`Variant`]): The variant.
        parts (`dict[str, MeasuredPart]`): Its components by name.
        first_run (`float`): Seconds of the first run, including the compiler's time.
        peak_memory (`float`, *optional*): Growth in one run, in MB.
        weights (`float`): Weights in MB.
        psnr (`float`): Against the reference's result, in dB; infinite if they are equal.
        times (`list[float]`): Seconds of the runs.
    """

    variant: Variant
    parts: dict[str, MeasuredPart]
    first_run: float
    peak_memory: float | None
    weights: float
    psnr: float = math.inf
    times: list[float] = field(default_factory=list)

    @property
    def tiles(self) -> int:
        return self.parts["noise predictor"].calls.items

    @property
    def flops(self) -> float:
        return sum(part.flops_of_run for part in self.parts.values())


def environment(device: torch.device) -> dict:
    """What times depend on besides the code."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor() or platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "diffusers_invsr": diffusers_invsr.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def to_json(results: dict[str, list[Measured]], peaks: dict[str, float], environment: dict) -> dict:
    """All results with raw times. JSON has no infinity: `psnr` is null where the results are equal."""
    workloads = []
    for workload, variants in results.items():
        rows = []
        for measured in variants:
            median, low, high = speed_up(measured.times, variants[0].times)
            rows.append(
                {
                    "name": measured.variant.name,
                    "settings": asdict(measured.variant.settings),
                    "seconds": measured.times,
                    "speed_up": {"of_medians": median, "lowest": low, "highest": high},
                    "psnr": measured.psnr if math.isfinite(measured.psnr) else None,
                    "equal_to_reference": math.isinf(measured.psnr),
                    "tiles": measured.tiles,
                    "flops": measured.flops,
                    "first_run_seconds": measured.first_run,
                    "peak_memory_mb": measured.peak_memory,
                    "weights_mb": measured.weights,
                    "components": {
                        name: {
                            "calls": part.calls.count,
                            "batch": part.calls.batch,
                            "flops_per_call": part.flops,
                            "seconds_per_call": part.times,
                        }
                        for name, part in measured.parts.items()
                    },
                }
            )
        workloads.append({"workload": workload, "reference": variants[0].variant.name, "variants": rows})
    return {"environment": environment, "matmul_peak_flops": peaks, "workloads": workloads}


def _milliseconds(times: list[float]) -> list[str]:
    return [f"{1000 * statistics.median(times):.4g}", f"{1000 * min(times):.4g}–{1000 * max(times):.4g}"]


def _rate(flops: float, seconds: float, peak: float) -> list[str]:
    return [f"{flops / seconds / 1e12:.3g}", f"{flops / seconds / peak:.1%}"]


def to_markdown(results: dict[str, list[Measured]], peaks: dict[str, float], environment: dict) -> str:
    """Two tables for each workload: end to end, and by component."""
    text = [", ".join(f"{key} {value}" for key, value in environment.items() if value is not None)]
    text += [f"matrix products in {dtype}: {peak / 1e12:.3g} TFLOP/s" for dtype, peak in peaks.items()]
    for workload, variants in results.items():
        reference, rows, part_rows = variants[0], [], []
        for measured in variants:
            median, low, high = speed_up(measured.times, reference.times)
            peak = peaks[measured.variant.settings.dtype]
            psnr = "equal" if math.isinf(measured.psnr) else f"{measured.psnr:.1f}"
            rows.append(
                [
                    measured.variant.name,
                    str(measured.tiles),
                    *_milliseconds(measured.times),
                    f"{median:.2f} ({low:.2f}–{high:.2f})",
                    *_rate(measured.flops, statistics.median(measured.times), peak),
                    "n/a" if measured.peak_memory is None else f"{measured.peak_memory:.0f}",
                    f"{measured.weights:.0f}",
                    "reference" if measured is reference else psnr,
                ]
            )
            for name, part in measured.parts.items():
                part_rows.append(
                    [
                        measured.variant.name,
                        name,
                        f"{part.calls.count}",
                        f"{part.calls.batch}",
                        *_milliseconds(part.times),
                        f"{part.flops / 1e9:.4g}",
                        *_rate(part.flops, statistics.median(part.times), peak),
                    ]
                )
        times = ["ms", "range"]
        rates = ["TFLOP/s", "of peak"]
        headings = ["variant", "tiles", *times, f"speed-up over {reference.variant.name}", *rates]
        headings += ["peak memory beyond weights, MB", "weights, MB", "PSNR, dB"]
        text += [f"## {workload}", markdown_table(headings, rows)]
        text += [markdown_table(["variant", "component", "calls", "batch", *times, "GFLOP", *rates], part_rows)]
    return "\n\n".join(text) + "\n"


def make_plot(results: dict[str, list[Measured]]) -> Figure:
    """Median time of each variant with its range, one diagram per workload."""
    heights = [1 + 0.35 * len(variants) for variants in results.values()]
    figure = Figure(figsize=(8, sum(heights)), dpi=150, layout="constrained")
    diagrams = figure.subplots(len(results), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (workload, variants) in zip(diagrams, results.items()):
        medians = [statistics.median(measured.times) for measured in variants]
        below = [median - min(measured.times) for median, measured in zip(medians, variants)]
        above = [max(measured.times) - median for median, measured in zip(medians, variants)]
        bars = axes.barh([measured.variant.name for measured in variants], medians, xerr=[below, above], capsize=3)
        axes.bar_label(
            bars, [f"×{speed_up(measured.times, variants[0].times)[0]:.2f}" for measured in variants], padding=3
        )
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("seconds, median and range")
        axes.set_title(workload, loc="left")
    return figure


def save_report(results: dict[str, list[Measured]], peaks: dict[str, float], environment: dict, output: Path) -> str:
    """Write `benchmark.md`, `.json` and `.png` in a folder that appears when all are complete. Returns the tables."""
    output = output.absolute()
    markdown = to_markdown(results, peaks, environment)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        folder = Path(temporary, "new")
        folder.mkdir()
        (folder / "benchmark.md").write_text(markdown, encoding="utf-8")
        data = json.dumps(to_json(results, peaks, environment), indent=2, allow_nan=False)
        (folder / "benchmark.json").write_text(data + "\n", encoding="utf-8")
        make_plot(results).savefig(folder / "benchmark.png")
        folder.rename(output)
    return markdown
