"""Make a picture from text with any diffusers pipeline, then upscale it with InvSR.

    python examples/text_to_image.py "a lighthouse in a storm, oil painting"

Downloads SD-Turbo unless `--text-to-image` is a folder.
"""

import argparse

import torch
from diffusers import AutoPipelineForText2Image

from diffusers_invsr import TINY, InvSRPipeline, auto_dtype


parser = argparse.ArgumentParser()
parser.add_argument("prompt", help="what the picture shows")
parser.add_argument("--text-to-image", default="stabilityai/sd-turbo", help="folder or Hub id (default: %(default)s)")
parser.add_argument("--model", default=TINY, help="folder or Hub id for InvSR (default: the embedded model)")
parser.add_argument("--steps", type=int, default=1, help="steps of the text-to-image model (default: %(default)s)")
parser.add_argument("--guidance-scale", type=float, default=0.0, help="0 for turbo models (default: %(default)s)")
parser.add_argument("--output", default="upscaled.png", help="the upscaled picture (default: %(default)s)")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = auto_dtype(device)
text_to_image = AutoPipelineForText2Image.from_pretrained(args.text_to_image, dtype=dtype).to(device)
upscaler = InvSRPipeline.from_pretrained(args.model, dtype=dtype).to(device)

generator = torch.Generator().manual_seed(0)
image = text_to_image(
    args.prompt, num_inference_steps=args.steps, guidance_scale=args.guidance_scale, generator=generator
).images[0]
# A late start adds little noise: generated pictures are clean already
result = upscaler(image, start_timestep=100, generator=generator).images[0]
result.save(args.output)
print(f"{image.width}x{image.height} -> {args.output}: {result.width}x{result.height}")
