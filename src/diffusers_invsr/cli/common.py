"""What the commands share: loading models, choosing devices, reporting errors in one sentence."""

import logging
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from ..checks import OUT_OF_MEMORY


if TYPE_CHECKING:
    import torch

    from ..pipeline_invsr import InvSRPipeline


ColorFix = Literal["none", "wavelet", "ycbcr", "adain"]
MODEL_METAVAR = "tiny|sd-turbo|PATH|HUB_ID"


def error_message(error: BaseException) -> str:
    """The message of an error in one line."""
    text = textwrap.shorten(str(error), 400) or type(error).__name__
    if isinstance(error, MemoryError) or any(phrase in text.lower() for phrase in OUT_OF_MEMORY):
        return "out of memory; reduce --tile-size (or --tile-batch-size)."
    return text


def fail(message: str):
    """Print an error and end the program with status 1."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


def report(message: str):
    """Print the failure of one file to stderr without disturbing progress bars."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def parse_tile_size(text: str) -> int | str | None:
    """The pipeline's `tile_size` for the value of `--tile-size`."""
    if text.isdecimal():
        return int(text)
    if text not in ("auto", "none"):
        raise typer.BadParameter(f"{text!r} is not an integer, none or auto.", param_hint="'--tile-size'")
    return None if text == "none" else text


def choose_device(device: str, dtype: str) -> tuple["torch.device", "torch.dtype"]:
    """The device and data type that the options name, `auto` included."""
    import torch

    from ..devices import auto_dtype

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.ones(1, device=device).cpu()  # "meta" exists, but holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(
            f"{str(device)!r} is unavailable: {error_message(error)}", param_hint="'--device'"
        ) from None
    return device, auto_dtype(device) if dtype == "auto" else getattr(torch, dtype)


@contextmanager
def warnings_of(*names: str) -> Iterator[list[str]]:
    """Collect the warnings of loggers instead of showing them."""
    handler, messages = logging.Handler(), []
    handler.emit = lambda record: messages.append(record.getMessage())
    before = [(logger, logger.level, logger.propagate) for logger in map(logging.getLogger, names)]
    for logger, *_ in before:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield messages
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def load_pipeline(
    model: str, device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None
) -> "InvSRPipeline":
    """Load what `--model` names; if that fails, end the program with a sentence on the alternatives."""
    import torch
    from diffusers.utils.logging import disable_progress_bar
    from huggingface_hub.errors import HFValidationError
    from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

    from .. import TINY, InvSRPipeline, keep_freed_memory
    from ..checkpoint_files import FetchError
    from ..conversion import convert as convert_to_pipeline

    disable_progress_bar()
    disable_transformers_progress_bar()
    path = Path(TINY if model == "tiny" else model)
    is_local = model != "sd-turbo" and path.exists()
    if is_local and not (path / "model_index.json").is_file():
        fail(
            f"{model!r} is not a saved pipeline: it has no model_index.json. Use `diffusers-invsr convert` to make one"
            " from a noise predictor."
        )
    if not is_local and model != "sd-turbo" and model.strip("./").count("/") != 1:
        fail(f"{model!r} is neither tiny, sd-turbo, a local folder nor a Hub id (owner/name).")
    try:
        with warnings_of("diffusers.models.modeling_utils", "transformers.modeling_utils") as warnings:
            if model == "sd-turbo":
                pipe = convert_to_pipeline(dtype=dtype)
            else:
                pipe = InvSRPipeline.from_pretrained(str(path) if is_local else model, dtype=dtype)
    except FetchError as error:
        fail(str(error))
    except Exception as error:
        if not is_local and isinstance(error, (OSError, HFValidationError)):
            fail(str(FetchError(model, error)))
        if not is_local and not isinstance(error, ValueError):
            raise
        fail(f"{model!r} cannot be loaded as an InvSR pipeline: {error_message(error)}")
    for warning in warnings:
        if "newly initialized" in warning:  # with random or uninitialized values
            warning = textwrap.shorten(re.sub(r"\x1b\[[0-9;]*m", "", warning), 400)  # without terminal colours
            fail(f"{model!r} cannot be loaded because weights are missing: {warning}")
    try:
        if pipe.device != torch.device(device):  # otherwise diffusers only warns about float16
            pipe.to(device)
    except RuntimeError as error:
        fail(f"{model!r} cannot be moved to the device {str(device)!r}: {textwrap.shorten(str(error), 400)}")
    if pipe.device.type == "cpu":
        keep_freed_memory()
    return pipe
