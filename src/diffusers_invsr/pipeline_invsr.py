"""InvSR: super-resolution by diffusion inversion (https://arxiv.org/abs/2412.09013)."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import groupby, product
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ModelMixin, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.schedulers import DDIMScheduler
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from .checks import check_positive, is_auto, is_integer, is_real
from .color_fix import COLOR_FIXES, apply_color_fix
from .devices import dtype_of
from .fallbacks import Float32Mixin, enlarge_within_memory, smaller_tiles_within_memory
from .hub import HubMixin
from .image_processor import InputImage, InvSRImageProcessor
from .prompt_embeds import NEGATIVE_PROMPT, PROMPT, FixedPromptMixin
from .tile_batches import Tile, TilePool, TileResults, collate, select, to_device
from .tiling import TILE_WINDOWS, TileBlender, TileGrid


logger = logging.get_logger(__name__)

MIN_SCALE, MAX_SCALE = 1, 8


@dataclass
class InvSRPipelineOutput(BaseOutput):
    """
    Output of [`InvSRPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The enlarged images: PIL images, an array `(B, H, W, C)` or a tensor `(B, C, H, W)` in [0, 1]; a list of
            arrays or tensors where their shapes differ. Latents for `output_type="latent"`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor


class InvSRPipeline(
    HubMixin,
    FixedPromptMixin,
    Float32Mixin,
    DiffusionPipeline,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
):
    r"""
    Enlarges images with a frozen diffusion model that starts from the LR image plus a predicted noise map, as in
    [Arbitrary-steps Image Super-resolution via Diffusion Inversion](https://arxiv.org/abs/2412.09013).

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for what every pipeline can do
    (loading, saving, running on a device, offloading, ...).

    Args:
        vae ([`AutoencoderKL`] or [`AutoencoderTiny`]): Autoencoder between images and latents.
        text_encoder ([`~transformers.CLIPTextModel`], *optional*): Text encoder of the diffusion model.
        tokenizer ([`~transformers.CLIPTokenizer`], *optional*): Its tokenizer.
        unet ([`UNet2DConditionModel`]): The frozen diffusion model.
        scheduler ([`InvSRScheduler`]): The schedules and the steps between their points.
        noise_predictor ([`InvSRNoisePredictor`]): Predicts the noise map of the starting step.
        fixed_prompt ([`InvSRPromptEmbeds`], *optional*): Embeddings of the fixed prompts, in place of a text encoder.
        scale (`int`, defaults to 4): The scale factor that the noise predictor was trained at.
        tile_size (`int`, defaults to 128): Default side of a tile, in LR pixels at that scale.
        prompt (`str`, *optional*): The fixed prompt; the published one by default.
        negative_prompt (`str`, *optional*): The fixed negative prompt; the published one by default.
        model_card (`dict`, *optional*):
            What the model card says of the weights, as in [`InvSRNoisePredictor`], whose own is the default.
    """

    model_cpu_offload_seq = "text_encoder->noise_predictor->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "fixed_prompt"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        noise_predictor: ModelMixin,
        fixed_prompt: ModelMixin | None = None,
        scale: int = 4,
        tile_size: int = 128,
        prompt: str = PROMPT,
        negative_prompt: str = NEGATIVE_PROMPT,
        model_card: dict[str, Any] | None = None,
    ):
        super().__init__()
        check_positive("scale", scale)
        if tile_size is not None:
            check_positive("tile_size", tile_size)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            noise_predictor=noise_predictor,
            fixed_prompt=fixed_prompt,
        )
        self.register_to_config(
            scale=scale, tile_size=tile_size, prompt=prompt, negative_prompt=negative_prompt, model_card=model_card
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if getattr(self, "vae", None) else 8
        self.image_processor = InvSRImageProcessor()
        self._fixed_prompt_embeds, self._fixed_prompt_source = {}, None
        self._guidance_scale, self._interrupt, self._num_timesteps = 1.0, False, 0

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        # diffusers itself takes over only models of the very class of the annotation; ours may be defined elsewhere.
        for name in ("noise_predictor", "fixed_prompt"):
            if name in pipeline.components:
                kwargs.setdefault(name, pipeline.components[name])
        return super().from_pipe(pipeline, **kwargs)

    def compile(self, **kwargs):
        r"""
        Compile the networks in place. From then on `tile_size="auto"` is the pipeline's own for every image, so that
        all tiles have one shape and nothing is compiled anew for another image; a last batch with fewer tiles is
        compiled once more. Where tiles were larger before, the noise that is drawn differs too, and so does the image.
        Networks that are on a CPU by then keep PyTorch's own kernel for GroupNorm, which is faster there than what
        Inductor generates.

        Args:
            kwargs: Arguments of `torch.compile`, such as `mode="reduce-overhead"` for CUDA graphs.
        """
        if self._execution_device.type == "cpu":
            try:
                # Not by a statement, which diffusers would take for a requirement of code from the Hub
                kwargs = import_module("diffusers_invsr.compilation").keep_group_norm(kwargs)
            except ImportError as error:  # of a private part of PyTorch, or of this package beside code from the Hub
                logger.warning(f"Compiling GroupNorm as well, which makes it slower on a CPU: {error}.")
        options = kwargs.pop("options", None)
        for network in self._networks_to_compile:
            network.compile(**kwargs, options=options and dict(options))  # PyTorch takes entries out of it

    @property
    def _execution_device(self) -> torch.device:
        # diffusers looks at every module for hooks of offloading, which takes milliseconds; but networks that are all
        # on one accelerator run there.
        networks = [network for network in (self.noise_predictor, self.unet, self.vae) if network is not None]
        devices = {next(network.parameters()).device for network in networks}
        if len(devices) == 1 and all(device.type not in ("cpu", "meta") for device in devices):
            return devices.pop()
        return super()._execution_device

    @property
    def is_compiled(self) -> bool:
        """Whether [`~InvSRPipeline.compile`] or `torch.compile(network)` made each shape of tiles a compilation."""
        return any(
            hasattr(network, "_orig_mod") or network._compiled_call_impl is not None
            for network in self._networks_to_compile
        )

    @property
    def _networks_to_compile(self) -> tuple[torch.nn.Module, ...]:
        return self.noise_predictor, self.unet, self.vae.encoder, self.vae.decoder

    @property
    def size_multiple(self) -> int:
        """LR pixels by which a tile's side has to be divisible, for the VAE and the UNet's levels."""
        unet_factor = 2 ** (len(self.unet.config.block_out_channels) - 1)
        return max(self.vae_scale_factor * unet_factor // self.config.scale, 1)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(
        self,
        num_images: int,
        num_steps: int,
        scale: float | None,
        target_size: tuple[int, int] | None,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        guidance_scale: float,
        eta: float,
        tile_size: int | str | None,
        tile_overlap: int | None,
        tile_window: str | None,
        tile_batch_size: int,
        color_fix: str | None,
        generator: torch.Generator | list[torch.Generator] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        output_type: str,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ):
        check_positive("num_steps", num_steps)
        check_positive("tile_batch_size", tile_batch_size)
        if scale is not None and target_size is not None:
            raise ValueError(f"`scale={scale}` and `target_size={target_size}` cannot both be given.")
        if scale is not None and not (is_real(scale) and MIN_SCALE <= scale <= MAX_SCALE):
            raise ValueError(f"`scale` has to be from {MIN_SCALE} to {MAX_SCALE}, but is {scale!r}.")
        if target_size is not None and not (
            isinstance(target_size, (list, tuple, np.ndarray, torch.Size))
            and len(target_size) == 2
            and all(is_real(side) and int(side) == side for side in target_size)
        ):
            raise ValueError(f"`target_size` has to be (height, width) in pixels, but is {target_size!r}.")
        if not is_real(eta) or not 0 <= eta <= 1:
            raise ValueError(f"`eta` has to be from 0 to 1, but is {eta!r}.")
        if is_auto(tile_size):
            tile_size = self.config.tile_size
        if tile_size is not None:
            multiple = self.size_multiple
            if not is_integer(tile_size) or tile_size < 1 or tile_size % multiple:
                raise ValueError(
                    f"`tile_size` has to be a positive multiple of {multiple}, 'auto' or None, but is {tile_size!r}."
                )
            # `None` stands for the default, which fits every tile
            if tile_overlap is not None and not (is_integer(tile_overlap) and 0 <= tile_overlap < tile_size):
                raise ValueError(
                    f"`tile_overlap` has to be from 0 to less than `tile_size={tile_size}`, but is {tile_overlap!r}."
                )
        if tile_window not in (None, *TILE_WINDOWS):
            raise ValueError(f"`tile_window` has to be None or one of {TILE_WINDOWS}, but is {tile_window!r}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` has to be 'pil', 'np', 'pt' or 'latent', but is {output_type!r}.")
        step = self.vae_scale_factor // math.gcd(self.vae_scale_factor, self.config.scale)
        if output_type == "latent" and tile_size is not None and (tile_overlap or 0) % step:
            raise ValueError(
                f"`tile_overlap` has to be a multiple of {step} with `output_type='latent'`, but is {tile_overlap}."
            )
        if color_fix not in (None, *COLOR_FIXES):
            raise ValueError(f"`color_fix` has to be None or one of {COLOR_FIXES}, but is {color_fix!r}.")
        if color_fix is not None and output_type == "latent":
            raise ValueError(f"`color_fix={color_fix!r}` cannot be applied with `output_type='latent'`.")
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * num_images
        if generator is not None and not all(isinstance(item, torch.Generator) for item in generators):
            raise ValueError(f"`generator` has to be a torch.Generator or one for each image, but is {generator!r}.")
        if len(generators) != num_images:
            raise ValueError(f"`generator` has {len(generators)} generators for {num_images} images.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` has to be callable, but is {callback_on_step_end!r}.")
        unknown = set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be among {self._callback_tensor_inputs}, but has"
                f" {sorted(unknown)}."
            )
        self.check_prompts(num_images, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale)

        self.check_components()

    def check_components(self):
        """Raises a ValueError if the components do not fit each other."""
        if "start_timestep" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(
                f"`scheduler` has to be an InvSRScheduler, but is a {type(self.scheduler).__name__}: use"
                " `InvSRScheduler.from_config(pipe.scheduler.config)`."
            )
        latents_per_lr = self.config.scale / self.vae_scale_factor
        reduction = 2 ** (len(self.noise_predictor.config.block_out_channels) - 1)
        if latents_per_lr * reduction != 1:
            raise ValueError(
                f"`noise_predictor` reduces its input by {reduction}, but `scale={self.config.scale}` and a VAE that"
                f" reduces by {self.vae_scale_factor} need {1 / latents_per_lr:g}."
            )
        channels = {part: getattr(self, part).config.latent_channels for part in ("noise_predictor", "vae")}
        if len(set(channels.values())) > 1:
            raise ValueError(
                f"`noise_predictor` predicts noise of {channels['noise_predictor']} channels, but the latents of `vae`"
                f" have {channels['vae']}."
            )

    def prepare_noise(
        self, batch_size: int, height: int, width: int, num_maps: int, generator, device: torch.device
    ) -> torch.Tensor:
        r"""
        Draw the Gaussian noise of one tile, in the order in which sampling uses it.

        Args:
            batch_size (`int`): Images.
            height (`int`), width (`int`): Size of the tile in LR pixels.
            num_maps (`int`): Maps to draw: the predictor's, the VAE posterior's, then one for each step if `eta > 0`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source.
            device (`torch.device`): Where the noise is needed.

        Returns:
            `torch.Tensor`: Noise of shape `(num_maps, batch_size, latent_channels, latent_height, latent_width)`.
        """
        side = self.config.scale / self.vae_scale_factor
        shape = (batch_size, self.vae.config.latent_channels, int(height * side), int(width * side))
        return torch.stack([randn_tensor(shape, generator, device, torch.float32) for _ in range(num_maps)])

    @staticmethod
    def _draw(dist: DiagonalGaussianDistribution, noise: torch.Tensor) -> torch.Tensor:
        """`mean + exp(logvar / 2) * noise` in float32, whatever the network's number type."""
        return dist.mean.float() + torch.exp(0.5 * dist.logvar.float()) * noise

    def encode_image(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        r"""
        Latents of an image, drawn from the VAE's posterior: `z = c * (mean + std * noise)`.

        Args:
            image (`torch.Tensor`): Image of shape `(batch, 3, height, width)`, in [0, 1].
            noise (`torch.Tensor`): Standard Gaussian noise, of the latents' shape.

        Returns:
            `torch.Tensor`: Latents in float32. An autoencoder without a posterior, such as `AutoencoderTiny`, ignores
            the noise.
        """
        encoded = self.vae.encode((2 * image - 1).to(dtype_of(self.vae)))
        if hasattr(encoded, "latent_dist"):
            latents = self._draw(encoded.latent_dist, noise)
        else:
            latents = encoded.latents.float()
        return self.vae.config.scaling_factor * latents

    def prepare_latents(
        self, lr: torch.Tensor, enlarged: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        r"""
        The starting state: latents of the enlarged image plus predicted noise (section 3.2).

        Args:
            lr (`torch.Tensor`): LR image of shape `(batch, 3, h, w)`, in [0, 1]; what the noise predictor sees.
            enlarged (`torch.Tensor`): The image at the target size; what the VAE sees.
            timestep (`torch.Tensor`): Schedule index of the starting step, of shape `(1,)`.
            noise (`torch.Tensor`): From [`~InvSRPipeline.prepare_noise`].

        Returns:
            `torch.Tensor`: Noisy latents at `timestep`, float32.
        """
        noise_dist = self.noise_predictor((2 * lr - 1).to(dtype_of(self.noise_predictor)), timestep).latent_dist
        noise_map = self._draw(noise_dist, noise[0])
        latents = self.encode_image(enlarged, noise[1])
        return self.scheduler.add_noise(latents, noise_map, timestep)

    def denoise(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        eta: float,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        progress_bar: tqdm | None = None,
    ) -> torch.Tensor:
        r"""
        The steps of the scheduler's schedule, by the frozen diffusion model (section 3.1).

        Args:
            latents (`torch.Tensor`): The starting state `(batch, channels, h, w)`.
            noise (`torch.Tensor`): From [`~InvSRPipeline.prepare_noise`]: with `eta > 0` a map a step, after the two
                of the start.
            eta (`float`): Noise of the intermediate steps, from 0 (DDIM) to 1.
            prompt_embeds (`torch.Tensor`, *optional*): Embeddings `(batch, tokens, width)`.
            negative_prompt_embeds (`torch.Tensor`, *optional*): The same for the negative prompt.
            callback_on_step_end (`Callable`, *optional*): As in [`~InvSRPipeline.__call__`].
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): As in [`~InvSRPipeline.__call__`].
            progress_bar (`tqdm`, *optional*): Counts the steps of each tile.

        Returns:
            `torch.Tensor`: Clean latents, float32.
        """
        indices, dtype = self.scheduler.timesteps, dtype_of(self.unet)
        # A tensor, so that a compiled UNet is not compiled anew for each step
        device_indices = to_device(indices, latents.device)
        for i, index in enumerate(indices.tolist()):
            if self.interrupt:
                continue
            latents_input, embeds = latents.to(dtype), prompt_embeds
            if self.do_classifier_free_guidance:
                latents_input = torch.cat([latents_input] * 2)
                embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
            embeds = embeds if embeds is None else embeds.to(dtype)
            model_output = self.unet(latents_input, device_indices[i], encoder_hidden_states=embeds).sample.float()
            if self.do_classifier_free_guidance:
                unconditional, conditional = model_output.chunk(2)
                model_output = unconditional + self.guidance_scale * (conditional - unconditional)
            variance_noise = noise[2 + i] if eta > 0 and i < len(indices) - 1 else None
            latents = self.scheduler.step(model_output, index, latents, eta, variance_noise=variance_noise).prev_sample

            if callback_on_step_end is not None:
                callback_kwargs = {}
                for k in callback_on_step_end_tensor_inputs or []:
                    callback_kwargs[k] = locals()[k]
                callback_outputs = callback_on_step_end(self, i, index, callback_kwargs) or {}
                latents = callback_outputs.pop("latents", latents)
                embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                negative_prompt_embeds = callback_outputs.pop("negative_prompt_embeds", negative_prompt_embeds)
                if prompt_embeds is not None:
                    last = prompt_embeds[-1:]
                    # SDCFGCutoffCallback gives the last tile's for all: each keeps its own
                    if embeds.shape != last.shape or embeds.data_ptr() != last.data_ptr():
                        prompt_embeds = embeds.expand(len(latents), -1, -1)
            if progress_bar is not None:
                progress_bar.update(len(latents))
        return latents

    def decode_image(self, latents: torch.Tensor) -> torch.Tensor:
        r"""
        Image of latents: `D(z / c) / 2 + 1 / 2`, clamped to [0, 1].

        Args:
            latents (`torch.Tensor`): Latents `(batch, channels, h, w)`, scaled as the UNet knows them.

        Returns:
            `torch.Tensor`: Image `(batch, 3, height, width)` in float32; NaN where the VAE overflowed.
        """
        image = self.vae.decode((latents / self.vae.config.scaling_factor).to(dtype_of(self.vae))).sample.float()
        # Clamping would make infinite pixels look like black or white ones.
        return (image / 2 + 0.5).clamp(0, 1).masked_fill(image.isinf(), torch.nan)

    def cut_into_tiles(
        self,
        images: list[InputImage],
        scale: float | None,
        target_size: tuple[int, int] | None,
        tile_size: int | str | None,
        tile_overlap: int | None,
        tile_window: str | None = None,
    ) -> TileGrid:
        r"""
        The tiles of images of one size. Arguments as in [`~InvSRPipeline.__call__`].

        Raises:
            ValueError: If `target_size` is not 1 to 8 times the images' size.
        """
        size = tuple(images[0].pixels.shape[-2:])
        if target_size is None:
            scale = self.config.scale if scale is None else scale
            target_size = tuple(int(side * scale + 0.5) for side in size)
        elif not all(MIN_SCALE * side <= target <= MAX_SCALE * side for side, target in zip(size, target_size)):
            raise ValueError(
                f"`target_size={tuple(target_size)}` has to be {MIN_SCALE} to {MAX_SCALE} times the height and width"
                f" of the image, {size}."
            )
        pixels = torch.stack([image.pixels for image in images]) if len(images) > 1 else images[0].pixels[None]
        target_size = tuple(int(side) for side in target_size)
        auto = is_auto(tile_size)
        return TileGrid(
            pixels,
            target_size,
            self.config.scale,
            self.config.tile_size if auto else tile_size,
            tile_overlap,
            self.size_multiple,
            tile_window,
            fit=auto and not self.is_compiled,
        )

    def prepare_blender(self, grid: TileGrid, output_type: str) -> TileBlender:
        """Sums up the results of an image's tiles: `(1, 3, height, width)`, or latents with the padding."""
        if output_type == "latent":
            latents_per_lr = self.config.scale / self.vae_scale_factor
            return TileBlender(grid, (1, self.vae.config.latent_channels), latents_per_lr, crop=False)
        return TileBlender(grid, (1, 3), self.config.scale)

    def draw_tiles(
        self,
        runs: list[tuple[slice, TileGrid]],
        blenders: dict[int, TileBlender],
        num_maps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> Iterator[Tile]:
        r"""
        Cut tiles and draw their noise, tile by tile, so that results do not depend on how tiles are batched. Images
        come one after another; but where one generator serves several of one size, it draws the same tile of all of
        them at once, and all are on their way together.

        Args:
            runs (`list[tuple[slice, TileGrid]]`): Images of one size and their grid.
            blenders (`dict[int, TileBlender]`): What takes the results, by the number of the image.
            num_maps (`int`): As in [`~InvSRPipeline.prepare_noise`].
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): As in [`~InvSRPipeline.__call__`].
            device (`torch.device`): Where noise is drawn if there is no generator.
        """
        for run, grid in runs:
            size = run.stop - run.start if isinstance(generator, torch.Generator) else 1
            for first, (top, left) in product(range(run.start, run.stop, size), grid):
                in_run = first - run.start
                lr, enlarged = grid.cut(top, left, slice(in_run, in_run + size))
                source = generator[first] if isinstance(generator, (list, tuple)) else generator
                noise = self.prepare_noise(size, *lr.shape[-2:], num_maps, source, device)
                for i in range(size):
                    image, part = first + i, slice(i, i + 1)
                    yield Tile(
                        lr[part],
                        None if enlarged is None else enlarged[part],
                        noise[:, part],
                        image,
                        partial(blenders[image].add, top=top, left=left),
                    )

    @torch.no_grad()
    @smaller_tiles_within_memory
    def __call__(
        self,
        image: PipelineImageInput,
        num_steps: int = 1,
        start_timestep: int | None = None,
        timesteps: list[int] | None = None,
        scale: float | None = None,
        target_size: tuple[int, int] | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        tile_size: int | str | None = "auto",
        tile_overlap: int | None = None,
        tile_window: str | None = None,
        tile_batch_size: int = 1,
        color_fix: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> InvSRPipelineOutput | tuple:
        r"""
        Enlarge images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                The LR images. PIL of any mode; arrays `(H, W)`, `(H, W, C)` or `(B, H, W, C)`; tensors `(C, H, W)` or
                `(B, C, H, W)`; floats in [0, 1], integers of 8 or 16 bits by their type's range. Transparency is
                enlarged as well.
            num_steps (`int`, defaults to 1):
                Number of diffusion steps; 1 beside `timesteps` counts as not given. The published schedules are
                [200], [200, 100], [200, 100, 50], [200, 150, 100, 50] and [250, 200, 150, 100, 50]; more, up to 250,
                are spread evenly from 250.
            start_timestep (`int`, *optional*): First step: 250, 200, 150 or 100 (counted from 1, as in the paper).
            timesteps (`list[int]`, *optional*): The whole schedule instead: strictly descending, in 1 ... 250.
            scale (`float`, *optional*):
                Enlargement, from 1 to 8; by default the checkpoint's own (4). At another one the VAE sees the image
                enlarged to the target size, and the noise predictor sees it resized to the target size over 4.
            target_size (`tuple[int, int]`, *optional*): Height and width of the result, instead of `scale`.
            prompt (`str` or `list[str]`, *optional*): Prompt in place of the fixed one.
            negative_prompt (`str` or `list[str]`, *optional*): Negative prompt in place of the fixed one.
            guidance_scale (`float`, defaults to 1.0): Classifier-free guidance if greater than 1.
            eta (`float`, defaults to 0.0): Noise of the intermediate steps, from 0 (DDIM) to 1.
            tile_size (`int` or `str`, *optional*, defaults to `"auto"`):
                Side of a tile in LR pixels at the checkpoint's own scale; `None` processes the image whole. `"auto"`
                is the pipeline's default, or along an axis up to an eighth more where that is less work: not with
                the published tiling, nor with networks that were compiled as a whole.
            tile_overlap (`int`, *optional*):
                LR pixels that neighbouring tiles share; by default an eighth of the tile (with `"auto"`, of the
                pipeline's default) but at least 8 (or half the tile), and half of it with `tile_window="gaussian"`.
                Without tiles it has no effect.
            tile_window (`str`, *optional*):
                How tiles are blended: `"gaussian"` over the whole tile, or `"raised_cosine"` over the overlap alone.
                By default the former if `tile_overlap` is half the tile or more, else the latter. So either
                `tile_window="gaussian"` or `tile_overlap=tile_size // 2` alone is the published tiling. The defaults
                were chosen on the embedded model, which has no attention; for others, the published may be better.
            tile_batch_size (`int`, defaults to 1):
                Tiles, of all images, that go through the networks at once: for GPUs; on a CPU 1 is the fastest. Where
                they do not fit into memory, fewer do, and where a single one does not, it begins again with tiles of
                half the size; both with a warning, and callbacks are called again for what is done again. With
                `enable_model_cpu_offload`, networks move to the device and back for every batch, so larger ones pay.
            color_fix (`str`, *optional*): `"wavelet"`, `"ycbcr"` or `"adain"`: take the colours from the LR image.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of randomness, or one for each image. The same seed gives the same image on the same device. One
                for several images of one size draws for all of them at once, and memory holds all of their results.
            prompt_embeds (`torch.Tensor`, *optional*): Embeddings `(1 or B, tokens, width)` instead of `prompt`.
            negative_prompt_embeds (`torch.Tensor`, *optional*): The same for the negative prompt.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for the latents of the padded image.
            return_dict (`bool`, defaults to `True`): Whether to return an [`InvSRPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step_index, timestep, callback_kwargs)` after every step of every batch
                of tiles; `timestep` is a schedule index (199 for step 200). It may return a dict with changed tensors.
                If it sets `pipeline._interrupt = True`, the remaining steps and tiles are skipped; tiles that were not
                reached stay black.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Tensors in `callback_kwargs`: `"latents"`, `"prompt_embeds"`, `"negative_prompt_embeds"`.

        Returns:
            [`InvSRPipelineOutput`] or a tuple with its `images`.

        Raises:
            ValueError: If an argument is out of range or contradicts another one.
            TypeError: If `image` is of an unknown type.
            FloatingPointError:
                If a result is not finite in float32 either; in a smaller number type, such tiles are computed again in
                float32, with a warning. (A float16 VAE whose configuration says `force_upcast`, the default of
                `AutoencoderKL`, runs in float32 from the start.)
            torch.OutOfMemoryError: If the smallest tile does not fit into memory.

        Examples:

        ```py
        >>> from PIL import Image
        >>> from diffusers_invsr import TINY, InvSRPipeline

        >>> pipe = InvSRPipeline.from_pretrained(TINY)
        >>> pipe(Image.open("photo.png"), num_steps=1).images[0].save("photo_x4.png")
        ```
        """
        # 1. Check the arguments and read the images
        inputs = self.image_processor.preprocess(image)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            len(inputs),
            num_steps,
            scale,
            target_size,
            prompt,
            negative_prompt,
            guidance_scale,
            eta,
            tile_size,
            tile_overlap,
            tile_window,
            tile_batch_size,
            color_fix,
            generator,
            prompt_embeds,
            negative_prompt_embeds,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        self._guidance_scale = guidance_scale
        self._interrupt = False

        # 2. Choose the schedule. `num_steps` has a default, so 1 beside a list of steps is no contradiction.
        self.scheduler.set_timesteps(
            None if timesteps is not None and num_steps == 1 else num_steps,
            start_timestep=start_timestep,
            timesteps=timesteps,
        )
        indices = self.scheduler.timesteps
        self._num_timesteps = len(indices)

        # 3. Embed the prompts
        all_prompt_embeds, all_negative_prompt_embeds = self.encode_prompt(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            self.do_classifier_free_guidance,
            device,
        )

        # 4. Cut the images into tiles; images of one size and number type that follow one another share a grid
        runs, blenders, enlarged_rows = [], {}, {}
        for _, members in groupby(range(len(inputs)), key=lambda i: (inputs[i].pixels.shape, inputs[i].pixels.dtype)):
            members = list(members)
            run = slice(members[0], members[-1] + 1)
            grid = self.cut_into_tiles(inputs[run], scale, target_size, tile_size, tile_overlap, tile_window)
            runs.append((run, grid))
            for i, number in enumerate(members):
                blenders[number] = self.prepare_blender(grid, output_type)
                enlarged_rows[number] = partial(grid.enlarged_rows, image=i)
        num_maps = 2 + (len(indices) - 1 if eta > 0 else 0)
        source = generator[0] if isinstance(generator, (list, tuple)) else generator
        noise_device = device if source is None else source.device  # it goes to the device with its batch
        pool = TilePool(self.draw_tiles(runs, blenders, num_maps, generator, noise_device), tile_batch_size)
        num_tiles = sum(len(grid) * (run.stop - run.start) for run, grid in runs)

        def enlarge(tiles: list[Tile]) -> torch.Tensor:
            self._guidance_scale = guidance_scale  # a callback may have changed it for the tiles before
            lr, enlarged, noise = collate(tiles, self.config.scale, device)
            embeds = [select(each, tiles) for each in (all_prompt_embeds, all_negative_prompt_embeds)]

            # 5. Start from the enlarged images' latents plus the predicted noise
            latents = self.prepare_latents(lr, enlarged, to_device(indices[:1], device), noise)

            # 6. Denoise
            callback = (callback_on_step_end, callback_on_step_end_tensor_inputs)
            latents = self.denoise(latents, noise, eta, *embeds, *callback, progress_bar)

            # 7. Decode
            return latents if output_type == "latent" else self.decode_image(latents)

        # 8. Do so for one batch of tiles after another, and blend them. An image that is complete gets the type that
        # was asked for at once, while the device computes the next batch
        finished = {}

        def finish(number: int):
            blender = blenders.pop(number)
            result = blender.sum
            del blender.sum  # tiles that are not dropped yet know the blender
            if color_fix is not None:
                apply_color_fix(result, enlarged_rows[number], color_fix)
            elif output_type != "latent":
                result.clamp_(0, 1)  # the weights of tiles sum to 1 but for rounding
            finished[number] = self.image_processor.postprocess(result[0], inputs[number], output_type)

        enlarge_batch = partial(enlarge_within_memory, enlarge, pool=pool)
        blended = TileResults(partial(self.redo_in_float32, enlarge_batch), finish)
        with self.progress_bar(total=len(indices) * num_tiles) as progress_bar, self.upcast():
            for tiles in pool:
                if self.interrupt:
                    break
                blended.put(tiles, enlarge_batch(tiles))
            blended.flush()

        # 9. Give all images together, also those that an interruption left unfinished
        for number in list(blenders):
            finish(number)
        images = self.image_processor.collect([finished.pop(number) for number in range(len(inputs))], output_type)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return InvSRPipelineOutput(images=images)
