"""Compile the networks and upscale pictures with them.

    python examples/compile_pipeline.py examples/images/*.png --output upscaled

The first picture includes the compiler's time, so this is for many pictures, above all on a GPU.
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image

from diffusers_invsr import TINY, InvSRPipeline, auto_dtype


parser = argparse.ArgumentParser()
parser.add_argument("images", nargs="+", type=Path, help="the pictures to upscale, of any sizes")
parser.add_argument("--model", default=TINY, help="folder or Hub id (default: the embedded model)")
parser.add_argument("--backend", default="inductor", help="backend of `torch.compile` (default: %(default)s)")
parser.add_argument("--output", default="upscaled", type=Path, help="folder of the results (default: %(default)s)")
args = parser.parse_args()
if len({path.stem for path in args.images}) < len(args.images):
    parser.error("the names of the pictures must differ without their extensions, which the results share")

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = InvSRPipeline.from_pretrained(args.model, dtype=auto_dtype(device)).to(device)
# On CUDA, mode="reduce-overhead" (CUDA graphs) is the fastest
pipe.compile(backend=args.backend, mode="reduce-overhead" if device == "cuda" else None)

args.output.mkdir(parents=True, exist_ok=True)
for path in args.images:  # all tiles have one shape, so only the first picture takes the compiler's time
    start = time.perf_counter()
    result = pipe(Image.open(path), generator=torch.Generator().manual_seed(0)).images[0]
    print(f"{path}: {time.perf_counter() - start:.1f} s")
    result.save(args.output / f"{path.stem}.png")
