"""Latent LPIPS (section 3.3 of the paper): the perceptual distance of two latents, without decoding them."""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..checkpoint_files import CHECKPOINT_SUFFIXES, check_state_dict, find_checkpoint, read_checkpoint


CONVOLUTIONS = (2, 2, 3, 3, 3)  # of VGG16's five levels
POOLED_LEVEL = 4  # the only level that still begins with a max-pool
INITIAL_WEIGHT = 0.1  # of the linear layers, about the mean of LPIPS' own


class VGG16Trunk(nn.Module):
    """
    VGG16's convolutions up to relu5_3, with torchvision's indices as names. Returns the features of the five levels,
    each `(batch, channels, height, width)`. Arguments as in [`LatentLPIPS`].
    """

    def __init__(self, in_channels: int, block_out_channels: tuple[int, ...]):
        super().__init__()
        index = 0
        for level, (out_channels, num_convolutions) in enumerate(zip(block_out_channels, CONVOLUTIONS)):
            block = nn.Sequential()
            if level > 0:
                # Latents are small already: the first three pools are omitted, but they keep their indices.
                if level == POOLED_LEVEL:
                    block.add_module(str(index), nn.MaxPool2d(2))
                index += 1
            for _ in range(num_convolutions):
                convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
                nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
                nn.init.zeros_(convolution.bias)
                block.add_module(str(index), convolution)
                block.add_module(str(index + 1), nn.ReLU(inplace=True))
                in_channels = out_channels
                index += 2
            self.add_module(f"slice{level + 1}", block)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for block in self.children():
            x = block(x)
            features.append(x)
        return features


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Features `(batch, channels, height, width)` scaled to unit length along the channels, in float32."""
    features = features.float()
    # Unlike a square root, `vector_norm` has a gradient at zero.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _with_both_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict whose linear layers have one of their names (`lin0`, `lins.0`) or both, with both."""
    pairs = [(f"lin{level}.model.1.weight", f"lins.{level}.model.1.weight") for level in range(len(CONVOLUTIONS))]
    names = dict(pairs) | {second: first for first, second in pairs}
    return {names[key]: value for key, value in state_dict.items() if key in names} | state_dict


