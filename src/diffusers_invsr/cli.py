"""The command line `diffusers-invsr`: enlarge image files; convert, publish, describe and measure models."""

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import __version__, cli_evaluation
from .cli_models import choose_device, describe, fail, load_pipeline, parse_tile_size, report, saved_dtypes
from .image_files import FORMATS, IMAGE_SUFFIXES, check_side, find_images, plan_outputs, read_image, save_image, show


if TYPE_CHECKING:
    from .pipeline_invsr import InvSRPipeline


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Option(
        metavar="tiny|sd-turbo|PATH|HUB_ID",
        help="tiny: comes with the package, needs no network. sd-turbo: the published weights, from the Hub."
        " Or the folder of a saved pipeline, or its id on the Hub.",
    ),
]


def main():
    """Entry point of `diffusers-invsr`: the app, with the log noise of the libraries below turned off."""
    warnings.simplefilter("ignore")  # what the pipeline has to say is logged
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed
            stream.reconfigure(errors="backslashreplace")  # names of files can hold what cannot be printed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left half-written
    for name in ("diffusers", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except OSError as error:  # of a path that may not be looked at, or of an output that takes no more
        sys.exit(f"Error: {describe(error)}")


def print_version(value: bool):
    if value:
        typer.echo(f"diffusers-invsr {__version__}")
        raise typer.Exit


@app.callback()
def callback(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
):
    """InvSR super-resolution: enlarge images by diffusion inversion, in any number of steps."""


@app.command()
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
        typer.Option("--out", "-o", help="Folder of the results; for a single image also a file: .png, .jpg, .webp."),
    ],
    model: Model = "tiny",
    steps: Annotated[int, typer.Option(min=1, max=250, help="Diffusion steps.")] = 1,
    start_timestep: Annotated[
        int | None,
        typer.Option(
            metavar="250|200|150|100",
            help="Where the steps start: higher changes more.  [default: as published for the number of steps]",
        ),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(min=1, max=8, help="Enlargement.  [default: the model's own, 4]")
    ] = None,
    tile_size: Annotated[
        str,
        typer.Option(
            metavar="INTEGER|none|auto",
            help="Side of a tile, in input pixels at x4; less needs less memory. none: the whole image at once."
            " auto: the model's own, or up to an eighth more where that is less work.",
        ),
    ] = "auto",
    tile_overlap: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Pixels that tiles share; half the tile is as published."
            "  [default: an eighth of the tile, 8 or more]",
        ),
    ] = None,
    tile_batch_size: Annotated[
        int, typer.Option(min=1, help="Tiles at once, for GPUs: only speed and memory change.")
    ] = 1,
    color_fix: Annotated[
        Literal["none", "wavelet", "ycbcr", "adain"], typer.Option(help="Take the colours from the input.")
    ] = "none",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed, the same for each file.")] = 0,
    device: Annotated[str, typer.Option(help="auto (cuda, else mps, else cpu) or a device of PyTorch.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        typer.Option(help="auto: bfloat16 where the device computes in it, else float32."),
    ] = "auto",
    image_format: Annotated[
        Literal["keep", "png", "jpg", "webp"],
        typer.Option("--format", help="keep: the input's where it is png, jpg or webp, else png."),
    ] = "keep",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results that exist, instead of skipping their images.")
    ] = False,
    suffix: Annotated[str, typer.Option(help="Added to the names of the results, such as _x4.")] = "",
):
    """Enlarge images.

    Results have the names of the inputs; images in a folder keep their subfolders. ICC profile and EXIF data are kept,
    transparency too (in JPEG it becomes white). A file that cannot be read is reported and left out.

    Exit status: 0 if all is done (or was done before), 1 if something failed, 2 if the command is wrong.
    """
    # 1. What to do, before a model is loaded
    tile_side = parse_tile_size(tile_size)
    out = Path(os.path.expanduser(out))
    outputs, num_missing = plan(inputs, out, image_format, suffix)
    existing = {} if overwrite else {source: target for source, target in outputs.items() if target.exists()}
    for source, target in existing.items():
        typer.echo(f"{show(source)}: skipped, {show(target)} exists (--overwrite replaces it)")
    waiting = {source: target for source, target in outputs.items() if source not in existing}

    num_failed = 0
    if waiting:
        # 2. The model
        pipe = load_pipeline(model, *choose_device(device, dtype))
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
        typer.echo(f"{num_done} enlarged, {len(existing)} skipped, {num_failed + num_missing} failed")
    raise typer.Exit(1 if num_failed or num_missing else 0)


