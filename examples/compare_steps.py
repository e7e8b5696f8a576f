"""Compare starts and numbers of steps side by side.

    python examples/compare_steps.py examples/images/parrots.png

More noise at the start and more steps change more. With the embedded model the results hardly differ.
"""

import argparse

import torch
from PIL import Image, ImageDraw

from diffusers_invsr import TINY, InvSRPipeline, auto_dtype


parser = argparse.ArgumentParser()
parser.add_argument("image", help="the picture to upscale")
parser.add_argument("--model", default=TINY, help="folder or Hub id (default: the embedded model)")
parser.add_argument("--output", default="comparison.png", help="the comparison (default: %(default)s)")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = InvSRPipeline.from_pretrained(args.model, dtype=auto_dtype(device)).to(device)

image = Image.open(args.image).convert("RGB")
settings = {f"1 step from {start}": {"start_timestep": start} for start in (250, 200, 150, 100)}
settings |= {f"{num_steps} steps": {"num_steps": num_steps} for num_steps in (2, 3, 4, 5)}
results = {
    label: pipe(image, generator=torch.Generator().manual_seed(0), **arguments).images[0]
    for label, arguments in settings.items()
}
width, height = results["2 steps"].size
results = {"bicubic": image.resize((width, height), Image.Resampling.BICUBIC), **results}

sheet = Image.new("RGB", (3 * width, 3 * height))
for number, (label, result) in enumerate(results.items()):
    left, top = number % 3 * width, number // 3 * height
    sheet.paste(result, (left, top))
    ImageDraw.Draw(sheet).text((left + 8, top + 8), label, "white", font_size=24, stroke_width=2, stroke_fill="black")
sheet.save(args.output)
