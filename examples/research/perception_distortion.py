"""The curve between fidelity and perception: several models on the same photographs, one step each.

    python examples/research/perception_distortion.py --hr KODAK --patterns 'kodim1[789].png' 'kodim2?.png' \
        --output curve --models L2=my-l2/pipeline balance=between perceptual=my-perceptual/pipeline

Fidelity is PSNR and SSIM of luma, perception the gradient ratio (mean absolute gradient of the result's luma over that
of the HR image; below 1 it is smoother). A high ratio alone proves nothing, since noise raises it too: `--grain 2 4 6`
shows by how much, with Gaussian noise on the last model's results. LR images are made as in `paper_findings.py`, from
the same seeds. `--output` gets `scores.jsonl` (a stopped run goes on there), `curve.md`, `curve.json`, `curve.png`
and, for each photograph, the middle of bicubic, each model's result, those with grain and the HR image. Needs `pip
install ".[examples,training]"` and matplotlib.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from findings_common import (
    METRICS,
    Difference,
    Scores,
    add_pattern_argument,
    crop_to_multiple,
    load_pipeline,
    make_lr,
    measure,
    read_photographs,
    settings_of,
    write_json,
)
from paper_findings import DEGRADATIONS
from PIL import Image

from diffusers_invsr.files import write_atomically
from diffusers_invsr.tables import markdown_table


BICUBIC = "bicubic"
CROP = 192  # side of a sheet's crops, in HR pixels


def parse_model(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder or name == BICUBIC:
        raise argparse.ArgumentTypeError(f"{text!r} has to be NAME=FOLDER, with another name than {BICUBIC!r}")
    return name, folder


def parse_sigma(text: str) -> float:
    try:
        sigma = float(text)
    except ValueError:
        sigma = math.nan
    if not 0 < sigma < 256:
        raise argparse.ArgumentTypeError(f"{text!r} has to be a number above 0 and below 256")
    return sigma


def add_grain(image: Image.Image, sigma: float, seed: list[int]) -> Image.Image:
    """Gaussian noise of standard deviation `sigma`, in levels of 255, the same on each channel."""
    noise = np.random.default_rng(seed).normal(0, sigma, (image.height, image.width, 1))
    return Image.fromarray((np.array(image) + noise).round().clip(0, 255).astype(np.uint8))


def save_plot(means: dict[tuple[str, str], dict[str, float]], names: list[str], file: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(DEGRADATIONS), 4), layout="constrained")
    for axis, degradation in zip(figure.subplots(1, len(DEGRADATIONS)), DEGRADATIONS):
        points = [(means[degradation, name]["gradient_ratio"], means[degradation, name]["psnr_y"]) for name in names]
        for name, point in zip(names, points):
            axis.scatter(*point, color="tab:gray" if name == BICUBIC else "tab:blue")
            axis.annotate(name, point, textcoords="offset points", xytext=(5, 4), fontsize=8)
        axis.set(title=degradation, xlabel="gradient ratio (perception)", ylabel="PSNR of luma, dB (fidelity)")
        axis.margins(x=0.2, y=0.1)
    figure.savefig(file, dpi=150)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hr", type=Path, required=True, help="folder of HR photographs")
    parser.add_argument("--models", type=parse_model, nargs="+", required=True, help="NAME=FOLDER of each")
    grain = "standard deviations of noise on the last model's results, in levels of 255"
    parser.add_argument("--grain", type=parse_sigma, nargs="+", default=[], help=grain)
    parser.add_argument("--output", type=Path, required=True, help="folder; a stopped run goes on there")
    parser.add_argument("--seed", type=int, default=0, help="seed of the degradation and of the sampling")
    parser.add_argument("--start", type=int, default=200, choices=(250, 200, 150, 100), help="the one step")
    add_pattern_argument(parser)
    arguments = parser.parse_args(argv)
    names = [name for name, _ in arguments.models]
    if len(set(names)) < len(names):
        parser.error(f"--models has to give each a name of its own, but has {' '.join(names)}")
    return arguments


def main(argv: list[str] | None = None):
    arguments = parse_args(argv)
    photographs = read_photographs(arguments.hr, arguments.patterns, arguments.crop)
    pipes = {name: load_pipeline(folder, "cpu") for name, folder in arguments.models}
    models = {name: settings_of(pipe, photographs, arguments.seed) for name, pipe in pipes.items()}
    settings = {"start": arguments.start, "models": models}
    scores = Scores(arguments.output / "scores.jsonl", settings)
    last = list(pipes)[-1]
    grains = {f"{last} + grain {sigma:g}": sigma for sigma in arguments.grain}
    names = [BICUBIC, *pipes, *grains]
    for photo in photographs:
        hr = crop_to_multiple(photo.hr, 4)
        for degradation in DEGRADATIONS:
            if all((degradation, photo.name, name) in scores for name in names):
                continue
            lr = make_lr(degradation, hr, [arguments.seed, photo.number])
            results = {BICUBIC: lr.resize(hr.size, Image.Resampling.BICUBIC)}
            for name, pipe in pipes.items():
                generator = torch.Generator().manual_seed(arguments.seed)
                results[name] = pipe(lr, timesteps=[arguments.start], generator=generator).images[0]
            seed = [arguments.seed, photo.number, 1]  # not the stream of the degradation
            results |= {name: add_grain(results[last], sigma, seed) for name, sigma in grains.items()}
            box = [(side - CROP) // 2 for side in hr.size]
            box += [start + CROP for start in box]
            sheet = Image.new("RGB", (CROP * (len(results) + 1), CROP))
            for column, image in enumerate([*results.values(), hr]):
                sheet.paste(image.crop(box), (CROP * column, 0))
            sheet.save(arguments.output / f"{photo.name}_{degradation}.png")
            for name, result in results.items():
                if (degradation, photo.name, name) not in scores:
                    scores.add((degradation, photo.name, name), measure(result, hr))
        print(photo.name, flush=True)

    means, lines = {}, []
    for degradation in DEGRADATIONS:
        rows = []
        for name in names:
            of_photos = [scores[degradation, photo.name, name] for photo in photographs]
            mean = {metric: float(np.mean([each[metric] for each in of_photos])) for metric in METRICS}
            means[degradation, name] = mean
            bicubic = [scores[degradation, photo.name, BICUBIC]["psnr_y"] for photo in photographs]
            gain = Difference.of([each["psnr_y"] for each in of_photos], bicubic)
            values = [f"{mean[metric]:.{digits}f}" for metric, (_, digits, _) in METRICS.items()]
            rows.append([name, *values, "" if name == BICUBIC else gain.to_text("psnr_y")])
        title = f"{degradation}, mean over {len(photographs)} photographs"
        headings = [title, *(text for text, *_ in METRICS.values()), "PSNR Y − bicubic"]
        lines += [markdown_table(headings, rows), ""]
    table = "\n".join(lines)
    print(table)
    write_atomically(arguments.output / "curve.md", table)
    record = {"settings": settings, "means": [[*key, value] for key, value in means.items()]}
    write_json(arguments.output / "curve.json", record)
    save_plot(means, names, arguments.output / "curve.png")


if __name__ == "__main__":
    main()
