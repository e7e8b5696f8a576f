"""Can the start be chosen for each image? An experiment: a rule from the LR image's noise and blur.

    python examples/fit_auto_start.py --hr KODAK --output results

Each crop of the photographs of `--fit-patterns` is degraded in three ways (`test`, `simple` and `training` of
`findings_common.py`) and enlarged in one step from each start. The rule is a linear regression of what each start
gains over the mean of the starts, in PSNR-Y and in SSIM-Y, on features of the LR image. Then it chooses for crops of
the photographs of `--test-patterns`, which it has not seen, and is compared with each fixed start and with the best
start of each image, which nobody can know beforehand: the bound of all such rules. Differences are paired and
averaged over a photograph's crops first: a photograph counts once. `--output` gets `fit_scores.jsonl` and
`test_scores.jsonl` (a stopped run goes on there), `auto_start.md` and `auto_start.json`, with the rule. Needs
`pip install ".[examples,training]"`.
"""

import argparse
from dataclasses import asdict, dataclass

import numpy as np
import torch
from findings_common import (
    METRICS,
    Difference,
    Photograph,
    Scores,
    add_common_arguments,
    load_pipeline,
    make_lr,
    measure,
    positive,
    read_photographs,
    settings_of,
    write_json,
)
from PIL import Image
from scipy.ndimage import laplace
from skimage.restoration import estimate_sigma

from diffusers_invsr import TINY, InvSRPipeline
from diffusers_invsr.files import write_atomically
from diffusers_invsr.metrics import luma
from diffusers_invsr.scheduling_invsr import START_TIMESTEPS
from diffusers_invsr.tables import markdown_table


DEGRADATIONS = ("test", "simple", "training")
JUDGED = ("psnr_y", "ssim_y")
FEATURES = ("noise", "noise squared", "gradient ratio of two scales", "Laplacian without noise")
LAPLACIAN_GAIN = 20  # variance of the Laplacian (1, 1, -4, 1, 1) of white noise with variance 1


def mean_gradient(image: np.ndarray) -> float:
    return float(np.mean([np.abs(np.diff(image, axis=axis)).mean() for axis in (0, 1)]))


