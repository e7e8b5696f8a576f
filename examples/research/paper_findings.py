"""The paper's findings, tested on a model: tables and verdicts from photographs that its training never saw.

    python examples/research/paper_findings.py --hr KODAK --patterns 'kodim1[789].png' 'kodim2?.png' --output results

LR images are made from fixed seeds by two degradations: `test`, that of the paper's test sets, and `simple`, one blur,
noise and JPEG. `--output` gets `scores.jsonl` (every score; a stopped run resumes from there), `findings.md` and
pictures. A difference is clear if its 95 % confidence interval over the photographs (paired, Student's t) excludes 0.
A claim is confirmed if all of its differences are clear and have the claimed direction.
Needs `pip install ".[examples,training]"`.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from findings_common import (
    DEGRADATIONS,
    METRICS,
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

from diffusers_invsr import TINY, InvSRPipeline
from diffusers_invsr.files import write_atomically
from diffusers_invsr.scheduling_invsr import PUBLISHED_SCHEDULES, START_TIMESTEPS
from diffusers_invsr.tables import markdown_table
from diffusers_invsr.training.validation import to_image, to_tensor


SCALES = (2, 3, 4, 6)
ABLATION = ((250, 200, 150, 100, 50), (250, 150, 50), (150, 100, 50), (250,), (100,))  # of the paper, for finding 2
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}
CEILING = "autoencoder ceiling"
PREDICTED, RANDOM, NONE = "predicted noise", "random noise", "no noise"
CLAIM_METRICS = ("psnr_y", "ssim_y")  # a claim is judged by each of them separately
DIFFERENCE_METRICS = ("psnr_y", "ssim_y", "gradient_ratio")


@dataclass(frozen=True)
class Run:
    """How the LR images of a table's row are made and upscaled."""

    degradation: str
    method: str  # an interpolation, the ceiling, or the noise at the start
    timesteps: tuple[int, ...] = ()
    eta: float = 0.0
    scale: int = 4

    @property
    def name(self) -> str:
        steps = f", {len(self.timesteps)} step{'s' * (len(self.timesteps) > 1)} {list(self.timesteps)}"
        return f"{self.method}{steps if self.timesteps else ''}{f', eta {self.eta:g}' if self.eta else ''}"

    def key(self, photo: Photograph) -> tuple:
        return self.degradation, self.scale, photo.name, self.name


@dataclass
class Question:
    """Differences a − b of rows, by their labels. All are above 0 if the claim holds."""

    text: str
    pairs: list[tuple[str, str]]
    is_claim: bool = True


@dataclass
class Table:
    title: str
    rows: dict[str, Run]
    questions: list[Question] = field(default_factory=list)


def rows_of(runs: list[Run]) -> dict[str, Run]:
    return {run.name: run for run in runs}


def main_table(degradation: str) -> Table:
    runs = [Run(degradation, name) for name in INTERPOLATIONS]
    runs += [Run(degradation, PREDICTED, PUBLISHED_SCHEDULES[num_steps]) for num_steps in (1, 3, 5)]
    rows = rows_of([*runs, Run(degradation, CEILING)])
    question = Question("One step against bicubic interpolation", [(runs[2].name, "bicubic")], is_claim=False)
    return Table("What the model does", rows, [question])


def noise_table(degradation: str) -> Table:
    methods = (PREDICTED, RANDOM, NONE)
    runs = {(method, start): Run(degradation, method, (start,)) for method in methods for start in START_TIMESTEPS}
    pairs = [
        (runs[PREDICTED, start].name, runs[method, start].name) for method in methods[1:] for start in START_TIMESTEPS
    ]
    question = Question("Predicted noise is better than random noise and than none, at each start", pairs)
    return Table("Finding 1: the predicted noise", rows_of(list(runs.values())), [question])


def steps_table(degradation: str) -> Table:
    five, early_three, late_three, early_one, late_one = runs = [Run(degradation, PREDICTED, s) for s in ABLATION]
    fewer = [(early_one.name, early_three.name), (early_three.name, five.name), (late_one.name, late_three.name)]
    later = [(late_three.name, early_three.name), (late_one.name, early_one.name)]
    questions = [Question("Fewer steps: closer to the HR image", fewer), Question("Later starts: closer", later)]
    return Table("Finding 2: number of steps and start", rows_of(runs), questions)


