"""What commands share: models, devices and messages. What is wrong is said in one sentence, which ends the program."""

import logging
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .checks import OUT_OF_MEMORY


if TYPE_CHECKING:
    import torch

    from .pipeline_invsr import InvSRPipeline


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = textwrap.shorten(str(error), 400) or type(error).__name__
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in OUT_OF_MEMORY):
        return "the memory is not enough; lower --tile-size (or --tile-batch-size)."
    return text


def fail(message: str):
    """Tell why nothing can be done, and end."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


def choose_device(device: str, dtype: str) -> tuple["torch.device", "torch.dtype"]:
    """The device and the number type that `auto` stands for, or those that were named."""
    import torch

    from .devices import auto_dtype

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.ones(1, device=device).cpu()  # "meta" exists, but holds nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(
            f"{str(device)!r} cannot be used: {describe(error)}", param_hint="'--device'"
        ) from None
    return device, auto_dtype(device) if dtype == "auto" else getattr(torch, dtype)


def saved_dtypes(folder: Path) -> "dict[str, torch.dtype]":
    """The number type of each component of a saved pipeline that lies there in safetensors; of several, the widest."""
    import torch
    from safetensors import SafetensorError, safe_open

    floats = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    dtypes = {}
    for file in folder.glob("*/*.safetensors"):
        # Neither variants ("model.fp16.safetensors") nor other weights that lie there are loaded
        if "." in file.stem or not file.name.startswith(("diffusion_pytorch_model", "model")):
            continue
        try:
            with safe_open(file, "pt") as weights:
                names = weights.keys()
                found = {weights.get_slice(name).get_dtype() for name in names}
        except (SafetensorError, OSError):  # loading tells what is wrong
            continue
        for dtype in (floats[name] for name in found if name in floats):
            dtypes[file.parent.name] = torch.promote_types(dtype, dtypes.get(file.parent.name, dtype))
    return dtypes


@contextmanager
def warnings_of(*names: str) -> Iterator[list[str]]:
    """Keeps what loggers warn of, instead of showing it."""
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
    model: str,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | dict[str, torch.dtype] | None" = None,
) -> "InvSRPipeline":
    """Load what `--model` names. Where that fails, one sentence says what else there is, and the program ends."""
    import torch
    from diffusers.utils.logging import disable_progress_bar
    from huggingface_hub.errors import HFValidationError
    from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

    from . import TINY, InvSRPipeline, keep_freed_memory
    from .checkpoint_files import FetchError
    from .conversion import convert as convert_to_pipeline

    disable_progress_bar()
    disable_transformers_progress_bar()
    path = Path(TINY if model == "tiny" else model)
    is_local = model != "sd-turbo" and path.exists()
    if is_local and not (path / "model_index.json").is_file():
        fail(
            f"{model!r} is not a saved pipeline: it has no model_index.json. A noise predictor by itself becomes one"
            " with `diffusers-invsr convert`."
        )
    if not is_local and model != "sd-turbo" and model.strip("./").count("/") != 1:
        fail(f"{model!r} is neither tiny, sd-turbo, a folder here nor an id on the Hub (owner/name).")
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
        fail(f"{model!r} cannot be loaded as an InvSR pipeline: {describe(error)}")
    for warning in warnings:
        if "newly initialized" in warning:  # with what memory held
            warning = textwrap.shorten(re.sub(r"\x1b\[[0-9;]*m", "", warning), 400)  # without the colours of terminals
            fail(f"{model!r} cannot be loaded, as weights are missing: {warning}")
    try:
        if pipe.device != torch.device(device):  # where it is already, diffusers only warns of float16
            pipe.to(device)
    except RuntimeError as error:
        fail(f"{model!r} cannot be moved to the device {str(device)!r}: {textwrap.shorten(str(error), 400)}")
    if pipe.device.type == "cpu":
        keep_freed_memory()
    return pipe


def parse_tile_size(text: str) -> int | str | None:
    """The pipeline's `tile_size`, or "auto"."""
    if text.isdecimal():
        return int(text)
    if text not in ("auto", "none"):
        raise typer.BadParameter(f"{text!r} is not an integer, none or auto.", param_hint="'--tile-size'")
    return None if text == "none" else text


def report(message: str):
    """Tell of a failure, beside the progress bars."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)
