"""Files of weights that are not in diffusers' format: found, fetched, read and compared with a model."""

import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file


CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")
# Left in the keys by data parallelism and by `torch.compile`.
KEY_PREFIXES = ("module.", "_orig_mod.")


class FetchError(OSError):
    """Something could not be fetched from the Hub. The message is one sentence that names the ways out."""

    def __init__(self, source: str, cause: BaseException):
        # Where the chain of errors began stands what is wrong: no connection, no such repository, ...
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        reason = str(cause).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(cause).__name__
        super().__init__(
            f"{source!r} could not be fetched from the Hub ({reason}): give the path of a local copy instead, or use"
            " the small model that comes with the package (`TINY`, or `--model tiny` on the command line)."
        )


def find_checkpoint(source: str, token: str | bool | None = None, revision: str | None = None) -> str:
    r"""
    Path of a checkpoint, which is fetched if it is on the Hub.

    Args:
        source (`str`): A file, or one on the Hub as `"owner/repository/file"`.
        token (`str` or `bool`, *optional*): Access token for the Hub.
        revision (`str`, *optional*): Revision on the Hub.

    Returns:
        `str`: The file.

    Raises:
        FetchError: If it could not be fetched from the Hub.
        FileNotFoundError: If `source` is the path of a file that does not exist.
    """
    if os.path.isfile(source):
        return source
    if source.count("/") < 2 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"`source={source!r}` is neither a file nor one on the Hub (`owner/repository/file`).")
    owner, repo, path = source.split("/", 2)
    try:
        return hf_hub_download(f"{owner}/{repo}", path, token=token, revision=revision)
    except (OSError, HFValidationError) as error:
        raise FetchError(source, error) from error


def read_checkpoint(file: str | os.PathLike) -> dict[str, torch.Tensor]:
    r"""
    Tensors of a published-style file, by their plain names.

    Args:
        file (`str` or `os.PathLike`):
            A `.pth`, `.pt` or `.safetensors` file; tensors directly in it or under `state_dict`, with or without
            `module.` and `_orig_mod.` in front of their names.

    Returns:
        `dict[str, torch.Tensor]`: The tensors.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        if Path(file).suffix == ".safetensors":
            state_dict = load_file(file)
        else:
            state_dict = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip(": ").split("\n")[0]
        if isinstance(error, UnpicklingError):  # PyTorch goes on to advise running what the file says
            reason = "it is damaged, or holds more than tensors"
        raise ValueError(f"{str(file)!r} cannot be read as a file of tensors ({reason}).") from error
    if isinstance(state_dict, dict) and isinstance(state_dict.get("state_dict"), dict):
        state_dict = state_dict["state_dict"]
    if not isinstance(state_dict, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state_dict.items()
    ):
        raise ValueError(f"{str(file)!r} must hold named tensors, directly or under `state_dict`.")

    def plain(key: str) -> str:
        while key.startswith(KEY_PREFIXES):
            key = key.split(".", 1)[1]
        return key

    return {plain(key): value for key, value in state_dict.items()}


def check_state_dict(state_dict: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], source: str):
    r"""
    Compare names and shapes of tensors with those that a model has.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The tensors.
        expected (`dict[str, torch.Tensor]`): The model's.
        source (`str`): Where they come from, for the message.

    Raises:
        ValueError: If any is missing, left over or of another shape.
    """
    faults = {
        "missing": [key for key in expected if key not in state_dict],
        "unexpected": [key for key in state_dict if key not in expected],
        "of another shape": [
            f"{key} {tuple(state_dict[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in expected.items()
            if key in state_dict and state_dict[key].shape != tensor.shape
        ],
    }
    lists = [
        f"{len(found)} {fault} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for fault, found in faults.items()
        if found
    ]
    if lists:
        raise ValueError(
            f"{source!r} does not fit the model's configuration of {len(expected)} tensors: {'; '.join(lists)}."
        )
