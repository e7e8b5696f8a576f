"""A cache on disk of the VAE's posteriors of HR crops, so that the frozen encoder runs once per crop."""

import hashlib
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..files import module_fingerprint, tensor_bytes


class LatentCache:
    r"""
    A folder with one tensor per crop: the parameters of the posterior (`latent_dist.parameters`, `(2C, h, w)`: mean
    and log-variance along the channels), or the latents `(C, h, w)` of an encoder without a posterior.

    It pays off where crops repeat: with `crops_per_image` of the datasets. The distribution is stored instead of
    samples, so that every epoch still draws its own.

    Args:
        folder (`str` or `Path`): The folder. It is made when the first file is written.
        fingerprint (`str`): Identifies the encoder, from [`vae_fingerprint`]. Each encoder has its own subfolder.

    Raises:
        ValueError: If `fingerprint` could name a file outside the folder.
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        if not isinstance(fingerprint, str) or not fingerprint.isalnum():
            raise ValueError(f"`fingerprint` must consist of letters and digits, got {fingerprint!r}.")
        self.folder = Path(folder).expanduser() / fingerprint
        self._warned: set[Path] = set()

    def get(self, keys: Sequence[str]) -> list[torch.Tensor | None]:
        r"""
        Look up crops.

        Args:
            keys (`list[str]`): The crops' `"keys"`.

        Returns:
            `list[torch.Tensor | None]`: For each, the tensor that was put there, in its dtype and on the CPU;
            `None` if there is none, or if the file is damaged (with one warning per file).
        """
        return [self._read(self._path(key)) for key in keys]

    def put(self, keys: Sequence[str], tensors: torch.Tensor | Sequence[torch.Tensor]):
        r"""
        Store a tensor per crop, in place of an earlier one.

        Args:
            keys (`list[str]`): The crops' `"keys"`.
            tensors (`torch.Tensor` or `list[torch.Tensor]`): One per key, along the first dimension.

        Raises:
            ValueError: If there are more or fewer tensors than keys. Nothing is stored then.
        """
        if len(tensors) != len(keys):
            raise ValueError(f"`tensors` must have one tensor per key, got {len(tensors)} for {len(keys)} keys.")
        for key, tensor in zip(keys, tensors):
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            tensor = tensor.detach().cpu().contiguous()
            temporary = path.with_name(f".{uuid4().hex}.tmp")
            try:
                save_file({"latents": tensor}, temporary, metadata={"key": key, "crc32": _checksum(tensor)})
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
        # 256 subfolders: a folder of a million files is slow
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _read(self, path: Path) -> torch.Tensor | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor("latents")
                if file.metadata()["crc32"] != _checksum(tensor):
                    raise ValueError("wrong checksum")
                return tensor
        except Exception as error:  # of many kinds, for a file that can hold anything
            if path not in self._warned:
                self._warned.add(path)
                warnings.warn(f"Ignored the damaged file {path}: {error}", stacklevel=3)
            return None


def vae_fingerprint(vae: torch.nn.Module) -> str:
    """Identify what a VAE's encoder computes; see [`~diffusers_invsr.files.module_fingerprint`]."""
    parts = ("encoder.", "quant_conv.")
    known = any(name.startswith(parts) for name in vae.state_dict())  # not under the names of `torch.compile`
    return module_fingerprint(vae, parts if known else ("",))


def _checksum(tensor: torch.Tensor) -> str:
    return f"{zlib.crc32(tensor_bytes(tensor)):08x}"
