"""Procedural training images: occlusion, texture, shading and strokes with the contrast of photographs.

Half of the training data of the embedded model is made here. The base is the dead-leaves model (opaque shapes of
power-law sizes that hide one another), which shares edges, occlusion and scale invariance with natural images.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter


def power_law_noise(size: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Periodic noise (size, size) whose amplitude spectrum falls as 1/f**exponent, with zero mean and unit std."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    radius = np.hypot(fx * rng.uniform(0.5, 1.0), fy)  # unequal axes: wood, grass and water have a direction
    radius[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(size, size))) / radius**exponent
    noise = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
    return (noise - noise.mean()) / (noise.std() + 1e-8)


def grating(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Stripes or a checked pattern of random period, direction and sharpness, in about [-1, 1]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, frequency = rng.uniform(0, np.pi), 2 * np.pi / np.exp(rng.uniform(np.log(5), np.log(48)))
    sharpness = rng.choice([1.0, 3.0, 10.0])
    wave = np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 6.3))
    if rng.random() < 0.3:
        wave = wave * np.sin(frequency * (np.cos(angle) * y - np.sin(angle) * x) + rng.uniform(0, 6.3))
    return np.tanh(sharpness * wave) / np.tanh(sharpness)


def random_color(rng: np.random.Generator) -> np.ndarray:
    """RGB in [0, 1]: mostly muted as in nature, in a third of the cases saturated."""
    hue, value = rng.uniform(0, 1), rng.beta(1.3, 1.5)
    saturation = rng.uniform(0.5, 1.0) if rng.random() < 0.35 else rng.beta(1.2, 4.0)
    ramp = np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    return (value * (1 - saturation * (1 - np.clip(ramp, 0, 1)))).astype(np.float32)


def shape_mask(radius: int, rng: np.random.Generator) -> np.ndarray:
    """Filled ellipse, polygon, star-like blob or bar in a square of side 2 * radius, as uint8."""
    side = 2 * radius
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    kind = rng.integers(5)
    if kind == 0:
        low = rng.uniform(0, 0.35, size=2) * side
        draw.ellipse((low[0], low[1], side - low[0], side - low[1]), fill=255)
    else:
        if kind == 1:  # a bar or rectangle
            half = np.array([rng.uniform(0.1, 0.7), rng.uniform(0.5, 0.7)])
            points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
        else:  # a polygon (3 to 8 corners) or a blob (40 corners on a wavy circle)
            corners = rng.integers(3, 9) if kind < 4 else 40
            angles = np.sort(rng.uniform(0, 2 * np.pi, corners)) if kind < 4 else np.linspace(0, 2 * np.pi, corners)
            wave = rng.uniform(0, 0.3) * np.cos(rng.integers(2, 7) * angles + rng.uniform(0, 6.3))
            radii = rng.uniform(0.6, 1.0, corners) if kind < 4 else 0.7 + wave
            points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
        turn = rng.uniform(0, 2 * np.pi)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        draw.polygon([tuple(p) for p in (points @ rotation.T + 1) * radius], fill=255)
    return np.asarray(mask)


def surface(height: int, width: int, textures: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Colour of one shape: a base colour, linear shading and often a texture, (height, width, 3)."""
    y, x = np.mgrid[:height, :width].astype(np.float32) / max(height, width) - 0.5
    shading = rng.normal(0, 0.25) * x + rng.normal(0, 0.25) * y
    kind = rng.random()
    if kind < 0.6:
        texture = textures[rng.integers(len(textures))]
        rows = (np.arange(height) + rng.integers(len(texture))) % len(texture)
        columns = (np.arange(width) + rng.integers(len(texture))) % len(texture)
        shading = shading + np.exp(rng.uniform(np.log(0.02), np.log(0.25))) * texture[np.ix_(rows, columns)]
    elif kind < 0.75:
        shading = shading + rng.uniform(0.05, 0.4) * grating(height, width, rng)
    # Texture acts half on the light (it scales the colour) and half as paint of another colour.
    color, paint = random_color(rng), random_color(rng) - 0.5
    return color * (1 + 0.8 * shading[..., None]) + 0.6 * shading[..., None] * paint


