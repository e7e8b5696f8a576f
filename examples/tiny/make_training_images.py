#!/usr/bin/env python
"""
Make HR images for training a small model with `train_invsr.py`: pieces of photographs and procedural images.

    python examples/tiny/make_training_images.py --photos kodak --patterns 'kodim0?.png' --output images

A photograph, at its own size and at 3/4 and 1/2 of it, is cut into overlapping squares of 256 pixels, each in its four
orientations (the training itself adds mirroring). All but the first orientation get another tone curve and half of
them permuted channels, to make more of few photographs. Procedural images have 256 pixels too.
`<output>/photographs` and `<output>/procedural` are for `train_invsr.py --train_data`.
"""

import argparse
import tempfile
from multiprocessing import get_context
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image
from procedural import draw_image


SIDE = 256  # of every image in pixels
STRIDES = {1.0: 128, 0.75: 64, 0.5: 64}  # pixels between pieces of a photograph, by its size


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make HR images for training: pieces of photographs, and procedural images."
    )
    parser.add_argument("--photos", type=Path, required=True, help="Folder of photographs.")
    parser.add_argument("--patterns", nargs="+", default=["*.png", "*.jpg"], help="Patterns of files in it.")
    parser.add_argument("--output", type=Path, required=True, help="New folder for the images.")
    parser.add_argument("--count", type=int, default=1200, help="Number of procedural images.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the procedural images and of the tone curves.")
    parser.add_argument("--processes", type=int, default=2, help="Processes that cut and draw them.")
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"`--output` must be a new folder, but {args.output} exists.")
    if args.count < 0 or args.processes < 1:
        parser.error(
            f"`--count` must be at least 0 and `--processes` at least 1, got {args.count} and {args.processes}."
        )
    args.files = sorted({file for pattern in args.patterns for file in args.photos.glob(pattern)})
    if not args.files:
        parser.error(f"`--photos` must contain a file {' or '.join(args.patterns)}, but {args.photos} does not.")
    stems = [file.stem for file in args.files]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        parser.error(f"`--photos` must have files of different names, but {args.photos} has two named {twice}.")
    return args


def vary(piece: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change the exponent of the tone curve and, in half of the cases, permute the channels of an 8-bit RGB image."""
    channels = rng.permutation(3) if rng.random() < 0.5 else [0, 1, 2]
    return (255 * (piece[..., channels] / 255.0) ** np.exp(rng.uniform(-0.4, 0.4))).round().astype(np.uint8)


def cut_photograph(job: tuple[Path, Path, int]) -> int:
    """Save the pieces of a photograph in four orientations; returns their number."""
    file, folder, seed = job
    photo = Image.open(file).convert("RGB")
    rng = np.random.default_rng((seed, crc32(file.name.encode())))
    pieces = 0
    for scale, stride in STRIDES.items():
        size = tuple(round(side * scale) for side in photo.size)
        pixels = np.asarray(photo if scale == 1 else photo.resize(size, Image.Resampling.LANCZOS))
        for top in range(0, pixels.shape[0] - SIDE + 1, stride):
            for left in range(0, pixels.shape[1] - SIDE + 1, stride):
                for quarter in range(4):
                    piece = np.rot90(pixels[top : top + SIDE, left : left + SIDE], quarter)
                    piece = vary(piece, rng) if quarter else piece
                    name = f"{file.stem}_{100 * scale:03.0f}_{top:04d}_{left:04d}_{quarter}.png"
                    Image.fromarray(np.ascontiguousarray(piece)).save(folder / name, compress_level=1)
                    pieces += 1
    return pieces


def draw_procedural(job: tuple[int, int, Path]):
    """Save one procedural image. It has its own seed, so it does not depend on the others or on the processes."""
    seed, number, folder = job
    Image.fromarray(draw_image(np.random.default_rng((seed, number)))).save(folder / f"{number:05d}.png")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # The folder appears when it is complete.
    with tempfile.TemporaryDirectory(prefix=f".{args.output.name}-", dir=args.output.parent) as temporary:
        root = Path(temporary, "new")
        for name in ("photographs", "procedural"):
            (root / name).mkdir(parents=True)
        photographs = [(file, root / "photographs", args.seed) for file in args.files]
        procedural = [(args.seed, number, root / "procedural") for number in range(args.count)]
        with get_context("spawn").Pool(args.processes) as pool:
            pieces = dict(zip(args.files, pool.imap(cut_photograph, photographs)))
            small = [file.name for file in args.files if not pieces[file]]
            if small:
                raise SystemExit(f"`--photos` must be at least {SIDE} pixels high and wide, but {small[0]} is not.")
            for _ in pool.imap_unordered(draw_procedural, procedural, chunksize=8):
                pass
        root.rename(args.output)
    counts = f"{sum(pieces.values())} pieces of {len(pieces)} photographs and {args.count} procedural images"
    print(f"{counts} in {args.output}")


if __name__ == "__main__":
    main()
