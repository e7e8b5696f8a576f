"""Which overlap and window hide the seams between tiles? Every setting against an untiled pass of the same image.

    python examples/benchmarks/measure_seams.py --hr KODAK --patterns 'kodim0[1-6].png' --tile-size 64 --output out
    python examples/benchmarks/measure_seams.py --hr LR_IMAGES --degradation none --tile-size 48 --output out

With D = tiled − untiled, in levels of 255, along both axes:

- step: |D(x) − D(x − 1)| where a tile or its ramp begins or ends, against all other places at the same phase of the
  networks' grid (D steps more at the borders of the latents' pixels than between them). A hard border shows here; a
  blended one is no step but a broad ramp.
- line: the same difference averaged with its sign over 32 pixels along the border, so that only straight lines
  remain; the largest within an LR pixel of where one tile gives way to the next (the middle of their overlap, where
  the slope of the blending is steepest), against all other places at the same phase.
- band: |D| where tiles overlap or within an LR pixel of a tile's end, against where one tile stands alone. With half
  a tile of overlap the latter are the margins of the image.

The rule: the smallest overlap at which each of the three is as low as with the published tiling (half a tile,
Gaussian), or as elsewhere in the same images, where no seam can be: the mean of the paired differences is not above
its standard error. Of two windows that pass, the one with the lower line.

D contains noise, which is drawn for each tile by itself, and context: the padding at a tile's ends and group
normalisations, which see the whole tile. The PSNR between two untiled passes with different seeds shows how much is
noise.

`--output` gets `seams.md` and for each image a picture with one row per setting, where its line is worst: untiled,
published tiling, this setting, and D of both amplified. Needs `pip install ".[examples,training]"`.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from benchmark_common import positive
from PIL import Image
from scipy.ndimage import maximum_filter1d

from diffusers_invsr import TINY, InvSRPipeline
from diffusers_invsr.degradation.simple import simple_degradation
from diffusers_invsr.metrics import psnr
from diffusers_invsr.tables import markdown_table
from diffusers_invsr.tiling import TILE_WINDOWS, TileAxis


SEGMENT = 32  # pixels along a border
MEASURES = ("step", "line", "band")
CROP, AMPLIFICATION = 160, 16  # of the pictures


class Seams:
    r"""
    Where seams can be along one axis, in output pixels.

    Attributes:
        ends (`list[int]`): First pixels after a tile or its ramp begins or ends.
        crossings (`list[int]`): Where one tile gives way to the next.
        band (`np.ndarray`): Whether a pixel is in several tiles or within an LR pixel of an end, `(length,)`.
    """

    def __init__(self, axis: TileAxis, scale: int):
        self.length, self.period = axis.length * scale, axis.multiple * scale
        side, ramp = axis.tile_size * scale, axis.overlap * scale
        tiles = [(start * scale, start * scale + side) for start in axis.starts]
        ends = {end for a, b in tiles for end in (a, a + ramp, b - ramp, b)}
        self.ends = sorted(end for end in ends if 0 < end < self.length)
        self.crossings = [(b + a) // 2 for (_, b), (a, _) in zip(tiles, tiles[1:])]
        cover = np.zeros(self.length, dtype=int)
        for a, b in tiles:
            cover[a:b] += 1
        self.band = cover > 1
        for end in {end for tile in tiles for end in tile if 0 < end < self.length}:
            self.band[max(end - scale, 0) : end + scale] = True

    def split(self, places: list[int], reach: int) -> tuple[np.ndarray, np.ndarray]:
        """The places, and all others at the same phase of the networks' grid that are farther than `reach`."""
        others = np.arange(1, self.length)
        places = np.array(places, dtype=int)
        others = others[np.isin(others % self.period, places % self.period)]
        return places, others[(np.abs(others[:, None] - places) > reach).all(axis=1)]


