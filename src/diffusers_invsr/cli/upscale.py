"""The command `upscale`: enlarge image files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..image_files import FORMATS, IMAGE_SUFFIXES, check_side, read_image, save_image
from ..image_paths import display_path, find_images, plan_outputs
from .common import MODEL_METAVAR, ColorFix, choose_device, error_message, load_pipeline, parse_tile_size, report


if TYPE_CHECKING:
    from ..pipeline_invsr import InvSRPipeline


def upscale(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUTS",
            help="Image files, folders (with all subfolders), or quoted patterns such as 'photos/**/*.jpg'.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder of the results, or for a single image the file: .png, .jpg or .webp."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar=MODEL_METAVAR,
            help="tiny: included in the package, needs no network. sd-turbo: the published weights, from the Hub."
            " Or the folder or Hub id of a saved pipeline.",
        ),
    ] = "tiny",
    steps: Annotated[int, typer.Option(min=1, max=250, help="Number of diffusion steps.")] = 1,
    start_timestep: Annotated[
        int | None,
        typer.Option(
            metavar="250|200|150|100",
            help="Timestep to start from; higher values change the image more."
            "  [default: as published for the number of steps]",
        ),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(min=1, max=8, help="Scale factor.  [default: the model's own, 4]")
    ] = None,
    tile_size: Annotated[
        str,
        typer.Option(
            metavar="INTEGER|none|auto",
            help="Side of a tile in input pixels at x4; smaller tiles need less memory. none: the whole image at once."
            " auto: the model's own size, or the nearest that covers the image with equal tiles.",
        ),
    ] = "auto",
    tile_overlap: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Overlap of neighbouring tiles in pixels; the published method uses half the tile."
            "  [default: an eighth of the tile, at least 8]",
        ),
    ] = None,
    tile_batch_size: Annotated[
        int, typer.Option(min=1, help="Tiles per batch, for GPUs; affects only speed and memory.")
    ] = 1,
    color_fix: Annotated[ColorFix, typer.Option(help="Transfer the colours of the input.")] = "none",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed, the same for each file.")] = 0,
    device: Annotated[str, typer.Option(help="auto (cuda, else mps, else cpu) or a PyTorch device.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        typer.Option(help="auto: bfloat16 if the device supports it natively, else float32."),
    ] = "auto",
    image_format: Annotated[
        Literal["keep", "png", "jpg", "webp"],
        typer.Option("--format", help="keep: the format of the input if it is png, jpg or webp, else png."),
    ] = "keep",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing results instead of skipping their images.")
    ] = False,
    suffix: Annotated[str, typer.Option(help="Suffix added to the names of the results, such as _x4.")] = "",
):
    """Upscale images.

    Results are named like the inputs, and images in a folder keep their subfolders. ICC profiles, EXIF data and
    transparency are preserved (JPEG shows transparency on white). Files that cannot be read are reported and skipped.

    Exit status: 0 on success (also if all results existed), 1 if something failed, 2 for a usage error.
    """
    # 1. What to do, before a model is loaded
    tile_side = parse_tile_size(tile_size)
    out = Path(os.path.expanduser(out))
    outputs, num_missing = plan_upscaling(inputs, out, image_format, suffix)
    existing = {} if overwrite else {source: target for source, target in outputs.items() if target.exists()}
    for source, target in existing.items():
        typer.echo(f"{display_path(source)}: skipped, {display_path(target)} exists (use --overwrite to replace it)")
    waiting = {source: target for source, target in outputs.items() if source not in existing}

    num_failed = 0
    if waiting:
        # 2. The model
        pipe = load_pipeline(model, *choose_device(device, dtype))
        if pipe.takes_text and pipe.text_encoder is not None and pipe.tokenizer is not None:
            pipe.drop_text_encoder()  # or else each image would embed the same prompts
        options = {
            "num_steps": steps,
            "start_timestep": start_timestep,
            "scale": scale,
            "tile_size": tile_side,
            "tile_overlap": tile_overlap,
            "tile_batch_size": tile_batch_size,
            "color_fix": None if color_fix == "none" else color_fix,
        }
        check_options(pipe, options)

        # 3. The images, one by one
        num_failed = upscale_files(pipe, waiting, options, seed)
    if len(outputs) + num_missing > 1:
        num_done = len(waiting) - num_failed
        typer.echo(f"{num_done} upscaled, {len(existing)} skipped, {num_failed + num_missing} failed")
    raise typer.Exit(1 if num_failed or num_missing else 0)


def plan_upscaling(inputs: list[str], out: Path, image_format: str, suffix: str) -> tuple[dict[Path, Path], int]:
    """The result's file for each image, and the number of inputs without images, which are reported."""
    if any(character in suffix for character in "/\\:\0"):
        raise typer.BadParameter(f"{suffix!r} cannot be part of a file name.", param_hint="'--suffix'")
    to_file = out.suffix.lower() in IMAGE_SUFFIXES and not out.is_dir()
    if not to_file and out.exists() and not out.is_dir():
        raise typer.BadParameter(
            f"{out} is a file, but must be a folder or the name of an image: {', '.join(FORMATS)}.",
            param_hint="'--out'",
        )
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not (to_file and folder == out) and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise typer.BadParameter(f"{out} cannot be created: {folder} is not writable.", param_hint="'--out'")
    found = find_images(inputs, out, suffix)
    for text, reason in found.problems.items():
        report(f"{text}: {reason}")
    if found.duplicates:
        typer.echo(f"{len(found.duplicates)} left out: links to images found under another name")
    if found.results:
        typer.echo(f"{len(found.results)} left out: results, according to their names ({suffix})")
    images = found.images
    if not images:
        raise typer.BadParameter("no images found.", param_hint="'INPUTS'")
    if to_file:
        extension = out.suffix.lower()
        if extension not in FORMATS:
            raise typer.BadParameter(f"{out} must end in one of {', '.join(FORMATS)}.", param_hint="'--out'")
        if len(images) > 1:
            raise typer.BadParameter(
                f"{out} is the name of a single image, but there are {len(images)} inputs: give a folder.",
                param_hint="'--out'",
            )
        if suffix or image_format not in ("keep", extension[1:].replace("jpeg", "jpg")):
            raise typer.BadParameter(
                f"{out} already determines name and format: omit `--suffix` and `--format`.", param_hint="'--out'"
            )
        out, images, image_format = out.parent, {source: Path(out.name) for source in images}, "keep"
    try:
        return plan_outputs(images, out, image_format, suffix), len(found.problems)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--out'") from None


