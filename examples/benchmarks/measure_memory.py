"""Peak memory and time of a tiled x4 enlargement, where freed memory is returned and where it is kept (Linux, CPU).

    python examples/benchmarks/measure_memory.py --sizes 256 1024
    python examples/benchmarks/measure_memory.py --sizes 128 --model random --width 1 --repeats 3

Each measurement runs in a process of its own; those with `keep_freed_memory()` and those without it take turns. Two
runs on one tile come first: one to warm up, and one that counts for memory but not for time. Memory is the peak beyond
what was held before. The output takes 12 bytes per pixel in float32 (the sum of the blended tiles), 3 bytes as an
8-bit array and 4 bytes as a PIL image. Figures are medians; ratios are those of times, with the range of turns.
"""

import argparse
import subprocess
import sys
import time
from statistics import median

import torch
from benchmark_common import add_model_arguments, load_model, positive, speed_up
from peak_memory import PeakMemory, return_free_memory
from PIL import Image

from diffusers_invsr import keep_freed_memory
from diffusers_invsr.tables import markdown_table


BYTES_PER_OUTPUT_PIXEL = 12 + 3 + 4


def measure(arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds for one image, the growth of memory at its peak in MB, and the MB of the output."""
    if arguments.freed == "kept" and not keep_freed_memory():
        raise SystemExit("Freed memory can be kept with glibc only, the C library of most Linux systems.")
    pipe = load_model(arguments, torch.device("cpu")).to(dtype=getattr(torch, arguments.dtype))
    pipe.set_progress_bar_config(disable=True)
    (size,) = arguments.sizes
    image = Image.effect_noise((size, size), 64).convert("RGB")
    options = {"tile_size": arguments.tile_size or "auto", "generator": torch.Generator().manual_seed(0)}
    side = arguments.tile_size or pipe.config.tile_size
    tile = Image.new("RGB", (side, side))
    pipe(tile, **options)
    return_free_memory()
    with PeakMemory() as memory:
        pipe(tile, **options)
        start = time.perf_counter()
        pipe(image, **options)
        seconds = time.perf_counter() - start
    return seconds, memory.growth, (pipe.config.scale * size) ** 2 * BYTES_PER_OUTPUT_PIXEL / 2**20


def main(args: list[str] | None = None):
    args = sys.argv[1:] if args is None else args
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=positive, nargs="+", default=[256, 1024], help="sides of square LR images")
    add_model_arguments(parser, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    parser.add_argument("--tile-size", type=positive, help="LR pixels (default: automatic)")
    parser.add_argument("--repeats", type=positive, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--freed", choices=("returned", "kept"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(args)
    if arguments.freed:
        print(*measure(arguments))
        return

    command = [sys.executable, __file__, *args]
    rows = []
    for size in arguments.sizes:
        results = {"returned": [], "kept": []}
        for _ in range(arguments.repeats):
            for freed, turns in results.items():
                options = ["--sizes", str(size), "--freed", freed]
                process = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True)
                if process.returncode:  # the reason is on stderr
                    raise SystemExit(process.returncode)
                turns.append([float(number) for number in process.stdout.split()])
        reference, *_ = zip(*results["returned"])
        for freed, turns in results.items():
            times, growths, (buffers, *_) = zip(*turns)
            ratio, low, high = speed_up(times, reference)
            growth = median(growths)
            rows.append([f"{size}", freed, f"{median(times):.2f}", f"{ratio:.2f} ({low:.2f}–{high:.2f})"])
            rows[-1] += [f"{growth:.0f}", f"{buffers:.0f}", f"{growth - buffers:.0f}"]
    headings = ["LR side", "freed memory", "s", "faster", "peak growth, MB", "output buffers, MB", "beyond them, MB"]
    print(markdown_table(headings, rows))


if __name__ == "__main__":
    main()
