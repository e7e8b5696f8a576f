"""Running a model over a test set at several schedules, and measuring what comes out (section 4 of the paper)."""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..checks import check_positive, is_integer
from ..files import file_digest, module_fingerprint
from ..image_files import MAX_NAME_BYTES, save_image
from ..scheduling_invsr import check_timesteps
from .metrics import (
    DEFAULT_METRICS,
    DEFAULT_METRICS_WITHOUT_GT,
    METRICS,
    MetricSuite,
    MetricUnavailable,
)
from .pairs import check_sizes, match_by_name, read_rgb
from .records import IMAGES_FOLDER, Records, open_folder
from .report import Evaluation, Run


if TYPE_CHECKING:
    from ..pipeline_invsr import InvSRPipeline


BICUBIC, RESULTS = "bicubic", "results"
RESULT = "result"  # of a run, among the digests of what was measured
MAX_SEED = 2**63 - 1
INCEPTION_FEATURES = 2048  # of FID


@dataclass
class Sampling:
    r"""
    How a pipeline is run; the arguments of [`InvSRPipeline.__call__`] but for the schedule.

    Args:
        seed (`int`, defaults to 0): Seed, the same for each image, of a generator on the CPU.
        scale (`float`, *optional*): Enlargement, by default the pipeline's own.
        color_fix (`str`, *optional*): `"wavelet"`, `"ycbcr"` or `"adain"`; the paper's tables use `"wavelet"`.
        tile_size (`int` or `str`, *optional*, defaults to `"auto"`): Side of a tile in LR pixels; `None`: no tiles.
        tile_overlap (`int`, *optional*):
            LR pixels that tiles share, by default an eighth of the tile, 8 or more; half of it is as published.
        tile_batch_size (`int`, defaults to 1): Tiles at once.
    """

    seed: int = 0
    scale: float | None = None
    color_fix: str | None = None
    tile_size: int | str | None = "auto"
    tile_overlap: int | None = None
    tile_batch_size: int = 1

    def check(self, pipe: "InvSRPipeline"):
        """Raises a ValueError for what the pipeline would refuse for any image."""
        if not is_integer(self.seed) or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"`seed` has to be an integer from 0 to {MAX_SEED}, but is {self.seed!r}.")
        defaults = inspect.signature(pipe.__call__).parameters
        names = [name for name in inspect.signature(pipe.check_inputs).parameters if name in defaults]
        arguments = {name: getattr(self, name, defaults[name].default) for name in names}
        pipe.check_inputs(num_images=1, **arguments)

    def enlarge(self, pipe: "InvSRPipeline", lr: Image.Image, timesteps: list[int]) -> Image.Image:
        arguments = {name: value for name, value in vars(self).items() if name != "seed"}
        generator = torch.Generator().manual_seed(self.seed)
        return pipe(lr, timesteps=timesteps, generator=generator, **arguments).images[0]


@dataclass
class _Source:
    """One way to make results: the run's name, and the result of an LR image where it is not a given file."""

    run: Run
    enlarge: Callable[[Image.Image, tuple[int, int] | None], Image.Image] | None
    records: Records = field(init=False)


