"""The commands `degrade` and `evaluate`: make test sets, and measure models on them."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..image_paths import display_path
from .common import MODEL_METAVAR, ColorFix, choose_device, error_message, fail, load_pipeline, parse_tile_size, report


if TYPE_CHECKING:
    from ..evaluation import ImageResult


INSTALL = "pip install 'diffusers-invsr[evaluation]'"
# Options of `evaluate` that make no sense with given results
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
        Path,
        typer.Argument(metavar="HR_DIR", exists=True, file_okay=False, help="Folder of HR images (with subfolders)."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the test set: lq/, gt/ and settings.json.")],
    setting: Annotated[
        Literal["test", "training"],
        typer.Option(help="The lighter degradation of the paper's test sets, or the one used in training."),
    ] = "test",
    size: Annotated[
        str,
        typer.Option(metavar="INTEGER|none", help="Side of the centre crop of each HR image. none: the whole image."),
    ] = "512",
    scale: Annotated[int, typer.Option(min=1, max=8, help="HR size divided by LR size.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed of the set.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the test set in the folder OUT.")] = False,
):
    """Make a synthetic test set: degrade HR images to LR images.

    The degradation of an image depends only on the seed and its name, and is the same on every machine. Images that
    cannot be read or are too small are reported and skipped.

    Exit status: 0 on success, 1 if an image failed, 2 for a usage error.
    """
    if size != "none" and not size.isdecimal():
        raise typer.BadParameter(f"{size!r} is not an integer or none.", param_hint="'--size'")
    from ..evaluation import make_test_set

    out = out.expanduser()
    try:
        test_set = make_test_set(
            hr,
            out,
            setting=setting,
            size=None if size == "none" else int(size),
            scale=scale,
            seed=seed,
            overwrite=overwrite,
            progress=True,
        )
    except ImportError as error:
        fail(f"{error}: {INSTALL}")
    except (FileExistsError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        fail(error_message(error))
    for path, problem in test_set.problems.items():
        report(f"{display_path(path)}: {problem}")
    typer.echo(f"{len(test_set.images)} degraded, {len(test_set.problems)} failed -> {display_path(out.absolute())}")
    raise typer.Exit(1 if test_set.problems else 0)


def evaluate(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the evaluation: results, tables, pictures.")],
    lq: Annotated[Path | None, typer.Option(help="Folder of LR images.")] = None,
    gt: Annotated[Path | None, typer.Option(help="Folder of HR images with the same names.")] = None,
    model: Annotated[str | None, typer.Option(metavar=MODEL_METAVAR, help="The model, as for upscale.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of results of another program, instead of a model.")
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, max=250, help="Number of diffusion steps; repeat for several runs.  [default: 1]"),
    ] = None,
    start_timestep: Annotated[
        list[int] | None,
        typer.Option(
            metavar="250|200|150|100", help="Timestep to start from; repeat for several runs.  [default: as published]"
        ),
    ] = None,
    timesteps: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP,STEP,...", help="A whole schedule, such as 250,150,50; repeat for several runs."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|all",
            help="psnr_y, ssim_y, gradient_ratio, lpips (these by default with --gt), dists, niqe, clipiqa, musiq,"
            " maniqa, fid; separate by commas or repeat.",
        ),
    ] = None,
    crop_border: Annotated[int, typer.Option(min=0, help="Border in pixels that PSNR and SSIM exclude.")] = 0,
    scale: Annotated[
        float | None, typer.Option(min=1, max=8, help="Scale factor.  [default: the model's own]")
    ] = None,
    tile_size: Annotated[str, typer.Option(metavar="INTEGER|none|auto", help="As for upscale.")] = "auto",
    tile_overlap: Annotated[int | None, typer.Option(min=0, help="As for upscale.")] = None,
    tile_batch_size: Annotated[int, typer.Option(min=1, help="As for upscale.")] = 1,
    color_fix: Annotated[
        ColorFix,
        typer.Option(help="As for upscale; the paper's tables use wavelet."),
    ] = "none",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed, the same for each image.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first LIMIT images.")] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Also make comparison sheets, and a plot of PSNR against steps.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the evaluation in the folder OUT.")] = False,
    device: Annotated[str, typer.Option(help="As for upscale.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        typer.Option(help="auto: as for upscale on a GPU, float32 on a CPU."),
    ] = "auto",
):
    """Measure a model, or given results, on a test set.

    Repeat the command to resume an evaluation that was stopped, or to add schedules and metrics. Tables are written to
    OUT/results.json, .csv and .md. Metrics that are unavailable are marked n/a, with the reason.

    Exit status: 0 on success, 1 if an image failed, 2 for a usage error.
    """
    # 1. What to do, before a model is loaded
    out, tile_side = out.expanduser(), parse_tile_size(tile_size)
    if (model is None) == (results is None):
        raise typer.BadParameter("give either a model or the results of another program.", param_hint="'--model'")
    if model is not None and lq is None:
        raise typer.BadParameter("a model needs LR images.", param_hint="'--lq'")
    if results is not None:
        given = [name for name in MODEL_OPTIONS if context.get_parameter_source(name).name == "COMMANDLINE"]
        if given:
            raise typer.BadParameter(
                "applies to a model, not to given results.", param_hint=f"'--{given[0].replace('_', '-')}'"
            )
    schedules = parse_schedules(steps or [], start_timestep or [], timesteps or []) if model is not None else []
    if grid and model is not None and gt is not None and importlib.util.find_spec("matplotlib") is None:
        fail(f"--grid requires matplotlib, which is not installed: {INSTALL}")

    from ..evaluation import METRICS, Evaluator, Sampling, save_plot, save_sheets
    from ..evaluation.pairs import match_by_name

    try:
        folders = {"lq": lq, "gt": gt, "results": results}
        match_by_name({argument: folder for argument, folder in folders.items() if folder is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    names = [name for text in metric or [] for name in text.split(",")]
    needing_gt = [name for name in names if name in METRICS and METRICS[name].needs_gt]
    if needing_gt and gt is None:
        raise typer.BadParameter(f"{', '.join(needing_gt)} need HR images: give --gt.", param_hint="'--metric'")
    names = list(METRICS) if "all" in names else names or None

    # 2. The model
    import torch
    from tqdm import tqdm

    torch_device, torch_dtype = choose_device(device, dtype)
    if dtype == "auto" and torch_device.type == "cpu":  # so that the figures do not depend on the CPU
        torch_dtype = torch.float32
    pipe = None
    if model is not None:
        pipe = load_pipeline(model, torch_device, torch_dtype)
        pipe.set_progress_bar_config(disable=True)

    # 3. The images, one by one
    try:
        evaluator = Evaluator(
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
            device=torch_device,
        )
        for name, reason in evaluator.suite.unavailable.items():
            report(f"{METRICS[name].label}: n/a, {reason}")
        for result in evaluator.measure(progress=True):
            if result.error is None:
                tqdm.write(summary(result))
            else:
                report(f"{result.run} {result.image}: {result.error}")
    except (FileExistsError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        fail(error_message(error))

    # 4. The tables and pictures
    evaluation = evaluator.evaluation
    typer.echo("\n" + evaluation.to_markdown(images=False))
    typer.echo(f"results.json, results.csv, results.md -> {display_path(out.absolute())}")
    if grid:
        sheets = save_sheets(evaluation, out)
        typer.echo(f"{len(sheets)} sheets -> {display_path((out / 'grids').absolute())}")
        plot = save_plot(evaluation, out) if pipe is not None and gt is not None else None
        typer.echo(f"plot -> {display_path(plot.absolute())}" if plot else "no plot: it needs the PSNR of a model")
    raise typer.Exit(1 if evaluation.failed else 0)


def summary(result: "ImageResult") -> str:
    """The values of one image in one line."""
    from ..evaluation import METRICS

    numbers = (f"{METRICS[name].label} {value:.{METRICS[name].digits}f}" for name, value in result.values.items())
    return f"{result.run} {result.image}: {', '.join(numbers) or 'no metric'}"


def parse_schedules(steps: list[int], starts: list[int], timesteps: list[str]) -> list[list[int]]:
    """The schedules that the options name: each number of steps from each start, and the complete ones."""
    from ..scheduling_invsr import check_timesteps, published_schedule, starting_schedule

    schedules = []
    try:
        for num_steps in steps or ([] if timesteps and not starts else [1]):
            schedules += [starting_schedule(num_steps, start) for start in starts] or [published_schedule(num_steps)]
        for text in timesteps:
            parts = text.replace(" ", "").split(",")
            if not all(part.isdecimal() for part in parts):
                raise ValueError(
                    f"`--timesteps` must be integers separated by commas, such as 250,150,50, got {text!r}."
                )
            schedules.append(check_timesteps([int(part) for part in parts]))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return schedules
