"""Upscale with a LoRA on the diffusion model (the UNet).

    python examples/load_lora.py examples/images/parrots.png my-lora --model my-invsr --weight 0.8

Needs `pip install peft`.
"""

import argparse

import torch
from PIL import Image

from diffusers_invsr import InvSRPipeline, auto_dtype


parser = argparse.ArgumentParser()
parser.add_argument("image", help="the picture to upscale")
parser.add_argument("lora", help="folder, file or Hub id of a LoRA for the model's UNet, such as one for SD 2.1")
parser.add_argument("--model", required=True, help="folder or Hub id")
parser.add_argument("--weight", type=float, default=1.0, help="strength of the LoRA (default: %(default)s)")
parser.add_argument("--output", default="upscaled.png", help="the upscaled picture (default: %(default)s)")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = InvSRPipeline.from_pretrained(args.model, dtype=auto_dtype(device)).to(device)
pipe.load_lora_weights(args.lora, adapter_name="style")
pipe.set_adapters("style", args.weight)

result = pipe(Image.open(args.image), generator=torch.Generator().manual_seed(0)).images[0]
result.save(args.output)
