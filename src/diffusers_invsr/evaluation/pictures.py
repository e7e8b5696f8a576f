"""Pictures of an evaluation: sheets that compare results, and a plot of PSNR against steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..image_files import save_image
from ..metrics import luma
from .evaluate import BICUBIC, result_file
from .pairs import match_by_name, read_rgb
from .records import PLOT_FILE, SHEETS_FOLDER
from .report import Evaluation, Run


LABEL_HEIGHT, GAP = 22, 6
COLUMN = 384  # width in pixels of each image and each crop in a sheet
CROP_COLORS = ("red", "deepskyblue")
MIN_CROP = 16


def choose_crops(image: Image.Image, count: int = len(CROP_COLORS)) -> list[tuple[int, int, int, int]]:
    r"""
    Choose the most detailed squares of an image: those with the highest gradient energy that do not overlap.

    Args:
        image (`PIL.Image.Image`): The image, RGB.
        count (`int`, defaults to 2): Number of squares; fewer are returned if there is no room.

    Returns:
        `list[tuple[int, int, int, int]]`: Left, top, right and bottom of each square in pixels. The side is a sixth of
        the image's shorter side, but at least 16 pixels; positions are multiples of a quarter of it.
    """
    y = luma(np.array(image))
    side = min(max(min(image.size) // 6, MIN_CROP), *image.size)
    energy = np.zeros_like(y)
    energy[:, :-1] += np.abs(np.diff(y, axis=1))
    energy[:-1] += np.abs(np.diff(y, axis=0))
    # Sums over squares are differences of a cumulative sum, rounded below so that equal squares stay equal
    total = np.pad(energy, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    step = max(side // 4, 1)
    corners = [(top, left) for top in range(0, sums.shape[0], step) for left in range(0, sums.shape[1], step)]
    boxes = []
    for top, left in sorted(corners, key=lambda corner: (-round(sums[corner], 3), corner)):
        if len(boxes) < count and all(abs(top - other[1]) >= side or abs(left - other[0]) >= side for other in boxes):
            boxes.append((left, top, left + side, top + side))
    return boxes


def sheet(images: dict[str, Image.Image], boxes: Sequence[tuple[int, int, int, int]]) -> Image.Image:
    r"""
    Images side by side under their names, with enlarged crops below each.

    Args:
        images (`dict[str, PIL.Image.Image]`): RGB images of the same size, by name.
        boxes (`Sequence[tuple[int, int, int, int]]`): Crops, from [`choose_crops`].

    Returns:
        `PIL.Image.Image`: The sheet, RGB.
    """
    width, height = next(iter(images.values())).size
    shown = (COLUMN, max(round(height * COLUMN / width), 1))
    rows = [shown[1], *([COLUMN] * len(boxes))]
    size = (len(images) * (COLUMN + GAP) - GAP, LABEL_HEIGHT + sum(row + GAP for row in rows) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, image) in enumerate(images.items()):
        left, top = number * (COLUMN + GAP), LABEL_HEIGHT
        draw.text((left + 3, 3), name, fill="black", font_size=14)
        sheet.paste(image.resize(shown, Image.Resampling.LANCZOS), (left, top))
        top += shown[1] + GAP
        for color, box in zip(CROP_COLORS, boxes):
            frame = [left + box[0] * shown[0] / width, LABEL_HEIGHT + box[1] * shown[1] / height]
            frame += [left + box[2] * shown[0] / width, LABEL_HEIGHT + box[3] * shown[1] / height]
            draw.rectangle(frame, outline=color, width=2)
            sheet.paste(image.crop(box).resize((COLUMN, COLUMN), Image.Resampling.NEAREST), (left, top))
            draw.rectangle((left, top, left + COLUMN - 1, top + COLUMN - 1), outline=color, width=2)
            top += COLUMN + GAP
    return sheet


def save_sheets(evaluation: Evaluation, out: Path) -> list[Path]:
    r"""
    Save a sheet LR (bicubic) | results | HR for each image of an evaluation, without the columns that do not exist.

    Args:
        evaluation ([`Evaluation`]): The evaluation.
        out (`Path`): Its folder. The sheets are saved in its subfolder `grids`.

    Returns:
        `list[Path]`: Files of the sheets.
    """
    arguments = [argument for argument in ("lq", "gt", "results") if argument in evaluation.settings]
    pairs = match_by_name({argument: Path(evaluation.settings[argument]) for argument in arguments})
    saved = []
    for name in dict.fromkeys(name for run in evaluation.runs for name in run.images):
        files = pairs[name]
        runs = [run for run in evaluation.runs if name in run.images and run.name != BICUBIC]
        results = {_label(run): read_rgb(result_file(run.name, name, files, out)) for run in runs}
        hr = {"HR": read_rgb(files["gt"])} if "gt" in files else {}
        large = [*hr.values(), *results.values()]
        if not large:
            continue
        lr = {}
        if "lq" in files:
            lr = {"LR (bicubic)": read_rgb(files["lq"]).resize(large[0].size, Image.Resampling.BICUBIC)}
        picture = sheet({**lr, **results, **hr}, choose_crops(large[0]))
        file = out / SHEETS_FOLDER / f"{name}.png"
        save_image(picture, file, picture)
        saved.append(file)
    return saved


def _label(run: Run) -> str:
    return f"{run.name} ({len(run.timesteps)} step{'s' * (len(run.timesteps) > 1)})" if run.timesteps else run.name


def save_plot(evaluation: Evaluation, out: Path) -> Path | None:
    r"""
    Plot the mean PSNR against the number of steps, with one line for each starting timestep.

    Args:
        evaluation ([`Evaluation`]): The evaluation.
        out (`Path`): Its folder.

    Returns:
        `Path`, *optional*: The file `psnr.png`, or `None` if no schedule has a PSNR.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    means = {run.name: run.mean("psnr_y") for run in evaluation.runs}
    runs = [run for run in evaluation.runs if run.timesteps and means[run.name] is not None]
    if not runs:
        return None
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for start in sorted({run.timesteps[0] for run in runs}, reverse=True):
        points = [(len(run.timesteps), means[run.name]) for run in runs if run.timesteps[0] == start]
        axes.plot(*zip(*sorted(points)), marker="o", label=f"from {start}")
    if means.get(BICUBIC) is not None:
        axes.axhline(means[BICUBIC], color="grey", linestyle="--", label="bicubic")
    axes.set_xlabel("steps")
    axes.set_ylabel("mean PSNR-Y (dB)")
    axes.set_xticks(sorted({len(run.timesteps) for run in runs}))
    axes.grid(alpha=0.3)
    axes.legend()
    file = out / PLOT_FILE
    temporary = file.with_name(f".{file.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(file)
    return file
