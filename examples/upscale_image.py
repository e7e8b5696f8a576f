"""Upscale one picture.

    python examples/upscale_image.py examples/images/parrots.png

The embedded model is a small demonstration. For better results give `--model` a folder or a Hub id.
"""

import argparse

import torch
from PIL import Image

from diffusers_invsr import TINY, InvSRPipeline, auto_dtype


parser = argparse.ArgumentParser()
parser.add_argument("image", help="the picture to upscale")
parser.add_argument("--model", default=TINY, help="folder or Hub id (default: the embedded model)")
parser.add_argument("--output", default="upscaled.png", help="the upscaled picture (default: %(default)s)")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = InvSRPipeline.from_pretrained(args.model, dtype=auto_dtype(device)).to(device)

# `num_steps`, `start_timestep`, `scale` and `color_fix` are the arguments that change the result most
result = pipe(Image.open(args.image), num_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
result.save(args.output)
print(f"{args.output}: {result.width}x{result.height}")
