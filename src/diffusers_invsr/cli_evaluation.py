"""The commands that measure models: `degrade` makes a test set, `evaluate` runs a model over one."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .cli_models import choose_device, describe, fail, load_pipeline, parse_tile_size, report
from .image_files import show


if TYPE_CHECKING:
    from .evaluation import MetricSuite


EXTRA = "pip install 'diffusers-invsr[evaluation]'"
# Of `evaluate`, without meaning where results are given
MODEL_OPTIONS = (
    "steps",
    "start_timestep",
    "timesteps",
    "scale",
    "tile_size",
    "tile_overlap",
    "tile_batch_size",
    "color_fix",
    "seed",
    "dtype",
)


def degrade(
    hr: Annotated[
        Path, typer.Argument(metavar="HR_DIR", exists=True, file_okay=False, help="HR images, with all subfolders.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the test set: lq/, gt/ and settings.json.")],
    setting: Annotated[
        Literal["test", "training"],
        typer.Option(help="The lighter degradation of the paper's test sets, or that of its training."),
    ] = "test",
    size: Annotated[
        str,
        typer.Option(
            metavar="INTEGER|none", help="Side of the middle square to take of HR images. none: images as they are."
        ),
    ] = "512",
    scale: Annotated[int, typer.Option(min=1, max=8, help="HR size over LR size.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the set.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the test set that OUT holds.")] = False,
):
    """Make a synthetic test set: LR images of HR images.

    What is drawn for an image follows from the seed and its name, on any machine. An image that cannot be read or is
    too small is reported and left out.

    Exit status: 0 if all is done, 1 if something failed, 2 if the command is wrong.
    """
    if size != "none" and not size.isdecimal():
        raise typer.BadParameter(f"{size!r} is not an integer or none.", param_hint="'--size'")
    from .evaluation import degrade_folder

    out, failed = out.expanduser(), []

    def tell(path: Path, problem: str | None):
        if problem is not None:
            failed.append(path)
            report(f"{show(path)}: {problem}")

    try:
        images = degrade_folder(
            hr,
            out,
            setting=setting,
            size=None if size == "none" else int(size),
            scale=scale,
            seed=seed,
            overwrite=overwrite,
            on_image=tell,
            progress=True,
        )
    except ImportError as error:
        fail(f"{error}: {EXTRA}")
    except (FileExistsError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        fail(describe(error))
    typer.echo(f"{len(images)} degraded, {len(failed)} failed -> {show(out.absolute())}")
    raise typer.Exit(1 if failed else 0)


def evaluate(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the evaluation: results, tables, pictures.")],
    lq: Annotated[Path | None, typer.Option(help="Folder of LR images.")] = None,
    gt: Annotated[Path | None, typer.Option(help="Folder of HR images, with the same names.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="tiny|sd-turbo|PATH|HUB_ID", help="The model, as for upscale.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of results that another program made, instead of a model.")
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, max=250, help="Diffusion steps; may be repeated, each is a run.  [default: 1]"),
    ] = None,
    start_timestep: Annotated[
        list[int] | None,
        typer.Option(metavar="250|200|150|100", help="Where the steps start; may be repeated.  [as published]"),
    ] = None,
    timesteps: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP,STEP,...", help="A whole schedule, such as 250,150,50; may be repeated."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|all",
            help="psnr_y, ssim_y, gradient_ratio, lpips (the default with --gt), dists, niqe, clipiqa, musiq, maniqa,"
            " fid; may be repeated.",
        ),
    ] = None,
    crop_border: Annotated[int, typer.Option(min=0, help="Pixels at each edge that PSNR and SSIM leave out.")] = 0,
    scale: Annotated[float | None, typer.Option(min=1, max=8, help="Enlargement.  [default: the model's own]")] = None,
    tile_size: Annotated[str, typer.Option(metavar="INTEGER|none|auto", help="As for upscale.")] = "auto",
    tile_overlap: Annotated[int | None, typer.Option(min=0, help="As for upscale.")] = None,
    tile_batch_size: Annotated[int, typer.Option(min=1, help="As for upscale.")] = 1,
    color_fix: Annotated[
        Literal["none", "wavelet", "ycbcr", "adain"], typer.Option(help="The paper's tables use wavelet.")
    ] = "none",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed, the same for each image.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first so many images.")] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Also make comparison sheets, and a plot of PSNR over steps and starts.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where OUT holds an evaluation.")] = False,
    device: Annotated[str, typer.Option(help="As for upscale.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        typer.Option(help="auto: as for upscale on a GPU, float32 on a CPU."),
    ] = "auto",
):
    """Measure a model, or given results, on a test set, at one or several schedules.

    The same command again goes on where it was stopped; further schedules and metrics can be added. Tables are in
    OUT/results.json, .csv and .md. A metric that cannot be had here is marked n/a there, with the reason.

    Exit status: 0 if all is done, 1 if an image failed, 2 if the command is wrong.
    """
    # 1. What to do, before a model is loaded
    out, tile_side = out.expanduser(), parse_tile_size(tile_size)
    if (model is None) == (results is None):
        raise typer.BadParameter("give either a model or results of another program.", param_hint="'--model'")
    if model is not None and lq is None:
        raise typer.BadParameter("the model needs LR images.", param_hint="'--lq'")
    if results is not None:
        given = [name for name in MODEL_OPTIONS if context.get_parameter_source(name).name == "COMMANDLINE"]
        if given:
            raise typer.BadParameter(
                "is for a model, not for given results.", param_hint=f"'--{given[0].replace('_', '-')}'"
            )
    schedules = parse_schedules(steps or [], start_timestep or [], timesteps or []) if model is not None else []
    if grid and model is not None and gt is not None and importlib.util.find_spec("matplotlib") is None:
        fail(f"--grid needs matplotlib, which is not installed: {EXTRA}")

    from .evaluation import METRICS, Sampling, save_plot, save_sheets
    from .evaluation import evaluate as run_evaluation
    from .evaluation.pairs import match_by_name

    try:
        folders = {"lq": lq, "gt": gt, "results": results}
        match_by_name({argument: folder for argument, folder in folders.items() if folder is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    names = [name for text in metric or [] for name in text.split(",")]
    needing = [name for name in names if name in METRICS and METRICS[name].needs_gt]
    if needing and gt is None:
        raise typer.BadParameter(f"{', '.join(needing)} need HR images: give --gt.", param_hint="'--metric'")
    names = list(METRICS) if "all" in names else names or None

    # 2. The model
    import torch

    place, number_type = choose_device(device, dtype)
    if dtype == "auto" and place.type == "cpu":  # figures should not hang on what a CPU computes in
        number_type = torch.float32
    pipe = None
    if model is not None:
        pipe = load_pipeline(model, place, number_type)
        pipe.set_progress_bar_config(disable=True)

    def tell(run: str, image: str, values: dict[str, float] | None, problem: str | None):
        from tqdm import tqdm

        if values is None:
            report(f"{run} {image}: {problem}")
        else:
            numbers = (f"{METRICS[name].label} {value:.{METRICS[name].digits}f}" for name, value in values.items())
            tqdm.write(f"{run} {image}: {', '.join(numbers) or 'no metric'}")

    def tell_unavailable(suite: "MetricSuite"):
        for name, reason in suite.unavailable.items():
            report(f"{METRICS[name].label}: n/a, {reason}")

    # 3. The images, one by one
    try:
        evaluation = run_evaluation(
            out,
            lq=lq,
            gt=gt,
            pipe=pipe,
            results=results,
            schedules=schedules,
            metrics=names,
            sampling=Sampling(
                seed=seed,
                scale=scale,
                color_fix=None if color_fix == "none" else color_fix,
                tile_size=tile_side,
                tile_overlap=tile_overlap,
                tile_batch_size=tile_batch_size,
            ),
            crop_border=crop_border,
            limit=limit,
            overwrite=overwrite,
            device=place,
            progress=True,
            on_image=tell,
            on_metrics=tell_unavailable,
        )
    except (FileExistsError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        fail(describe(error))

    # 4. What came out
    typer.echo("\n" + evaluation.to_markdown(images=False))
    typer.echo(f"results.json, results.csv, results.md -> {show(out.absolute())}")
    if grid:
        typer.echo(f"{len(save_sheets(evaluation, out))} sheets -> {show((out / 'grids').absolute())}")
        plot = save_plot(evaluation, out) if pipe is not None and gt is not None else None
        typer.echo(f"plot -> {show(plot.absolute())}" if plot else "no plot: it needs PSNR of a model's results")
    raise typer.Exit(1 if evaluation.failed else 0)


def parse_schedules(steps: list[int], starts: list[int], timesteps: list[str]) -> list[list[int]]:
    """The schedules that the options name: each number of steps from each start, and those given whole."""
    from .scheduling_invsr import check_timesteps, published_schedule, starting_schedule

    schedules = []
    try:
        for num_steps in steps or ([] if timesteps and not starts else [1]):
            schedules += [starting_schedule(num_steps, start) for start in starts]
            schedules += [] if starts else [published_schedule(num_steps)]
        for text in timesteps:
            parts = text.replace(" ", "").split(",")
            if not all(part.isdecimal() for part in parts):
                raise ValueError(f"`--timesteps` has to be integers with commas, such as 250,150,50, but is {text!r}.")
            schedules.append(check_timesteps([int(part) for part in parts]))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return schedules
