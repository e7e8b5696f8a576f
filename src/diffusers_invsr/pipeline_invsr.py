"""InvSR: super-resolution by diffusion inversion (https://arxiv.org/abs/2412.09013)."""

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ModelMixin, UNet2DConditionModel
from diffusers.image_processor import PipelineImageInput
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.schedulers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from .call_arguments import CALLBACK_TENSORS, CallArguments
from .checks import check_positive
from .devices import dtype_of
from .fixed_prompts import FixedPromptsMixin
from .hub import HubMixin
from .image_processor import InvSRImageProcessor
from .noise_predictor import draw
from .pipeline_output import InvSRPipelineOutput
from .prompt_embeds import NEGATIVE_PROMPT, PROMPT
from .running_calls import RunningCallsMixin
from .tile_batches import Tile, collate, embeds_of, to_device
from .tile_by_tile import TileByTileMixin


class InvSRPipeline(
    HubMixin,
    FixedPromptsMixin,
    RunningCallsMixin,
    TileByTileMixin,
    DiffusionPipeline,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
):
    r"""
    Enlarges images with a frozen diffusion model that starts from the LR image plus a predicted noise map, as in
    [Arbitrary-steps Image Super-resolution via Diffusion Inversion](https://arxiv.org/abs/2412.09013). See
    [`DiffusionPipeline`] for what all pipelines have (loading, saving, running on a device, offloading, ...).

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
    _callback_tensor_inputs = list(CALLBACK_TENSORS)

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

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        # diffusers itself takes over only models of the very class of the annotation; ours may be defined elsewhere.
        for name in ("noise_predictor", "fixed_prompt"):
            if name in pipeline.components:
                kwargs.setdefault(name, pipeline.components[name])
        return super().from_pipe(pipeline, **kwargs)

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
    def size_multiple(self) -> int:
        """The number of LR pixels that a tile's side must be a multiple of, for the VAE and the UNet's levels."""
        unet_factor = 2 ** (len(self.unet.config.block_out_channels) - 1)
        return max(self.vae_scale_factor * unet_factor // self.config.scale, 1)

    @property
    def latents_per_lr(self) -> float:
        """Latent pixels per LR pixel, along an axis: ½ for the published weights (×4, and a VAE that reduces by 8)."""
        return self.config.scale / self.vae_scale_factor

    def check_inputs(self, num_images: int = 1, **arguments) -> CallArguments:
        r"""
        Check what a call asks for.

        Args:
            num_images (`int`, defaults to 1): Number of images in the call.
            arguments: Arguments of [`~InvSRPipeline.__call__`], by name; the others have their defaults.

        Returns:
            `CallArguments`: The arguments, and with them a scheduler of the call's own that has its schedule.

        Raises:
            ValueError: If an argument is out of range, contradicts another one or does not fit the components.
        """
        call = CallArguments(**arguments)
        latent_step = self.vae_scale_factor // math.gcd(self.vae_scale_factor, self.config.scale)
        call.check(num_images, self.config.tile_size, self.size_multiple, latent_step)
        has_text_encoder = self.text_encoder is not None and self.tokenizer is not None
        call.check_prompts(num_images, self.takes_text, has_text_encoder, self.unet.config.cross_attention_dim)
        self.check_components()
        return replace(call, scheduler=call.schedule(self.scheduler))

    def check_components(self):
        """Raises a ValueError if the components do not fit each other."""
        if "start_timestep" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(
                f"`scheduler` must be an InvSRScheduler, got {type(self.scheduler).__name__}: use"
                " `InvSRScheduler.from_config(pipe.scheduler.config)`."
            )
        reduction = 2 ** (len(self.noise_predictor.config.block_out_channels) - 1)
        if self.latents_per_lr * reduction != 1:
            raise ValueError(
                f"`noise_predictor` must reduce its input by {1 / self.latents_per_lr:g} for `scale="
                f"{self.config.scale}` and a VAE that reduces by {self.vae_scale_factor}, got {reduction}."
            )
        channels = self.vae.config.latent_channels
        if self.noise_predictor.config.latent_channels != channels:
            raise ValueError(
                f"`noise_predictor` must predict noise of {channels} channels, as the latents of `vae` have, got"
                f" {self.noise_predictor.config.latent_channels}."
            )

    def prepare_noise(
        self, batch_size: int, height: int, width: int, num_maps: int, generator, device: torch.device
    ) -> torch.Tensor:
        r"""
        Draw the Gaussian noise of one tile, in the order in which sampling uses it.

        Args:
            batch_size (`int`): Images.
            height (`int`), width (`int`): Size of the tile in LR pixels.
            num_maps (`int`): Maps to draw: the predictor's ξ₁, the VAE posterior's ξ₂, then one per step if `eta > 0`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source.
            device (`torch.device`): Where the noise is needed.

        Returns:
            `torch.Tensor`: Noise of shape `(num_maps, batch_size, latent_channels, latent_height, latent_width)`.
        """
        size = (int(height * self.latents_per_lr), int(width * self.latents_per_lr))
        shape = (batch_size, self.vae.config.latent_channels, *size)
        return torch.stack([randn_tensor(shape, generator, device, torch.float32) for _ in range(num_maps)])

    def predict_noise(self, lr: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        r"""
        The noise map of the starting step, from the LR image (section 3.2): `n = mean + std * noise`.

        Args:
            lr (`torch.Tensor`): LR images of shape `(batch, 3, h, w)`, in [0, 1].
            timestep (`torch.Tensor`): Schedule index of the starting step (199 for step 200), of shape `(1,)`.
            noise (`torch.Tensor`): Standard Gaussian noise ξ₁ of the latents' shape.

        Returns:
            `torch.Tensor`: Noise maps of shape `(batch, latent_channels, latent_height, latent_width)`, float32.
        """
        lr = (2 * lr - 1).to(dtype_of(self.noise_predictor))
        return draw(self.noise_predictor(lr, timestep).latent_dist, noise)

    def encode_image(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        r"""
        Latents of an image, drawn from the VAE's posterior: `z = c * (mean + std * noise)`.

        Args:
            image (`torch.Tensor`): Images of shape `(batch, 3, height, width)`, in [0, 1].
            noise (`torch.Tensor`): Standard Gaussian noise ξ₂ of the latents' shape.

        Returns:
            `torch.Tensor`: Latents of shape `(batch, latent_channels, latent_height, latent_width)`, float32. An
            autoencoder without a posterior, such as `AutoencoderTiny`, ignores the noise.
        """
        encoded = self.vae.encode((2 * image - 1).to(dtype_of(self.vae)))
        latents = draw(encoded.latent_dist, noise) if hasattr(encoded, "latent_dist") else encoded.latents.float()
        return self.vae.config.scaling_factor * latents

    def prepare_latents(
        self, lr: torch.Tensor, enlarged: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        r"""
        The starting state: latents of the enlarged image plus predicted noise (section 3.2).

        Args:
            lr (`torch.Tensor`): LR images of shape `(batch, 3, h, w)`, in [0, 1]; what the noise predictor sees.
            enlarged (`torch.Tensor`): The images at the target size, `(batch, 3, height, width)`; what the VAE sees.
            timestep (`torch.Tensor`): Schedule index of the starting step (199 for step 200), of shape `(1,)`.
            noise (`torch.Tensor`): ξ₁ and ξ₂, from [`~InvSRPipeline.prepare_noise`].

        Returns:
            `torch.Tensor`: Noisy latents of shape `(batch, latent_channels, latent_height, latent_width)`, float32.
        """
        noise_map = self.predict_noise(lr, timestep, noise[0])  # (B, 4, h/2, w/2) for the published weights
        latents = self.encode_image(enlarged, noise[1])  # (B, 4, h/2, w/2)
        return self.scheduler.add_noise(latents, noise_map, timestep)

    def denoise(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        scheduler: DDIMScheduler | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Iterable[str] = ("latents",),
        progress_bar: tqdm | None = None,
    ) -> torch.Tensor:
        r"""
        Denoise with the frozen diffusion model, along a schedule (section 3.1). Like all steps, it records gradients
        unless it is called under `torch.no_grad()`.

        Args:
            latents (`torch.Tensor`): The starting state `(batch, channels, h, w)`, at the schedule's first step.
            prompt_embeds (`torch.Tensor`, *optional*): Embeddings `(1 or batch, tokens, width)`.
            negative_prompt_embeds (`torch.Tensor`, *optional*): The same for the negative prompt, for guidance.
            noise (`torch.Tensor`, *optional*): Fresh noise for every step but the last, if `eta > 0`:
                `(steps - 1, batch, channels, h, w)`.
            guidance_scale (`float`, defaults to 1.0): Classifier-free guidance if greater than 1.
            eta (`float`, defaults to 0.0): Noise of the intermediate steps, from 0 (DDIM) to 1.
            scheduler ([`InvSRScheduler`], *optional*): By default the pipeline's. Call its `set_timesteps` first.
            callback_on_step_end, callback_on_step_end_tensor_inputs: As in [`~InvSRPipeline.__call__`].
            progress_bar (`tqdm`, *optional*): It advances by one per step and image.

        Returns:
            `torch.Tensor`: Clean latents, `(batch, channels, h, w)`, float32.
        """
        scheduler, dtype = scheduler or self.scheduler, dtype_of(self.unet)
        # A tensor, so that a compiled UNet is not compiled again for each step
        timesteps = to_device(scheduler.timesteps, latents.device)
        if eta > 0 and len(timesteps) > 1 and noise is None:
            raise ValueError("`noise` is required with an `eta` greater than 0.")
        with self.running_step(guidance_scale) as call:  # in which a callback may change the guidance, or interrupt
            for i, t in enumerate(scheduler.timesteps.tolist()):
                if call.interrupt:
                    break
                guided = call.guidance_scale > 1
                latents_input = torch.cat([latents] * 2) if guided else latents  # (2 * B, 4, h, w)
                if guided and negative_prompt_embeds is None:
                    raise ValueError("`negative_prompt_embeds` is required with a `guidance_scale` greater than 1.")
                embeds = None
                if prompt_embeds is not None:
                    prompts = [negative_prompt_embeds, prompt_embeds] if guided else [prompt_embeds]
                    embeds = torch.cat([prompt.expand(len(latents), -1, -1) for prompt in prompts]).to(dtype)
                output = self.unet(latents_input.to(dtype), timesteps[i], encoder_hidden_states=embeds).sample.float()
                if guided:
                    unconditional, conditional = output.chunk(2)
                    output = unconditional + call.guidance_scale * (conditional - unconditional)  # (B, 4, h, w)
                variance_noise = noise[i] if eta > 0 and i < len(timesteps) - 1 else None
                latents = scheduler.step(output, t, latents, eta, variance_noise=variance_noise).prev_sample

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for k in callback_on_step_end_tensor_inputs or ():
                        callback_kwargs[k] = locals()[k]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs) or {}
                    latents = callback_outputs.pop("latents", latents)
                    prompt_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = callback_outputs.pop("negative_prompt_embeds", negative_prompt_embeds)
                if progress_bar is not None:
                    progress_bar.update(len(latents))
        return latents

    def decode_image(self, latents: torch.Tensor) -> torch.Tensor:
        r"""
        Image of latents: `D(z / c) / 2 + 1 / 2`, clamped to [0, 1].

        Args:
            latents (`torch.Tensor`): Latents `(batch, channels, h, w)`, scaled as the UNet knows them.

        Returns:
            `torch.Tensor`: Images `(batch, 3, height, width)` in float32; NaN where the VAE overflowed.
        """
        image = self.vae.decode((latents / self.vae.config.scaling_factor).to(dtype_of(self.vae))).sample.float()
        # Clamping would make infinite pixels look like black or white ones.
        return (image / 2 + 0.5).clamp(0, 1).masked_fill(image.isinf(), torch.nan)

    def enlarge_batch(
        self, tiles: list[Tile], call: CallArguments, device: torch.device, progress_bar: tqdm | None = None
    ) -> torch.Tensor:
        """
        Enlarge a batch of B tiles of one shape, as section 3 of the paper does with an image. Returns images
        `(B, 3, height, width)` in [0, 1], or latents `(B, channels, h, w)` with `output_type="latent"`, on the device.
        """
        lr, enlarged, noise = collate(tiles, self.config.scale, device)  # (B, 3, h, w), (B, 3, 4h, 4w), (2, B, 4, ...)
        timesteps = to_device(call.scheduler.timesteps, device)

        # 1. Start from the enlarged images' latents plus the predicted noise
        latents = self.prepare_latents(lr, enlarged, timesteps[:1], noise)  # (B, 4, h/2, w/2)

        # 2. Denoise
        latents = self.denoise(
            latents,
            prompt_embeds=embeds_of(tiles, call.prompt_embeds),
            negative_prompt_embeds=embeds_of(tiles, call.negative_prompt_embeds),
            noise=noise[2:],
            guidance_scale=call.guidance_scale,
            eta=call.eta,
            scheduler=call.scheduler,
            callback_on_step_end=call.callback_on_step_end,
            callback_on_step_end_tensor_inputs=call.callback_tensors,
            progress_bar=progress_bar,
        )  # (B, 4, h/2, w/2)

        # 3. Decode
        return latents if call.output_type == "latent" else self.decode_image(latents)  # (B, 3, 4h, 4w)

    @torch.no_grad()
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
                Number of diffusion steps, from 1 to 250; 1 beside `timesteps` counts as not given. The published
                schedules are [200], [200, 100], [200, 100, 50], [200, 150, 100, 50] and [250, 200, 150, 100, 50];
                more steps are spread evenly from 250.
            start_timestep (`int`, *optional*): First step: 250, 200, 150 or 100 (counted from 1, as in the paper).
            timesteps (`list[int]`, *optional*): The whole schedule instead: strictly descending, from 1 to 250.
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
                covers the image with the fewest equal tiles of three quarters to nine eighths of the pipeline's
                default; with the published tiling, or compiled networks, tiles have the default.
            tile_overlap (`int`, *optional*):
                LR pixels that neighbouring tiles share; by default an eighth of the tile but at least 8 (or half the
                tile), and half of it with `tile_window="gaussian"`.
            tile_window (`str`, *optional*):
                How tiles are blended: `"gaussian"` over the whole tile (default if `tile_overlap` is half of it or
                more; the published tiling), or `"raised_cosine"` over the overlap alone.
            tile_batch_size (`int`, defaults to 1):
                Tiles, of all images, that go through the networks at once: for GPUs; on a CPU 1 is the fastest. If
                they do not fit into memory, there are fewer, and if a single one does not, the call starts again with
                smaller tiles; both with a warning, and callbacks are called again for what is repeated.
            color_fix (`str`, *optional*): `"wavelet"`, `"ycbcr"` or `"adain"`: take the colours from the LR image.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of randomness, or one per image. The same seed gives the same image on the same device. One
                for several images of one size draws for all of them at once, and memory holds all of their results.
            prompt_embeds (`torch.Tensor`, *optional*): Embeddings `(1 or B, tokens, width)` instead of `prompt`.
            negative_prompt_embeds (`torch.Tensor`, *optional*): The same for the negative prompt.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for the latents of the padded image.
            return_dict (`bool`, defaults to `True`): Whether to return an [`InvSRPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step_index, timestep, callback_kwargs)` after every step of every batch
                of tiles; `timestep` is a schedule index (199 for step 200). It may return a dict with changed tensors.
                If it sets `pipeline._interrupt = True`, the remaining steps and tiles of its call are skipped; tiles
                that were not reached are black, before `color_fix`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Tensors in `callback_kwargs`: `"latents"`, `"prompt_embeds"`, `"negative_prompt_embeds"`.

        Returns:
            [`InvSRPipelineOutput`] or a tuple with its `images`.

        Raises:
            ValueError: If an argument is out of range or contradicts another one.
            TypeError: If `image` is of an unknown type.
            FloatingPointError: If a result is not finite in float32, in which tiles that overflow are repeated.
            torch.OutOfMemoryError: If the smallest tile does not fit into memory.

        Examples:

        ```py
        >>> from PIL import Image
        >>> from diffusers_invsr import TINY, InvSRPipeline

        >>> pipe = InvSRPipeline.from_pretrained(TINY)
        >>> pipe(Image.open("photo.png"), num_steps=1).images[0].save("photo_x4.png")
        ```
        """
        # 1. Read the images and check what is asked for
        inputs = self.image_processor.preprocess(image)
        call = self.check_inputs(
            len(inputs),
            num_steps=num_steps,
            start_timestep=start_timestep,
            timesteps=timesteps,
            scale=scale,
            target_size=target_size,
            prompt=prompt,
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            eta=eta,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            tile_window=tile_window,
            tile_batch_size=tile_batch_size,
            color_fix=color_fix,
            generator=generator,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device

        # 2. Embed the prompts
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale > 1, device
        )
        call = replace(call, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds)

        # 3. Enlarge tile by tile; each finished image gets its type while the device works on the next one
        images = {}
        running = self.running_call(guidance_scale=guidance_scale, num_timesteps=len(call.scheduler.timesteps))
        finished = closing(self.enlarge_images(inputs, call, device))
        with running, self.upcast_vae(), self.exact_group_norm(device), finished as results:
            for number, result in results:
                images[number] = self.image_processor.postprocess(result[0], inputs[number], output_type)
                del result  # or else memory holds it beside the next one
        self.maybe_free_model_hooks()

        # 4. Give all images together
        images = self.image_processor.collect([images.pop(number) for number in range(len(inputs))], output_type)
        if not return_dict:
            return (images,)
        return InvSRPipelineOutput(images=images)
