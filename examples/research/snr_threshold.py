"""Where does the quality turn? One-step results from starts at ever lower signal-to-noise ratios.

    python examples/research/snr_threshold.py --model MODEL --hr KODAK --patterns 'kodim1[789].png' 'kodim2?.png' \
        --output out

The paper starts where SNR = ᾱ / (1 − ᾱ) is above 1.44, at step 250 (2.08) or later. The pipeline keeps to that, so
this script puts its parts together. The model's diffusion prior and noise predictor have to know all of the starts:
`train_tiny.py --prior-steps 400`, and a predictor that was trained from 50, 100, ..., 400. Predicted noise is compared
with random noise. `--output` gets `scores.jsonl` (a stopped run goes on there), `threshold.md` and `threshold.json`.
Needs `pip install ".[examples,training]"`; `--plot` needs matplotlib besides.
"""

import argparse
import importlib.util
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from findings_common import (
    METRICS,
    PAPER_DEGRADATIONS,
    SIMPLE_DEGRADATIONS,
    Difference,
    Photograph,
    Scores,
    add_common_arguments,
    add_pattern_argument,
    crop_to_multiple,
    load_pipeline,
    make_lr,
    measure,
    read_photographs,
    settings_of,
    with_constant_noise,
    write_json,
)
from PIL import Image

from diffusers_invsr import InvSRPipeline
from diffusers_invsr.files import write_atomically
from diffusers_invsr.resampling import enlarge
from diffusers_invsr.tables import markdown_table
from diffusers_invsr.training import one_step_estimate
from diffusers_invsr.training.validation import to_image, to_tensor


STARTS = (50, 100, 150, 200, 250, 300, 350, 400)
NOISES = ("predicted", "random")
SHOWN = ("psnr_y", "ssim_y", "gradient_ratio")
JUDGED = ("psnr_y", "ssim_y")


@torch.no_grad()
def one_step(pipe: InvSRPipeline, lr: Image.Image, start: int, seed: int) -> Image.Image:
    """What `pipe(lr, timesteps=[start], tile_size=None)` gives of an image that needs no padding, at any start."""
    pixels = to_tensor(lr).to(pipe.device)
    noise = pipe.prepare_noise(1, lr.height, lr.width, 2, torch.Generator().manual_seed(seed), pipe.device)
    index = torch.tensor([start - 1], device=pipe.device)
    latents = pipe.encode_image(enlarge(pixels, pipe.config.scale), noise[1])
    prompt_embeds, _ = pipe.encode_prompt(None, None, None, None, False, pipe.device)
    estimate = one_step_estimate(
        pipe.noise_predictor, pipe.unet, pipe.scheduler, pixels, latents, index, noise[0], prompt_embeds
    )
    return to_image(pipe.decode_image(estimate))


def compute(
    pipe, photographs: list[Photograph], degradations: list[str], starts: list[int], scores: Scores, seed: int
):
    """Add the scores that are missing."""
    pipes = dict(zip(NOISES, (pipe, with_constant_noise(pipe, 0.0))))
    for photo in photographs:
        for degradation in degradations:
            keys = [(degradation, noise, start, photo.name) for noise in NOISES for start in starts]
            missing = [key for key in keys if key not in scores]
            if not missing:
                continue
            hr = crop_to_multiple(photo.hr, pipe.size_multiple * pipe.config.scale)
            lr = make_lr(degradation, hr, [seed, photo.number], pipe.config.scale)
            for key in missing:
                _, noise, start, _ = key
                scores.add(key, measure(one_step(pipes[noise], lr, start, seed), hr))
            print(f"{photo.name}, {degradation}: {len(missing)} results", flush=True)


def turning_point(starts: list[int], by_start: dict[int, list[float]], metric: str) -> tuple[str, dict]:
    """The best start, and the first one with more noise that is clearly worse."""
    best = max(starts, key=lambda start: np.mean(by_start[start]))
    differences = {start: Difference.of(by_start[start], by_start[best]) for start in starts}
    turn = next((start for start in starts if start > best and differences[start].sign == -1), None)
    text = f"{METRICS[metric][0]}: best at start {best}; "
    if turn is None:
        text += f"no start with more noise, up to {starts[-1]}, is clearly worse"
    else:
        text += (
            f"with more noise, start {turn} is the first that is clearly worse, {differences[turn].to_text(metric)}"
        )
    return text, {"best": best, "turn": turn, "below_best": {s: asdict(d) for s, d in differences.items()}}