def line_profile(steps: np.ndarray, reach: int) -> np.ndarray:
    """`(height, width - 1, 3)` steps from column to column as lines of a segment's length, `(segments, width - 1)`."""
    segments = steps[: len(steps) // SEGMENT * SEGMENT].reshape(-1, SEGMENT, *steps.shape[1:])
    return maximum_filter1d(np.abs(segments.mean(axis=1)).mean(axis=-1), 2 * reach + 1, axis=1)


def seam_measures(tiled: np.ndarray, untiled: np.ndarray, axes: list[TileAxis], scale: int) -> dict:
    """The three measures at the seams and elsewhere, PSNR, number of tiles, and where the worst line is."""
    difference = tiled - untiled
    at, elsewhere, worst = {"step": [], "line": []}, {"step": [], "line": []}, (0.0, 0, 0)
    both = [Seams(axis, scale) for axis in axes]
    for dim, seams in enumerate(both):
        across = difference.swapaxes(0, 1) if dim == 0 else difference  # the axis across the seams is the second one
        steps = np.diff(across, axis=1)
        lines = line_profile(steps, scale)
        for name, values, places, reach in (
            ("step", np.abs(steps).mean(axis=(0, 2)), seams.ends, 0),
            ("line", lines.mean(axis=0), seams.crossings, 2 * scale),
        ):
            seam, other = seams.split(places, reach)
            at[name] += [*values[seam - 1]]
            elsewhere[name] += [*values[other - 1]]
        for crossing in seams.crossings:
            segment = int(lines[:, crossing - 1].argmax())
            middle = (crossing, segment * SEGMENT + SEGMENT // 2)
            worst = max(worst, (float(lines[segment, crossing - 1]), *(middle if dim == 0 else middle[::-1])))
    band = both[0].band[:, None] | both[1].band[None]
    at["band"], elsewhere["band"] = (np.abs(difference[mask]).mean(axis=-1) for mask in (band, ~band))
    return {
        "tiles": math.prod(len(axis.starts) for axis in axes),
        "psnr": psnr(tiled, untiled),
        **{name: float(np.mean(values)) for name, values in at.items()},
        **{f"{name} elsewhere": float(np.mean(values)) for name, values in elsewhere.items()},
        "worst at": worst[1:],
    }


def make_row(images: list[np.ndarray], untiled: np.ndarray, middle: tuple[int, int]) -> np.ndarray:
    """Untiled and tiled images around a place, then D of the tiled ones, amplified, side by side."""
    top, left = (min(max(x - CROP // 2, 0), max(side - CROP, 0)) for x, side in zip(middle, untiled.shape))
    shown = [untiled, *images, *(127.5 + AMPLIFICATION * (image - untiled) for image in images)]
    crops = [np.pad(x[top : top + CROP, left : left + CROP], ((0, 4), (0, 4), (0, 0))) for x in shown]
    return np.concatenate(crops, axis=1)


def upscale(pipe: InvSRPipeline, lr: Image.Image, seed: int, **tiling) -> np.ndarray:
    """The upscaled image `(height, width, 3)` in levels of 255, not rounded."""
    generator = torch.Generator().manual_seed(seed)
    return 255 * pipe(lr, generator=generator, output_type="np", **tiling).images[0].astype(np.float64)


def measure(
    pipe: InvSRPipeline, lr: Image.Image, tile_size: int, settings: list[tuple[int, str]], seed: int
) -> tuple[dict[tuple[int, str], dict], float, Image.Image]:
    """The measures of every setting on an image, the PSNR between two seeds, and the picture."""
    untiled = upscale(pipe, lr, seed, tile_size=None)
    published = upscale(pipe, lr, seed, tile_size=tile_size, tile_window="gaussian")
    scores, rows = {}, []
    for overlap, window in settings:
        tiled = upscale(pipe, lr, seed, tile_size=tile_size, tile_overlap=overlap, tile_window=window)
        axes = [TileAxis(length, tile_size, overlap, pipe.size_multiple) for length in (lr.height, lr.width)]
        scores[overlap, window] = seam_measures(tiled, untiled, axes, pipe.config.scale)
        rows.append(make_row([published, tiled], untiled, scores[overlap, window]["worst at"]))
    sheet = np.concatenate(rows).round().clip(0, 255).astype(np.uint8)
    return scores, psnr(upscale(pipe, lr, seed + 1, tile_size=None), untiled), Image.fromarray(sheet)


def paired_difference(values: list[float], others: list[float]) -> tuple[float, float]:
    """Mean of the differences and its standard error, which is 0 for one pair: then the mean alone decides."""
    differences = np.subtract(values, others)
    count = len(differences)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0


def report(images: list[dict[tuple[int, str], dict]], tile_size: int, noise: float) -> str:
    """The table over all images and the choice, in Markdown."""
    published = [scores[tile_size // 2, "gaussian"] for scores in images]
    rows, passed = [], []
    for overlap, window in images[0]:
        scores = [each[overlap, window] for each in images]
        mean = {name: float(np.mean([score[name] for score in scores])) for name in scores[0] if name != "worst at"}
        rows.append([str(overlap), window.replace("_", " "), f"{mean['tiles']:.0f}", f"{mean['psnr']:.2f}"])
        is_as_low = []
        for name in MEASURES:
            values = [score[name] for score in scores]
            difference, error = paired_difference(values, [score[name] for score in published])
            above, above_error = paired_difference(values, [score[f"{name} elsewhere"] for score in scores])
            is_as_low.append(difference <= error or above <= above_error)
            rows[-1] += [f"{mean[name]:.3f} / {mean[f'{name} elsewhere']:.3f}", f"{difference:+.3f} ± {error:.3f}"]
        if all(is_as_low):
            passed.append((overlap, mean["line"], window))
    headings = ["overlap", "window", "tiles", "PSNR"]
    for name in MEASURES:
        headings += [f"{name}, at seams / elsewhere", "− published"]
    overlap, _, window = min(passed)  # the published tiling itself passes
    return (
        f"## Tiles of {tile_size}, mean over {len(images)} images\n\n{markdown_table(headings, rows)}\n\n"
        f"PSNR between two untiled passes with different seeds: {noise:.2f} dB.\n\n"
        f"The smallest overlap that is not worse than the published: {overlap}, {window}.\n"
    )


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hr", type=Path, required=True, help="folder of images")
    parser.add_argument("--patterns", nargs="+", default=["*.png"], help="which of its files")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the results")
    parser.add_argument("--model", default=TINY, help="folder of a pipeline (default: the embedded model)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument(
        "--degradation", choices=("simple", "none"), default="simple", help="of LR images; none: the images are LR"
    )
    parser.add_argument("--shrink", type=positive, default=4, help="size of the images over that of their LR versions")
    parser.add_argument("--tile-size", type=positive, default=64, help="LR pixels (default: %(default)s)")
    parser.add_argument("--overlaps", type=int, nargs="+", help="LR pixels (default: eight, from 0 to half the tile)")
    parser.add_argument("--windows", nargs="+", choices=TILE_WINDOWS, default=TILE_WINDOWS)
    parser.add_argument("--seed", type=int, default=0, help="of the degradation and of the sampling")
    arguments = parser.parse_args(argv)

    size, seed = arguments.tile_size, arguments.seed
    overlaps = arguments.overlaps or [size * x // 128 for x in (0, 4, 8, 16, 24, 32, 48, 64)]
    if not all(0 <= overlap < size for overlap in overlaps):
        parser.error(f"`--overlaps` must be between 0 and less than `--tile-size {size}`, got {overlaps}.")
    settings = {(overlap, window) for overlap in overlaps for window in arguments.windows}
    settings = sorted(settings | {(size // 2, "gaussian")})
    pipe = InvSRPipeline.from_pretrained(arguments.model).to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    if size % pipe.size_multiple:
        parser.error(f"`--tile-size` must be a multiple of {pipe.size_multiple}, got {size}.")
    paths = sorted({path for pattern in arguments.patterns for path in arguments.hr.glob(pattern)})
    if not paths:
        parser.error(f"`--hr` must contain a file {' or '.join(arguments.patterns)}, but {arguments.hr} does not.")
    lr_images = {}
    for number, path in enumerate(paths):
        lr = Image.open(path).convert("RGB")
        if arguments.degradation == "simple":
            height, width = (side - side % arguments.shrink for side in (lr.height, lr.width))
            rng = np.random.default_rng([seed, number])
            lr = Image.fromarray(simple_degradation(np.array(lr)[:height, :width], rng, arguments.shrink))
        if min(lr.size) < size or max(lr.size) == size:
            parser.error(f"The LR image of {path.name} must be larger than the tile, {size}, got {lr.size}.")
        lr_images[path.stem] = lr

    arguments.output.mkdir(parents=True, exist_ok=True)
    results, noise = [], []
    for name, lr in lr_images.items():
        scores, psnr_of_seeds, sheet = measure(pipe, lr, size, settings, seed)
        results.append(scores)
        noise.append(psnr_of_seeds)
        sheet.save(arguments.output / f"{name}.png")
        print(f"{name}: done", flush=True)
    text = report(results, size, float(np.mean(noise)))
    print(text)
    (arguments.output / "seams.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
