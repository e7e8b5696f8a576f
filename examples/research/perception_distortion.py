"""The curve between fidelity and perception: several models on the same photographs, one step each.

    python examples/research/perception_distortion.py --hr KODAK --patterns 'kodim1[789].png' 'kodim2?.png' \
        --output curve --models L2=my-l2/pipeline balance=between perceptual=my-perceptual/pipeline

Fidelity is PSNR and SSIM of luma, perception the gradient ratio (mean absolute gradient of the result's luma over that
of the HR image; below 1 the result is smoother). A high ratio alone proves nothing, since noise raises it too:
`--grain 2 4 6` shows by how much, with Gaussian noise on the last model's results. LR images are made as in
`paper_findings.py`, from the same seeds. `--output` gets `scores.jsonl` (a stopped run resumes from there),
`curve.md`, `curve.png` and for each photograph a sheet: bicubic, each model, those with grain, HR image.
Needs `pip install ".[examples,training]"` and matplotlib.
"""

import argparse

import numpy as np
import torch
from findings_common import (
    DEGRADATIONS,
    METRICS,
    Difference,
    Scores,
    add_arguments,
    crop_to_multiple,
    load_pipeline,
    make_lr,
    measure,
    read_photographs,
    settings_of,
    to_cells,
)
from matplotlib.figure import Figure
from PIL import Image

from diffusers_invsr.files import write_atomically
from diffusers_invsr.tables import markdown_table


BICUBIC = "bicubic"
CROP = 192  # side of a sheet's crops, in HR pixels


def parse_model(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder or name == BICUBIC:
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER with another name than {BICUBIC!r}, got {text!r}")
    return name, folder


def add_grain(image: Image.Image, sigma: float, seed: list[int]) -> Image.Image:
    """Gaussian noise of standard deviation `sigma`, in levels of 255, the same on each channel."""
    noise = np.random.default_rng(seed).normal(0, sigma, (image.height, image.width, 1))
    return Image.fromarray((np.array(image) + noise).round().clip(0, 255).astype(np.uint8))


def make_sheet(images: list[Image.Image]) -> Image.Image:
    """The middle of images of one size, side by side."""
    left, top = ((side - CROP) // 2 for side in images[0].size)
    sheet = Image.new("RGB", (CROP * len(images), CROP))
    for column, image in enumerate(images):
        sheet.paste(image.crop((left, top, left + CROP, top + CROP)), (CROP * column, 0))
    return sheet


def make_plot(means: dict[tuple[str, str], dict[str, float]]) -> Figure:
    """PSNR over gradient ratio, one diagram for each degradation."""
    figure = Figure(figsize=(5 * len(DEGRADATIONS), 4), layout="constrained")
    for axes, wanted in zip(figure.subplots(1, len(DEGRADATIONS)), DEGRADATIONS):
        for (degradation, name), mean in means.items():
            if degradation == wanted:
                point = (mean["gradient_ratio"], mean["psnr_y"])
                axes.scatter(*point, color="tab:gray" if name == BICUBIC else "tab:blue")
                axes.annotate(name, point, textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.set(title=wanted, xlabel="gradient ratio (perception)", ylabel="PSNR of luma, dB (fidelity)")
        axes.margins(x=0.2, y=0.1)
    return figure


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--models", type=parse_model, nargs="+", required=True, help="NAME=FOLDER of each")
    grain = "standard deviations of noise on the last model's results, in levels of 255"
    parser.add_argument("--grain", type=float, nargs="+", default=[], help=grain)
    arguments = parser.parse_args(argv)
    models, seed = dict(arguments.models), arguments.seed
    if len(models) < len(arguments.models):
        parser.error(f"`--models` must have different names, got {' '.join(name for name, _ in arguments.models)}.")

    photographs = read_photographs(arguments)
    pipes = {name: load_pipeline(folder, arguments.device) for name, folder in models.items()}
    settings = {name: settings_of(pipe, photographs, seed) for name, pipe in pipes.items()}
    scores = Scores(arguments.output / "scores.jsonl", settings)
    last = list(pipes)[-1]
    grains = {f"{last} + grain {sigma:g}": sigma for sigma in arguments.grain}
    names = [BICUBIC, *pipes, *grains]
    for photo in photographs:
        hr = crop_to_multiple(photo.hr, 4)
        for degradation in DEGRADATIONS:
            if all((degradation, photo.name, name) in scores for name in names):
                continue
            lr = make_lr(degradation, hr, [seed, photo.number])
            results = {BICUBIC: lr.resize(hr.size, Image.Resampling.BICUBIC)}
            for name, pipe in pipes.items():
                results[name] = pipe(lr, generator=torch.Generator().manual_seed(seed)).images[0]
            for name, sigma in grains.items():  # 1: another stream than that of the degradation
                results[name] = add_grain(results[last], sigma, [seed, photo.number, 1])
            make_sheet([*results.values(), hr]).save(arguments.output / f"{photo.name}_{degradation}.png")
            for name, result in results.items():
                if (degradation, photo.name, name) not in scores:
                    scores.add((degradation, photo.name, name), measure(result, hr))
        print(photo.name, flush=True)

    means, tables = {}, []
    for degradation in DEGRADATIONS:
        rows = []
        for name in names:
            values = {
                metric: [scores[degradation, photo.name, name][metric] for photo in photographs] for metric in METRICS
            }
            means[degradation, name] = {metric: float(np.mean(each)) for metric, each in values.items()}
            bicubic = [scores[degradation, photo.name, BICUBIC]["psnr_y"] for photo in photographs]
            gain = "" if name == BICUBIC else Difference.of(values["psnr_y"], bicubic).to_text("psnr_y")
            rows.append([name, *to_cells(means[degradation, name]), gain])
        title = f"{degradation}, mean over {len(photographs)} photographs"
        headings = [title, *(heading for _, heading, *_ in METRICS.values()), "PSNR Y − bicubic"]
        tables.append(markdown_table(headings, rows) + "\n")
    text = "\n".join(tables)
    print(text)
    write_atomically(arguments.output / "curve.md", text)
    make_plot(means).savefig(arguments.output / "curve.png", dpi=150)


if __name__ == "__main__":
    main()