def draw_strokes(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw lines, branches or rows of letter-like strokes over a float canvas."""
    size = len(canvas)
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    if rng.random() < 0.5:  # rows of "letters": two to four joined strokes in a cell
        height = rng.uniform(10, 48)
        top, left = rng.uniform(0, size / 2, size=2)
        thickness = max(1, round(height * rng.uniform(0.08, 0.2)))
        for row in range(rng.integers(1, 6)):
            for column in range(rng.integers(3, 16)):
                if rng.random() < 0.15:
                    continue
                points = rng.choice([0.0, 0.5, 1.0], size=(rng.integers(3, 6), 2)) * [0.55, 0.8]
                points = points * height + [left + column * 0.75 * height, top + row * 1.2 * height]
                draw.line([tuple(p) for p in points], fill=255, width=thickness)
    else:  # lines: wires, twigs, seams
        for _ in range(rng.integers(2, 14)):
            points = rng.uniform(-0.1, 1.1, size=2) * size + np.cumsum(rng.normal(0, size / 5, size=(4, 2)), axis=0)
            draw.line([tuple(p) for p in points], fill=255, width=int(rng.integers(1, 9)), joint="curve")
    alpha = np.asarray(mask, dtype=np.float32)[..., None] / 255
    return canvas * (1 - alpha) + random_color(rng) * alpha


def draw_image(rng: np.random.Generator, size: int = 256) -> np.ndarray:
    """
    Draw one procedural image.

    Args:
        rng (`np.random.Generator`): Source of every random choice.
        size (`int`, defaults to 256): Side in pixels.

    Returns:
        `np.ndarray`: RGB image of shape (size, size, 3), uint8.
    """
    drawn = 2 * size  # drawn at twice the size and averaged: antialiased edges
    textures = [power_law_noise(256, rng.uniform(0.4, 1.8), rng) for _ in range(6)]
    canvas = surface(drawn, drawn, textures, rng)
    smallest = np.exp(rng.uniform(np.log(4), np.log(40)))
    count = int(rng.uniform(20, 260)) if rng.random() < 0.9 else 0  # a tenth is one bare texture or gradient
    # Radii with density r**-2 between the smallest and the largest: fewer large shapes than small ones.
    radii = 1 / rng.uniform(1 / (0.45 * drawn), 1 / smallest, size=count)
    for radius in radii[np.argsort(-radii * rng.uniform(0.5, 1.5, count))].astype(int):
        cy, cx = rng.integers(0, drawn, size=2)
        y0, x0 = max(cy - radius, 0), max(cx - radius, 0)
        y1, x1 = min(cy + radius, drawn), min(cx + radius, drawn)
        mask = shape_mask(radius, rng)[y0 - cy + radius : y1 - cy + radius, x0 - cx + radius : x1 - cx + radius]
        alpha = mask[..., None].astype(np.float32) / 255
        region = canvas[y0:y1, x0:x1]
        region += alpha * (surface(y1 - y0, x1 - x0, textures, rng) - region)
    for _ in range(rng.integers(0, 4)):
        canvas = draw_strokes(canvas, rng)

    # Contrast of photographs: mean and standard deviation of the luma drawn around what natural images show.
    image = canvas.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
    luma = image @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    gain = np.clip(rng.normal(0.22, 0.06), 0.06, 0.36) / (luma.std() + 1e-3)
    image = (image - luma.mean()) * min(gain, 3.0) + np.clip(rng.normal(0.45, 0.12), 0.2, 0.8)
    if rng.random() < 0.5:  # a lens is never perfectly sharp
        image = gaussian_filter(image, (rng.uniform(0.2, 0.9),) * 2 + (0,))
    image = Image.fromarray((255 * np.clip(image, 0, 1)).round().astype(np.uint8))
    if rng.random() < 0.2:  # and cameras sharpen
        image = image.filter(ImageFilter.UnsharpMask(radius=1, percent=int(rng.integers(20, 80)), threshold=0))
    return np.asarray(image)