def damage_table() -> Table:
    starts = {"early start": (250,), "late start": (100,)}
    rows = {}
    for damage in ("blur", "noise"):
        rows[f"{damage}: bicubic"] = Run(damage, "bicubic")
        rows |= {f"{damage}: {name} {list(steps)}": Run(damage, PREDICTED, steps) for name, steps in starts.items()}
    early, late = (f"{name} {list(steps)}" for name, steps in starts.items())
    questions = [
        Question("The early start is better for blur", [(f"blur: {early}", f"blur: {late}")]),
        Question("The late start is better for noise", [(f"noise: {late}", f"noise: {early}")]),
    ]
    return Table("Finding 3: kind of damage and start", rows, questions)


def eta_table(degradation: str) -> Table:
    rows, pairs = {}, []
    for timesteps in (PUBLISHED_SCHEDULES[3], PUBLISHED_SCHEDULES[5]):
        ddim, noisy = (Run(degradation, PREDICTED, timesteps, eta) for eta in (0.0, 1.0))
        rows |= rows_of([ddim, noisy])
        pairs.append((noisy.name, ddim.name))
    question = Question(
        "Random noise at the intermediate steps (eta = 1) against DDIM (eta = 0)", pairs, is_claim=False
    )
    return Table("Finding 4: noise of the intermediate steps", rows, [question])


def scales_table(degradation: str) -> Table:
    rows, pairs = {}, []
    for scale in SCALES:
        bicubic = Run(degradation, "bicubic", scale=scale)
        model = Run(degradation, PREDICTED, PUBLISHED_SCHEDULES[1], scale=scale)
        rows |= {f"×{scale}: {run.name}": run for run in (bicubic, model)}
        pairs.append((f"×{scale}: {model.name}", f"×{scale}: {bicubic.name}"))
    question = Question("One set of weights, better than bicubic interpolation at each scale", pairs)
    return Table("Finding 5: scales", rows, [question])


TABLES = {
    "main": [main_table(degradation) for degradation in DEGRADATIONS],
    "noise": [noise_table(degradation) for degradation in DEGRADATIONS],
    "steps": [steps_table(degradation) for degradation in DEGRADATIONS],
    "damage": [damage_table()],
    "eta": [eta_table(degradation) for degradation in DEGRADATIONS],
    "scales": [scales_table(degradation) for degradation in DEGRADATIONS],
}


# Computing


@torch.no_grad()
def reconstruct(pipe: InvSRPipeline, hr: Image.Image) -> Image.Image:
    """The HR image through the autoencoder alone: no result can be better than what it can represent."""
    latents = pipe.encode_image(to_tensor(hr).to(pipe.device), torch.zeros(1, device=pipe.device))
    return to_image(pipe.decode_image(latents))


def make_result(pipes: dict[str, InvSRPipeline], run: Run, lr: Image.Image, hr: Image.Image, seed: int) -> Image.Image:
    """The result of a run for one photograph."""
    if run.method == CEILING:
        return reconstruct(pipes[PREDICTED], hr)
    if run.method in INTERPOLATIONS:
        return lr.resize(hr.size, INTERPOLATIONS[run.method])
    result = pipes[run.method](
        lr,
        timesteps=list(run.timesteps),
        scale=run.scale,
        eta=run.eta,
        tile_size=None,
        generator=torch.Generator().manual_seed(seed),
    )
    return result.images[0]