class LatentLPIPS(ModelMixin, ConfigMixin):
    r"""
    LPIPS ([Zhang et al., 2018](https://arxiv.org/abs/1801.03924)) of latents, the perceptual part of InvSR's training
    loss (section 3.3 of the [InvSR paper](https://arxiv.org/abs/2412.09013)).

        d(x, y) = Σ_l mean_hw( w_l · (φ̂_l(x) − φ̂_l(y))² )

    with the features φ̂_l of relu1_2, 2_2, 3_3, 4_3 and 5_3 of a VGG16 whose first convolution takes the latents and
    whose first three max-pools are removed, scaled to unit length along the channels, and a weight w_l ≥ 0 for each
    channel.

    Both latents are scaled by the VAE's scaling factor and have the shape `(batch, in_channels, height, width)`, 2 × 2
    or larger; the distance has the shape `(batch,)`, is 0 or more, and 0 for equal latents.

    The defaults are the published network (14.72 M parameters) with the keys of the published file. The weights are
    random; see [`~LatentLPIPS.from_vgg16`] and [`load_latent_lpips`]. In training mode the dropout of LPIPS' linear
    layers is active; as a loss, use the network in evaluation mode and frozen.

    Args:
        in_channels (`int`, defaults to 4): Channels of the latents.
        block_out_channels (`tuple[int]`, defaults to `(64, 128, 256, 512, 512)`): Channels of each of the five levels.

    Raises:
        ImportError: If `lpips` is not installed.
        ValueError: If `block_out_channels` does not have five entries.
    """

    @register_to_config
    def __init__(self, in_channels: int = 4, block_out_channels: tuple[int, ...] = (64, 128, 256, 512, 512)):
        super().__init__()
        import lpips  # requires torchvision, which not every build of torch has; training works without this loss

        if len(block_out_channels) != len(CONVOLUTIONS):
            raise ValueError(
                f"`block_out_channels` must have an entry for each of VGG16's {len(CONVOLUTIONS)} levels, got"
                f" {block_out_channels!r}."
            )
        # Part of the published file, but meant for RGB images: it has no effect on latents.
        self.scaling_layer = lpips.ScalingLayer()
        self.net = VGG16Trunk(in_channels, block_out_channels)
        layers = [lpips.NetLinLayer(channels, use_dropout=True) for channels in block_out_channels]
        for level, layer in enumerate(layers):
            nn.init.constant_(layer.model[-1].weight, INITIAL_WEIGHT)
            self.add_module(f"lin{level}", layer)
        self.lins = nn.ModuleList(layers)
        self.register_state_dict_post_hook(self._untie)

    @staticmethod
    def _untie(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, local_metadata: dict[str, Any]):
        """The linear layers have two names, but a safetensors file has no tensor twice: one name gets a copy."""
        for key in [key for key in state_dict if key.startswith(f"{prefix}lins.")]:
            state_dict[key] = state_dict[key].clone()

    @classmethod
    def from_vgg16(cls, weights: str | os.PathLike | None = None, in_channels: int = 4) -> "LatentLPIPS":
        r"""
        The network before it is trained: VGG16 trained on ImageNet, with LPIPS' linear layers for RGB images.

        Each filter of the first convolution becomes its mean over the colours for all latent channels, times
        `3 / in_channels`: the sum of its weights stays the same, and with it the scale of its output.

        Args:
            weights (`str` or `os.PathLike`, *optional*):
                File of the state dict of torchvision's VGG16; by default torchvision downloads it.
            in_channels (`int`, defaults to 4): Channels of the latents.

        Returns:
            [`LatentLPIPS`]: The network, in training mode.

        Raises:
            OSError: If the weights could not be downloaded.
            ValueError: If the file does not have VGG16's tensors.
        """
        import lpips

        if weights is None:
            from torchvision.models import VGG16_Weights

            try:
                vgg16 = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
            except (OSError, RuntimeError) as error:
                raise OSError(
                    f"torchvision could not download VGG16's ImageNet weights ({error}): pass `weights`, the path of"
                    " a file of its state dict."
                ) from error
        else:
            vgg16 = read_checkpoint(weights)

        with torch.device("meta"):
            expected = cls(in_channels=3).net.state_dict()
        # "slice2.5.weight" here is "features.5.weight" there.
        names = {key: f"features.{key.split('.', 1)[1]}" for key in expected}
        trunk = {key: vgg16[name] for key, name in names.items() if name in vgg16}
        check_state_dict(trunk, expected, str(weights or "VGG16"))
        colours = trunk["slice1.0.weight"]
        trunk["slice1.0.weight"] = colours.mean(dim=1, keepdim=True).repeat(1, in_channels, 1, 1) * (3 / in_channels)

        model = cls(in_channels=in_channels)
        model.net.load_state_dict(trunk)
        linear = torch.load(
            Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True
        )
        model.load_state_dict(model.state_dict() | _with_both_names(linear))
        return model

    @torch.no_grad()
    def clamp_weights(self):
        """Set negative weights of the linear layers to zero, so that no difference reduces the distance."""
        for layer in self.lins:
            layer.model[-1].weight.clamp_(min=0)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            x (`torch.Tensor`):
                Latents times the VAE's scaling factor, `(batch, in_channels, height, width)`, 2 × 2 or larger.
            y (`torch.Tensor`): Latents to compare them with, of the same shape.

        Returns:
            `torch.Tensor`: Distances of shape `(batch,)`, in float32, 0 or more.

        Raises:
            ValueError: If the shapes differ or are invalid.
        """
        channels = self.config["in_channels"]
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < 2:
            raise ValueError(
                f"`x` and `y` must have the same shape `(batch, {channels}, height, width)`, 2 × 2 or larger, got"
                f" {tuple(x.shape)} and {tuple(y.shape)}."
            )
        # Separately, not as one batch: no features are kept for the side that needs no gradient, the target.
        features_x, features_y = self.net(x.to(self.dtype)), self.net(y.to(self.dtype))
        distance = x.new_zeros(x.shape[0], dtype=torch.float32)
        for feature_x, feature_y, layer in zip(features_x, features_y, self.lins):
            dropout, linear = layer.model
            difference = dropout((_unit(feature_x) - _unit(feature_y)).square()).mean(dim=(2, 3), keepdim=True)
            # The 1×1 convolution, after the spatial mean since both are linear, and in float32 under autocast too.
            distance = distance + (linear.weight * difference).sum(dim=(1, 2, 3))
        return distance


def load_latent_lpips(source: str | os.PathLike, config: dict[str, Any] | None = None) -> LatentLPIPS:
    r"""
    Load a latent LPIPS as a loss, from a file in the published format or a folder of `save_pretrained`.

    Args:
        source (`str` or `os.PathLike`):
            A `.pth`, `.pt` or `.safetensors` file, such as the published `vgg16_sdturbo_lpips.pth`, with the linear
            layers under one of their names (`lin0`, `lins.0`) or both; one on the Hub, as `"owner/repository/file"`;
            or a folder in diffusers' format.
        config (`dict`, *optional*): Configuration of the network in a file; by default the published one.

    Returns:
        [`LatentLPIPS`]: The network, in evaluation mode and frozen, in float32.

    Raises:
        FetchError: If it could not be fetched from the Hub.
        FileNotFoundError: If there is no such file or folder.
        ValueError: If names or shapes in the file do not match the configuration, or `source` is something else.
    """
    source = Path(source)
    if source.is_dir():
        if config is not None:
            raise ValueError(
                f"`config` must be None for the folder `source={str(source)!r}`, which has its own configuration."
            )
        if not (source / LatentLPIPS.config_name).is_file():
            raise ValueError(f"`source={str(source)!r}` must be a folder with a {LatentLPIPS.config_name}.")
        return LatentLPIPS.from_pretrained(source, torch_dtype=torch.float32).eval().requires_grad_(False)
    if source.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(f"`source` must be a folder or a {', '.join(CHECKPOINT_SUFFIXES)} file, got {str(source)!r}.")

    with torch.device("meta"):
        model = LatentLPIPS.from_config(config or {})
    state_dict = _with_both_names(read_checkpoint(find_checkpoint(str(source))))
    check_state_dict(state_dict, model.state_dict(), str(source))
    model.load_state_dict({key: value.float() for key, value in state_dict.items()}, assign=True)
    return model.eval().requires_grad_(False)
