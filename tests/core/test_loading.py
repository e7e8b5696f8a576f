"""Saving, and every way of loading from a folder with the package installed."""

import copy
import gc
import json
import logging
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from sd_turbo import enlarge, save_sd_turbo

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline, InvSRScheduler, convert


@pytest.fixture(scope="module")
def base(tmp_path_factory, cases) -> Path:
    """A folder like SD-Turbo's."""
    folder = tmp_path_factory.mktemp("base")
    save_sd_turbo(folder, cases)
    return folder


@pytest.fixture(scope="module")
def folder(base, cases) -> Path:
    """A saved pipeline."""
    folder = base / "invsr"
    torch.manual_seed(1)
    predictor = InvSRNoisePredictor(**cases["noise_predictor"])
    convert(predictor, base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder) -> torch.Tensor:
    """What the saved pipeline makes of an image."""
    return enlarge(InvSRPipeline.from_pretrained(folder))


@pytest.fixture
def warnings():
    """The warnings that diffusers logs."""
    records = []

    class Recorder(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    recorder = Recorder(logging.WARNING)
    logging.getLogger("diffusers").addHandler(recorder)
    yield records
    logging.getLogger("diffusers").removeHandler(recorder)


def assert_same_weights(pipe: InvSRPipeline, other: InvSRPipeline):
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            state_dict = getattr(other, name).state_dict()
            assert state_dict.keys() == component.state_dict().keys()
            assert all(torch.equal(tensor, state_dict[key]) for key, tensor in component.state_dict().items()), name


@pytest.mark.parametrize("pipeline_class", [InvSRPipeline, DiffusionPipeline])
def test_load_folder(folder, expected, warnings, pipeline_class):
    pipe = pipeline_class.from_pretrained(folder)
    assert type(pipe) is InvSRPipeline
    assert isinstance(pipe.scheduler, InvSRScheduler)
    assert isinstance(pipe.noise_predictor, InvSRNoisePredictor)
    assert not pipe.noise_predictor.training
    assert torch.equal(enlarge(pipe), expected)
    assert warnings == []


def test_saved_again_is_the_same(folder, tmp_path, expected):
    pipe = InvSRPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path)
    again = InvSRPipeline.from_pretrained(tmp_path)
    assert_same_weights(pipe, again)
    assert torch.equal(enlarge(again), expected)
    for file in folder.rglob("*.*"):
        if file.name != "tokenizer.json":  # a tokenizer notes there how it was last used
            assert (tmp_path / file.relative_to(folder)).read_bytes() == file.read_bytes(), file.name


def test_no_local_path_is_saved(base, folder, tmp_path):
    InvSRPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    InvSRNoisePredictor.from_pretrained(folder / "noise_predictor").save_pretrained(tmp_path / "predictor")
    for file in tmp_path.rglob("*.json"):
        content = file.read_text()
        assert "_name_or_path" not in content, file
        assert str(base) not in content, file


def test_only_own_files_are_changed(folder, tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"_name_or_path": "kept"}')
    InvSRPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    assert json.loads(other.read_text()) == {"_name_or_path": "kept"}


def test_index_names_the_package(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "InvSRPipeline"
    assert index["noise_predictor"] == ["diffusers_invsr", "InvSRNoisePredictor"]
    assert index["scheduler"] == ["diffusers_invsr", "InvSRScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_load_from_sd_turbo(base, folder, expected, warnings):
    pipe = InvSRPipeline.from_pretrained(
        base,
        noise_predictor=InvSRNoisePredictor.from_pretrained(folder / "noise_predictor"),
        scheduler=InvSRScheduler.from_pretrained(base, subfolder="scheduler"),
    )
    assert torch.equal(enlarge(pipe), expected)
    assert warnings == []


def test_dtype(folder, expected):
    pipe = InvSRPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)} == {torch.bfloat16}
    assert (enlarge(pipe) - expected).abs().max() < 0.05


def test_variant(folder, tmp_path):
    pipe = InvSRPipeline.from_pretrained(folder, dtype=torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    for name in ("vae", "unet", "noise_predictor"):
        assert [file.name for file in (tmp_path / name).glob("*.safetensors")] == [
            "diffusion_pytorch_model.fp16.safetensors"
        ]
    assert_same_weights(pipe, InvSRPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16))
    with pytest.raises(ValueError, match="variant"):
        InvSRPipeline.from_pretrained(folder, variant="fp16")


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map(folder, expected, device_map):
    pipe = DiffusionPipeline.from_pretrained(folder, device_map=device_map)
    assert (enlarge(pipe) - expected).abs().max() < 1e-5


def test_fixed_embeddings_serve_their_own_prompt_alone(folder, tmp_path):
    pipe = InvSRPipeline.from_pretrained(folder)
    pipe.drop_text_encoder()
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`prompt` of the configuration must be .* got 'a house'"):
        enlarge(InvSRPipeline.from_pretrained(tmp_path, prompt="a house"))