def report(
    degradation: str, starts: list[int], snr: dict[int, float], scores: Scores, photographs: list[Photograph]
) -> tuple[str, dict]:
    """The table of a degradation and where its quality turns, as Markdown and as data."""

    def values(noise: str, start: int, metric: str) -> list[float]:
        return [scores[degradation, noise, start, photo.name][metric] for photo in photographs]

    headings = ["start", "SNR", *(METRICS[metric][0] for metric in SHOWN), "predicted − random, PSNR Y"]
    rows, means = [], []
    for start in starts:
        row = {metric: float(np.mean(values("predicted", start, metric))) for metric in SHOWN}
        gain = {metric: Difference.of(*(values(noise, start, metric) for noise in NOISES)) for metric in JUDGED}
        means.append({"start": start, "snr": snr[start], **row, "gain": {m: asdict(d) for m, d in gain.items()}})
        numbers = [f"{mean:.{METRICS[metric][1]}f}" for metric, mean in row.items()]
        rows.append([str(start), f"{snr[start]:.2f}", *numbers, gain["psnr_y"].to_text("psnr_y")])
    turns = {
        metric: turning_point(starts, {start: values("predicted", start, metric) for start in starts}, metric)
        for metric in JUDGED
    }
    title = f"One step from each start ({degradation}, mean over {len(photographs)} photographs)"
    lines = "\n".join(f"- {text}" for text, _ in turns.values())
    data = {
        "degradation": degradation,
        "starts": means,
        "turns": {metric: data for metric, (_, data) in turns.items()},
    }
    return f"## {title}\n\n{markdown_table(headings, rows)}\n\n{lines}\n", data


def plot(reports: list[dict], file: Path):
    """PSNR and SSIM over the SNR of the start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(JUDGED)), JUDGED):
        for data in reports:
            points = [(row["snr"], row[metric]) for row in data["starts"]]
            axes.plot(*zip(*points), marker="o", label=data["degradation"])
        axes.set(xlabel="SNR of the start", ylabel=METRICS[metric][0], xscale="log")
        axes.legend()
    figure.savefig(file)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, model=None)
    add_pattern_argument(parser)
    names = [*PAPER_DEGRADATIONS, *SIMPLE_DEGRADATIONS]
    parser.add_argument("--degradations", nargs="+", choices=names, default=["test", "simple"])
    parser.add_argument("--starts", type=int, nargs="+", default=STARTS, help="steps, counted from 1")
    parser.add_argument("--plot", type=Path, help="a picture of it, such as threshold.png")
    arguments = parser.parse_args(argv)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: `pip install matplotlib`.")

    pipe = load_pipeline(arguments.model, arguments.device)
    starts, last = sorted(set(arguments.starts)), len(pipe.scheduler.alphas_cumprod)
    if not 1 <= starts[0] <= starts[-1] <= last:
        parser.error(f"--starts have to be from 1 to {last}, but are {starts}.")
    photographs = read_photographs(arguments.hr, arguments.patterns, arguments.crop)
    scores = Scores(arguments.output / "scores.jsonl", settings_of(pipe, photographs, arguments.seed))
    compute(pipe, photographs, arguments.degradations, starts, scores, arguments.seed)

    alphas = {start: pipe.scheduler.alphas_cumprod[start - 1].item() for start in starts}
    snr = {start: alpha / (1 - alpha) for start, alpha in alphas.items()}
    reports = [report(degradation, starts, snr, scores, photographs) for degradation in arguments.degradations]
    text = "\n".join(markdown for markdown, _ in reports)
    print(text)
    write_atomically(arguments.output / "threshold.md", text)
    data = {"photographs": [photo.name for photo in photographs], "degradations": [data for _, data in reports]}
    write_json(arguments.output / "threshold.json", data)
    if arguments.plot:
        plot([data for _, data in reports], arguments.plot)


if __name__ == "__main__":
    main()
