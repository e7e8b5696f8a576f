"""Files that are whole or not there, and what identifies a network."""

import hashlib
import json
import os
from pathlib import Path

import torch


def write_atomically(file: Path, text: str):
    """Write a text file so that an interruption leaves the old content or the new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # for names of files that are no UTF-8
    os.replace(temporary, file)


def save_atomically(obj: dict, file: Path):
    """Save for `torch.load` so that an interruption leaves the old file or the new one, never half of one."""
    temporary = file.with_suffix(".tmp")
    torch.save(obj, temporary)
    os.replace(temporary, file)


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def module_fingerprint(module: torch.nn.Module, parts: tuple[str, ...] = ("",), with_config: bool = True) -> str:
    r"""
    Identify what a network computes.

    Args:
        module (`ModelMixin` or `PreTrainedModel`): A network of diffusers or transformers.
        parts (`tuple[str, ...]`, *optional*): With what the names of the weights begin that count; by default all do.
        with_config (`bool`, defaults to `True`): Whether its configuration counts, which a new release may add to.

    Returns:
        `str`: 32 hexadecimal digits that follow from its class, its configuration, and the names, dtypes and
        values of its weights; not from where it was loaded from.
    """
    config = {}
    if with_config:
        config = module.config if isinstance(module.config, dict) else module.config.to_dict()
        config = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps([type(module).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith(parts):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:32]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor as they are in memory, on any device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
