"""The paper's tables: its test sets and schedules, with the published figures beside those of this run.

    python examples/research/reproduce_paper.py --sets sets --output reproduced

The sets are `sets/ImageNet-Test`, `sets/RealSR` and `sets/RealSet80`, each with the folder `lq` and, where there are
HR images, `gt`. Sets that are missing are left out. `reproduce_paper.md` says where to get them. The same command
resumes a stopped run. Needs `pip install ".[metrics]"` and, for the published weights, a network connection.
"""

import argparse
from pathlib import Path

import torch

from diffusers_invsr import TINY, InvSRPipeline, auto_dtype, convert
from diffusers_invsr.evaluation import METRICS, Evaluation, Sampling, evaluate
from diffusers_invsr.evaluation.evaluate import schedule_name
from diffusers_invsr.files import write_atomically


# Tables of the paper. The ablation of schedules is compared on ImageNet-Test.
PUBLISHED = {
    "ImageNet-Test": {
        (200,): {"lpips": 0.2517, "niqe": 4.38, "clipiqa": 0.709, "musiq": 72.29},
        (250, 200, 150, 100, 50): {"psnr_y": 22.70, "lpips": 0.2844, "niqe": 4.88, "clipiqa": 0.673},
        (250, 150, 50): {"psnr_y": 22.92, "lpips": 0.2762, "niqe": 4.80, "clipiqa": 0.682},
        (150, 100, 50): {"psnr_y": 23.84, "lpips": 0.2575, "niqe": 4.22, "clipiqa": 0.702},
        (250,): {"psnr_y": 23.84, "lpips": 0.2575, "niqe": 4.53, "clipiqa": 0.713},
        (100,): {"psnr_y": 24.66, "lpips": 0.2450, "niqe": 4.06, "clipiqa": 0.691},
    },
    "RealSR": {(200,): {"niqe": 4.22, "clipiqa": 0.692}},
    "RealSet80": {(200,): {}},
}
REFERENCE_METRICS = ("psnr_y", "ssim_y", "lpips")
NO_REFERENCE_METRICS = ("niqe", "clipiqa", "musiq", "maniqa")
NOT_MEASURED = "not measured here"


def comparison(measured: dict[str, Evaluation]) -> str:
    """A Markdown table with one row per set, schedule and metric that is published or measured."""
    lines = ["| set | schedule | metric | published | here |", "| --- | --- | --- | --- | --- |"]
    for name, schedules in PUBLISHED.items():
        runs = {run.name: run for run in measured[name].runs} if name in measured else {}
        for schedule, figures in schedules.items():
            run = runs.get(schedule_name(schedule))
            for metric in (*REFERENCE_METRICS, *NO_REFERENCE_METRICS):
                digits = METRICS[metric].digits
                value = run.mean(metric) if run and metric in measured[name].metrics else None
                if metric in figures or value is not None:
                    published = f"{figures[metric]:.{digits}f}" if metric in figures else ""
                    here = NOT_MEASURED if value is None else f"{value:.{digits}f} ({len(run.images)} images)"
                    steps = ", ".join(map(str, schedule))
                    lines.append(f"| {name} | {steps} | {METRICS[metric].label} | {published} | {here} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True, help="folder of the test sets")
    parser.add_argument("--output", type=Path, required=True, help="folder for results and tables")
    parser.add_argument("--model", default="sd-turbo", help="tiny, sd-turbo (published weights), a folder or a Hub id")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="torch device (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    parser.add_argument("--limit", type=int, help="only the first images of each set, to try it out")
    arguments = parser.parse_args(argv)

    found = [name for name in PUBLISHED if (arguments.sets / name / "lq").is_dir()]
    if not found:
        folders = ", ".join(str(arguments.sets / name / "lq") for name in PUBLISHED)
        parser.error(f"`--sets` must contain at least one of {folders}.")
    dtype = auto_dtype(arguments.device) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    if arguments.model == "sd-turbo":
        pipe = convert(dtype=dtype)
    else:
        pipe = InvSRPipeline.from_pretrained(TINY if arguments.model == "tiny" else arguments.model, dtype=dtype)
    pipe.to(arguments.device).set_progress_bar_config(disable=True)
    tile_size = pipe.config.tile_size
    sampling = Sampling(color_fix="wavelet", tile_overlap=tile_size // 2 if tile_size else None)  # as published
    measured, complete = {}, True
    for name in found:
        folder = arguments.sets / name
        has_gt = (folder / "gt").is_dir()
        try:
            measured[name] = evaluate(
                arguments.output / name,
                lq=folder / "lq",
                gt=folder / "gt" if has_gt else None,
                pipe=pipe,
                schedules=list(PUBLISHED[name]),
                metrics=(*(REFERENCE_METRICS if has_gt else ()), *NO_REFERENCE_METRICS),
                sampling=sampling,
                limit=arguments.limit,
                progress=True,
            )
        except (FileExistsError, ValueError) as error:  # the other sets can still be measured
            print(f"{name}: {error}")
            complete = False
            continue
        for (run, image), problem in measured[name].failed.items():
            print(f"{name} {run} {image}: {problem}")
            complete = False
        for metric, reason in measured[name].unavailable.items():
            print(f"{name} {METRICS[metric].label}: {reason}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = comparison(measured)
    write_atomically(arguments.output / "comparison.md", table)
    print(table)
    if not complete:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