def plan(inputs: list[str], out: Path, image_format: str, suffix: str) -> tuple[dict[Path, Path], int]:
    """The result's file for each image, and the number of inputs for which there is no image; these are reported."""
    if any(character in suffix for character in "/\\:\0"):
        raise typer.BadParameter(f"{suffix!r} has to be a part of a file name.", param_hint="'--suffix'")
    to_file = out.suffix.lower() in IMAGE_SUFFIXES and not out.is_dir()
    if not to_file and out.exists() and not out.is_dir():
        raise typer.BadParameter(
            f"{out} is a file, but has to be a folder or the name of an image: {', '.join(FORMATS)}.",
            param_hint="'--out'",
        )
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not (to_file and folder == out) and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise typer.BadParameter(f"{out} cannot be made, since {folder} cannot be written to.", param_hint="'--out'")
    images, missing, results, others = find_images(inputs, out, suffix)
    for text, reason in missing.items():
        report(f"{text}: {reason}")
    if others:
        typer.echo(f"{len(others)} left out: through links, they are there by another name")
    if results:
        typer.echo(f"{len(results)} left out: by their names ({suffix}) they are results")
    if not images:
        raise typer.BadParameter("there is no image to enlarge.", param_hint="'INPUTS'")
    if to_file:
        extension = out.suffix.lower()
        if extension not in FORMATS:
            raise typer.BadParameter(f"{out} has to end in one of {', '.join(FORMATS)}.", param_hint="'--out'")
        if len(images) > 1:
            raise typer.BadParameter(
                f"{out} is the name of one image, but there are {len(images)} inputs: give a folder.",
                param_hint="'--out'",
            )
        if suffix or image_format not in ("keep", extension[1:].replace("jpeg", "jpg")):
            raise typer.BadParameter(
                f"{out} already says the name and the format: leave out `--suffix` and `--format`.",
                param_hint="'--out'",
            )
        out, images, image_format = out.parent, {source: Path(out.name) for source in images}, "keep"
    try:
        return plan_outputs(images, out, image_format, suffix), len(missing)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--out'") from None


