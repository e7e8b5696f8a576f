"""What one call of the pipeline asks for, and what of it can be checked before any image is looked at."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .checks import check_positive, is_auto, is_integer, is_real
from .color_fix import COLOR_FIXES
from .scheduling_invsr import InvSRScheduler
from .tiling import TILE_WINDOWS, choose_overlap_and_window


MIN_SCALE, MAX_SCALE = 1, 8
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


def _is_among(value: Any, names: tuple) -> bool:
    """Whether a value is one of some names; arrays, which compare by element, are not."""
    return (value is None or isinstance(value, str)) and value in names


@dataclass(frozen=True)
class CallArguments:
    r"""
    The arguments of [`InvSRPipeline.__call__`], which documents them, with their defaults.

    Args:
        scheduler ([`InvSRScheduler`], *optional*): The call's own, with its schedule: see [`~CallArguments.schedule`].
    """

    num_steps: int = 1
    start_timestep: int | None = None
    timesteps: Sequence[int] | None = None
    scale: float | None = None
    target_size: tuple[int, int] | None = None
    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    guidance_scale: float = 1.0
    eta: float = 0.0
    tile_size: int | str | None = "auto"
    tile_overlap: int | None = None
    tile_window: str | None = None
    tile_batch_size: int = 1
    color_fix: str | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    output_type: str = "pil"
    callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    scheduler: InvSRScheduler | None = None

    @property
    def callback_tensors(self) -> Sequence[str]:
        """Names of the tensors that the callback gets; diffusers' callbacks name their own."""
        official = isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks))
        names = self.callback_on_step_end.tensor_inputs if official else self.callback_on_step_end_tensor_inputs
        return names or ()

    @property
    def generators(self) -> list[torch.Generator]:
        """All sources of randomness that were given."""
        generators = self.generator if isinstance(self.generator, (list, tuple)) else [self.generator]
        return [generator for generator in generators if generator is not None]

    @property
    def num_noise_maps(self) -> int:
        """Noise maps per tile: the predictor's, the VAE posterior's, then one for every step but the last."""
        return 2 + (len(self.scheduler.timesteps) - 1 if self.eta > 0 else 0)

    def schedule(self, scheduler: InvSRScheduler) -> InvSRScheduler:
        """A copy of the pipeline's scheduler with the schedule of this call, which other calls do not change."""
        scheduler = copy.copy(scheduler)
        # `num_steps` has a default, so 1 beside a list of steps is no contradiction
        num_steps = None if self.timesteps is not None and self.num_steps == 1 else self.num_steps
        scheduler.set_timesteps(num_steps, start_timestep=self.start_timestep, timesteps=self.timesteps)
        return scheduler

    def check(self, num_images: int, default_tile_size: int | None, size_multiple: int, latent_step: int):
        r"""
        Check everything that depends on no network.

        Args:
            num_images (`int`): Number of images in the call.
            default_tile_size (`int`, *optional*): What `tile_size="auto"` stands for.
            size_multiple (`int`): The number of LR pixels that every `tile_size` must be a multiple of.
            latent_step (`int`): The same for `tile_overlap` where latents are blended.

        Raises:
            ValueError: If an argument is out of range or contradicts another one.
        """
        check_positive("num_steps", self.num_steps)
        check_positive("tile_batch_size", self.tile_batch_size)
        self._check_size()
        self._check_tiles(default_tile_size, size_multiple, latent_step)
        if not is_real(self.guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number, got {self.guidance_scale!r}.")
        if not is_real(self.eta) or not 0 <= self.eta <= 1:
            raise ValueError(f"`eta` must be between 0 and 1, got {self.eta!r}.")
        if not _is_among(self.output_type, OUTPUT_TYPES):
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {self.output_type!r}.")
        if not _is_among(self.color_fix, (None, *COLOR_FIXES)):
            raise ValueError(f"`color_fix` must be None or one of {COLOR_FIXES}, got {self.color_fix!r}.")
        if self.color_fix is not None and self.output_type == "latent":
            raise ValueError(f"`color_fix={self.color_fix!r}` cannot be used with `output_type='latent'`.")
        self._check_generators(num_images)
        self._check_callback()

    def _check_size(self):
        if self.scale is not None and self.target_size is not None:
            raise ValueError(f"Pass either `scale` or `target_size`, got {self.scale} and {self.target_size}.")
        if self.scale is not None and not (is_real(self.scale) and MIN_SCALE <= self.scale <= MAX_SCALE):
            raise ValueError(f"`scale` must be between {MIN_SCALE} and {MAX_SCALE}, got {self.scale!r}.")
        if self.target_size is not None and not (
            isinstance(self.target_size, (list, tuple, np.ndarray, torch.Size))
            and len(self.target_size) == 2
            and all(is_real(side) and int(side) == side for side in self.target_size)
        ):
            raise ValueError(f"`target_size` must be (height, width) in pixels, got {self.target_size!r}.")

    def _check_tiles(self, default_tile_size: int | None, size_multiple: int, latent_step: int):
        size = default_tile_size if is_auto(self.tile_size) else self.tile_size
        if size is not None:
            if not is_integer(size) or size < 1 or size % size_multiple:
                raise ValueError(
                    f"`tile_size` must be a positive multiple of {size_multiple}, 'auto' or None, got {size!r}."
                )
            # `None` stands for the default, which fits every tile
            if self.tile_overlap is not None and not (is_integer(self.tile_overlap) and 0 <= self.tile_overlap < size):
                raise ValueError(
                    f"`tile_overlap` must be at least 0 and less than `tile_size={size}`, got {self.tile_overlap!r}."
                )
            overlap, _ = choose_overlap_and_window(size, self.tile_overlap, self.tile_window)
            if self.output_type == "latent" and overlap % latent_step:
                raise ValueError(
                    f"`tile_overlap` must be a multiple of {latent_step} with `output_type='latent'`, got {overlap}."
                )
        if not _is_among(self.tile_window, (None, *TILE_WINDOWS)):
            raise ValueError(f"`tile_window` must be None or one of {TILE_WINDOWS}, got {self.tile_window!r}.")

    def _check_generators(self, num_images: int):
        if self.generator is None:
            return
        is_list = isinstance(self.generator, (list, tuple))
        if not all(isinstance(item, torch.Generator) for item in (self.generator if is_list else [self.generator])):
            raise ValueError(f"`generator` must be a torch.Generator or one per image, got {self.generator!r}.")
        if is_list and len(self.generator) != num_images:
            raise ValueError(f"`generator` must be one per image, {num_images}, got {len(self.generator)}.")

    def _check_callback(self):
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be callable, got {self.callback_on_step_end!r}.")
        names = self.callback_tensors
        if not isinstance(names, (list, tuple)) or not all(name in CALLBACK_TENSORS for name in names):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be a list of names in {CALLBACK_TENSORS}, got {names!r}."
            )

    def check_prompts(self, num_images: int, takes_text: bool, has_text_encoder: bool, width: int):
        r"""
        Check prompts and their embeddings.

        Args:
            num_images (`int`): Number of images in the call.
            takes_text (`bool`): Whether the UNet attends to embeddings.
            has_text_encoder (`bool`): Whether the pipeline can embed a text.
            width (`int`): Width of the embeddings.

        Raises:
            ValueError: If they do not fit the pipeline or the number of images.
        """
        for name in ("prompt", "negative_prompt"):
            text, embeds = getattr(self, name), getattr(self, f"{name}_embeds")
            if text is not None and embeds is not None:
                raise ValueError(f"Pass either `{name}` or `{name}_embeds`, not both.")
            if text is not None and not has_text_encoder:
                raise ValueError(
                    f"`{name}={text!r}` needs a text encoder and a tokenizer, and this pipeline has none."
                )
            texts = text if isinstance(text, (list, tuple)) else [text] * num_images
            if text is not None and not (len(texts) == num_images and all(isinstance(item, str) for item in texts)):
                raise ValueError(f"`{name}` must be a string or one per image, {num_images}, got {text!r}.")
            if embeds is None:
                continue
            if not takes_text:
                raise ValueError(f"`{name}_embeds` cannot be used: this pipeline's UNet takes no text.")
            shape = tuple(getattr(embeds, "shape", ()))
            if len(shape) != 3 or shape[0] not in (1, num_images) or shape[2] != width:
                raise ValueError(
                    f"`{name}_embeds` must be a tensor of shape (1 or {num_images}, tokens, {width}), got {shape}."
                )
        lengths = {
            embeds.shape[1] for embeds in (self.prompt_embeds, self.negative_prompt_embeds) if embeds is not None
        }
        if len(lengths) > 1:
            raise ValueError(
                f"`negative_prompt_embeds` must have {self.prompt_embeds.shape[1]} tokens like `prompt_embeds`, got"
                f" {tuple(self.negative_prompt_embeds.shape)}."
            )
        if self.guidance_scale > 1 and not takes_text:
            raise ValueError(
                f"`guidance_scale` must be at most 1, since this pipeline's UNet takes no text, got"
                f" {self.guidance_scale}."
            )