def features(lr: Image.Image) -> list[float]:
    r"""
    What the rule knows of an LR image: numbers of order 1 for `FEATURES`.

    The noise is scikit-image's wavelet estimate, the logarithm of levels of 255. The gradients of a sharp image shrink
    little when it is halved, those of a blurred one grow. The Laplacian's variance is that of luma less what the noise
    contributes, relative to the image's own variance.
    """
    pixels = np.array(lr)
    sigma = np.log1p(estimate_sigma(pixels.astype(np.float64), channel_axis=-1, average_sigmas=True))
    y = luma(pixels)
    height, width = (side // 2 * 2 for side in y.shape)
    half = y[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
    gradients = np.log((mean_gradient(half) + 0.1) / (mean_gradient(y) + 0.1))
    detail = max(np.var(laplace(y)) - LAPLACIAN_GAIN * estimate_sigma(y) ** 2, 0)
    return [float(x) for x in (sigma, sigma**2, gradients, np.log((detail + 1) / (np.var(y) + 1)))]


@dataclass
class Rule:
    """Chooses the start with the greatest predicted gain: PSNR-Y and SSIM-Y, each in units of its spread."""

    starts: tuple[int, ...]
    mean: np.ndarray  # of the features
    scale: np.ndarray  # their standard deviation
    weights: np.ndarray  # (features + 1, starts): from the standardised features and 1 to the gain of each start

    @classmethod
    def fit(cls, inputs: np.ndarray, scores: np.ndarray, starts: tuple[int, ...]) -> "Rule":
        r"""
        Least squares.

        Args:
            inputs (`np.ndarray`): Features `(images, features)`.
            scores (`np.ndarray`): `(images, starts, metrics)`.
            starts (`tuple[int, ...]`): The starts.
        """
        gains = scores - scores.mean(axis=1, keepdims=True)
        spread = gains.std(axis=(0, 1))
        target = (gains / np.where(spread > 0, spread, 1)).sum(axis=2)
        mean, scale = inputs.mean(axis=0), inputs.std(axis=0)
        rule = cls(starts, mean, np.where(scale > 0, scale, 1), np.empty(0))
        rule.weights = np.linalg.lstsq(rule.design(inputs), target, rcond=None)[0]
        return rule

    def design(self, inputs: np.ndarray) -> np.ndarray:
        return np.hstack([(inputs - self.mean) / self.scale, np.ones((len(inputs), 1))])

    def choose(self, inputs: np.ndarray) -> np.ndarray:
        """Index of a start for each image."""
        return (self.design(inputs) @ self.weights).argmax(axis=1)

    def to_dict(self) -> dict:
        return {
            "starts": list(self.starts),
            "features": list(FEATURES),
            **{name: getattr(self, name).tolist() for name in ("mean", "scale", "weights")},
        }


def crops_of(photo: Photograph, size: int, count: int, seeds: list[int]) -> list[Image.Image]:
    """Random crops, the same for the same seeds and photograph."""
    if min(photo.hr.size) < size:
        raise SystemExit(f"{photo.name} is {photo.hr.size} pixels, too small for --crop {size}.")
    rng = np.random.default_rng([*seeds, photo.number])
    corners = [[int(rng.integers(side - size + 1)) for side in photo.hr.size] for _ in range(count)]
    return [photo.hr.crop((left, top, left + size, top + size)) for left, top in corners]


def compute(
    pipe: InvSRPipeline, photographs: list[Photograph], size: int, count: int, scores: Scores, seeds: list[int]
):
    """Add the features and scores that are missing, by photograph, crop and degradation."""
    for photo in photographs:
        for number, hr in enumerate(crops_of(photo, size, count, seeds)):
            for kind, degradation in enumerate(DEGRADATIONS):
                key = (photo.name, number, degradation)
                if key in scores:
                    continue
                lr = make_lr(degradation, hr, [*seeds, photo.number, number, kind], pipe.config.scale)
                record = {"features": features(lr)}
                for start in START_TIMESTEPS:
                    generator = torch.Generator().manual_seed(seeds[0])
                    result = pipe(lr, timesteps=[start], tile_size=None, generator=generator).images[0]
                    record[str(start)] = measure(result, hr)
                scores.add(key, record)
        print(f"{photo.name}: {count} crops", flush=True)


@dataclass
class Samples:
    """All LR images of some photographs."""

    photographs: np.ndarray  # (images,): the names
    inputs: np.ndarray  # (images, features)
    scores: np.ndarray  # (images, starts, metrics)

    @classmethod
    def of(cls, scores: Scores, photographs: list[Photograph], count: int) -> "Samples":
        keys = [(p.name, number, d) for p in photographs for number in range(count) for d in DEGRADATIONS]
        records = [scores[key] for key in keys]
        table = [[[record[str(start)][m] for m in JUDGED] for start in START_TIMESTEPS] for record in records]
        return cls(np.array([key[0] for key in keys]), np.array([r["features"] for r in records]), np.array(table))

    def by_photograph(self, values: np.ndarray) -> list[float]:
        return [float(values[self.photographs == name].mean()) for name in dict.fromkeys(self.photographs)]


def compare(samples: Samples, rule: Rule) -> tuple[str, dict]:
    """Fixed starts, the rule and the bound on some images, as Markdown and as data."""
    choice = rule.choose(samples.inputs)
    methods = {f"start {start}": samples.scores[:, i] for i, start in enumerate(START_TIMESTEPS)}
    methods["rule"] = samples.scores[np.arange(len(choice)), choice]
    methods["best start of each image"] = samples.scores.max(axis=1)  # for each metric by itself
    values = {n: {m: samples.by_photograph(x[:, i]) for i, m in enumerate(JUDGED)} for n, x in methods.items()}
    minus_rule = {
        name: {metric: Difference.of(row[metric], values["rule"][metric]) for metric in JUDGED}
        for name, row in values.items()
        if name != "rule"
    }
    headings = [
        "",
        *(METRICS[metric][0] for metric in JUDGED),
        *(f"{METRICS[metric][0]} − rule's" for metric in JUDGED),
    ]
    rows = []
    for name, row in values.items():
        numbers = [f"{np.mean(row[metric]):.{METRICS[metric][1] + 1}f}" for metric in JUDGED]
        differences = [minus_rule[name][m].to_text(m) if name in minus_rule else "" for m in JUDGED]
        rows.append([name, *numbers, *differences])
    data = {
        "means": {name: {metric: float(np.mean(row[metric])) for metric in JUDGED} for name, row in values.items()},
        "minus_rule": {
            name: {m: asdict(d) | {"sign": d.sign} for m, d in row.items()} for name, row in minus_rule.items()
        },
        "chosen": {str(start): int((choice == i).sum()) for i, start in enumerate(START_TIMESTEPS)},
    }
    fixed = [row[metric] for name, row in minus_rule.items() if name.startswith("start") for metric in JUDGED]
    data["higher_than_each"], data["clearly"] = all(d.mean < 0 for d in fixed), all(d.sign == -1 for d in fixed)
    verdict = (
        "beats"
        if data["clearly"]
        else "is higher than, but not clearly,"
        if data["higher_than_each"]
        else "does not beat"
    )
    chosen = ", ".join(f"{start}: {times}" for start, times in data["chosen"].items())
    lines = f"- The rule {verdict} every fixed start in both metrics.\n- It chose {chosen}.\n"
    return f"{markdown_table(headings, rows)}\n\n{lines}", data


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, model=TINY)
    patterns = {"fit": ["kodim0?.png", "kodim1[0-6].png"], "test": ["kodim1[789].png", "kodim2?.png"]}
    for name, default in patterns.items():
        parser.add_argument(f"--{name}-patterns", nargs="+", default=default, help=f"files to {name} the rule with")
    parser.add_argument("--crop", type=positive, default=256, help="side of the crops in HR pixels")
    parser.add_argument("--crops", type=positive, default=4, help="crops of each photograph")
    arguments = parser.parse_args(argv)

    pipe = load_pipeline(arguments.model, arguments.device)
    if arguments.crop % pipe.config.scale:
        parser.error(f"--crop has to be a multiple of {pipe.config.scale}, but is {arguments.crop}.")
    sets = {name: read_photographs(arguments.hr, getattr(arguments, f"{name}_patterns")) for name in patterns}
    if shared := {photo.name for photo in sets["fit"]} & {photo.name for photo in sets["test"]}:
        parser.error(f"--fit-patterns and --test-patterns both have {', '.join(sorted(shared))}.")

    samples = {}
    for index, (name, photographs) in enumerate(sets.items()):
        settings = settings_of(pipe, photographs, arguments.seed) | {"crop": arguments.crop}
        scores = Scores(arguments.output / f"{name}_scores.jsonl", settings)
        compute(pipe, photographs, arguments.crop, arguments.crops, scores, [arguments.seed, index])
        samples[name] = Samples.of(scores, photographs, arguments.crops)
    rule = Rule.fit(samples["fit"].inputs, samples["fit"].scores, START_TIMESTEPS)
    parts, data = [], {"rule": rule.to_dict()}
    for name in ("test", "fit"):
        text, data[name] = compare(samples[name], rule)
        seen = "never seen by the rule" if name == "test" else "those the rule was fitted on"
        count = len(samples[name].inputs)
        parts.append(f"## {count} images of {len(sets[name])} photographs, {seen}\n\n{text}")
    text = "\n".join(parts)
    print(text)
    write_atomically(arguments.output / "auto_start.md", text)
    write_json(arguments.output / "auto_start.json", data)


if __name__ == "__main__":
    main()
