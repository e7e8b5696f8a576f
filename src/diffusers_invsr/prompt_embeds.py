"""The embeddings of the fixed prompts, a component that stands in for a text encoder."""

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
