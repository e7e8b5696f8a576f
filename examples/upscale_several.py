"""Upscale several pictures in one call.

    python examples/upscale_several.py examples/images/*.png --output upscaled

A GPU then works on tiles of all pictures at once.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from diffusers_invsr import TINY, InvSRPipeline, auto_dtype


parser = argparse.ArgumentParser()
parser.add_argument("images", nargs="+", type=Path, help="the pictures to upscale, of any sizes")
parser.add_argument("--model", default=TINY, help="folder or Hub id (default: the embedded model)")
parser.add_argument("--output", default="upscaled", type=Path, help="folder of the results (default: %(default)s)")
args = parser.parse_args()
if len({path.stem for path in args.images}) < len(args.images):
    parser.error("the names of the pictures must differ without their extensions, which the results share")

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = InvSRPipeline.from_pretrained(args.model, dtype=auto_dtype(device)).to(device)

# One generator per picture: no result depends on the other pictures
generators = [torch.Generator().manual_seed(0) for _ in args.images]
results = pipe(
    [Image.open(path) for path in args.images],
    tile_batch_size=8 if device == "cuda" else 1,  # on a CPU, single tiles are the fastest
    generator=generators,
).images

args.output.mkdir(parents=True, exist_ok=True)
for path, result in zip(args.images, results):
    result.save(args.output / f"{path.stem}.png")
