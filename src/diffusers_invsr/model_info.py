"""What a model needs, without running it: for the command `diffusers-invsr info`."""

import weakref
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .hub import card_metadata
from .pipeline_invsr import InvSRPipeline
from .tiling import larger_tile_size


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and live at once: their most is in `peak`."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage):
        if storage in self._seen:
            return
        self._seen.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, num_bytes: int):
        self.live -= num_bytes


class FusedAttention(TorchFunctionMode):
    """Gives attention the memory of the fused kernels, which never hold the whole attention map."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, _, value, *_ = args
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def tile_memory(pipe: InvSRPipeline, tile_size: int) -> int:
    r"""
    Bytes that one tile takes beside the weights, found by sending its shape (no numbers) through the networks.

    What kernels take for themselves is not in it: on a CPU with the embedded model the truth is up to twice as much.

    Args:
        pipe ([`InvSRPipeline`]): The pipeline. Its networks are on the device "meta" afterwards, without weights.
        tile_size (`int`): Side of the tile in LR pixels.
    """
    pipe.to("meta")
    timestep = torch.tensor([199], device="meta")
    embeds = None
    if pipe.takes_text:
        embeds = torch.empty(1, 77, pipe.unet.config.cross_attention_dim, dtype=pipe.unet.dtype, device="meta")
    lr = torch.empty(1, 3, tile_size, tile_size, device="meta")
    target = tile_size * pipe.config.scale
    latent = target // pipe.vae_scale_factor
    noise = torch.empty(2, 1, pipe.vae.config.latent_channels, latent, latent, device="meta")
    weights = [tensor for part in _networks(pipe).values() for tensor in (*part.parameters(), *part.buffers())]
    with FusedAttention(), PeakMemory(weights) as memory:
        enlarged = torch.empty(1, 3, target, target, device="meta")
        latents = pipe.prepare_latents(lr, enlarged, timestep, noise)
        latents = pipe.unet(latents.to(pipe.unet.dtype), timestep, encoder_hidden_states=embeds).sample
        pipe.vae.decode(latents.to(pipe.vae.dtype))
    return memory.peak


def _networks(pipe: InvSRPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _licence(pipe: InvSRPipeline, folder: Path) -> str:
    """The licence that the folder's model card names, else the one in the pipeline's configuration."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    cards = [card_metadata(pipe)]
    if (folder / "README.md").is_file():
        with suppress(ValueError, YAMLError):  # a card with damaged metadata says nothing of it
            cards.insert(0, ModelCard((folder / "README.md").read_text(encoding="utf-8")).data.to_dict())
    for card in cards:
        if name := card.get("license_name") or card.get("license"):
            return f"{name}, {card['license_link']}" if card.get("license_link") else name
    return "not stated"


def describe_model(pipe: InvSRPipeline, folder: Path) -> dict[str, str]:
    r"""
    What a user of a model has to know, by name. The pipeline cannot be used afterwards (see [`tile_memory`]).

    Args:
        pipe ([`InvSRPipeline`]): The pipeline.
        folder (`Path`): Where it lies, for its size and its model card.
    """
    networks = _networks(pipe)
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in networks.items()}
    num_bytes = sum(p.numel() * p.element_size() for part in networks.values() for p in part.parameters())
    files = [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
    sides = sorted({pipe.config.tile_size, larger_tile_size(pipe.config.tile_size, pipe.size_multiple)})
    size = sides[-1] * pipe.config.scale
    dtype = str(pipe.dtype).removeprefix("torch.")
    has_text_encoder = pipe.text_encoder is not None
    text = "yes" if has_text_encoder else "no (fixed prompts)" if pipe.takes_text else "no (the model takes no text)"
    return {
        "scale": f"x{pipe.config.scale} (any from 1 to 8 with --scale)",
        "tile": f"{' or '.join(map(str, sides))} pixels, in multiples of {pipe.size_multiple}",
        "licence": _licence(pipe, folder),
        "text encoder": text,
        "parameters": f"{sum(parameters.values()) / 1e6:,.2f} M",
        **{f"  {name}": f"{count / 1e6:,.2f} M" for name, count in parameters.items()},
        "size on disk": f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"
        if files
        else "not a folder here",
        "memory, weights": f"{num_bytes / 1e6:,.0f} MB in {dtype} (in float16: 2 bytes a parameter)",
        "memory, one tile": f"at least {tile_memory(pipe, sides[-1]) / 1e6:,.0f} MB ({sides[-1]} to {size} pixels)",
    }
