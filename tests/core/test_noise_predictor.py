import json

import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor
from helpers import FIXTURES

from diffusers_invsr import InvSRNoisePredictor


SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1, "temb_channels": 64, "attention_head_dim": 8}


def test_default_configuration_is_the_published_network():
    published = json.loads((FIXTURES / "noise_predictor_full_keys.json").read_text())
    with torch.device("meta"):
        models = InvSRNoisePredictor(), InvSRNoisePredictor(**published["config"])
    for model in models:
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == published["state_dict"]
        assert model.num_parameters() == published["parameters"] == 33_837_576


@pytest.mark.parametrize("index", range(3))
def test_matches_reference(reference_pipe, cases, tensors, index):
    timestep = torch.tensor(cases["noise_predictor_cases"][index]["timestep_index"])
    with torch.no_grad():
        dist = reference_pipe.noise_predictor(2 * tensors[f"predictor.{index}.image"] - 1, timestep).latent_dist
    torch.testing.assert_close(dist.mean, tensors[f"predictor.{index}.mean"], atol=1e-4, rtol=0)
    torch.testing.assert_close(dist.logvar, tensors[f"predictor.{index}.logvar"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("block_type", ["AttnDownBlock2D", "DownBlock2D"])
def test_each_further_level_halves_the_resolution(levels, block_type):
    model = InvSRNoisePredictor(
        down_block_types=(block_type,) * levels,
        block_out_channels=(32,) * levels,
        layers_per_block=1,
        temb_channels=64,
        attention_head_dim=8,
        latent_channels=5,
    )
    dist = model(torch.rand(2, 3, 24, 32), 199).latent_dist
    assert dist.mean.shape == dist.logvar.shape == (2, 5, 24 >> levels - 1, 32 >> levels - 1)


@pytest.mark.parametrize("timestep", [199, torch.tensor(199), torch.tensor([199]), torch.tensor([199.0, 199.0])])
def test_timestep_may_be_one_for_all_or_one_an_image(timestep):
    torch.manual_seed(0)
    model = InvSRNoisePredictor(**SMALL).eval()
    image = torch.rand(2, 3, 16, 16)
    expected = model(image, torch.tensor([199, 199])).latent_dist.mean
    assert torch.equal(model(image, timestep).latent_dist.mean, expected)
    assert not torch.equal(model(image, 99).latent_dist.mean, expected)


def test_without_double_z_the_map_is_its_mean():
    dist = InvSRNoisePredictor(**SMALL, double_z=False)(torch.rand(1, 3, 16, 16), 199, return_dict=False)[0]
    assert dist.mean.shape == (1, 4, 8, 8)
    torch.testing.assert_close(dist.sample(), dist.mean, atol=1e-5, rtol=0)


def test_gradient_checkpointing_keeps_the_gradients():
    torch.manual_seed(0)
    model = InvSRNoisePredictor(**SMALL)
    image = torch.rand(1, 3, 16, 16)

    def gradients():
        model.zero_grad()
        dist = model(image, 199).latent_dist
        (dist.mean.sum() + dist.logvar.sum()).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.enable_gradient_checkpointing()
    model.train()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_takes_attention_processors():
    model = InvSRNoisePredictor(**SMALL).eval()
    image = 2 * torch.rand(1, 3, 16, 16) - 1
    with torch.no_grad():
        before = model(image, 199).moments
        model.set_attn_processor(SlicedAttnProcessor(1))
        after = model(image, 199).moments
    assert {type(processor) for processor in model.attn_processors.values()} == {SlicedAttnProcessor}
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    model = InvSRNoisePredictor(**SMALL).eval()
    image = torch.rand(1, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image, 199).latent_dist.mean, model(image, 199).latent_dist.mean)


def test_wrong_number_of_levels_is_refused():
    with pytest.raises(ValueError, match="one entry per level, got 2, 1 and 1"):
        InvSRNoisePredictor(block_out_channels=(32,), layers_per_block=1)
