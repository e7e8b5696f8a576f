"""Upscale a large picture in overlapping tiles.

    python examples/upscale_panorama.py examples/images/panorama.png --tile-size 48

The memory that the networks need depends on the tile, not on the picture.
"""

import argparse

import torch
from PIL import Image

from diffusers_invsr import TINY, InvSRPipeline, auto_dtype


parser = argparse.ArgumentParser()
parser.add_argument("image", help="the picture to upscale")
parser.add_argument("--model", default=TINY, help="folder or Hub id (default: the embedded model)")
parser.add_argument("--tile-size", type=int, default=128, help="side of a tile in LR pixels (default: %(default)s)")
parser.add_argument("--output", default="upscaled.png", help="the upscaled picture (default: %(default)s)")
args = parser.parse_args()

Image.MAX_IMAGE_PIXELS = None  # Pillow refuses very large pictures otherwise
device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = InvSRPipeline.from_pretrained(args.model, dtype=auto_dtype(device)).to(device)

result = pipe(
    Image.open(args.image),
    tile_size=args.tile_size,
    tile_overlap=args.tile_size // 4,  # more overlap hides seams better and takes longer
    tile_batch_size=8 if device == "cuda" else 1,
    generator=torch.Generator().manual_seed(0),
).images[0]
result.save(args.output)
print(f"{args.output}: {result.width}x{result.height}")
