"""Where does the quality turn? One-step results from starts at ever lower signal-to-noise ratios.

    python examples/research/snr_threshold.py --model MODEL --hr KODAK --patterns 'kodim1[789].png' 'kodim2?.png' \
        --output out

The paper starts where SNR = ᾱ / (1 − ᾱ) is above 1.44, at step 250 (2.08) or later, and the pipeline accepts no other
start. So this script puts the pipeline's parts together itself. The model's diffusion prior and noise predictor must
have been trained on all of the starts. Predicted noise is compared with random noise. `--output` gets `scores.jsonl`
(a stopped run resumes from there) and `threshold.md`. Needs `pip install ".[examples,training]"`.
"""

import argparse

import numpy as np
import torch
from findings_common import (
    DEGRADATIONS,
    METRICS,
    PAPER_DEGRADATIONS,
    SIMPLE_DEGRADATIONS,
    Difference,
    Photograph,
    Scores,
    add_arguments,
    crop_to_multiple,
    load_pipeline,
    make_lr,
    measure,
    read_photographs,
    settings_of,
    to_cells,
    with_constant_noise,
)
from PIL import Image

from diffusers_invsr import InvSRPipeline
from diffusers_invsr.files import write_atomically
from diffusers_invsr.resampling import enlarge
from diffusers_invsr.tables import markdown_table
from diffusers_invsr.training import one_step_estimate
from diffusers_invsr.training.validation import to_image, to_tensor


STARTS = (50, 100, 150, 200, 250, 300, 350, 400)
PREDICTED, RANDOM = "predicted", "random"
SHOWN = ("psnr_y", "ssim_y", "gradient_ratio")
JUDGED = ("psnr_y", "ssim_y")


@torch.no_grad()
def one_step(pipe: InvSRPipeline, lr: Image.Image, start: int, seed: int) -> Image.Image:
    """`pipe(lr, timesteps=[start], tile_size=None)` for any start and an image that needs no padding."""
    pixels = to_tensor(lr).to(pipe.device)
    noise = pipe.prepare_noise(1, lr.height, lr.width, 2, torch.Generator().manual_seed(seed), pipe.device)
    index = torch.tensor([start - 1], device=pipe.device)
    latents = pipe.encode_image(enlarge(pixels, pipe.config.scale), noise[1])
    prompt_embeds, _ = pipe.encode_prompt(do_classifier_free_guidance=False, device=pipe.device)
    estimate = one_step_estimate(
        pipe.noise_predictor, pipe.unet, pipe.scheduler, pixels, latents, index, noise[0], prompt_embeds
    )
    return to_image(pipe.decode_image(estimate))


def compute(
    pipe: InvSRPipeline,
    photographs: list[Photograph],
    degradations: list[str],
    starts: list[int],
    scores: Scores,
    seed: int,
):
    """Add the missing scores."""
    pipes = {PREDICTED: pipe, RANDOM: with_constant_noise(pipe, 0.0)}
    for photo in photographs:
        for degradation in degradations:
            keys = [(degradation, noise, start, photo.name) for noise in pipes for start in starts]
            missing = [key for key in keys if key not in scores]
            if not missing:
                continue
            hr = crop_to_multiple(photo.hr, pipe.size_multiple * pipe.config.scale)
            lr = make_lr(degradation, hr, [seed, photo.number], pipe.config.scale)
            for key in missing:
                _, noise, start, _ = key
                scores.add(key, measure(one_step(pipes[noise], lr, start, seed), hr))
            print(f"{photo.name}, {degradation}: {len(missing)} results", flush=True)


def turning_point(by_start: dict[int, list[float]], metric: str) -> str:
    """The best start and the first one with more noise that is clearly worse. Starts are in ascending order."""
    best = max(by_start, key=lambda start: np.mean(by_start[start]))
    for start, values in by_start.items():
        difference = Difference.of(values, by_start[best])
        if start > best and difference.direction == -1:
            turn = f"with more noise, start {start} is the first that is clearly worse, {difference.to_text(metric)}"
            break
    else:
        turn = f"no start with more noise, up to {max(by_start)}, is clearly worse"
    return f"{METRICS[metric][1]}: best at start {best}; {turn}"


def report(degradation: str, snr: dict[int, float], scores: Scores, photographs: list[Photograph]) -> str:
    """The table of a degradation over the starts, and where its quality turns, in Markdown."""

    def values(noise: str, start: int, metric: str) -> list[float]:
        return [scores[degradation, noise, start, photo.name][metric] for photo in photographs]

    rows = []
    for start, ratio in snr.items():
        means = {metric: float(np.mean(values(PREDICTED, start, metric))) for metric in SHOWN}
        gain = Difference.of(*(values(noise, start, "psnr_y") for noise in (PREDICTED, RANDOM)))
        rows.append([str(start), f"{ratio:.2f}", *to_cells(means), gain.to_text("psnr_y")])
    headings = ["start", "SNR", *(METRICS[metric][1] for metric in SHOWN), "predicted − random, PSNR Y"]
    turns = [turning_point({start: values(PREDICTED, start, metric) for start in snr}, metric) for metric in JUDGED]
    title = f"One step from each start ({degradation}, mean over {len(photographs)} photographs)"
    lines = "\n".join(f"- {turn}" for turn in turns)
    return f"## {title}\n\n{markdown_table(headings, rows)}\n\n{lines}\n"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--model", required=True, help="folder of a pipeline")
    names = [*PAPER_DEGRADATIONS, *SIMPLE_DEGRADATIONS]
    parser.add_argument("--degradations", nargs="+", choices=names, default=DEGRADATIONS)
    parser.add_argument("--starts", type=int, nargs="+", default=STARTS, help="steps, counted from 1")
    arguments = parser.parse_args(argv)

    pipe = load_pipeline(arguments.model, arguments.device)
    starts, last = sorted(set(arguments.starts)), len(pipe.scheduler.alphas_cumprod)
    if not 1 <= starts[0] <= starts[-1] <= last:
        parser.error(f"`--starts` must be between 1 and {last}, got {starts}.")
    photographs = read_photographs(arguments)
    scores = Scores(arguments.output / "scores.jsonl", settings_of(pipe, photographs, arguments.seed))
    compute(pipe, photographs, arguments.degradations, starts, scores, arguments.seed)

    alphas = {start: pipe.scheduler.alphas_cumprod[start - 1].item() for start in starts}
    snr = {start: alpha / (1 - alpha) for start, alpha in alphas.items()}
    text = "\n".join(report(degradation, snr, scores, photographs) for degradation in arguments.degradations)
    print(text)
    write_atomically(arguments.output / "threshold.md", text)


if __name__ == "__main__":
    main()
