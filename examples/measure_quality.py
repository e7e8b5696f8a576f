"""Compare results with the originals: PSNR and SSIM of luma.

    diffusers-invsr degrade my-photos -o my-set
    python examples/measure_quality.py --lr my-set/lq --hr my-set/gt

Needs `pip install ".[evaluation]"`. `diffusers-invsr evaluate` has more metrics, schedules and pictures.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_invsr import TINY, InvSRPipeline, auto_dtype
from diffusers_invsr.metrics import psnr_y, ssim_y


parser = argparse.ArgumentParser()
parser.add_argument("--lr", required=True, type=Path, help="folder of LR images")
parser.add_argument("--hr", required=True, type=Path, help="folder of the originals, under the same paths")
parser.add_argument("--model", default=TINY, help="folder or Hub id (default: the embedded model)")
args = parser.parse_args()
paths = sorted(path for path in args.hr.rglob("*") if path.is_file())
if not paths:
    parser.error(f"`--hr` must be a folder of images, got {args.hr}")

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = InvSRPipeline.from_pretrained(args.model, dtype=auto_dtype(device)).to(device)

scores = []
for path in paths:
    name = path.relative_to(args.hr)
    hr, lr = Image.open(path).convert("RGB"), Image.open(args.lr / name).convert("RGB")
    result = pipe(lr, target_size=(hr.height, hr.width), generator=torch.Generator().manual_seed(0)).images[0]
    images = [np.array(image) for image in (lr.resize(hr.size, Image.Resampling.BICUBIC), result)]
    scores.append([metric(image, np.array(hr)) for metric in (psnr_y, ssim_y) for image in images])
    print("{}: PSNR {:.2f} -> {:.2f} dB, SSIM {:.4f} -> {:.4f}".format(name, *scores[-1]))
print("mean: PSNR {:.2f} -> {:.2f} dB, SSIM {:.4f} -> {:.4f}".format(*np.mean(scores, axis=0)), "(bicubic -> InvSR)")
