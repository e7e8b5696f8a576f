"""What the scripts of this folder share: arguments, models, ratios of times."""

import argparse
import statistics
from pathlib import Path

import torch
from random_sd_turbo import build_pipeline

from diffusers_invsr import TINY, InvSRPipeline


def positive(text: str) -> int:
    """An `argparse` type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}.")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser, default: str):
    parser.add_argument(
        "--model",
        default=default,
        help="random (SD-Turbo's shapes), tiny, or the folder of a pipeline (default: %(default)s)",
    )
    parser.add_argument("--width", type=float, help="channels of the random model: 1 (default), 0.5 ... 0.0625")


def load_model(arguments: argparse.Namespace, device: torch.device) -> InvSRPipeline:
    r"""
    The pipeline that `--model` and `--width` name.

    Raises:
        SystemExit: If there is none.
    """
    model, width = arguments.model, arguments.width
    if width is not None and model != "random":
        raise SystemExit(f"`--width {width:g}` is for the random model, not for `--model {model}`.")
    try:
        if model == "random":
            with device:  # where the random weights are drawn
                return build_pipeline(1.0 if width is None else width)
        folder = Path(TINY if model == "tiny" else model)
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"`--model` must be random, tiny or the folder of a saved pipeline, got {model!r}.")
        return InvSRPipeline.from_pretrained(folder).to(device)
    except (ValueError, OSError) as error:
        raise SystemExit(f"The model cannot be loaded: {error}") from error


def speed_up(times: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Ratio of the reference's median time to that of a variant, and the lowest and the highest ratio of a turn."""
    ratios = [before / after for before, after in zip(reference, times)]
    return statistics.median(reference) / statistics.median(times), min(ratios), max(ratios)
