"""How the peak memory of a tiled x4 enlargement grows with the image, beyond the buffers of the output (Linux, CPU).

    python examples/measure_memory.py --sizes 256 2048

Each size runs in a process of its own, after one tile to warm up. The output takes, a pixel, 12 bytes in float32 (the
sum of the blended tiles), 3 bytes as an array of 8 bits and 4 bytes as a PIL image.
"""

import argparse
import subprocess
import sys

import torch
from peak_memory import PeakMemory
from PIL import Image

from diffusers_invsr import TINY, InvSRPipeline


BYTES_PER_OUTPUT_PIXEL = 12 + 3 + 4


def measure(size: int, model: str, tile_size: int | None) -> tuple[float, float]:
    """Peak growth in MB while a `size` x `size` image is enlarged, and the MB of its output's buffers."""
    pipe = InvSRPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    side = tile_size or pipe.config.tile_size
    pipe(Image.new("RGB", (side, side)), tile_size=side)
    image = Image.effect_noise((size, size), 64).convert("RGB")
    with PeakMemory() as memory:
        pipe(image, tile_size=tile_size or "auto", generator=torch.Generator().manual_seed(0))
    return memory.growth, (pipe.config.scale * size) ** 2 * BYTES_PER_OUTPUT_PIXEL / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 2048], help="sides of square LR images")
    parser.add_argument("--model", default=TINY, help="pipeline folder (default: the embedded model)")
    parser.add_argument("--tile-size", type=int, help="LR pixels (default: the model's own)")
    parser.add_argument("--single", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.single:
        print(*measure(arguments.single, arguments.model, arguments.tile_size))
        return

    print(
        "| LR side | peak growth (MB) | output buffers (MB) | beyond them (MB) |",
        "| --- | --- | --- | --- |",
        sep="\n",
    )
    for size in arguments.sizes:
        command = [sys.executable, __file__, "--single", str(size), "--model", arguments.model]
        command += ["--tile-size", str(arguments.tile_size)] if arguments.tile_size else []
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        growth, buffers = map(float, output.split())
        print(f"| {size} | {growth:.0f} | {buffers:.0f} | {growth - buffers:.0f} |", flush=True)


if __name__ == "__main__":
    main()
