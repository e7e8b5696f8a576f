"""HR crops for training the embedded model: photographs, decoded once, and procedural pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from procedural import draw_image


PROCEDURAL = "procedural"
HALVED_FROM = 1024  # photographs with a long side of so many pixels are also used at half the size


class Crops:
    r"""
    Random square crops from several groups of pictures, in the eight orientations.

    Args:
        cache (`Path`): Folder of the decoded pictures, from [`decode`].
        shares (`dict[str, float]`): Share of the crops that comes from each group; `procedural` needs no photographs.
        size (`int`): Side of the crops in pixels, at most 256.
        held_back (`list[str]`): Photographs that are left out, as `group/file name`.
    """

    def __init__(self, cache: Path, shares: dict[str, float], size: int, held_back: list[str]):
        self.size, total = size, sum(shares.values())
        self.groups = []
        for group, share in shares.items():
            files = sorted(file for file in (cache / group).glob("*.npy"))
            names = {Path(name).stem for name in held_back if name.split("/")[0] == group}
            pictures = [np.load(file, mmap_mode="r") for file in files if file.stem.partition("@")[0] not in names]
            if not pictures:
                raise SystemExit(f"The group {group!r} has no pictures.")
            # A larger picture has more to show, but not in proportion
            weights = np.sqrt([picture.shape[0] * picture.shape[1] for picture in pictures])
            self.groups.append((share / total, pictures, weights / weights.sum()))

    def draw(self, count: int, rng: np.random.Generator) -> torch.Tensor:
        """HR crops `(count, 3, size, size)`, in [0, 1]."""
        crops = np.stack([self._draw_one(rng) for _ in range(count)])
        return torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous().float() / 255

    def _draw_one(self, rng: np.random.Generator) -> np.ndarray:
        _, pictures, weights = self.groups[rng.choice(len(self.groups), p=[share for share, *_ in self.groups])]
        picture = pictures[rng.choice(len(pictures), p=weights)]
        top, left = (rng.integers(side - self.size + 1) for side in picture.shape[:2])
        crop = np.rot90(picture[top : top + self.size, left : left + self.size], rng.integers(4))
        return crop[:, ::-1] if rng.random() < 0.5 else crop


def decode(folder: Path, cache: Path, data: dict, seed: int):
    r"""
    Write every picture to `cache` as an array `(height, width, 3)` of 8 bits, which crops are read from without
    decoding. Files that are there already stay.

    Args:
        folder (`Path`): Folder with a folder of photographs for each group.
        cache (`Path`): Folder that gets a folder for each group.
        data (`dict`): `shares` by group, `patterns` of files by group (by default all), `procedural_count`.
        seed (`int`): Seed of the procedural pictures.
    """
    for group in data["shares"]:
        (cache / group).mkdir(parents=True, exist_ok=True)
        if group == PROCEDURAL:
            for number in range(data["procedural_count"]):
                file = cache / group / f"{number:04d}.npy"
                if not file.is_file():
                    save(draw_image(np.random.default_rng((seed, number))), file)
            continue
        photos = {file for pattern in data["patterns"].get(group, ["*"]) for file in (folder / group).glob(pattern)}
        for photo in sorted(photos):
            if (cache / group / f"{photo.stem}.npy").is_file():
                continue
            image = Image.open(photo).convert("RGB")
            if max(image.size) >= HALVED_FROM:
                save(np.asarray(image.reduce(2)), cache / group / f"{photo.stem}@2.npy")
            save(np.asarray(image), cache / group / f"{photo.stem}.npy")


def save(image: np.ndarray, file: Path):
    """Whole or not at all."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.save(stream, image)
    temporary.rename(file)
