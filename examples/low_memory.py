"""Upscale with little GPU memory.

    python examples/low_memory.py examples/images/parrots.png

Without a GPU it runs on the CPU, without offloading.
"""

import argparse

import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_invsr import TINY, InvSRPipeline, auto_dtype


parser = argparse.ArgumentParser()
parser.add_argument("image", help="the picture to upscale")
parser.add_argument("--model", default=TINY, help="folder or Hub id (default: the embedded model)")
parser.add_argument("--tile-size", type=int, default=64, help="side of a tile in LR pixels (default: %(default)s)")
parser.add_argument("--output", default="upscaled.png", help="the upscaled picture (default: %(default)s)")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = InvSRPipeline.from_pretrained(args.model, dtype=auto_dtype(device))  # bfloat16 where the GPU supports it
if pipe.text_encoder is not None:
    pipe.drop_text_encoder()  # the prompt is fixed, so its embeddings are enough
if isinstance(pipe.vae, AutoencoderKL):
    pipe.vae.enable_tiling()  # for tiles larger than the VAE's own, which have 192 LR pixels with SD-Turbo
if device == "cuda":
    pipe.enable_model_cpu_offload()  # only the network in use is on the GPU

# Smaller tiles save the most. Networks move for every batch of tiles, so with offloading a larger batch may be faster
result = pipe(Image.open(args.image), tile_size=args.tile_size, generator=torch.Generator().manual_seed(0)).images[0]
result.save(args.output)
if device == "cuda":
    print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**20:.0f} MB")
