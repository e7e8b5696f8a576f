"""Show what the training's degradation does to a photograph: a contact sheet of random draws.

    python examples/training/show_degradation.py --hr photo.png --output sheet.png --settings training

The first picture is the middle of the photograph, the others are LR images of it, enlarged by repeating pixels, each
with its main settings below it. Needs `pip install "diffusers-invsr[training]"`.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from diffusers_invsr.degradation.degradation import Degradation, DegradationSettings, EvaluationDegradationSettings
from diffusers_invsr.training.validation import to_image, to_tensor


SETTINGS = {"training": DegradationSettings, "evaluation": EvaluationDegradationSettings}
COLUMNS = 8
CAPTION = 40  # pixels


def caption(draw: dict) -> str:
    """Two lines with the settings of one image."""
    noise, second = draw["noise"], draw["second_order"]
    level = f"{noise.get('sigma', noise.get('scale')):.1f}"
    sinc = "sinc " if draw["final_sinc"]["kind"] == "sinc" else ""
    return (
        f"{draw['blur']['kind']} x{draw['resize']['factor']:.2f} {noise['kind']} {level}{' grey' * noise['grey']}\n"
        f"JPEG {draw['jpeg_quality']:.0f} {'2nd order ' if second else ''}{sinc}JPEG {draw['final_jpeg_quality']:.0f}"
    )


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hr", type=Path, required=True, help="the photograph")
    parser.add_argument("--output", type=Path, required=True, help="the picture to write")
    parser.add_argument("--draws", type=int, default=32, help="number of LR images")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    parser.add_argument("--settings", choices=SETTINGS, default="training", help="what to draw from")
    parser.add_argument("--crop", type=int, default=256, help="height and width of the crop in pixels")
    arguments = parser.parse_args(argv)

    degradation = Degradation(SETTINGS[arguments.settings]())
    crop = arguments.crop // degradation.scale * degradation.scale
    try:
        photo = Image.open(arguments.hr).convert("RGB")
    except OSError as error:
        parser.error(f"`--hr {arguments.hr}` could not be read as an image: {error}")
    if not degradation.min_size <= crop <= min(photo.size):
        parser.error(
            f"`--crop` must be between {degradation.min_size} and {min(photo.size)}, the photograph's shorter side,"
            f" got {arguments.crop}."
        )
    left, top = (photo.width - crop) // 2, (photo.height - crop) // 2
    photo = photo.crop((left, top, left + crop, top + crop))
    hr = to_tensor(photo)

    pictures = [(photo, "HR")]
    generator = torch.Generator().manual_seed(arguments.seed)
    for _ in range(arguments.draws):
        # In batches of one image, so that the resizes differ too
        draw = degradation.draw(1, generator)
        lr = to_image(degradation.apply(hr, draw, generator))
        pictures.append((lr.resize((crop, crop), Image.Resampling.NEAREST), caption(draw.to_dicts()[0])))

    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (crop + 8), rows * (crop + CAPTION)), "white")
    text = ImageDraw.Draw(sheet)
    for index, (picture, words) in enumerate(pictures):
        place = index % COLUMNS * (crop + 8), index // COLUMNS * (crop + CAPTION)
        sheet.paste(picture, place)
        text.multiline_text((place[0], place[1] + crop + 2), words, fill="black", font_size=13)
    sheet.save(arguments.output)


if __name__ == "__main__":
    main()