def test_textual_inversion(folder, tmp_path):
    pipe = InvSRPipeline.from_pretrained(folder)
    plain = enlarge(pipe, prompt="a thing")
    torch.save({"<thing>": torch.ones(pipe.text_encoder.config.hidden_size)}, tmp_path / "thing.bin")
    pipe.load_textual_inversion(str(tmp_path), weight_name="thing.bin", token="<thing>")
    assert not torch.equal(enlarge(pipe, prompt="a <thing>"), plain)
    assert torch.equal(enlarge(pipe, prompt="a thing"), plain)


def test_embeddings_follow_the_text_encoders_weights(folder, expected):
    pipe = InvSRPipeline.from_pretrained(folder)
    assert torch.equal(enlarge(pipe), expected)
    with torch.no_grad():
        for weight in pipe.text_encoder.parameters():
            weight.mul_(1.5)
    assert not torch.equal(enlarge(pipe), expected)


@pytest.mark.parametrize("duplicate", [lambda pipe: pickle.loads(pickle.dumps(pipe)), copy.copy, copy.deepcopy])
def test_copies_after_a_call(folder, expected, duplicate):
    pipe = InvSRPipeline.from_pretrained(folder)
    enlarge(pipe)
    assert (enlarge(duplicate(pipe)) - expected).abs().max() < 1e-5


def test_a_dropped_text_encoder_is_freed_though_it_was_offloaded(folder):
    pipe = InvSRPipeline.from_pretrained(folder)
    pipe.enable_model_cpu_offload(device=torch.device("cpu"))
    encoder = weakref.ref(pipe.text_encoder)
    pipe.drop_text_encoder()
    gc.collect()
    assert encoder() is None


def test_lora_of_a_text_encoder_is_left_out_where_there_is_none(folder, caplog):
    logger = logging.getLogger("diffusers_invsr.fixed_prompts")
    logger.addHandler(caplog.handler)
    InvSRPipeline.load_lora_into_text_encoder({"unet.a": None}, None, None)
    assert not caplog.text
    InvSRPipeline.load_lora_into_text_encoder({"text_encoder.a": None}, None, None, prefix=None)
    logger.removeHandler(caplog.handler)
    assert "layers for a text encoder are left out" in caplog.text


@pytest.mark.parametrize("without_text", [False, True])
def test_from_pipe(folder, expected, warnings, without_text):
    pipe = InvSRPipeline.from_pretrained(folder, tile_size=64)
    if without_text:
        pipe.drop_text_encoder()
    warnings.clear()
    other = InvSRPipeline.from_pipe(pipe, prompt="another")
    assert all(part is pipe.components[name] for name, part in other.components.items())
    assert other.config.tile_size == 64
    assert not any("not switched over" in warning for warning in warnings)
    assert (enlarge(InvSRPipeline.from_pipe(pipe)) - expected).abs().max() < 1e-5


def test_from_pipe_of_sd_turbo(base, folder, expected):
    source = StableDiffusionPipeline.from_pretrained(base)
    parts = InvSRPipeline.from_pretrained(folder)
    pipe = InvSRPipeline.from_pipe(source, noise_predictor=parts.noise_predictor, scheduler=parts.scheduler)
    assert (enlarge(pipe) - expected).abs().max() < 1e-5


def test_offloading_follows_the_order_of_use(folder):
    pipe = InvSRPipeline.from_pretrained(folder)
    used = []
    for name in pipe.model_cpu_offload_seq.split("->"):
        module = pipe.vae.decoder if name == "vae" else getattr(pipe, name)
        module.register_forward_pre_hook(lambda *_, name=name: used.append(name))
    enlarge(pipe)
    assert list(dict.fromkeys(used)) == pipe.model_cpu_offload_seq.split("->")


@pytest.mark.parametrize("without_text", [False, True])
def test_offloading_hooks(folder, expected, without_text):
    pipe = InvSRPipeline.from_pretrained(folder)
    if without_text:
        pipe.drop_text_encoder()
    # Without a device, diffusers refuses to offload from a CPU.
    pipe.enable_model_cpu_offload(device=torch.device("cpu"))
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(pipe._all_hooks) == len(modules)
    assert (enlarge(pipe) - expected).abs().max() < 1e-5


def test_without_text_encoder(folder, expected, tmp_path):
    pipe = InvSRPipeline.from_pretrained(folder)
    pipe.drop_text_encoder()
    pipe.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "fixed_prompt",
        "model_index.json",
        "noise_predictor",
        "scheduler",
        "unet",
        "vae",
    }
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert_same_weights(pipe, again)
    assert torch.equal(enlarge(again), enlarge(InvSRPipeline.from_pretrained(tmp_path)))
    assert (enlarge(again) - expected).abs().max() < 1e-5
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(ValueError, match=f"`{name}='a house'` needs a text encoder"):
            enlarge(again, **{name: "a house"})


def test_predictor_alone(folder, tmp_path):
    predictor = InvSRNoisePredictor.from_pretrained(folder, subfolder="noise_predictor")
    predictor.save_pretrained(tmp_path)
    again = InvSRNoisePredictor.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in predictor.state_dict().items())
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
