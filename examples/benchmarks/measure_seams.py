"""Which overlap and window hide the seams between tiles? Every setting against an untiled pass of the same image.

    python examples/benchmarks/measure_seams.py --hr KODAK --patterns 'kodim0[1-6].png' --tile-size 64 --output out
    python examples/benchmarks/measure_seams.py --hr LR_IMAGES --degradation none --tile-size 48 --output out

With D = tiled − untiled, in levels of 255, along both axes:

- step: |D(x) − D(x − 1)| where a tile's support or its ramp begins or ends, against all other places at the same
  phase of the networks' grid (D steps more at the pixels of the latents than between them). A hard border shows here;
  a blended one is no step but a broad ramp.
- line: the same difference averaged with its sign over 32 pixels along the border, so that what is no straight line
  cancels; the largest within an LR pixel of where one tile gives way to the next (the middle of their overlap,
  where the slope of the blending is steepest), against all other places at the same phase.
- band: |D| where tiles overlap or within an LR pixel of a tile's end, against where one tile stands alone. With half
  a tile of overlap the latter are the image's margins alone.

The rule: the smallest overlap at which each of the three is as low as with the published setting (half a tile,
Gaussian), or as elsewhere in the same image, where no seam can be: their paired difference is not above its standard
error. Of two windows that pass, that with the lower line.

Noise is drawn anew for each tile, with the same seed. How much of D is noise and not context is told by the row of
another seed: PSNR between two untiled passes. With the embedded model, whose predicted deviation is near 0, it is far
above all others, so that D is context: the padding at a tile's ends and the group normalisations, which see the whole
tile. Such a model has no attention; the answer for one that has may differ.

`--output` gets `scores.jsonl` (a stopped run goes on there), `seams.md`, `seams.json` and for each image a picture
with a row for each setting, cut out where its line is worst: untiled, published, this setting, amplified D of both.
Tiles are enlarged once for all settings that have them. Needs `pip install ".[examples,training]"`.
"""

import argparse
from dataclasses import asdict

import numpy as np
import torch
from findings_common import (
    PAPER_DEGRADATIONS,
    SIMPLE_DEGRADATIONS,
    Difference,
    Scores,
    add_common_arguments,
    add_pattern_argument,
    crop_to_multiple,
    load_pipeline,
    make_lr,
    positive,
    read_photographs,
    settings_of,
    write_json,
)
from PIL import Image
from scipy.ndimage import maximum_filter1d

from diffusers_invsr import TINY, InvSRPipeline
from diffusers_invsr.files import write_atomically
from diffusers_invsr.metrics import psnr
from diffusers_invsr.tables import markdown_table
from diffusers_invsr.tiling import TILE_WINDOWS, TileAxis, TileGrid


SEGMENT = 32  # pixels along a border
SEAMS = ("step", "line", "band")
CROP, AMPLIFICATION = 160, 16  # of the pictures


class Enlarger:
    """Enlarges one LR image with any tiles; a tile that several settings have goes through the networks once."""

    def __init__(self, pipe: InvSRPipeline, lr: Image.Image, seed: int):
        self.pipe, self.inputs, self.seed = pipe, pipe.image_processor.preprocess(lr), seed
        self.tiles = {}

    def grid(self, tile_size: int | None, overlap: int = 0, window: str = "gaussian") -> TileGrid:
        return self.pipe.cut_into_tiles(self.inputs, None, None, tile_size, overlap, window)

    def __call__(self, grid: TileGrid) -> np.ndarray:
        """The enlarged image `(height, width, 3)` in levels of 255, not rounded."""
        blender = self.pipe.prepare_blender(grid, "pt")
        for corner in grid:
            key = (grid.rows.tile_length, grid.columns.tile_length, *corner)
            if key not in self.tiles:
                generator = torch.Generator().manual_seed(self.seed)
                tile, _ = grid.cut(*corner)
                self.tiles[key] = self.pipe(tile, tile_size=None, generator=generator, output_type="pt").images
            blender.add(self.tiles[key], *corner)
        return 255 * blender.sum[0].permute(1, 2, 0).double().numpy()