def schedule_name(timesteps: Sequence[int]) -> str:
    """Name of a schedule, `"200-100-50"`, which is that of its folder; long ones are cut and end in a digest."""
    name = "-".join(map(str, timesteps))
    if len(name) <= 100:
        return name
    return f"{len(timesteps)}-steps-from-{timesteps[0]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def pipeline_fingerprint(pipe: "InvSRPipeline") -> str:
    """32 hexadecimal digits that follow from all that a pipeline's results hang on: weights and configurations."""
    parts = {}
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            parts[name] = module_fingerprint(part)
        elif hasattr(part, "config"):
            parts[name] = {key: value for key, value in part.config.items() if not key.startswith("_")}
    parts |= {name: pipe.config[name] for name in ("scale", "tile_size", "prompt", "negative_prompt")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def evaluate(
    out: str | Path,
    lq: str | Path | None = None,
    gt: str | Path | None = None,
    pipe: "InvSRPipeline | None" = None,
    results: str | Path | None = None,
    schedules: Sequence[Sequence[int]] = ((200,),),
    metrics: Sequence[str] | None = None,
    sampling: Sampling | None = None,
    crop_border: int = 0,
    limit: int | None = None,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: bool = False,
    on_image: Callable[[str, str, dict[str, float] | None, str | None], None] | None = None,
    on_metrics: Callable[[MetricSuite], None] | None = None,
) -> Evaluation:
    r"""
    Enlarge a test set with a model at each of several schedules, or take results, and measure them.

    Images belong together by their path below their folder without the extension. `out` gets a folder for each run
    with the results as PNG files (`200-100-50/images/...`) and its measurements, and the tables `results.json`,
    `results.csv` and `results.md`. What is there already is not done again: a call that was killed goes on at the
    image where it was, and metrics can be added. Metrics see the 8 bits that are in the files.

    Args:
        out (`str` or `Path`): Folder of the evaluation.
        lq (`str` or `Path`, *optional*): Folder of the LR images; for given results only needed for the bicubic row.
        gt (`str` or `Path`, *optional*): Folder of the HR images. With them, bicubic enlargement is measured as well.
        pipe ([`InvSRPipeline`], *optional*): The model; or
        results (`str` or `Path`, *optional*): Folder of results that some other program made.
        schedules (`Sequence[Sequence[int]]`, defaults to `((200,),)`):
            Steps counted from 1, strictly descending in 1 ... 250, for each run of the model.
        metrics (`Sequence[str]`, *optional*): Of [`METRICS`]. By default PSNR, SSIM, gradient ratio and LPIPS, or,
            without `gt`, NIQE, CLIPIQA, MUSIQ and MANIQA.
        sampling ([`Sampling`], *optional*): Seed, scale, colour fix and tiles of the model's runs.
        crop_border (`int`, defaults to 0): Pixels that PSNR and SSIM leave out at each edge.
        limit (`int`, *optional*): Take only the first so many images, in the order of names.
        overwrite (`bool`, defaults to `False`): Whether to begin anew where `out` holds an evaluation.
        device (`str` or `torch.device`, *optional*): Where metrics run; by default where the model is, else the CPU.
        progress (`bool`, defaults to `False`): Whether to show a progress bar.
        on_image (`Callable`, *optional*):
            Called with the run's name, the image's name, its values (`None` if it failed) and what was wrong with it.
        on_metrics (`Callable`, *optional*): Called with the [`MetricSuite`] before the first image.

    Returns:
        [`Evaluation`]

    Raises:
        ValueError: If an argument is out of range, the images' names or sizes do not match, or `out` was begun with
            other settings, weights or images.
        FileExistsError: If `out` holds something else.
    """
    # 1. What to do
    sampling = sampling or Sampling()
    if (pipe is None) == (results is None):
        raise ValueError("Either `pipe` or `results` has to be given, not both.")
    if pipe is not None and lq is None:
        raise ValueError("`lq` has to be given for `pipe` to enlarge.")
    if limit is not None:
        check_positive("limit", limit)
    if pipe is not None:
        sampling.check(pipe)
    schedules = [check_timesteps(list(schedule)) for schedule in schedules]
    if pipe is not None and not schedules:
        raise ValueError("`schedules` has to have at least one schedule.")
    out = Path(out)
    folders = {"lq": lq, "gt": gt, "results": results}
    folders = {argument: Path(folder) for argument, folder in folders.items() if folder is not None}
    for argument, folder in folders.items():
        if out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"`out` has to be outside of `{argument}` ({folder}), whose images it would join: {out}.")
        if overwrite and folder.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"`overwrite` cannot replace {out}, which holds `{argument}` ({folder}).")
    pairs = dict(list(match_by_name(folders).items())[:limit])
    too_long = [name for name in pairs if len(os.fsencode(Path(name).name)) + len(".png") > MAX_NAME_BYTES]
    if too_long:
        raise ValueError(f"The results' names would be longer than {MAX_NAME_BYTES} bytes: {', '.join(too_long[:3])}.")
    scale = sampling.scale
    if scale is None and pipe is not None:
        scale = pipe.config.scale
    check_sizes(pairs, scale)
    if metrics is None:
        metrics = DEFAULT_METRICS if gt is not None else DEFAULT_METRICS_WITHOUT_GT
    device = device or (pipe.device if pipe is not None else "cpu")
    suite = MetricSuite(metrics, gt is not None, device, crop_border)
    if on_metrics is not None:
        on_metrics(suite)

    # 2. The folder, with what is done already
    settings = {"crop_border": crop_border}
    if pipe is not None:
        settings |= {name: value for name, value in vars(sampling).items() if name != "tile_batch_size"}
        settings |= {
            "weights": pipeline_fingerprint(pipe),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "device": pipe.device.type,
        }
    open_folder(out, settings, overwrite)
    sources = _sources(pipe, sampling, schedules, folders)
    digest = cache(file_digest)
    for source in sources:
        source.records = Records(out / source.run.name)
        _check_unchanged(source, pairs, digest, out)

    # 3. The images, one by one
    described = {**settings, **{argument: str(folder) for argument, folder in folders.items()}}
    described |= {"versions": {name: version(name) for name in ("diffusers-invsr", "diffusers", "torch", "pillow")}}
    evaluation = Evaluation(described, suite.names, suite.unavailable, [source.run for source in sources])
    with tqdm(total=len(sources) * len(pairs), unit="image", disable=None if progress else True) as bar:
        for source in sources:
            bar.set_description(source.run.name)
            for name, files in pairs.items():
                try:
                    _measure_image(source, name, files, suite, out, digest)
                except Exception as error:  # whatever is wrong with one image, the others go on
                    evaluation.failed[source.run.name, name] = str(error) or type(error).__name__
                if on_image is not None:
                    on_image(
                        source.run.name,
                        name,
                        source.run.images.get(name),
                        evaluation.failed.get((source.run.name, name)),
                    )
                bar.update()
            _measure_set(source, pairs, suite, out)

    # 4. The tables
    evaluation.save(out)
    return evaluation


