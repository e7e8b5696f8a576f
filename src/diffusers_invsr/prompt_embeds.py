"""The fixed prompts: how a pipeline embeds them, and the component that stands in for a text encoder."""

import weakref

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging
from torch import nn

from .checks import is_real
from .devices import dtype_of


logger = logging.get_logger(__name__)

# The fixed prompts of the published weights.
PROMPT = (
    "Cinematic, high-contrast, photo-realistic, 8k, ultra HD, meticulous detailing, hyper sharpness, perfect without"
    " deformations"
)
NEGATIVE_PROMPT = (
    "Low quality, blurring, jpeg artifacts, deformed, over-smooth, cartoon, noisy,painting, drawing, sketch,"
    " oil painting"
)


class InvSRPromptEmbeds(ModelMixin, ConfigMixin):
    r"""
    The embeddings of the two fixed prompts. A pipeline that holds them needs neither text encoder nor tokenizer.

    Args:
        num_tokens (`int`, defaults to 77): Tokens of a prompt.
        embed_dim (`int`, defaults to 1024): Width of the text encoder.
        prompt (`str`): The text whose embeddings these are.
        negative_prompt (`str`): The same for the negative prompt.
    """

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 77,
        embed_dim: int = 1024,
        prompt: str = PROMPT,
        negative_prompt: str = NEGATIVE_PROMPT,
    ):
        super().__init__()
        self.prompt_embeds = nn.Parameter(torch.zeros(1, num_tokens, embed_dim), requires_grad=False)
        self.negative_prompt_embeds = nn.Parameter(torch.zeros(1, num_tokens, embed_dim), requires_grad=False)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the positive and the negative embeddings, each of shape `(1, num_tokens, embed_dim)`."""
        return self.prompt_embeds, self.negative_prompt_embeds


class FixedPromptMixin:
    """Prompts of a pipeline: given ones, or the fixed ones of its config, whose embeddings are kept."""

    @property
    def takes_text(self) -> bool:
        """Whether the UNet attends to prompt embeddings."""
        blocks = (*self.unet.config.down_block_types, self.unet.config.mid_block_type)
        return any("CrossAttn" in str(block) for block in blocks)

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        do_classifier_free_guidance: bool = True,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        r"""
        Embed the prompts; where none are given, the fixed ones, which are embedded once a device and type.

        Args:
            prompt (`str` or `list[str]`, *optional*): Prompt, for all images or one an image.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance leads away from.
            prompt_embeds (`torch.Tensor`, *optional*): Embeddings to use instead of `prompt`.
            negative_prompt_embeds (`torch.Tensor`, *optional*): Embeddings to use instead of `negative_prompt`.
            do_classifier_free_guidance (`bool`, defaults to `True`): Whether the negative prompt is needed.
            device (`torch.device`, *optional*): Where to compute.

        Returns:
            `tuple[torch.Tensor | None, torch.Tensor | None]`: Both embeddings, of shape `(1 or batch, tokens, width)`;
            `None` for what is not needed, both if the UNet takes no text.

        Raises:
            ValueError: If the UNet takes text and there is neither a text encoder nor embeddings, or if the two
                embeddings differ in their number of tokens.
        """
        if not self.takes_text:
            return None, None
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self._embed_fixed("prompt", device) if prompt is None else self._embed(prompt, device)
        prompt_embeds = prompt_embeds.to(device=device, dtype=dtype_of(self.unet))
        if not do_classifier_free_guidance:
            return prompt_embeds, None
        if negative_prompt_embeds is None and negative_prompt is None:
            negative_prompt_embeds = self._embed_fixed("negative_prompt", device)
        elif negative_prompt_embeds is None:
            negative_prompt_embeds = self._embed(negative_prompt, device)
        negative_prompt_embeds = negative_prompt_embeds.to(device=device, dtype=dtype_of(self.unet))
        if negative_prompt_embeds.shape[1] != prompt_embeds.shape[1]:
            raise ValueError(
                f"`prompt_embeds` has {prompt_embeds.shape[1]} tokens, but the negative prompt"
                f" {negative_prompt_embeds.shape[1]}: give embeddings of both with as many."
            )
        return prompt_embeds, negative_prompt_embeds

    def check_prompts(
        self,
        num_images: int,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        guidance_scale: float,
    ):
        """Raises a ValueError for prompts or embeddings that do not fit the pipeline or the number of images."""
        width = self.unet.config.cross_attention_dim
        for name, text, embeds in (
            ("prompt", prompt, prompt_embeds),
            ("negative_prompt", negative_prompt, negative_prompt_embeds),
        ):
            if text is not None and embeds is not None:
                raise ValueError(f"`{name}` and `{name}_embeds` cannot both be given.")
            if text is not None and (self.text_encoder is None or self.tokenizer is None):
                raise ValueError(f"`{name}={text!r}` cannot be used: this pipeline has no text encoder and tokenizer.")
            texts = text if isinstance(text, (list, tuple)) else [text] * num_images
            if text is not None and not (len(texts) == num_images and all(isinstance(item, str) for item in texts)):
                raise ValueError(
                    f"`{name}` has to be a string or one for each of {num_images} images, but is {text!r}."
                )
            if embeds is None:
                continue
            if not self.takes_text:
                raise ValueError(f"`{name}_embeds` cannot be used: this pipeline's UNet takes no text.")
            shape = tuple(getattr(embeds, "shape", ()))
            if len(shape) != 3 or shape[0] not in (1, num_images) or shape[2] != width:
                raise ValueError(
                    f"`{name}_embeds` has to be a tensor of shape (1 or {num_images}, tokens, {width}), but its shape"
                    f" is {shape}."
                )
        lengths = {embeds.shape[1] for embeds in (prompt_embeds, negative_prompt_embeds) if embeds is not None}
        if len(lengths) > 1:
            raise ValueError(
                f"`negative_prompt_embeds` has to have {prompt_embeds.shape[1]} tokens like `prompt_embeds`, but its"
                f" shape is {tuple(negative_prompt_embeds.shape)}."
            )
        if not is_real(guidance_scale):
            raise ValueError(f"`guidance_scale` has to be a finite number, but is {guidance_scale!r}.")
        if guidance_scale > 1 and not self.takes_text:
            raise ValueError(f"`guidance_scale={guidance_scale}` cannot be used: this pipeline's UNet takes no text.")

    def _embed_fixed(self, name: str, device: torch.device) -> torch.Tensor:
        """Embeddings of the fixed prompt `name` ("prompt" or "negative_prompt"), from the cache if nothing changed."""
        text = self.config[name]
        if self.fixed_prompt is not None:
            if text != self.fixed_prompt.config[name]:
                raise ValueError(
                    f"`{name}={text!r}` of the configuration cannot be used: this pipeline holds the embeddings of"
                    f" {self.fixed_prompt.config[name]!r} and no text encoder."
                )
            # A call, so that hooks of offloading see it
            return dict(zip(("prompt", "negative_prompt"), self.fixed_prompt()))[name]
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                f"`{name}_embeds` has to be given: this pipeline has neither a text encoder nor embeddings of its own."
            )
        if getattr(self.text_encoder, "peft_config", None):  # adapters may be switched at any time
            return self._embed(text, device)
        versions = sum(0 if weight.is_inference() else weight._version for weight in self.text_encoder.parameters())
        source = (weakref.ref(self.text_encoder), versions, len(self.tokenizer))
        if source != self._fixed_prompt_source:
            self._fixed_prompt_source = source
            self._fixed_prompt_embeds.clear()
        key = (text, str(device), dtype_of(self.unet))
        if key not in self._fixed_prompt_embeds:
            with torch.no_grad():
                self._fixed_prompt_embeds[key] = self._embed(text, device)
        return self._fixed_prompt_embeds[key]

    def _embed(self, text: str | list[str], device: torch.device) -> torch.Tensor:
        text = self.maybe_convert_prompt([text] if isinstance(text, str) else list(text), self.tokenizer)
        tokens = self.tokenizer(
            text,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(device))[0]

    @torch.no_grad()
    def drop_text_encoder(self):
        """Replace text encoder and tokenizer by the embeddings of the fixed prompts (saves 1.4 GB in float32)."""
        if self.text_encoder is None:
            raise ValueError("This pipeline has no text encoder to drop.")
        names = ("prompt", "negative_prompt")
        embeds = [self._embed_fixed(name, self._execution_device).clone() for name in names]
        texts = {name: self.config[name] for name in names}
        fixed_prompt = InvSRPromptEmbeds(*embeds[0].shape[1:], **texts).eval()
        fixed_prompt.prompt_embeds, fixed_prompt.negative_prompt_embeds = (
            nn.Parameter(tensor, requires_grad=False) for tensor in embeds
        )
        self.register_modules(fixed_prompt=fixed_prompt, text_encoder=None, tokenizer=None)
        self._fixed_prompt_embeds.clear()
        self.maybe_free_model_hooks()  # those of offloading would keep the encoder

    def fuse_lora(self, *args, **kwargs):
        self._fixed_prompt_embeds.clear()  # merging leaves no trace in the weights' versions
        super().fuse_lora(*args, **kwargs)

    def unfuse_lora(self, *args, **kwargs):
        self._fixed_prompt_embeds.clear()
        super().unfuse_lora(*args, **kwargs)

    @classmethod
    def load_lora_into_text_encoder(cls, state_dict: dict, network_alphas: dict | None, text_encoder, *args, **kwargs):
        if text_encoder is not None:
            super().load_lora_into_text_encoder(state_dict, network_alphas, text_encoder, *args, **kwargs)
        elif any(key.startswith(cls.text_encoder_name) for key in state_dict):
            logger.warning("The LoRA's layers for a text encoder are left out: this pipeline has none.")

    def __getstate__(self) -> dict:
        """The pipeline for pickling and copying, without the cache of embeddings."""
        return self.__dict__ | {"_fixed_prompt_embeds": {}, "_fixed_prompt_source": None}
