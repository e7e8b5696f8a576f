"""Running a model on a test set at one or several schedules, and measuring the results (section 4 of the paper)."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..checks import check_positive, is_integer
from ..files import file_digest, module_fingerprint
from ..image_files import MAX_NAME_BYTES, save_image
from ..scheduling_invsr import check_timesteps
from .metric_suite import DEFAULT_METRICS, DEFAULT_METRICS_WITHOUT_GT, METRICS, MetricSuite, MetricUnavailable
from .pairs import check_sizes, match_by_name, read_rgb
from .records import IMAGES_FOLDER, Records, open_folder
from .report import Evaluation, Run


if TYPE_CHECKING:
    from ..pipeline_invsr import InvSRPipeline


BICUBIC, RESULTS = "bicubic", "results"
RESULT = "result"  # key of the result of a run among the digests of the files that were measured
MAX_SEED = 2**63 - 1
PACKAGES = ("diffusers-invsr", "diffusers", "torch", "pillow")
INCEPTION_FEATURES = 2048  # dimensions of the distributions that FID compares


@dataclass
class Sampling:
    r"""
    How a pipeline is run: the arguments of [`InvSRPipeline.__call__`] other than the schedule.

    Args:
        seed (`int`, defaults to 0): Seed of a generator on the CPU, the same for each image.
        scale (`float`, *optional*): Scale factor, by default the pipeline's own.
        color_fix (`str`, *optional*): `"wavelet"`, `"ycbcr"` or `"adain"`; the paper's tables use `"wavelet"`.
        tile_size (`int` or `str`, *optional*, defaults to `"auto"`):
            Side of a tile in LR pixels; `None` for the whole image at once.
        tile_overlap (`int`, *optional*):
            Overlap of tiles in LR pixels, by default an eighth of the tile and at least 8; the published method uses
            half the tile.
        tile_batch_size (`int`, defaults to 1): Tiles per batch.
    """

    seed: int = 0
    scale: float | None = None
    color_fix: str | None = None
    tile_size: int | str | None = "auto"
    tile_overlap: int | None = None
    tile_batch_size: int = 1

    def check(self, pipe: "InvSRPipeline"):
        """Raise a `ValueError` for settings that the pipeline refuses for every image."""
        if not is_integer(self.seed) or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"`seed` must be an integer between 0 and {MAX_SEED}, got {self.seed!r}.")
        pipe.check_inputs(**self._arguments())

    def run(self, pipe: "InvSRPipeline", lr: Image.Image, timesteps: list[int]) -> Image.Image:
        """The pipeline's result for an LR image at a schedule."""
        generator = torch.Generator().manual_seed(self.seed)
        return pipe(lr, timesteps=timesteps, generator=generator, **self._arguments()).images[0]

    def _arguments(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "seed"}


@dataclass
class ImageResult:
    r"""
    What was measured of one image in one run.

    Args:
        run (`str`): Name of the run, see [`Run`].
        image (`str`): Name of the image: its path below its folder without the extension.
        values (`dict[str, float]`): Values by metric; metrics that could not be measured are missing.
        error (`str`, *optional*): What went wrong if the image failed; it has no values then.
    """

    run: str
    image: str
    values: dict[str, float]
    error: str | None = None


