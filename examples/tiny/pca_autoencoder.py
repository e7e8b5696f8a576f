"""An autoencoder whose encoder is not learned: a principal component analysis of 4x4 patches.

A learned encoder would spend most of a small budget on getting the colours right. Because this one is linear, errors
of latents can also be measured in the metric of pixels without decoding.
"""

import numpy as np
import torch
from diffusers import AutoencoderTiny


LATENT_CHANNELS = 16
RAW_LATENT_GAIN = 0.35  # keeps the PCA latents inside the range that DecoderTiny's tanh(x / 3) passes almost unchanged


def build_vae() -> AutoencoderTiny:
    """An [`AutoencoderTiny`] that reduces by 4, its encoder without blocks and thus linear."""
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(0, 0, 0),
        num_decoder_blocks=(2, 2, 1),
    )


def to_patches(image: np.ndarray) -> np.ndarray:
    """The 4x4 patches of an image in [0, 1], (number, 48), in the order in which the encoder gathers their pixels."""
    image = image[: image.shape[0] // 4 * 4, : image.shape[1] // 4 * 4].astype(np.float64) / 255
    blocks = image.reshape(image.shape[0] // 4, 2, 2, -1, 2, 2, 3)  # rows, y1, y0, columns, x1, x0, RGB
    return blocks.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, 48)


def set_pca_encoder(vae: AutoencoderTiny, photographs: list[np.ndarray], procedural: np.ndarray) -> torch.Tensor:
    """
    Set the encoder to space-to-depth followed by a PCA of 4x4 RGB patches, and the scaling factor to match.

    An encoder without blocks is linear: two strided convolutions, which here gather 2x2 neighbourhoods with single
    taps, and an output convolution, which here holds the components in its central tap. A component of standard
    deviation s is scaled by s**-1/2: halfway between the metric of pixels and whitening, so that noise hides fine
    components before coarse ones, as in other latent spaces, but does not drown them.

    Returns:
        `torch.Tensor`: The map from latents to patches, (channels, 48), for a loss in the metric of pixels.
    """
    natural = np.concatenate([to_patches(image) for image in photographs])
    drawn = np.concatenate([to_patches(image) for image in procedural[:64]])
    mean = natural.mean(axis=0)
    covariance = sum(w * (x - mean).T @ (x - mean) / len(x) for w, x in ((0.75, natural), (0.25, drawn)))
    variances, components = np.linalg.eigh(covariance)
    order = np.argsort(-variances)[:LATENT_CHANNELS]
    components, scales = components[:, order].T, RAW_LATENT_GAIN * variances[order] ** -0.25
    projection = components * scales[:, None]

    convolutions = [layer for layer in vae.encoder.layers if isinstance(layer, torch.nn.Conv2d)]
    with torch.no_grad():
        for convolution in convolutions:
            convolution.weight.zero_()
            if convolution.bias is not None:
                convolution.bias.zero_()
        for c in range(3):
            convolutions[0].weight[c, c, 1, 1] = 1
        # With stride 2 and padding 1, taps 1 and 2 of a 3x3 kernel see the pixels 2i and 2i + 1.
        for convolution, width in zip(convolutions[1:3], (3, 12)):
            for position in range(4):
                for c in range(width):
                    convolution.weight[position * width + c, c, 1 + position // 2, 1 + position % 2] = 1
        convolutions[3].weight[:, :, 1, 1] = torch.from_numpy(projection).float()
        convolutions[3].bias.copy_(torch.from_numpy(-projection @ mean))
    scaling_factor = float(1 / ((natural - mean) @ projection.T).std())
    vae.register_to_config(scaling_factor=scaling_factor)
    return torch.from_numpy(components / scales[:, None] / scaling_factor).float()
