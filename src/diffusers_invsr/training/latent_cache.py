"""The VAE's answers for HR crops, kept on disk so that the frozen encoder runs once for each crop (section 6)."""

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
    A folder with one tensor a crop: the parameters of the posterior (`latent_dist.parameters`: mean and log-variance
    along the channels), or the latents of an encoder that gives those alone.

    It pays where crops come again: with `crops_per_image` of the datasets. Not the sampled latents but the
    distribution is kept, so that every epoch still draws its own.

    Args:
        folder (`str` or `Path`): Where the files are. It is made when the first one is written.
        fingerprint (`str`): Which encoder they are of, from [`vae_fingerprint`]. Each has its own subfolder.

    Raises:
        ValueError: If the fingerprint is not the name of a folder.
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        if not isinstance(fingerprint, str) or not fingerprint.isalnum():
            raise ValueError(f"`fingerprint` has to be made of letters and digits, but is {fingerprint!r}.")
        self.folder = Path(folder).expanduser() / fingerprint
        self._warned: set[Path] = set()

    def get(self, keys: Sequence[str]) -> list[torch.Tensor | None]:
        r"""
        Look up crops.

        Args:
            keys (`list[str]`): The crops' `"keys"`.

        Returns:
            `list[torch.Tensor | None]`: For each, what was put there, in its number type and on the CPU; `None` if
            there is nothing, or nothing whole (of which there is one warning a file).
        """
        return [self._read(self._path(key)) for key in keys]

    def put(self, keys: Sequence[str], tensors: torch.Tensor | Sequence[torch.Tensor]):
        r"""
        Keep a tensor for each crop, in place of an earlier one.

        Args:
            keys (`list[str]`): The crops' `"keys"`.
            tensors (`torch.Tensor` or `list[torch.Tensor]`): One for each key, along the first dimension.

        Raises:
            ValueError: If there is not one tensor for each key.
        """
        if len(tensors) != len(keys):
            raise ValueError(
                f"`tensors` has to hold one tensor for each of the {len(keys)} keys, but holds {len(tensors)}."
            )
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
        return self.folder / name[:2] / f"{name[2:]}.safetensors"  # 256 subfolders: a folder of a million is slow

    def _read(self, path: Path) -> torch.Tensor | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor("latents")
                if file.metadata()["crc32"] != _checksum(tensor):
                    raise ValueError("its checksum is wrong")
                return tensor
        except Exception as error:  # of many kinds, for a file that can hold anything
            if path not in self._warned:
                self._warned.add(path)
                warnings.warn(f"{path} is damaged and counts as missing: {error}", stacklevel=3)
            return None


def vae_fingerprint(vae: torch.nn.Module) -> str:
    """Identify what a VAE's encoder computes; see [`~diffusers_invsr.files.module_fingerprint`]."""
    parts = ("encoder.", "quant_conv.")
    known = any(name.startswith(parts) for name in vae.state_dict())  # not under the names of `torch.compile`
    return module_fingerprint(vae, parts if known else ("",))


def _checksum(tensor: torch.Tensor) -> str:
    return f"{zlib.crc32(tensor_bytes(tensor)):08x}"