def check_options(pipe: "InvSRPipeline", options: dict):
    """Raises a usage error for options that the pipeline would refuse for any image."""
    try:
        pipe.scheduler.set_timesteps(options["num_steps"], start_timestep=options["start_timestep"])
        pipe.check_inputs(
            num_images=1,
            num_steps=options["num_steps"],
            scale=options["scale"],
            target_size=None,
            prompt=None,
            negative_prompt=None,
            guidance_scale=1.0,
            eta=0.0,
            tile_size=options["tile_size"],
            tile_overlap=options["tile_overlap"],
            tile_window=None,
            tile_batch_size=options["tile_batch_size"],
            color_fix=options["color_fix"],
            generator=None,
            prompt_embeds=None,
            negative_prompt_embeds=None,
            output_type="pil",
            callback_on_step_end=None,
            callback_on_step_end_tensor_inputs=[],
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def upscale_files(pipe: "InvSRPipeline", outputs: dict[Path, Path], options: dict, seed: int) -> int:
    """Enlarge each file into its own result; returns the number of files that failed. Shows bars on a terminal."""
    from tqdm import tqdm

    single = len(outputs) == 1
    num_failed = 0
    with tqdm(outputs.items(), desc="files", unit="file", disable=single or None, dynamic_ncols=True) as bar:
        for source, target in bar:
            layout = {"position": 0 if single else 1, "leave": False, "dynamic_ncols": True}
            pipe.set_progress_bar_config(desc=source.name, unit="step", disable=None, **layout)
            try:
                sizes = upscale_file(pipe, source, target, options, seed)
            except Exception as error:  # whatever is wrong with one file, the others go on
                report(f"{show(source)}: {describe(error)}")
                num_failed += 1
            else:
                tqdm.write(f"{show(source)} -> {show(target)} ({sizes})")
    return num_failed


def upscale_file(pipe: "InvSRPipeline", source: Path, target: Path, options: dict, seed: int) -> str:
    """Enlarge one file; returns the sizes before and after. The noise is drawn on the CPU, alike for every device."""
    import torch

    image, num_frames = read_image(source)
    check_side(target, int(max(image.size) * (options["scale"] or pipe.config.scale) + 0.5))
    result = pipe(image, generator=torch.Generator().manual_seed(seed), **options).images[0]
    note = save_image(result, target, image)
    note += f", the first of {num_frames} frames" if num_frames > 1 else ""
    return f"{image.width}x{image.height} to {result.width}x{result.height}{note}"


@app.command()
def convert(
    predictor: Annotated[
        str, typer.Argument(help="The noise predictor: a .pth or .safetensors file, a saved folder, or a Hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new pipeline.")],
    base: Annotated[
        str, typer.Option(metavar="ID_OR_FOLDER", help="The diffusion model that the predictor was trained with.")
    ] = "stabilityai/sd-turbo",
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, metavar="JSON", help="Configuration of the predictor, if not the published."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Number type of the saved weights.")
    ] = "float32",
    drop_text_encoder: Annotated[
        bool, typer.Option("--drop-text-encoder", help="Keep the embeddings of the fixed prompts instead.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the pipeline that the folder holds.")
    ] = False,
):
    """Make a pipeline of a noise predictor and the diffusion model it belongs to."""
    import torch

    from .conversion import convert as convert_to_pipeline

    try:
        convert_to_pipeline(
            predictor,
            base=base,
            output=os.path.expanduser(out),
            config=config,
            dtype=getattr(torch, dtype),
            drop_text_encoder=drop_text_encoder,
            overwrite=overwrite,
        )
    except (OSError, ValueError) as error:
        if isinstance(error, FileExistsError) and error.errno is None:  # not the system's, of a folder that is a file
            fail(f"{show(out.absolute())} exists already: only a pipeline is replaced, with --overwrite.")
        fail(describe(error))
    typer.echo(f"{predictor} + {base} -> {show(out.absolute())}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A saved pipeline.")],
    repo_id: Annotated[str, typer.Argument(help="Where to: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Access token of the Hub.  [default: the one you are logged in with]")
    ] = None,
):
    """Publish a saved pipeline on the Hub: weights, code and model card."""
    # By its absolute path, which is no keyword such as `tiny`
    pipe = load_pipeline(str(folder.absolute()), dtype=saved_dtypes(folder))
    try:
        # Where it is not asked to be private, the owner's own default is kept
        pipe.push_to_hub(repo_id, private=private or None, token=token)
    except (OSError, ValueError) as error:
        fail(f"`{repo_id}` could not be written on the Hub: {describe(error)}")
    typer.echo(f"{show(folder)} -> {repo_id}")


@app.command()
def info(model: Annotated[str, typer.Argument(metavar="tiny|sd-turbo|PATH|HUB_ID", help="As for upscale.")]):
    """Tell what a model needs: scale, tiles, licence, parameters, memory."""
    from . import TINY
    from .model_info import describe_model

    pipe = load_pipeline(model)
    try:
        pipe.check_components()
    except ValueError as error:
        fail(f"{model!r} cannot run: {error}")
    for name, value in describe_model(pipe, Path(TINY if model == "tiny" else model)).items():
        typer.echo(f"{name + ':':<22} {value}")


app.command()(cli_evaluation.degrade)
app.command()(cli_evaluation.evaluate)
