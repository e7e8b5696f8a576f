"""Image files for tests of the command line."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_image(size: tuple[int, int] = (12, 10), mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(pixels)
    return image.convert(mode) if mode in ("RGBA", "LA") else image.convert("RGB").convert(mode)


def save_images(*names: str, **settings):
    """Save an image under each name, each with other pixels."""
    for seed, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        make_image(seed=seed).save(name, **settings)
