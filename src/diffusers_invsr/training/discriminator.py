"""The discriminator of InvSR's training (section 3.3 of the paper)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TextTimeEmbedding, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import (
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    get_down_block,
    get_up_block,
)
from diffusers.utils import BaseOutput
from torch import nn


# Each level of the encoder is mirrored in the decoder.
UP_BLOCK_TYPES = {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"}
NORM_EPS = 1e-5


@dataclass
class InvSRDiscriminatorOutput(BaseOutput):
    """
    Output of [`InvSRDiscriminator`].

    Args:
        logits (`list[torch.Tensor]`):
            A logit map of shape `(batch, 1, height_i, width_i)` after the middle block, then one after each block of
            the decoder: one more than there are levels. Unbounded; larger means more real.
    """

    logits: list[torch.Tensor]


class LogitHead(nn.Sequential):
    """Features of shape `(batch, channels, height, width)` to a logit map `(batch, 1, height, width)`."""

    def __init__(self, channels: int, norm_num_groups: int):
        super().__init__(
            nn.GroupNorm(norm_num_groups, channels, eps=NORM_EPS),
            nn.SiLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.GroupNorm(norm_num_groups, channels, eps=NORM_EPS),
            nn.SiLU(),
            nn.Conv2d(channels, 1, kernel_size=3, padding=1),
        )


class InvSRDiscriminator(ModelMixin, ConfigMixin):
    r"""
    Distinguishes the latents of HR images from those that the diffusion model predicts from LR images (the adversarial
    part of the training loss, section 3.3 of the [InvSR paper](https://arxiv.org/abs/2412.09013)).

    A UNet conditioned on the starting timestep and the text, with

    - multiple inputs: every down block gets features of the latents themselves, resized to its resolution, besides the
      output of the block before it;
    - multiple outputs: the middle block and every up block return a logit map, from coarse to fine.

    The defaults are the published network (112.08 M parameters). Without `cross_attention_dim` there is no text
    conditioning: all blocks are plain, and the middle block has only self-attention.

    Args:
        in_channels (`int`, defaults to 4): Channels of the latents.
        down_block_types (`tuple[str]`):
            Down block of each level: `"DownBlock2D"` or `"CrossAttnDownBlock2D"`. The up blocks mirror them.
        block_out_channels (`tuple[int]`): Channels of each level; the time embedding is 4 times as wide as the first.
        layers_per_block (`int` or `tuple[int]`):
            ResNet (and attention) layers of each level's down block; its up block has one more.
        num_attention_heads (`int` or `tuple[int]`):
            Attention heads of each level; the middle block has as many as the last. No effect on plain levels.
        cross_attention_dim (`int`, *optional*, defaults to 1024): Width of the text embeddings; `None` for no text.
        addition_embed_type_num_heads (`int`, defaults to 64):
            Heads of the attention that pools the text embeddings, which are added to the time embedding.
        input_feature_channels (`int`, defaults to 32): Channels of the features that every down block gets.
        norm_num_groups (`int`, defaults to 32): Groups of every GroupNorm.

    Raises:
        ValueError: If the lengths of the tuples differ; diffusers and PyTorch check the rest.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D", "Attention"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels: tuple[int, ...] = (128, 256, 512),
        layers_per_block: int | tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int | tuple[int, ...] = (8, 16, 16),
        cross_attention_dim: int | None = 1024,
        addition_embed_type_num_heads: int = 64,
        input_feature_channels: int = 32,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        levels = len(block_out_channels)
        if isinstance(layers_per_block, int):
            layers_per_block = (layers_per_block,) * levels
        if isinstance(num_attention_heads, int):
            num_attention_heads = (num_attention_heads,) * levels
        lengths = [len(x) for x in (down_block_types, block_out_channels, layers_per_block, num_attention_heads)]
        if len(set(lengths)) > 1:
            raise ValueError(
                "`down_block_types`, `block_out_channels`, `layers_per_block` and `num_attention_heads` must have one"
                f" entry per level, got {', '.join(map(str, lengths))} entries."
            )

        # Time, and the text as a whole
        temb_channels = 4 * block_out_channels[0]
        self.time_proj = Timesteps(block_out_channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], temb_channels)
        self.add_embedding = None
        if cross_attention_dim is not None:
            self.add_embedding = TextTimeEmbedding(cross_attention_dim, temb_channels, addition_embed_type_num_heads)

        # Inputs
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.conv_features = nn.Conv2d(in_channels, input_feature_channels, kernel_size=3, padding=1)

        # UNet
        resnet_settings = {
            "temb_channels": temb_channels,
            "resnet_eps": NORM_EPS,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
        }
        # Linear projections around the attention, as in SD 2.1; as many parameters as with 1×1 convolutions.
        text_settings = {"cross_attention_dim": cross_attention_dim, "use_linear_projection": True}

        self.down_blocks = nn.ModuleList()
        channels = block_out_channels[0]
        for level, block_type in enumerate(down_block_types):
            block = get_down_block(
                block_type,
                num_layers=layers_per_block[level],
                in_channels=channels + input_feature_channels,
                out_channels=block_out_channels[level],
                add_downsample=level < levels - 1,
                downsample_padding=1,
                num_attention_heads=num_attention_heads[level],
                attention_head_dim=num_attention_heads[level],  # no effect, but get_down_block warns without it
                **resnet_settings,
                **text_settings,
            )
            self.down_blocks.append(block)
            channels = block_out_channels[level]

        if cross_attention_dim is None:
            self.mid_block = UNetMidBlock2D(
                channels, attention_head_dim=channels // num_attention_heads[-1], **resnet_settings
            )
        else:
            self.mid_block = UNetMidBlock2DCrossAttn(
                channels, num_attention_heads=num_attention_heads[-1], **resnet_settings, **text_settings
            )

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            block = get_up_block(
                UP_BLOCK_TYPES[down_block_types[level]],
                num_layers=layers_per_block[level] + 1,
                in_channels=block_out_channels[max(level - 1, 0)],  # of the last skip: what entered the level
                out_channels=block_out_channels[level],
                prev_output_channel=channels,
                add_upsample=level > 0,
                num_attention_heads=num_attention_heads[level],
                attention_head_dim=num_attention_heads[level],
                **resnet_settings,
                **text_settings,
            )
            self.up_blocks.append(block)
            channels = block_out_channels[level]

        # Outputs
        head_channels = (block_out_channels[-1], *reversed(block_out_channels))
        self.logit_heads = nn.ModuleList(LogitHead(channels, norm_num_groups) for channels in head_channels)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> InvSRDiscriminatorOutput | tuple[list[torch.Tensor]]:
        r"""
        Args:
            sample (`torch.Tensor`):
                Clean latents times the VAE's scaling factor, `(batch, in_channels, height, width)`, of any size.
                Estimates must be clamped to ±10.
            timestep (`torch.Tensor` or `int`):
                Schedule *index* of the starting timestep (199 for the paper's step 200): one for all latents, or one
                per image, of shape `(batch,)`.
            encoder_hidden_states (`torch.Tensor`, *optional*):
                Text embeddings of shape `(batch, tokens, cross_attention_dim)`, or `(1, tokens, cross_attention_dim)`
                for all latents. Required unless `cross_attention_dim` is `None`, when it has no effect.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`InvSRDiscriminatorOutput`] instead of a tuple.

        Returns:
            [`InvSRDiscriminatorOutput`] or a tuple with its `logits`. With `n` levels, the first map has the latents'
            resolution halved `n - 1` times, each time rounded up; each further map undoes one halving, and the last,
            whose block does not upsample, has the full resolution again.

        Raises:
            ValueError: If the text embeddings are missing or have another shape.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        if self.add_embedding is None:
            text = None
        else:
            self._check_text(encoder_hidden_states, sample.shape[0])
            temb = temb + self.add_embedding(encoder_hidden_states)
            text = encoder_hidden_states.expand(sample.shape[0], -1, -1)

        features = self.conv_features(sample)
        hidden_states = self.conv_in(sample)
        skips = (hidden_states,)
        for block in self.down_blocks:
            resized = F.interpolate(features, size=hidden_states.shape[-2:], mode="bicubic", align_corners=False)
            hidden_states, block_skips = self._run(block, torch.cat([hidden_states, resized], dim=1), temb, text)
            skips += block_skips

        hidden_states = self._run(self.mid_block, hidden_states, temb, text)
        logits = [self.logit_heads[0](hidden_states)]
        for block, head in zip(self.up_blocks, self.logit_heads[1:]):
            block_skips, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            # Halving an odd size rounds up, so the level above says what the size was.
            upsample_size = skips[-1].shape[-2:] if skips else None
            hidden_states = self._run(
                block, hidden_states, temb, text, res_hidden_states_tuple=block_skips, upsample_size=upsample_size
            )
            logits.append(head(hidden_states))

        if not return_dict:
            return (logits,)
        return InvSRDiscriminatorOutput(logits=logits)

    def _check_text(self, encoder_hidden_states: torch.Tensor | None, batch_size: int):
        width = self.config["cross_attention_dim"]
        if encoder_hidden_states is None:
            raise ValueError(f"`encoder_hidden_states` must be text embeddings of width {width}, got None.")
        shape = tuple(encoder_hidden_states.shape)
        if len(shape) != 3 or shape[0] not in (1, batch_size) or shape[2] != width:
            raise ValueError(
                f"`encoder_hidden_states` must have the shape `(1 or {batch_size}, tokens, {width})`, got {shape}."
            )

    @staticmethod
    def _run(block: nn.Module, hidden_states: torch.Tensor, temb: torch.Tensor, text: torch.Tensor | None, **kwargs):
        """Plain blocks take no text."""
        if getattr(block, "has_cross_attention", False):
            kwargs["encoder_hidden_states"] = text
        return block(hidden_states, temb=temb, **kwargs)