class Seams:
    r"""
    Where seams would be along one axis, in output pixels.

    Attributes:
        ends (`list[int]`): First pixels after a tile's support or its ramp begins or ends.
        crossings (`list[int]`): Where one tile gives way to the next.
        band (`np.ndarray`): Whether a pixel is under several tiles or within an LR pixel of an end, `(length,)`.
    """

    def __init__(self, axis: TileAxis, scale: int):
        self.length, self.period = axis.length * scale, axis.multiple * scale
        first = [start - axis.front for start in axis.starts]
        spans = [(start * scale, (start + axis.tile_length) * scale) for start in first]
        ramp = axis.overlap * scale
        ends = {end for a, b in spans for end in (a, a + ramp, b - ramp, b)}
        self.ends = sorted(end for end in ends if 0 < end < self.length)
        self.crossings = [(b + a) // 2 for (_, b), (a, _) in zip(spans, spans[1:])]
        cover = np.zeros(self.length, dtype=int)
        for a, b in spans:
            cover[max(a, 0) : b] += 1
        self.band = cover > 1
        for end in {end for span in spans for end in span if 0 < end < self.length}:
            self.band[max(end - scale, 0) : end + scale] = True

    def split(self, places: list[int], reach: int) -> tuple[np.ndarray, np.ndarray]:
        """The places, and those elsewhere: none within reach, and all at the same phase of the networks' grid."""
        others = np.arange(1, self.length)
        places = np.array(places, dtype=int)
        others = others[np.isin(others % self.period, places % self.period)]
        return places, others[(np.abs(others[:, None] - places) > reach).all(axis=1)]


def line_profile(steps: np.ndarray, reach: int) -> np.ndarray:
    """`(height, width - 1, 3)` steps from column to column as lines of a segment's length, `(segments, width - 1)`."""
    segments = steps[: len(steps) // SEGMENT * SEGMENT].reshape(-1, SEGMENT, *steps.shape[1:])
    return maximum_filter1d(np.abs(segments.mean(axis=1)).mean(axis=-1), 2 * reach + 1, axis=1)


def seam_measures(tiled: np.ndarray, untiled: np.ndarray, grid: TileGrid) -> dict:
    """The three measures at the seams and elsewhere, PSNR, tiles, and the corner of the crop with the worst line."""
    difference = tiled - untiled
    at, elsewhere, worst = {"step": [], "line": []}, {"step": [], "line": []}, (0.0, 0, 0)
    axes = [Seams(axis, grid.scale) for axis in (grid.rows, grid.columns)]
    for dim, seams in enumerate(axes):
        across = difference.swapaxes(0, 1) if dim == 0 else difference  # the axis across the seams is the second one
        steps = np.diff(across, axis=1)
        lines = line_profile(steps, grid.scale)
        for name, values, places, reach in (
            ("step", np.abs(steps).mean(axis=(0, 2)), seams.ends, 0),
            ("line", lines.mean(axis=0), seams.crossings, 2 * grid.scale),
        ):
            seam, other = seams.split(places, reach)
            at[name] += [*values[seam - 1]]
            elsewhere[name] += [*values[other - 1]]
        for crossing in seams.crossings:
            segment = int(lines[:, crossing - 1].argmax())
            middle = (crossing, segment * SEGMENT + SEGMENT // 2)
            worst = max(worst, (float(lines[segment, crossing - 1]), *(middle if dim == 0 else middle[::-1])))
    band = axes[0].band[:, None] | axes[1].band[None]
    at["band"], elsewhere["band"] = (np.abs(difference[mask]).mean(axis=-1) for mask in (band, ~band))
    return {
        "tiles": len(grid),
        "psnr": psnr(tiled, untiled),
        **{name: float(np.mean(values)) for name, values in at.items()},
        **{f"{name} elsewhere": float(np.mean(values)) for name, values in elsewhere.items()},
        "worst line": worst[0],
        "worst at": worst[1:],
    }


def crops(images: list[np.ndarray], untiled: np.ndarray, middle: tuple[int, int]) -> np.ndarray:
    """Untiled and tiled images around a place, then what the tiled ones differ by, amplified, side by side."""
    top, left = (min(max(x - CROP // 2, 0), max(side - CROP, 0)) for x, side in zip(middle, untiled.shape))
    shown = [untiled, *images, *(127.5 + AMPLIFICATION * (image - untiled) for image in images)]
    tiles = [np.pad(x[top : top + CROP, left : left + CROP], ((0, 4), (0, 4), (0, 0))) for x in shown]
    return np.concatenate(tiles, axis=1)


def compute(pipe: InvSRPipeline, lr: Image.Image, arguments: argparse.Namespace) -> tuple[dict, Image.Image]:
    """The measures of every setting on an image, and its picture."""
    enlarge = Enlarger(pipe, lr, arguments.seed)
    untiled = enlarge(enlarge.grid(None))
    size = arguments.tile_size
    published = enlarge(enlarge.grid(size, size // 2, "gaussian"))
    scores, rows = {}, []
    for overlap in arguments.overlaps:
        for window in arguments.windows:
            grid = enlarge.grid(size, overlap, window)
            tiled = enlarge(grid)
            score = scores[f"{overlap} {window}"] = seam_measures(tiled, untiled, grid)
            rows.append(crops([published, tiled], untiled, score["worst at"]))
    other = Enlarger(pipe, lr, arguments.seed + 1)
    scores["another seed"] = {"psnr": psnr(other(other.grid(None)), untiled)}
    sheet = np.concatenate(rows).round().clip(0, 255).astype(np.uint8)
    return scores, Image.fromarray(sheet)


def minus(values: list[dict], others: list[dict], name: str, other_name: str) -> Difference:
    return Difference.of([value[name] for value in values], [other[other_name] for other in others])


def is_as_low(difference: Difference) -> bool:
    """Of one pair, whose error is unknown, the mean alone decides."""
    return difference.mean <= (difference.error if difference.count > 1 else 0)


def report(scores: list[dict], arguments: argparse.Namespace) -> tuple[str, dict]:
    """The table and the choice, as Markdown and as data."""
    reference = [score[f"{arguments.tile_size // 2} gaussian"] for score in scores]
    rows, data, passed = [], [], {}
    for overlap in arguments.overlaps:
        for window in arguments.windows:
            values = [score[f"{overlap} {window}"] for score in scores]
            mean = {
                name: float(np.mean([value[name] for value in values])) for name in values[0] if name != "worst at"
            }
            differences = {name: minus(values, reference, name, name) for name in SEAMS}
            above = {name: minus(values, values, name, f"{name} elsewhere") for name in SEAMS}
            if all(is_as_low(differences[name]) or is_as_low(above[name]) for name in SEAMS):
                passed.setdefault(overlap, {})[window] = mean["line"]
            data.append({"overlap": overlap, "window": window, **mean})
            for name, by_measure in (("minus published", differences), ("minus elsewhere", above)):
                data[-1][name] = {measure: asdict(difference) for measure, difference in by_measure.items()}
            rows.append([str(overlap), window.replace("_", " "), f"{mean['tiles']:.0f}", f"{mean['psnr']:.2f}"])
            for name in SEAMS:
                rows[-1].append(f"{mean[name]:.3f} / {mean[f'{name} elsewhere']:.3f}")
                rows[-1].append(f"{differences[name].mean:+.3f} ± {differences[name].error:.3f}")
    headings = ["overlap", "window", "tiles", "PSNR"]
    for name in SEAMS:
        headings += [f"{name}, at seams / elsewhere", "− published"]
    noise = float(np.mean([score["another seed"]["psnr"] for score in scores]))
    overlap = min(passed, default=None)
    choice = None if overlap is None else {"overlap": overlap, "window": min(passed[overlap], key=passed[overlap].get)}
    text = (
        f"## Tiles of {arguments.tile_size}, mean over {len(scores)} images\n\n{markdown_table(headings, rows)}\n\n"
        f"PSNR between two untiled passes with different seeds: {noise:.2f} dB.\n\n"
    )
    if choice is None:
        text += "No setting is as good as the published one.\n"
    else:
        text += f"The smallest overlap that is not worse than the published: {overlap}, {choice['window']}.\n"
    return text, {"settings": data, "another seed": {"psnr": noise}, "choice": choice}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, model=TINY)
    add_pattern_argument(parser)
    degradations = ["none", *PAPER_DEGRADATIONS, *SIMPLE_DEGRADATIONS]
    parser.add_argument(
        "--degradation", choices=degradations, default="simple", help="of LR images; none: the images are LR ones"
    )
    parser.add_argument(
        "--shrink", type=positive, default=4, help="sides of the images over those of their LR versions"
    )
    parser.add_argument("--tile-size", type=positive, default=64, help="LR pixels")
    parser.add_argument("--overlaps", type=int, nargs="+", help="LR pixels (default: eight, from 0 to half the tile)")
    parser.add_argument("--windows", nargs="+", choices=TILE_WINDOWS, default=TILE_WINDOWS)
    arguments = parser.parse_args(argv)

    size = arguments.tile_size
    if arguments.overlaps is None:
        arguments.overlaps = [size * x // 128 for x in (0, 4, 8, 16, 24, 32, 48, 64)]
    if not all(0 <= overlap < size for overlap in arguments.overlaps):
        parser.error(f"--overlaps have to be from 0 to less than --tile-size {size}, but are {arguments.overlaps}.")
    arguments.overlaps = sorted({*arguments.overlaps, size // 2})
    arguments.windows = sorted({*arguments.windows, "gaussian"})

    pipe = load_pipeline(arguments.model, arguments.device)
    if size % pipe.size_multiple:
        parser.error(f"--tile-size has to be a multiple of {pipe.size_multiple}, but is {size}.")
    photographs = read_photographs(arguments.hr, arguments.patterns, arguments.crop)
    names = ("degradation", "shrink", "tile_size", "overlaps", "windows")
    settings = settings_of(pipe, photographs, arguments.seed) | {name: getattr(arguments, name) for name in names}
    scores = Scores(arguments.output / "scores.jsonl", settings)
    for photo in photographs:
        if (photo.name,) in scores:
            continue
        lr = photo.hr
        if arguments.degradation != "none":
            hr = crop_to_multiple(photo.hr, arguments.shrink)
            lr = make_lr(arguments.degradation, hr, [arguments.seed, photo.number], arguments.shrink)
        if min(lr.size) < size or max(lr.size) == size:
            parser.error(f"The LR image of {photo.name}, {lr.size}, has to be larger than the tile, {size}.")
        values, sheet = compute(pipe, lr, arguments)
        sheet.save(arguments.output / f"{photo.name}.png")
        scores.add((photo.name,), values)
        print(f"{photo.name}: done", flush=True)

    text, data = report([scores[photo.name,] for photo in photographs], arguments)
    print(text)
    write_atomically(arguments.output / "seams.md", text)
    write_json(arguments.output / "seams.json", data)


if __name__ == "__main__":
    main()
