"""The starting step as a slider between fidelity and realism: one step from each start, models beside each other.

    python examples/research/start_slider.py --hr KODAK --patterns 'kodim1[789].png' 'kodim2?.png' \
        --output slider --models before=tiny after=work/pipeline

For each degradation, model and start: PSNR and SSIM of luma over bicubic, ST-LPIPS (Alex), the gradient ratio, and
the energy of a weave with the period of the latents' pixels (`diffusers_invsr.training.lattice`), result over HR. LR
images are made as in `paper_findings.py`, from the same seeds. `--output` gets `scores.jsonl` (a stopped run resumes
there), `slider.md` and, for each photograph, the middle of bicubic, every result and the HR image.
Needs `pip install ".[examples,training]"`.
"""

import argparse

import numpy as np
import torch
from findings_common import (
    Scores,
    add_arguments,
    crop_to_multiple,
    load_pipeline,
    make_lr,
    measure,
    read_photographs,
    settings_of,
)
from PIL import Image

from diffusers_invsr import TINY
from diffusers_invsr.files import write_atomically
from diffusers_invsr.tables import markdown_table
from diffusers_invsr.training import ShiftTolerantLPIPS, lattice_energy, lattice_prominence
from diffusers_invsr.training.validation import to_tensor


BICUBIC = "bicubic"
DEGRADATIONS = ("simple", "test")
CROP = 192  # side of a sheet's crops, in HR pixels


def parse_model(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder or name == BICUBIC:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=FOLDER with another name than {BICUBIC!r}")
    return name, TINY if folder == "tiny" else folder


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--models", type=parse_model, nargs="+", required=True, help="NAME=FOLDER of each, or tiny")
    parser.add_argument("--starts", type=int, nargs="+", default=[100, 150, 200, 250], help="one step from each")
    return parser.parse_args(argv)


@torch.no_grad()
def measure_all(result: Image.Image, hr: Image.Image, st_lpips: ShiftTolerantLPIPS) -> dict[str, float]:
    scores = measure(result, hr)
    scores["st_lpips"] = st_lpips(to_tensor(result), to_tensor(hr)).item()
    for function in (lattice_energy, lattice_prominence):
        scores[function.__name__] = function(np.array(result), np.array(hr))
    return scores


def main(argv: list[str] | None = None):
    arguments = parse_args(argv)
    photographs = read_photographs(arguments)
    pipes = {name: load_pipeline(folder, arguments.device) for name, folder in arguments.models}
    models = {name: settings_of(pipe, photographs, arguments.seed) for name, pipe in pipes.items()}
    scores = Scores(arguments.output / "scores.jsonl", {"models": models})
    st_lpips = ShiftTolerantLPIPS("alex")
    runs = [(name, start) for name in pipes for start in arguments.starts]
    for photo in photographs:
        hr = crop_to_multiple(photo.hr, 4)
        for degradation in DEGRADATIONS:
            if all((degradation, photo.name, *run) in scores for run in [(BICUBIC, None), *runs]):
                continue
            lr = make_lr(degradation, hr, [arguments.seed, photo.number])
            results = {(BICUBIC, None): lr.resize(hr.size, Image.Resampling.BICUBIC)}
            for name, start in runs:
                generator = torch.Generator().manual_seed(arguments.seed)
                result = pipes[name](lr, timesteps=[start], tile_size=None, generator=generator).images[0]
                results[name, start] = result
            for run, result in results.items():
                if (degradation, photo.name, *run) not in scores:
                    scores.add((degradation, photo.name, *run), measure_all(result, hr, st_lpips))
            box = [(side - min(side, CROP)) // 2 for side in hr.size]
            box += [start + CROP for start in box]
            sheet = Image.new("RGB", (CROP * (len(results) + 1), CROP))
            for column, image in enumerate([*results.values(), hr]):
                sheet.paste(image.crop(box), (CROP * column, 0))
            sheet.save(arguments.output / f"{photo.name}_{degradation}.png")
        print(photo.name, flush=True)

    lines = []
    for degradation in DEGRADATIONS:
        bicubic, rows = None, []
        for run in [(BICUBIC, None), *runs]:
            of_photos = [scores[degradation, photo.name, *run] for photo in photographs]
            mean = {metric: float(np.mean([each[metric] for each in of_photos])) for metric in of_photos[0]}
            bicubic = bicubic or mean
            row = [run[0], str(run[1] or "")]
            row += [f"{mean['psnr_y']:.2f}", f"{mean['psnr_y'] - bicubic['psnr_y']:+.2f}"]
            row += [f"{mean['ssim_y'] - bicubic['ssim_y']:+.4f}", f"{mean['st_lpips']:.3f}"]
            row += [f"{mean[name]:.3f}" for name in ("gradient_ratio", "lattice_energy", "lattice_prominence")]
            rows.append(row)
        headings = ["model", "start", "PSNR Y", "over bicubic", "SSIM over bicubic", "ST-LPIPS", "gradient ratio"]
        headings += ["lattice energy", "lattice prominence"]
        lines += [f"{degradation}, mean over {len(photographs)}", "", markdown_table(headings, rows), ""]
    write_atomically(arguments.output / "slider.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
