"""The noise predictor of InvSR: the noise map of the starting step, predicted from the LR image (section 3.2)."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from diffusers.utils import BaseOutput
from torch import nn

from .hub import HubMixin


@dataclass
class InvSRNoisePredictorOutput(BaseOutput):
    """
    Output of [`InvSRNoisePredictor`].

    Args:
        latent_dist (`DiagonalGaussianDistribution`):
            Distribution of the noise map, with `mean` and `logvar` (clamped to [-30, 20]) of shape
            `(batch, latent_channels, height // r, width // r)`, where `r = 2 ** (levels - 1)`.
        moments (`torch.Tensor`, *optional*):
            Mean and log-variance (not clamped) in one tensor, along the channels. What shards a model over devices
            (FSDP) hooks the tensors of its output, and does not look for them in a distribution.
    """

    latent_dist: DiagonalGaussianDistribution
    moments: torch.Tensor | None = None


def draw(dist: DiagonalGaussianDistribution, noise: torch.Tensor) -> torch.Tensor:
    r"""
    Draw from a Gaussian distribution in float32: mean + exp(logvar / 2) · ξ.

    Args:
        dist (`DiagonalGaussianDistribution`): `mean` and `logvar` of shape `(batch, channels, height, width)`.
        noise (`torch.Tensor`): ξ, standard Gaussian noise of the same shape.

    Returns:
        `torch.Tensor`: The sample, of the same shape, in float32.
    """
    return dist.mean.float() + torch.exp(0.5 * dist.logvar.float()) * noise


class NoiseEncoder(nn.Module):
    """Time-conditioned encoder with the module names of the published checkpoint. Arguments as in the predictor."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        down_block_types: tuple[str, ...],
        block_out_channels: tuple[int, ...],
        layers_per_block: tuple[int, ...],
        act_fn: str,
        norm_num_groups: int,
        mid_block_add_attention: bool,
        resnet_time_scale_shift: str,
        temb_channels: int,
        attention_head_dim: int,
        freq_shift: int,
        flip_sin_to_cos: bool,
    ):
        super().__init__()
        block_settings = {
            "temb_channels": temb_channels,
            "resnet_eps": 1e-6,
            "resnet_act_fn": act_fn,
            "resnet_groups": norm_num_groups,
            "resnet_time_scale_shift": resnet_time_scale_shift,
            "attention_head_dim": attention_head_dim,
        }

        time_channels = max(128, block_out_channels[0])
        self.time_proj = Timesteps(time_channels, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(time_channels, temb_channels)
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=3, padding=1)

        self.down_blocks = nn.ModuleList()
        levels = zip(
            down_block_types, (block_out_channels[0], *block_out_channels), block_out_channels, layers_per_block
        )
        for level, (block_type, block_in, block_out, num_layers) in enumerate(levels):
            block = get_down_block(
                block_type,
                num_layers=num_layers,
                in_channels=block_in,
                out_channels=block_out,
                add_downsample=level < len(block_out_channels) - 1,
                downsample_padding=0,
                **block_settings,
            )
            self.down_blocks.append(block)
        self.mid_block = UNetMidBlock2D(
            block_out_channels[-1], add_attention=mid_block_add_attention, **block_settings
        )

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[-1], eps=1e-6)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(block_out_channels[-1], out_channels, kernel_size=3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        hidden_states = self.conv_in(sample)
        for block in self.down_blocks:
            hidden_states, _ = block(hidden_states, temb)
        hidden_states = self.mid_block(hidden_states, temb)
        return self.conv_out(self.conv_act(self.conv_norm_out(hidden_states)))


class InvSRNoisePredictor(HubMixin, ModelMixin, AttentionMixin, ConfigMixin):
    r"""
    Predicts the noise map with which the forward process reaches the starting step from the LR image ("partial noise
    prediction", section 3.2 of the [InvSR paper](https://arxiv.org/abs/2412.09013)).

    One network serves all starting steps through its time embedding. It works at LR resolution and returns the map at
    latent resolution: with `n` levels it reduces the resolution by `2 ** (n - 1)`, which must be the VAE's spatial
    factor over the scale factor (8 / 4 = 2 for the published weights, hence two levels).

    The defaults are the published network (33.84 M parameters); keys and argument names are those of the published
    checkpoint, so that its file loads unchanged.

    Args:
        in_channels (`int`, defaults to 3): Channels of the LR image.
        down_block_types (`tuple[str]`): Down block of each level: `"AttnDownBlock2D"` or `"DownBlock2D"`.
        up_block_types (`tuple[str]`): Part of published configurations; there is no decoder, so it has no effect.
        block_out_channels (`tuple[int]`): Channels of each level.
        layers_per_block (`int` or `tuple[int]`): ResNet (and attention) layers of each level.
        act_fn (`str`, defaults to `"silu"`): Activation of the ResNet blocks.
        latent_channels (`int`, defaults to 4): Channels of the noise map, those of the VAE's latents.
        norm_num_groups (`int`, defaults to 32): Groups of every GroupNorm.
        sample_size (`int`, defaults to 128): LR side in pixels that the network was trained at. For information.
        mid_block_add_attention (`bool`, defaults to `True`): Whether the middle block has an attention layer.
        resnet_time_scale_shift (`str`, defaults to `"default"`): How the ResNet blocks take the time embedding.
        temb_channels (`int`, defaults to 512): Width of the time embedding.
        attention_head_dim (`int`, defaults to 64): Channels of one attention head.
        freq_shift (`int`, defaults to 0): Frequency shift of the sinusoidal timestep projection.
        flip_sin_to_cos (`bool`, defaults to `True`): Whether the projection puts cosines first.
        double_z (`bool`, defaults to `True`):
            Whether the network returns a log-variance too. If `False`, the noise map is its mean alone.
        model_card (`dict`, *optional*):
            What the model card says of the weights: metadata of a Hub card (`license`, `base_model`, `datasets`, ...)
            and `training_data`, a text. For information.

    Raises:
        ValueError: If `down_block_types`, `block_out_channels` and `layers_per_block` differ in length.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "Attention"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        down_block_types: tuple[str, ...] = ("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D"),
        block_out_channels: tuple[int, ...] = (256, 512),
        layers_per_block: int | tuple[int, ...] = (3, 3),
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 128,
        mid_block_add_attention: bool = True,
        resnet_time_scale_shift: str = "default",
        temb_channels: int = 512,
        attention_head_dim: int = 64,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        double_z: bool = True,
        model_card: dict[str, Any] | None = None,
    ):
        super().__init__()
        if isinstance(layers_per_block, int):
            layers_per_block = (layers_per_block,) * len(block_out_channels)
        if not len(down_block_types) == len(block_out_channels) == len(layers_per_block):
            raise ValueError(
                "`down_block_types`, `block_out_channels` and `layers_per_block` need one entry per level, got"
                f" {len(down_block_types)}, {len(block_out_channels)} and {len(layers_per_block)}."
            )

        self.encoder = NoiseEncoder(
            in_channels=in_channels,
            out_channels=2 * latent_channels if double_z else latent_channels,
            down_block_types=down_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_add_attention,
            resnet_time_scale_shift=resnet_time_scale_shift,
            temb_channels=temb_channels,
            attention_head_dim=attention_head_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
        )

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> InvSRNoisePredictorOutput | tuple[DiagonalGaussianDistribution]:
        r"""
        Args:
            sample (`torch.Tensor`): LR images of shape `(batch, in_channels, height, width)`, in [-1, 1].
            timestep (`torch.Tensor` or `int`):
                Schedule *index* of the starting step (199 for the paper's step 200): one for all images, or one per
                image, of shape `(batch,)`.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`InvSRNoisePredictorOutput`] instead of a tuple.

        Returns:
            [`InvSRNoisePredictorOutput`] or a tuple with its `latent_dist`: the distribution of the noise map, of
            shape `(batch, latent_channels, height // r, width // r)` with `r = 2 ** (levels - 1)`.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        moments = self.encoder(sample, timestep)
        if not self.config["double_z"]:
            # The lower clamp of the log-variance: a standard deviation of 3e-7.
            moments = torch.cat([moments, torch.full_like(moments, -30.0)], dim=1)
        latent_dist = DiagonalGaussianDistribution(moments)

        if not return_dict:
            return (latent_dist,)
        return InvSRNoisePredictorOutput(latent_dist=latent_dist, moments=moments)
