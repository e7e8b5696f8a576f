"""What the embedded model does, in numbers: PSNR and SSIM on photographs that its training never saw.

    python examples/evaluate_tiny.py --hr DIR_OF_PHOTOGRAPHS --output results

The LR images are made with `simple_degradation.py` from fixed seeds. The table (Markdown and JSON) holds
interpolation, the model at several steps and starts, the same diffusion model with random and with no noise in place
of the predicted one (the paper's claim is that prediction helps), and the autoencoder's ceiling. Needs
`pip install ".[examples]"`.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from simple_degradation import SCALE, degrade

from diffusers_invsr import TINY, InvSRPipeline
from diffusers_invsr.metrics import psnr, psnr_y, ssim_y


def measure(result: Image.Image, hr: Image.Image) -> dict[str, float]:
    """PSNR over RGB, PSNR and SSIM over luma; 8 bits, no border cut off."""
    result, hr = np.array(result), np.array(hr)
    return {"psnr_rgb": psnr(result, hr), "psnr_y": psnr_y(result, hr), "ssim_y": ssim_y(result, hr)}


def with_constant_noise(pipe: InvSRPipeline, logvar: float) -> InvSRPipeline:
    """The same pipeline with a noise map of mean 0 and this log-variance, whatever the image: 0 is random noise."""
    predictor = copy.deepcopy(pipe.noise_predictor)
    conv = predictor.encoder.conv_out
    torch.nn.init.zeros_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    torch.nn.init.constant_(conv.bias[conv.out_channels // 2 :], logvar)
    return InvSRPipeline(**{**pipe.components, "noise_predictor": predictor})


@torch.no_grad()
def reconstruct(pipe: InvSRPipeline, hr: Image.Image) -> Image.Image:
    """The HR image through the autoencoder alone: no result can be better than what it can represent."""
    pixels = torch.from_numpy(np.array(hr)).permute(2, 0, 1)[None] / 255
    result = pipe.decode_image(pipe.encode_image(pixels, torch.zeros(1))[0][None])
    return Image.fromarray((result[0] * 255).round().byte().permute(1, 2, 0).numpy())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hr", type=Path, required=True, help="folder of HR photographs")
    parser.add_argument(
        "--patterns", nargs="+", default=["*.png"], help="which of its files, such as 'kodim1[789].png' 'kodim2?.png'"
    )
    parser.add_argument("--model", default=TINY, help="pipeline folder (default: the embedded model)")
    parser.add_argument("--output", type=Path, help="folder for table.md, table.json and the pictures of one step")
    parser.add_argument("--seed", type=int, default=0, help="seed of the degradation and of the sampling")
    arguments = parser.parse_args()

    paths = sorted({path for pattern in arguments.patterns for path in arguments.hr.glob(pattern)})
    if not paths:
        parser.error(f"--hr {arguments.hr} holds no file {' or '.join(arguments.patterns)}")
    pipe = InvSRPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    random_pipe, none_pipe = with_constant_noise(pipe, 0.0), with_constant_noise(pipe, -30.0)
    for other in (random_pipe, none_pipe):
        other.set_progress_bar_config(disable=True)

    starts = (250, 200, 150, 100)
    runs = {"predicted noise, 1 step [200]": (pipe, [200])}
    runs |= {f"predicted noise, 1 step [{start}]": (pipe, [start]) for start in starts if start != 200}
    runs["predicted noise, 3 steps [200, 100, 50]"] = (pipe, [200, 100, 50])
    runs["predicted noise, 5 steps [250, 200, 150, 100, 50]"] = (pipe, [250, 200, 150, 100, 50])
    runs |= {f"random noise, 1 step [{start}]": (random_pipe, [start]) for start in starts}
    runs |= {f"no noise, 1 step [{start}]": (none_pipe, [start]) for start in starts}

    scores: dict[str, list[dict[str, float]]] = {}
    for number, path in enumerate(paths):
        hr = Image.open(path).convert("RGB")
        hr = hr.crop((0, 0, hr.width - hr.width % SCALE, hr.height - hr.height % SCALE))
        lr = Image.fromarray(degrade(np.array(hr), np.random.default_rng([arguments.seed, number])))
        results = {
            "bicubic": lr.resize(hr.size, Image.Resampling.BICUBIC),
            "Lanczos": lr.resize(hr.size, Image.Resampling.LANCZOS),
        }
        for name, (run_pipe, timesteps) in runs.items():
            generator = torch.Generator().manual_seed(arguments.seed)
            results[name] = run_pipe(lr, timesteps=timesteps, tile_size=None, generator=generator).images[0]
        results["autoencoder ceiling"] = reconstruct(pipe, hr)
        for name, result in results.items():
            scores.setdefault(name, []).append(measure(result, hr))
        print(f"{path.name}: bicubic {scores['bicubic'][-1]}, one step {scores[next(iter(runs))][-1]}", flush=True)
        if arguments.output:
            arguments.output.mkdir(parents=True, exist_ok=True)
            lr.save(arguments.output / f"{path.stem}_lr.png")
            for name in ("bicubic", next(iter(runs))):
                results[name].save(arguments.output / f"{path.stem}_{name.split(',')[0].replace(' ', '_')}.png")

    means = {
        name: {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} for name, rows in scores.items()
    }
    lines = [f"| mean over {len(paths)} photographs | PSNR RGB | PSNR Y | SSIM Y |", "| --- | --- | --- | --- |"]
    for name, row in means.items():
        lines.append(f"| {name} | {row['psnr_rgb']:.2f} | {row['psnr_y']:.2f} | {row['ssim_y']:.4f} |")
    table = "\n".join(lines)
    print(table)
    if arguments.output:
        (arguments.output / "table.md").write_text(table + "\n")
        (arguments.output / "table.json").write_text(json.dumps({"mean": means, "images": scores}, indent=2) + "\n")


if __name__ == "__main__":
    main()
