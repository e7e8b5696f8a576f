"""A picture for people: crops of an LR image, enlarged by bicubic interpolation, beside the same crops of a result.

python examples/compare.py examples/images/lighthouse.png enlarged/lighthouse.png -o comparison.png
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw


GAP = 8


def comparison(lr: Image.Image, result: Image.Image, boxes: list[tuple[int, int, int, int]]) -> Image.Image:
    """One row a box (left, top, right, bottom; in pixels of the result): bicubic left, the result right."""
    bicubic = lr.convert("RGB").resize(result.size, Image.Resampling.BICUBIC)
    rows = [(bicubic.crop(box), result.convert("RGB").crop(box)) for box in boxes]
    width = 2 * max(left.width for left, _ in rows) + GAP
    sheet = Image.new("RGB", (width, sum(left.height + GAP for left, _ in rows) - GAP), "white")
    top = 0
    for left, right in rows:
        sheet.paste(left, (0, top))
        sheet.paste(right, (left.width + GAP, top))
        top += left.height + GAP
    draw = ImageDraw.Draw(sheet)
    for x, label in ((0, "bicubic"), (rows[0][0].width + GAP, "InvSR")):
        draw.rectangle((x, 0, x + 62, 18), fill="black")
        draw.text((x + 5, 3), label, fill="white", font_size=13)
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lr", type=Path, help="the LR image")
    parser.add_argument("result", type=Path, help="its enlargement")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture to write")
    parser.add_argument(
        "--box",
        type=int,
        nargs=4,
        action="append",
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="crop in pixels of the result; may be repeated (default: the whole image)",
    )
    arguments = parser.parse_args()
    result = Image.open(arguments.result)
    boxes = [tuple(box) for box in arguments.box or [(0, 0, *result.size)]]
    comparison(Image.open(arguments.lr), result, boxes).save(arguments.output)


if __name__ == "__main__":
    main()