def schedule_name(timesteps: Sequence[int]) -> str:
    """Name of a schedule and its folder, such as `"200-100-50"`; long ones are shortened and end in a digest."""
    name = "-".join(map(str, timesteps))
    if len(name) <= 100:
        return name
    return f"{len(timesteps)}-steps-from-{timesteps[0]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def pipeline_fingerprint(pipe: "InvSRPipeline") -> str:
    """32 hexadecimal digits that identify everything a pipeline's results depend on: weights and configurations."""
    parts = {}
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            parts[name] = module_fingerprint(part)
        elif hasattr(part, "config"):
            parts[name] = {key: value for key, value in part.config.items() if not key.startswith("_")}
    parts |= {name: pipe.config[name] for name in ("scale", "tile_size", "prompt", "negative_prompt")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def evaluate(*args, progress: bool = False, **kwargs) -> Evaluation:
    r"""
    Measure a model, or given results, on a test set, from start to end.

    Args:
        args, kwargs: Arguments of [`Evaluator`], which also has the errors that are raised.
        progress (`bool`, defaults to `False`): Whether to show a progress bar.

    Returns:
        [`Evaluation`]: The results.
    """
    evaluator = Evaluator(*args, **kwargs)
    for _ in evaluator.measure(progress):
        pass
    return evaluator.evaluation


class Evaluator:
    r"""
    Runs a model on a test set at each of several schedules, or takes given results, and measures them.

    Images are matched by their path below their folder without the extension. `out` receives a folder for each run,
    with the results as PNG files (`200-100-50/images/...`) and their measurements, and the tables `results.json`,
    `results.csv` and `results.md`. Existing results are not computed again: an evaluation that was stopped resumes at
    the image where it was, and schedules and metrics can be added. Metrics measure the 8-bit values in the files.

    Args:
        out (`str` or `Path`): Folder of the evaluation.
        lq (`str` or `Path`, *optional*): Folder of the LR images; with given results only used for the bicubic row.
        gt (`str` or `Path`, *optional*): Folder of the HR images. If given, bicubic upscaling is measured as well.
        pipe ([`InvSRPipeline`], *optional*): The model. Either this or `results` must be given.
        results (`str` or `Path`, *optional*): Folder of the results of another program.
        schedules (`Sequence[Sequence[int]]`, defaults to `((200,),)`):
            Timesteps of each run of the model, counted from 1, strictly descending from at most 250.
        metrics (`Sequence[str]`, *optional*): Names from [`METRICS`]. By default PSNR, SSIM, gradient ratio and LPIPS;
            without `gt`, NIQE, CLIPIQA, MUSIQ and MANIQA.
        sampling ([`Sampling`], *optional*): Seed, scale, colour fix and tiles of the model's runs.
        crop_border (`int`, defaults to 0): Border in pixels that PSNR and SSIM exclude.
        limit (`int`, *optional*): Use only the first `limit` images, in the order of their names.
        overwrite (`bool`, defaults to `False`): Whether to replace the evaluation in `out`, if any.
        device (`str` or `torch.device`, *optional*): Where metrics run; by default where the model is, else the CPU.

    Attributes:
        suite ([`MetricSuite`]): The metrics; `suite.unavailable` has those that are unavailable.
        evaluation ([`Evaluation`]): The results so far.

    Raises:
        ValueError: If an argument is out of range, or the images' names or sizes do not match.
    """

    def __init__(
        self,
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
    ):
        self.out, self.pipe, self.sampling, self.overwrite = Path(out), pipe, sampling or Sampling(), overwrite
        if (pipe is None) == (results is None):
            raise ValueError("Either `pipe` or `results` must be given, but not both.")
        if pipe is not None and lq is None:
            raise ValueError("`lq` must be given with `pipe`.")
        if limit is not None:
            check_positive("limit", limit)
        if pipe is not None:
            self.sampling.check(pipe)
        schedules = [check_timesteps(list(schedule)) for schedule in schedules]
        if pipe is not None and not schedules:
            raise ValueError("`schedules` must contain at least one schedule.")
        folders = {"lq": lq, "gt": gt, "results": results}
        folders = {argument: Path(folder) for argument, folder in folders.items() if folder is not None}
        for argument, folder in folders.items():
            if self.out.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"`out` must be outside `{argument}` ({folder}), got {out}.")
            if overwrite and folder.resolve().is_relative_to(self.out.resolve()):
                raise ValueError(f"`overwrite` cannot replace {out}, which contains `{argument}` ({folder}).")
        self.pairs = dict(list(match_by_name(folders).items())[:limit])
        too_long = [name for name in self.pairs if len(os.fsencode(Path(name).name)) + len(".png") > MAX_NAME_BYTES]
        if too_long:
            raise ValueError(
                f"The names of results would be longer than {MAX_NAME_BYTES} bytes: {', '.join(too_long[:3])}."
            )
        scale = self.sampling.scale
        if scale is None and pipe is not None:
            scale = pipe.config.scale
        check_sizes(self.pairs, scale)
        if metrics is None:
            metrics = DEFAULT_METRICS if gt is not None else DEFAULT_METRICS_WITHOUT_GT
        device = device or (pipe.device if pipe is not None else "cpu")
        self.suite = MetricSuite(metrics, gt is not None, device, crop_border)

        # What results depend on
        self.settings = {"crop_border": crop_border}
        if pipe is not None:
            self.settings |= {name: value for name, value in vars(self.sampling).items() if name != "tile_batch_size"}
            self.settings |= {
                "weights": pipeline_fingerprint(pipe),
                "dtype": str(pipe.dtype).removeprefix("torch."),
                "device": pipe.device.type,
            }
        described = {**self.settings, **{argument: str(folder) for argument, folder in folders.items()}}
        described["versions"] = {name: version(name) for name in PACKAGES}
        runs = _plan_runs(schedules if pipe is not None else None, with_bicubic="lq" in folders and "gt" in folders)
        self.evaluation = Evaluation(described, self.suite.names, self.suite.unavailable, runs)
        self._digest = cache(file_digest)

    def measure(self, progress: bool = False) -> Iterator[ImageResult]:
        r"""
        Measure the images of each run, and save the tables at the end.

        Args:
            progress (`bool`, defaults to `False`): Whether to show a progress bar.

        Yields:
            [`ImageResult`]: The values of each image, or what went wrong with it.

        Raises:
            ValueError: If `out` was begun with other settings, weights or images.
            FileExistsError: If `out` contains something other than an evaluation.
        """
        # 1. What has been measured before
        open_folder(self.out, self.settings, self.overwrite)
        records = {run.name: Records(self.out / run.name) for run in self.evaluation.runs}
        for run in self.evaluation.runs:
            self._check_unchanged(run, records[run.name])

        # 2. The images, one by one
        runs, failed = self.evaluation.runs, self.evaluation.failed
        with tqdm(total=len(runs) * len(self.pairs), unit="image", disable=None if progress else True) as bar:
            for run in runs:
                bar.set_description(run.name)
                for name in self.pairs:
                    try:
                        run.images[name] = self._measure_image(run, name, records[run.name])
                        failed.pop((run.name, name), None)  # of an earlier call
                    except Exception as error:  # a bad image does not stop the others
                        failed[run.name, name] = str(error) or type(error).__name__
                    yield ImageResult(run.name, name, run.images.get(name, {}), failed.get((run.name, name)))
                    bar.update()
                self._measure_set(run)

        # 3. The tables
        self.evaluation.save(self.out)

    def _measure_image(self, run: Run, name: str, records: Records) -> dict[str, float]:
        """Make the result of an image unless it exists, and measure what has not been measured yet."""
        files, file = self.pairs[name], result_file(run.name, name, self.pairs[name], self.out)
        wanted = [metric for metric in self.suite.available if not METRICS[metric].of_set]
        known = records.values.get(name, {})
        missing = [metric for metric in wanted if metric not in known]
        # A result without a record is left from an interruption, made from unknown inputs
        is_made = run.name == RESULTS or (file.is_file() and name in records.values)
        if missing or not is_made:
            hr = read_rgb(files["gt"]) if "gt" in files else None
            if not is_made:
                lr = read_rgb(files["lq"])
                save_image(self._upscale(run, lr, hr), file, lr)
            result = np.array(read_rgb(file))
            hr = None if hr is None else np.array(hr)
            if hr is not None and hr.shape != result.shape:
                raise ValueError(f"{file} has the shape {result.shape}, but the HR image has the shape {hr.shape}.")
            values = {}
            for metric in missing:
                try:
                    values[metric] = self.suite.of_image(metric, result, hr)
                except MetricUnavailable as error:
                    run.reasons[name, metric] = str(error)
            digests = {argument: self._digest(path) for argument, path in files.items()}
            if run.name != RESULTS:
                digests[RESULT] = file_digest(file)
            records.append(name, values, digests)
            known = records.values[name]
        return {metric: known[metric] for metric in wanted if metric in known}

    def _upscale(self, run: Run, lr: Image.Image, hr: Image.Image | None) -> Image.Image:
        if run.name == BICUBIC:
            return lr.resize(hr.size, Image.Resampling.BICUBIC)
        return self.sampling.run(self.pipe, lr, run.timesteps)

    def _measure_set(self, run: Run):
        """Measure the metrics of the whole set."""
        for metric in (metric for metric in self.suite.available if METRICS[metric].of_set):
            results = [result_file(run.name, name, self.pairs[name], self.out) for name in run.images]
            hrs = [self.pairs[name]["gt"] for name in run.images]
            try:
                run.of_set[metric] = self.suite.of_set(metric, results, hrs)
                if len(results) < INCEPTION_FEATURES:
                    run.reasons[None, metric] = (
                        f"over {len(results)} images: with fewer than {INCEPTION_FEATURES}, only values over the same"
                        " images are comparable"
                    )
            except MetricUnavailable as error:
                run.reasons[None, metric] = str(error)

    def _check_unchanged(self, run: Run, records: Records):
        """Raise a `ValueError` if an image, or a result made from it, differs from the one that was measured."""
        for name, digests in records.digests.items():
            files = self.pairs.get(name, {})
            result = self.out / run.name / IMAGES_FOLDER / f"{name}.png"
            if RESULT in digests and result.is_file():
                files = files | {RESULT: result}
            for argument, before in digests.items():
                file = files.get(argument)
                if file is not None and self._digest(file) != before:
                    raise ValueError(
                        f"`{argument}` must be the same as when {self.out} was begun, but {file} has changed: choose"
                        " another folder, or replace the evaluation with `overwrite`."
                    )


def _plan_runs(schedules: list[list[int]] | None, with_bicubic: bool) -> list[Run]:
    """The runs in the order of the tables; without schedules, results are given."""
    runs = {BICUBIC: Run(BICUBIC)} if with_bicubic else {}
    if schedules is None:
        return [*runs.values(), Run(RESULTS)]
    for timesteps in sorted(schedules, key=lambda steps: (len(steps), [-step for step in steps])):
        runs[schedule_name(timesteps)] = Run(schedule_name(timesteps), timesteps)
    return list(runs.values())


def result_file(run: str, name: str, files: dict[str, Path], out: Path) -> Path:
    """Path of the result of an image in a run."""
    return files["results"] if run == RESULTS else out / run / IMAGES_FOLDER / f"{name}.png"
