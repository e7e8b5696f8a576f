#!/usr/bin/env python
"""
Make triplets in BAPPS' layout from photographs, for `train_latent_lpips.py` where there are no human judgements.

    python make_triplets.py --photos kodak/ --patterns 'kodim0?.png' 'kodim1[0-6].png' --output triplets/

A triplet is a patch (`ref`) and two versions of it (`p0`, `p1`) with the same kind of distortion, one weaker and one
stronger. The judgement says that the weaker one is closer. **It is true by construction: nobody was asked.**
It teaches a metric to order strengths within a kind of distortion, but not how people weigh one kind against another.
For a metric that agrees with people, train on BAPPS (https://github.com/richzhang/PerceptualSimilarity).

Layout: `<output>/<train|val>/<kind>/{ref,p0,p1}/000000.png` and `judge/000000.npy`, the share of those asked who
prefer p1, here 0 or 1. All patches of a photograph are in the same split.
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter


FLAT = 6.0  # grey levels: patches with a smaller standard deviation are redrawn, for a blur would not change them
ATTEMPTS = 100
STRENGTH_RATIO = (1.1, 1.6)  # stronger to weaker


def blur(patch: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur; strength is its standard deviation in pixels."""
    return gaussian_filter(patch, (strength, strength, 0))


def noise(patch: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """White noise; strength is its standard deviation in grey levels."""
    return patch + rng.normal(0, strength, patch.shape)


def jpeg(patch: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """JPEG; strength is 100 minus the quality."""
    buffer = io.BytesIO()
    to_image(patch).save(buffer, format="JPEG", quality=round(100 - strength))
    return np.asarray(Image.open(buffer), dtype=np.float64)


def downsampling(patch: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Bicubic down and up again; strength is the factor."""
    image = to_image(patch)
    small = image.resize([round(side / strength) for side in image.size], Image.Resampling.BICUBIC)
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC), dtype=np.float64)


def color_shift(patch: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A constant added to each channel, in a random direction; strength is its length in grey levels."""
    direction = rng.normal(size=3)
    return patch + strength * direction / np.linalg.norm(direction)


# Each kind, and the strengths between which the weaker version is drawn.
KINDS: dict[str, tuple[Callable, tuple[float, float]]] = {
    "blur": (blur, (0.5, 2.0)),
    "noise": (noise, (3.0, 20.0)),
    "jpeg": (jpeg, (8.0, 30.0)),
    "downsampling": (downsampling, (1.2, 3.0)),
    "color_shift": (color_shift, (5.0, 30.0)),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make triplets in BAPPS' layout, judged by construction.")
    parser.add_argument("--photos", type=Path, required=True, help="Folder of photographs.")
    parser.add_argument("--patterns", nargs="+", default=["*.png", "*.jpg"], help="Patterns of files in it.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write; it must not exist yet.")
    parser.add_argument(
        "--val-photos", type=int, default=4, help="Photographs held out for validation, drawn at random."
    )
    parser.add_argument("--patches", type=int, default=30, help="Triplets of each kind per photograph.")
    parser.add_argument("--size", type=int, default=64, help="Height and width of a patch in pixels (BAPPS: 64).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of every random choice.")
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"`--output {args.output}` exists already: triplets of two runs must not be mixed.")
    if args.patches < 1 or args.size < 16:
        parser.error(f"`--patches` must be at least 1 and `--size` at least 16, got {args.patches} and {args.size}.")
    args.files = sorted({file for pattern in args.patterns for file in args.photos.glob(pattern)})
    if not 0 < args.val_photos < len(args.files):
        parser.error(
            f"`--val-photos` must leave photographs for both splits, got {args.val_photos} of the {len(args.files)}"
            f" that `--patterns` match in {args.photos}."
        )
    return args


def to_image(patch: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.round(patch), 0, 255).astype(np.uint8))


def draw_patch(photo: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random patch that is not flat, or the last one tried, (size, size, 3) as float64."""
    for _ in range(ATTEMPTS):
        y, x = (rng.integers(side - size + 1) for side in photo.shape[:2])
        patch = photo[y : y + size, x : x + size].astype(np.float64)
        if patch.mean(axis=2).std() >= FLAT:
            break
    return patch


def make_triplet(photo: np.ndarray, kind: str, size: int, rng: np.random.Generator) -> dict[str, np.ndarray | float]:
    """One triplet with its judgement. The stronger version is p1 if `judge` is 0."""
    distort, (low, high) = KINDS[kind]
    ref = draw_patch(photo, size, rng)
    weaker = np.exp(rng.uniform(np.log(low), np.log(high)))
    strengths = [weaker, weaker * rng.uniform(*STRENGTH_RATIO)]
    judge = float(rng.integers(2))
    if judge == 1:
        strengths.reverse()
    return {"ref": ref, **{f"p{i}": distort(ref, strengths[i], rng) for i in range(2)}, "judge": judge}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rng = np.random.default_rng(args.seed)
    held_out = set(rng.choice(len(args.files), args.val_photos, replace=False).tolist())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # The folder appears when it is complete.
    with tempfile.TemporaryDirectory(prefix=f".{args.output.name}-", dir=args.output.parent) as temporary:
        root = Path(temporary, "new")
        counts = {"train": 0, "val": 0}
        for i, file in enumerate(args.files):
            photo = np.asarray(Image.open(file).convert("RGB"))
            if min(photo.shape[:2]) < args.size:
                raise SystemExit(f"{file} must be at least {args.size} pixels high and wide (`--size`).")
            split = "val" if i in held_out else "train"
            for kind in KINDS:
                folder = root / split / kind
                for part in ("ref", "p0", "p1", "judge"):
                    (folder / part).mkdir(parents=True, exist_ok=True)
                for j in range(args.patches):
                    name = f"{i * args.patches + j:06d}"
                    triplet = make_triplet(photo, kind, args.size, rng)
                    np.save(folder / "judge" / f"{name}.npy", np.array([triplet.pop("judge")], dtype=np.float32))
                    for part, patch in triplet.items():
                        to_image(patch).save(folder / part / f"{name}.png")
                    counts[split] += 1
        root.rename(args.output)
    names = ", ".join(args.files[i].name for i in sorted(held_out))
    print(f"{counts['train']} triplets for training, {counts['val']} for validation (of {names}) in {args.output}")


if __name__ == "__main__":
    main()
