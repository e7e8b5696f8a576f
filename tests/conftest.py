import os


# No test touches the network; set before huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers import FIXTURES, reset_accelerate
from safetensors.torch import load_file

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline, InvSRScheduler


def pytest_configure(config: pytest.Config):
    if config.option.markexpr != "long":
        torch.set_num_threads(1)  # several only slow such small models down


@pytest.fixture(scope="session")
def cases() -> dict:
    """Configurations and parameters of the reference cases."""
    return json.loads((FIXTURES / "cases.json").read_text())


@pytest.fixture(scope="session")
def tensors() -> dict[str, torch.Tensor]:
    """Inputs and outputs of the reference cases."""
    return load_file(FIXTURES / "cases.safetensors")


@pytest.fixture(scope="session")
def prompt_embeds(tensors) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in ("prompt_embeds", "negative_prompt_embeds")}


@pytest.fixture
def reference_pipe(cases) -> InvSRPipeline:
    """Small SD-shaped pipeline with the reference's weights; it has neither text encoder nor prompt embeddings."""
    weights = load_file(FIXTURES / "weights.safetensors")
    components = {
        "vae": AutoencoderKL(**cases["vae"]),
        "unet": UNet2DConditionModel(**cases["unet"]),
        "noise_predictor": InvSRNoisePredictor(**cases["noise_predictor"]),
    }
    for name, component in components.items():
        prefix = f"{name}."
        component.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        component.eval()
    scheduler = InvSRScheduler(**cases["scheduler"])
    pipe = InvSRPipeline(text_encoder=None, tokenizer=None, scheduler=scheduler, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(reference_pipe, prompt_embeds):
    """The reference pipeline, called with its prompt embeddings, untiled tensors out, unless asked otherwise."""

    def call(image, **arguments):
        generator = torch.Generator().manual_seed(0)
        defaults = {"tile_size": None, "output_type": "pt", "generator": generator, **prompt_embeds}
        return reference_pipe(image, **{**defaults, **arguments}).images

    call.pipeline = reference_pipe
    return call


@pytest.fixture
def fresh_accelerator():
    yield
    reset_accelerate()


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Where a resumed run is the same to the last bit."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


@pytest.fixture
def warnings(caplog):
    """Texts of the warnings so far."""
    return lambda: [record.getMessage() for record in caplog.records if "tile_by_tile" in record.name]