def check_options(pipe: "InvSRPipeline", options: dict):
    """Raise a usage error for options that the pipeline refuses for every image."""
    try:
        pipe.check_inputs(**options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def upscale_files(pipe: "InvSRPipeline", outputs: dict[Path, Path], options: dict, seed: int) -> int:
    """Upscale each file, with progress bars on a terminal, and return the number of files that failed."""
    from tqdm import tqdm

    single = len(outputs) == 1
    num_failed = 0
    with tqdm(outputs.items(), desc="files", unit="file", disable=single or None, dynamic_ncols=True) as bar:
        for source, target in bar:
            layout = {"position": 0 if single else 1, "leave": False, "dynamic_ncols": True}
            pipe.set_progress_bar_config(desc=source.name, unit="step", disable=None, **layout)
            try:
                sizes = upscale_file(pipe, source, target, options, seed)
            except Exception as error:  # a bad file does not stop the others
                report(f"{display_path(source)}: {error_message(error)}")
                num_failed += 1
            else:
                tqdm.write(f"{display_path(source)} -> {display_path(target)} ({sizes})")
    return num_failed


def upscale_file(pipe: "InvSRPipeline", source: Path, target: Path, options: dict, seed: int) -> str:
    """Upscale one file and return the sizes before and after. Noise is drawn on the CPU, the same for every device."""
    import torch

    image, num_frames = read_image(source)
    check_side(target, int(max(image.size) * (options["scale"] or pipe.config.scale) + 0.5))
    result = pipe(image, generator=torch.Generator().manual_seed(seed), **options).images[0]
    remark = save_image(result, target, image)
    remark += f", the first of {num_frames} frames" if num_frames > 1 else ""
    return f"{image.width}x{image.height} to {result.width}x{result.height}{remark}"
