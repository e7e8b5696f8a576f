"""How a pipeline embeds its prompts: given ones, or the fixed ones of its configuration."""

import torch
from diffusers.utils import logging
from torch import nn

from .devices import dtype_of
from .prompt_embeds import InvSRPromptEmbeds


logger = logging.get_logger(__name__)


class FixedPromptsMixin:
    """The prompts of a pipeline that has a UNet and perhaps a text encoder or the embeddings of its fixed prompts."""

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
        Embed the prompts; where none are given, the fixed ones. To embed these once and for all, see
        [`~FixedPromptsMixin.drop_text_encoder`].

        Args:
            prompt (`str` or `list[str]`, *optional*): Prompt for all images, or one per image.
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
                f"Prompt and negative prompt must have equally many tokens, got {prompt_embeds.shape[1]} and"
                f" {negative_prompt_embeds.shape[1]}: pass the embeddings of both."
            )
        return prompt_embeds, negative_prompt_embeds

    def _embed_fixed(self, name: str, device: torch.device) -> torch.Tensor:
        """Embeddings of the fixed prompt `name` ("prompt" or "negative_prompt")."""
        text = self.config[name]
        if self.fixed_prompt is not None:
            if text != self.fixed_prompt.config[name]:
                raise ValueError(
                    f"`{name}` of the configuration must be {self.fixed_prompt.config[name]!r}, whose embeddings this"
                    f" pipeline holds in place of a text encoder, got {text!r}."
                )
            # A call, so that hooks of offloading see it
            return dict(zip(("prompt", "negative_prompt"), self.fixed_prompt()))[name]
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                f"`{name}_embeds` is required: this pipeline has neither a text encoder nor embeddings of its own."
            )
        return self._embed(text, device)

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
        """
        Replace text encoder and tokenizer by the embeddings of the fixed prompts, which no call has to embed
        again. For SD-Turbo this frees 1.4 GB in float32.

        Raises:
            ValueError: If there is no text encoder.
        """
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
        self.maybe_free_model_hooks()  # those of offloading would keep the encoder

    @classmethod
    def load_lora_into_text_encoder(cls, state_dict: dict, network_alphas: dict | None, text_encoder, *args, **kwargs):
        if text_encoder is not None:
            super().load_lora_into_text_encoder(state_dict, network_alphas, text_encoder, *args, **kwargs)
        elif any(key.startswith(cls.text_encoder_name) for key in state_dict):
            logger.warning("The LoRA's layers for a text encoder are left out: this pipeline has none.")