def compute(
    pipe: InvSRPipeline, photographs: list[Photograph], runs: list[Run], scores: Scores, seed: int, pictures: Path
):
    """Add the missing scores, photograph by photograph, and save pictures of some results."""
    pipes = {PREDICTED: pipe, RANDOM: with_constant_noise(pipe, 0.0), NONE: with_constant_noise(pipe, -30.0)}
    for photo in photographs:
        for degradation, scale in dict.fromkeys((run.degradation, run.scale) for run in runs):
            here = [run for run in runs if (run.degradation, run.scale) == (degradation, scale)]
            missing = [run for run in here if run.key(photo) not in scores]
            if not missing:
                continue
            hr = crop_to_multiple(photo.hr, scale)
            lr = make_lr(degradation, hr, [seed, photo.number], scale)
            lr.save(pictures / f"{photo.name}_{degradation}_x{scale}_lr.png")
            for run in missing:
                result = make_result(pipes, run, lr, hr, seed)
                if run.method == "bicubic" or (run.method == PREDICTED and run.timesteps == PUBLISHED_SCHEDULES[1]):
                    name = run.method.split()[0]
                    result.save(pictures / f"{photo.name}_{degradation}_x{scale}_{name}.png")
                scores.add(run.key(photo), measure(result, hr))
            print(f"{photo.name}, {degradation} ×{scale}: {len(missing)} results", flush=True)


# Reporting


def values(scores: Scores, run: Run, photographs: list[Photograph], metric: str) -> list[float]:
    return [scores[run.key(photo)][metric] for photo in photographs]


def verdict(pairs: list[tuple[str, str]], differences: list[Difference], metric: str) -> str:
    """Whether the differences of all pairs confirm a claim, and the smallest of them."""
    number = min(range(len(pairs)), key=lambda i: differences[i].mean)
    smallest, (a, b) = differences[number], pairs[number]
    clear, reverse = (sum(d.direction == direction for d in differences) for direction in (1, -1))
    if smallest.direction is None:
        words = "cannot be tested with one photograph"
    elif clear == len(pairs):
        words = "confirmed here"
    else:
        words = f"not confirmed here ({clear} of {len(pairs)} clearly so, {reverse} clearly the reverse)"
    which = f", the smallest, of {a} − {b}" if len(pairs) > 1 else ""
    return f"{METRICS[metric][1]}: {words}, {smallest.to_text(metric)}{which}"


def report(table: Table, scores: Scores, photographs: list[Photograph]) -> str:
    """A table and its questions in Markdown."""
    degradations = dict.fromkeys(run.degradation for run in table.rows.values())
    headings = [f"mean over {len(photographs)} photographs", *(heading for _, heading, *_ in METRICS.values())]
    rows = []
    for label, run in table.rows.items():
        means = {metric: float(np.mean(values(scores, run, photographs, metric))) for metric in METRICS}
        rows.append([label, *to_cells(means)])
    parts = [f"## {table.title} ({', '.join(degradations)})", markdown_table(headings, rows)]
    headings = ["difference ± standard error", *(METRICS[metric][1] for metric in DIFFERENCE_METRICS)]
    for question in table.questions:
        differences = {
            metric: [
                Difference.of(*(values(scores, table.rows[label], photographs, metric) for label in pair))
                for pair in question.pairs
            ]
            for metric in DIFFERENCE_METRICS
        }
        lines = [f"**{question.text}**"]
        if question.is_claim:
            lines += [f"- {verdict(question.pairs, differences[metric], metric)}" for metric in CLAIM_METRICS]
        rows = [
            [f"{a} − {b}", *(differences[metric][i].to_text(metric) for metric in DIFFERENCE_METRICS)]
            for i, (a, b) in enumerate(question.pairs)
        ]
        parts += ["\n".join(lines), markdown_table(headings, rows)]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--model", default=TINY, help="folder of a pipeline (default: the embedded model)")
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), help="which tables (default: all)"
    )
    arguments = parser.parse_args(argv)

    photographs = read_photographs(arguments)
    pipe = load_pipeline(arguments.model, arguments.device)
    scores = Scores(arguments.output / "scores.jsonl", settings_of(pipe, photographs, arguments.seed))
    pictures = arguments.output / "pictures"
    pictures.mkdir(exist_ok=True)
    tables = [table for name in arguments.tables for table in TABLES[name]]
    runs = list(dict.fromkeys(run for table in tables for run in table.rows.values()))
    compute(pipe, photographs, runs, scores, arguments.seed, pictures)

    text = "\n".join(report(table, scores, photographs) for table in tables)
    print(text)
    write_atomically(arguments.output / "findings.md", text)


if __name__ == "__main__":
    main()
