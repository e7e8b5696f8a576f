"""The fixed prompts: how a pipeline embeds them, and the component that stands in for a text encoder."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


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
    """

    @register_to_config
    def __init__(self, num_tokens: int = 77, embed_dim: int = 1024):
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
            ValueError: If the UNet takes text and there is neither a text encoder nor embeddings.
        """
        if not self.takes_text:
            return None, None
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self._embed_fixed_prompts(device)[0] if prompt is None else self._embed(prompt, device)
        prompt_embeds = prompt_embeds.to(device=device, dtype=self.unet.dtype)
        if not do_classifier_free_guidance:
            return prompt_embeds, None
        if negative_prompt_embeds is None:
            negative_prompt_embeds = (
                self._embed_fixed_prompts(device)[1]
                if negative_prompt is None
                else self._embed(negative_prompt, device)
            )
        return prompt_embeds, negative_prompt_embeds.to(device=device, dtype=self.unet.dtype)

    def _embed_fixed_prompts(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fixed_prompt is not None:
            return self.fixed_prompt()  # a call, so that hooks of offloading see it
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "`prompt_embeds` (and for guidance `negative_prompt_embeds`) have to be given: this pipeline has"
                " neither a text encoder nor embeddings of its own."
            )
        # Adapters and new tokens change what the text encoder says.
        key = (str(device), self.unet.dtype, id(self.text_encoder), len(self.tokenizer))
        if getattr(self.text_encoder, "peft_config", None):
            return self._embed(self.config.prompt, device), self._embed(self.config.negative_prompt, device)
        if key not in self._fixed_prompt_embeds:
            prompts = (self.config.prompt, self.config.negative_prompt)
            self._fixed_prompt_embeds[key] = tuple(self._embed(prompt, device) for prompt in prompts)
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

    def drop_text_encoder(self):
        """Replace text encoder and tokenizer by the embeddings of the fixed prompts (saves 1.4 GB in float32)."""
        if self.text_encoder is None:
            raise ValueError("This pipeline has no text encoder to drop.")
        with torch.no_grad():
            prompt_embeds, negative_prompt_embeds = self._embed_fixed_prompts(self._execution_device)
        fixed_prompt = InvSRPromptEmbeds(*prompt_embeds.shape[1:]).to(prompt_embeds.device, prompt_embeds.dtype)
        fixed_prompt.prompt_embeds.copy_(prompt_embeds)
        fixed_prompt.negative_prompt_embeds.copy_(negative_prompt_embeds)
        self.register_modules(fixed_prompt=fixed_prompt, text_encoder=None, tokenizer=None)
        self._fixed_prompt_embeds.clear()
