"""float32 against float64, at a quarter of SD-Turbo's channels, with activations whose means are large."""

import copy

import pytest
import torch
from helpers import generator, photo
from random_sd_turbo import build_pipeline
from torch import nn

from diffusers_invsr.group_norm import ExactGroupNorm, group_norm


@pytest.fixture(scope="module")
def lively():
    """As of real autoencoders: convolutions whose outputs have a mean of a few standard deviations."""
    pipe = build_pipeline(width=1 / 4, text=False)
    pipe.set_progress_bar_config(disable=True)
    source = generator(1)
    for network in (pipe.vae, pipe.unet, pipe.noise_predictor):
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.bias.data += 2 + torch.randn(module.bias.shape, generator=source) / 2
            elif isinstance(module, nn.GroupNorm):
                module.weight.data *= 1.5
    return pipe


def run_networks(pipe) -> dict[str, torch.Tensor]:
    """Each network by itself, on inputs laid out as the pipeline's."""
    dtype = pipe.unet.dtype
    lr, enlarged, latents = (
        tensor.to(dtype).contiguous(memory_format=torch.channels_last)
        for tensor in (
            2 * photo(32, 32) - 1,
            2 * photo(128, 128) - 1,
            torch.randn(1, 4, 16, 16, generator=generator()),
        )
    )
    embeds = pipe.fixed_prompt.prompt_embeds.to(dtype)
    return {
        "noise predictor": pipe.noise_predictor(lr, 199).latent_dist.mean,
        "encoder": pipe.vae.encode(enlarged).latent_dist.mean,
        "unet": pipe.unet(latents, 199, encoder_hidden_states=embeds).sample,
        "decoder": pipe.vae.decode(latents).sample,
    }


@torch.no_grad()
def test_float32_is_as_good_as_float64(lively):
    exact = copy.deepcopy(lively).to(torch.float64)
    arguments = {"num_steps": 2, "tile_size": 64, "output_type": "pt"}
    expected = exact(photo(64, 64), **arguments, generator=generator()).images
    result = lively(photo(64, 64), **arguments, generator=generator()).images
    assert expected.std() > 0.05
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    with ExactGroupNorm():
        outputs = run_networks(lively)
    for name, reference in run_networks(exact).items():
        torch.testing.assert_close(outputs[name].double(), reference, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("shape, groups", [((1, 128, 96, 96), 32), ((3, 8, 5, 7), 1), ((2, 6, 2, 3), 6)])
def test_group_norm_of_large_means(shape, groups, dtype, tolerance):
    """Where PyTorch's kernel for this layout is off by a thousand times as much."""
    weight, bias = torch.rand(2, shape[1], generator=generator()) + 0.5
    spread = torch.randn(shape, generator=generator()).contiguous(memory_format=torch.channels_last)
    for mean in (0, 5, 300) if dtype == torch.float32 else (0, 5):
        image = (spread + mean).to(dtype)
        for affine in ((weight.to(dtype), bias.to(dtype)), (None, None)):
            expected = torch.nn.functional.group_norm(
                image.double(), groups, *(None if value is None else value.double() for value in affine)
            )
            result = group_norm(image, groups, *affine)
            assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(result.double(), expected, atol=tolerance * max(mean, 1), rtol=tolerance)
