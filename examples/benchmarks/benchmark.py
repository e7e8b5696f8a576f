"""Speed, memory and agreement of InvSR's ways to run, by component and end to end. Nothing is downloaded.

    python examples/benchmarks/benchmark.py --output results --width 0.25
    python examples/benchmarks/benchmark.py --output results --device cuda --dtype bfloat16 --baseline published \
        --sizes 128x128 512x512 --tile-batch-size 1 4 16 --compile no full graphs \
        --variant fastest:compile=full,tile_batch_size=16,vae=tiny

The model is of SD-Turbo's shapes with random weights (`--width` times its channels), or any saved pipeline.

Variants: the first values of all options make the variant `base`. Each further value makes a variant that differs from
it in that value alone; `--variant NAME:key=value,key=value` adds combinations. All variants are measured for each
size, number of steps and number of images, in turns, so that other work on the machine affects all alike.
`--baseline published` adds the published procedure: half-overlapping tiles blended by a Gaussian window, image by
image and tile by tile, eager, NCHW. The reference of speed-ups and PSNR is that, or else `base`. Compiled pipelines do
not fit tiles to the image; with `compile=full` or `graphs` among the variants, no other does.

Times are medians with the range of all repeats, after warm-up. Speed-ups are ratios of medians, with the range of the
ratios of single turns. Operations are those of matrix products, convolutions and attention; a multiplication and an
addition count as two. The peak is the best of several products of large matrices in the same dtype (on CPUs also
of small ones, or only these where large ones would take more than a second each). Convolutions can exceed it: on CUDA
they may use TF32 for float32, and on CPUs they come from another library. PSNR compares the results in 8 bits. With
random weights it shows whether variants compute the same, not how good a result is.

Memory is the peak of one run beyond what was held before. With `--keep-memory` all variants run with
`keep_freed_memory()`. Needs matplotlib.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from benchmark_common import add_model_arguments, load_model, positive
from benchmark_report import Measured, MeasuredPart, environment, save_report
from benchmark_variants import (
    FIELDS,
    Runner,
    as_called,
    count_flops,
    fix_tile_size,
    make_variants,
    parse_setting,
    parse_variant,
    parts_of,
    record_calls,
)
from peak_memory import PeakMemory, return_free_memory
from PIL import Image, ImageChops, ImageOps
from tqdm import tqdm

from diffusers_invsr import keep_freed_memory
from diffusers_invsr.metrics import psnr


PHOTOGRAPH = Path(__file__).parents[1] / "images" / "lighthouse.png"


@dataclass(frozen=True)
class Workload:
    """LR images of one size and a number of steps."""

    width: int
    height: int
    steps: int
    num_images: int

    def __str__(self) -> str:
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        return f"{self.width}x{self.height}, {steps}, {self.num_images} image{'s' * (self.num_images > 1)}"

    def make_images(self) -> list[Image.Image]:
        image = ImageOps.fit(Image.open(PHOTOGRAPH).convert("RGB"), (self.width, self.height))
        return [ImageChops.offset(image, 17 * number) for number in range(self.num_images)]


def parse_size(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) >= 2 for side in sides):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in LR pixels, at least 2x2, got {text!r}")
    return int(sides[0]), int(sides[1])


def parse_arguments(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder for table, JSON and plot")
    add_model_arguments(parser, default="random")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--baseline", choices=("base", "published"), default="base", help="the reference")
    parser.add_argument("--repeats", type=positive, default=5, help="turns that are measured (default: %(default)s)")
    parser.add_argument(
        "--warmup", type=positive, default=2, help="runs before them, the last for memory (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-memory", action="store_true", help="keep freed memory in the process (on CPUs, with glibc)"
    )
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="let cuDNN choose its convolutions by measuring them (CUDA)"
    )
    work = parser.add_argument_group("workloads; all combinations are measured")
    work.add_argument("--sizes", type=parse_size, nargs="+", default=[(128, 128)], help="WIDTHxHEIGHT in LR pixels")
    work.add_argument("--steps", type=positive, nargs="+", default=[1], help="diffusion steps (default: 1)")
    work.add_argument("--images", type=positive, nargs="+", default=[1], help="images (default: 1)")
    settings = parser.add_argument_group("variants; the first values make the variant `base`")
    for name, item in FIELDS.items():
        rules = item.metadata
        accepted = rules.get("choices") or (*rules.get("words", {}), "N")
        settings.add_argument(
            f"--{name.replace('_', '-')}",
            type=partial(parse_setting, name),
            nargs="+",
            default=[item.default],
            metavar=f"{{{','.join(accepted)}}}",
            help=rules.get("help", "dtype"),
        )
    settings.add_argument(
        "--variant", type=parse_variant, action="append", default=[], help="NAME:key=value,...: a combination"
    )
    arguments = parser.parse_args(args)

    if arguments.output.exists():
        parser.error(f"`--output` must be a new folder, but {arguments.output} exists.")
    try:
        arguments.device = torch.device(arguments.device)
        torch.ones(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"`--device {arguments.device}` cannot be used: {error}")
    if arguments.device.type not in ("cpu", "cuda"):
        parser.error(f"`--device` must be cpu or cuda, got {arguments.device}.")
    if arguments.keep_memory and arguments.device.type != "cpu":
        parser.error("`--keep-memory` needs `--device cpu`.")
    if arguments.cudnn_benchmark and arguments.device.type != "cuda":
        parser.error("`--cudnn-benchmark` needs `--device cuda`.")
    options = {name: getattr(arguments, name) for name in FIELDS}
    try:
        arguments.variants = make_variants(options, arguments.variant, arguments.baseline == "published")
    except ValueError as error:
        parser.error(str(error))
    if arguments.device.type != "cuda" and any(each.settings.compile == "graphs" for each in arguments.variants):
        parser.error("`compile=graphs` needs `--device cuda`.")
    return arguments


def timed(function, device: torch.device) -> float:
    """Seconds of a call, including the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of the fastest of several products of square matrices, of two sizes on a CPU."""
    sizes, repeats = ((8192,), 20) if device.type == "cuda" else ((256, 2048), 3)
    rates = []
    for size in sizes:
        if rates and 2 * size**3 / rates[-1] > 1:  # seconds, as of float16 on most CPUs
            break
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        multiply = partial(torch.matmul, a, b)
        timed(multiply, device)
        rates.append(2 * size**3 / min(timed(multiply, device) for _ in range(repeats)))
    return max(rates)


def warm_up(run: Callable, device: torch.device) -> tuple[float, float | None, np.ndarray]:
    """Seconds of a run, the most memory it takes beyond what was held before, in MB, and its results in 8 bits."""
    return_free_memory()
    with PeakMemory(device) as memory:
        start = time.perf_counter()
        results = run()  # on the CPU: the device has done its work
        seconds = time.perf_counter() - start
    return seconds, memory.growth, np.stack([np.array(result) for result in results])


def prepare(runner: Runner, run: Callable, warmup: int, device: torch.device) -> tuple[Measured, np.ndarray]:
    """Count calls and operations, compile, and warm up. The last run counts for memory and is the result."""
    with record_calls(runner.pipe) as calls:  # before compiling, which would include the hooks
        first_run, growth, output = warm_up(run, device)
    parts = {
        name: MeasuredPart(calls[name], count_flops(part, calls[name]))
        for name, part in parts_of(runner.pipe).items()
        if name in calls
    }
    if runner.variant.settings.compile != "no":
        runner.compile()
        first_run, growth, output = warm_up(run, device)
    for _ in range(warmup - 1):
        _, growth, output = warm_up(run, device)
    return Measured(runner.variant, parts, first_run, growth, runner.weight_bytes / 2**20), output


@torch.no_grad()
def measure(
    workload: Workload, runners: list[Runner], repeats: int, warmup: int, device: torch.device, progress: tqdm
) -> list[Measured]:
    """Measure all variants in turns. The first one is the reference of PSNR."""
    images, results, reference = workload.make_images(), [], None
    runs = [partial(runner.run, images, workload.steps) for runner in runners]
    for runner, run in zip(runners, runs):
        progress.set_description(f"{workload}: {runner.variant.name}")
        try:
            measured, output = prepare(runner, run, warmup, device)
        except (ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
            name = runner.variant.name
            raise SystemExit(f"{workload}: the variant {name!r} cannot run: {error}") from error
        reference = output if reference is None else reference
        measured.psnr = psnr(output, reference)
        results.append(measured)
        progress.update()
    for turn in range(repeats):
        progress.set_description(f"{workload}: turn {turn + 1} of {repeats}")
        for runner, run, measured in zip(runners, runs, results):
            measured.times.append(timed(run, device))
            for name, part in measured.parts.items():
                module = parts_of(runner.pipe)[name]
                with as_called(module, part.calls):
                    part.times.append(timed(partial(module, *part.calls.args, **part.calls.kwargs), device))
        progress.update()
    return results


def main(args: list[str] | None = None):
    arguments = parse_arguments(args)
    device, variants = arguments.device, arguments.variants
    memory_kept = arguments.keep_memory and keep_freed_memory()
    if memory_kept != arguments.keep_memory:
        raise SystemExit("`--keep-memory` needs glibc, the C library of most Linux systems.")
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    model = load_model(arguments, device)
    if any(variant.settings.compile in ("full", "graphs") for variant in variants):
        variants = [fix_tile_size(variant, model.config.tile_size) for variant in variants]
    workloads = [
        Workload(*size, steps, images)
        for size, steps, images in product(arguments.sizes, arguments.steps, arguments.images)
    ]
    weights, results = {}, {}
    with tqdm(total=len(workloads) * (len(variants) + arguments.repeats)) as progress:
        for workload in workloads:
            runners = [Runner(variant, model, weights, device) for variant in variants]
            results[str(workload)] = measure(workload, runners, arguments.repeats, arguments.warmup, device, progress)
    peaks = {variant.settings.dtype: matmul_peak(variant.settings.torch_dtype, device) for variant in variants}
    command = {
        "model": arguments.model,
        "width": arguments.width,
        "repeats": arguments.repeats,
        "memory kept": memory_kept,
        "convolutions measured by cuDNN": arguments.cudnn_benchmark,
    }
    print(save_report(results, peaks, {**environment(device), **command}, arguments.output))


if __name__ == "__main__":
    main()
