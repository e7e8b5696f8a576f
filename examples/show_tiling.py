"""Do the seams between tiles show? A picture and a number.

    python examples/show_tiling.py panorama.png --tile-size 48 -o tiling.png

Enlarges an image whole and in tiles with the same noise, stacks both (whole above, tiled below), and compares how much
they differ in the columns beside the tiles' borders with all others.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_invsr import TINY, InvSRPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="the LR image")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture to write")
    parser.add_argument("--model", default=TINY, help="pipeline folder (default: the embedded model)")
    parser.add_argument("--tile-size", type=int, default=64, help="LR pixels")
    parser.add_argument("--tile-overlap", type=int, help="LR pixels (default: a quarter of the tile)")
    arguments = parser.parse_args()

    image = Image.open(arguments.image).convert("RGB")
    pipe = InvSRPipeline.from_pretrained(arguments.model)
    results = []
    for tile_size in (None, arguments.tile_size):
        generator = torch.Generator().manual_seed(0)
        result = pipe(image, tile_size=tile_size, tile_overlap=arguments.tile_overlap, generator=generator)
        results.append(result.images[0])

    overlap = arguments.tile_size // 4 if arguments.tile_overlap is None else arguments.tile_overlap
    inputs = pipe.image_processor.preprocess(image)
    axis = pipe.cut_into_tiles(inputs, None, None, arguments.tile_size, overlap).columns
    ends = {(start - axis.front + end) * pipe.config.scale for start in axis.starts for end in (0, axis.tile_length)}
    whole, tiled = (np.array(result, dtype=np.float64) for result in results)
    # A seam is a step in the difference from one column to the next.
    steps = np.abs(np.diff(tiled - whole, axis=1)).mean(axis=(0, 2))
    borders = [end - 1 for end in sorted(ends) if 0 < end < whole.shape[1]]
    elsewhere = np.delete(steps, borders)
    print(f"PSNR between the two: {10 * np.log10(255**2 / np.mean((whole - tiled) ** 2)):.1f} dB")
    print(f"step of their difference at tile borders {steps[borders].mean():.3f}, elsewhere {elsewhere.mean():.3f}")

    sheet = Image.new("RGB", (whole.shape[1], 2 * whole.shape[0] + 8), "white")
    sheet.paste(results[0], (0, 0))
    sheet.paste(results[1], (0, whole.shape[0] + 8))
    sheet.save(arguments.output)


if __name__ == "__main__":
    main()