def _sources(pipe, sampling: Sampling, schedules: list[list[int]], folders: dict[str, Path]) -> list[_Source]:
    sources = []
    if "lq" in folders and "gt" in folders:
        sources.append(_Source(Run(BICUBIC), lambda lr, size: lr.resize(size, Image.Resampling.BICUBIC)))
    if pipe is None:
        return [*sources, _Source(Run(RESULTS), None)]
    for timesteps in sorted(schedules, key=lambda steps: (len(steps), [-step for step in steps])):
        run = Run(schedule_name(timesteps), timesteps)
        if run.name not in {source.run.name for source in sources}:
            sources.append(_Source(run, lambda lr, _, steps=timesteps: sampling.enlarge(pipe, lr, steps)))
    return sources


def result_file(run: str, name: str, files: dict[str, Path], out: Path) -> Path:
    """Where the result of an image is."""
    return files["results"] if run == RESULTS else out / run / IMAGES_FOLDER / f"{name}.png"


def _check_unchanged(source: _Source, pairs: dict[str, dict[str, Path]], digest: Callable, out: Path):
    """Raises a ValueError if an image, or a result that was made of it, is not the one that was measured before."""
    for name, digests in source.records.digests.items():
        files = pairs.get(name, {})
        result = out / source.run.name / IMAGES_FOLDER / f"{name}.png"
        if RESULT in digests and result.is_file():
            files = files | {RESULT: result}
        for argument, before in digests.items():
            file = files.get(argument)
            if file is not None and digest(file) != before:
                raise ValueError(
                    f"`{argument}` has to have the images with which {out} was begun, but {file} has changed: choose"
                    " another folder, or replace what is there (`overwrite`)."
                )


def _measure_image(
    source: _Source, name: str, files: dict[str, Path], suite: MetricSuite, out: Path, digest: Callable
):
    """Make the result of one image if it is not there, and measure what is not measured yet."""
    run, records = source.run, source.records
    wanted = [metric for metric in suite.names if metric not in suite.unavailable and not METRICS[metric].of_set]
    file = result_file(run.name, name, files, out)
    known = records.values.get(name, {})
    missing = [metric for metric in wanted if metric not in known]
    # A result without a record was left by a kill: nobody knows what it was made of
    is_made = source.enlarge is None or (file.is_file() and name in records.values)
    if missing or not is_made:
        gt = read_rgb(files["gt"]) if "gt" in files else None
        if not is_made:
            lr = read_rgb(files["lq"])
            save_image(source.enlarge(lr, gt.size if gt is not None else None), file, lr)
        result = np.array(read_rgb(file))
        gt = None if gt is None else np.array(gt)
        if gt is not None and gt.shape != result.shape:
            raise ValueError(f"{file} has the shape {result.shape}, but the HR image has {gt.shape}.")
        values = {}
        for metric in missing:
            try:
                values[metric] = suite.of_image(metric, result, gt)
            except MetricUnavailable as error:
                run.reasons[name, metric] = str(error)
        digests = {argument: digest(path) for argument, path in files.items()}
        if source.enlarge is not None:
            digests[RESULT] = file_digest(file)
        records.append(name, values, digests)
        known = records.values[name]
    run.images[name] = {metric: known[metric] for metric in wanted if metric in known}


def _measure_set(source: _Source, pairs: dict[str, dict[str, Path]], suite: MetricSuite, out: Path):
    for metric in suite.names:
        if METRICS[metric].of_set and metric not in suite.unavailable:
            names = list(source.run.images)
            results = [result_file(source.run.name, name, pairs[name], out) for name in names]
            try:
                source.run.of_set[metric] = suite.of_set(metric, results, [pairs[name]["gt"] for name in names])
                if len(names) < INCEPTION_FEATURES:
                    source.run.reasons[None, metric] = (
                        f"over {len(names)} images: with fewer than {INCEPTION_FEATURES}, only values over the same"
                        " images can be compared"
                    )
            except MetricUnavailable as error:
                source.run.reasons[None, metric] = str(error)
