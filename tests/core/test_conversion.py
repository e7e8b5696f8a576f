"""From published files to a pipeline."""

import json
from pathlib import Path

import pytest
import torch
from helpers import FIXTURES
from safetensors.torch import save_file
from sd_turbo import enlarge, save_sd_turbo

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline, InvSRScheduler, convert, load_noise_predictor
from diffusers_invsr.checkpoint_files import FetchError, check_state_dict
from diffusers_invsr.conversion import PUBLISHED_MODEL_CARD, save_whole
from diffusers_invsr.hub import create_model_card


CHECKPOINT = FIXTURES / "noise_predictor_original.pth"
EVIL_PICKLE = b"\x80\x02cposix\nsystem\nq\x00X\x02\x00\x00\x00lsq\x01\x85q\x02Rq\x03."  # would run `ls`


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    return torch.load(CHECKPOINT, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def config(cases) -> dict:
    return cases["noise_predictor"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, cases) -> Path:
    """A folder like SD-Turbo's."""
    folder = tmp_path_factory.mktemp("base")
    save_sd_turbo(folder, cases)
    return folder


def assert_has(predictor: InvSRNoisePredictor, state_dict: dict[str, torch.Tensor]):
    assert predictor.state_dict().keys() == state_dict.keys()
    assert all(torch.equal(tensor, state_dict[key]) for key, tensor in predictor.state_dict().items())


def test_published_file(state_dict, config, cases, tensors):
    predictor = load_noise_predictor(CHECKPOINT, config)
    assert not predictor.training
    assert predictor.dtype == torch.float32
    assert_has(predictor, state_dict)
    for index, case in enumerate(cases["noise_predictor_cases"]):
        image = tensors[f"predictor.{index}.image"]
        with torch.no_grad():
            latent_dist = predictor(2 * image - 1, torch.tensor(case["timestep_index"])).latent_dist
        torch.testing.assert_close(latent_dist.mean, tensors[f"predictor.{index}.mean"], atol=1e-4, rtol=0)
        torch.testing.assert_close(latent_dist.logvar, tensors[f"predictor.{index}.logvar"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_file_kinds_and_prefixes(state_dict, config, tmp_path, suffix, prefix):
    file = tmp_path / f"predictor.{suffix}"
    prefixed = {f"{prefix}{key}": tensor for key, tensor in state_dict.items()}
    if suffix == "safetensors":
        save_file(prefixed, file)
    else:
        torch.save(prefixed if suffix == "pt" else {"state_dict": prefixed, "iteration": 3}, file)
    assert_has(load_noise_predictor(str(file), config), state_dict)


def test_config_file(state_dict, config, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert_has(load_noise_predictor(CHECKPOINT, file), state_dict)


def test_dtype(config):
    assert load_noise_predictor(CHECKPOINT, config, dtype=torch.float16).dtype == torch.float16


def test_diffusers_folder(state_dict, config, tmp_path):
    load_noise_predictor(CHECKPOINT, config).save_pretrained(tmp_path)
    assert_has(load_noise_predictor(tmp_path), state_dict)
    with pytest.raises(ValueError, match="`config` cannot be given"):
        load_noise_predictor(tmp_path, config)


def test_training_goes_on(config):
    predictor = load_noise_predictor(CHECKPOINT, config).train()
    predictor(torch.zeros(1, 3, 16, 16), 199).latent_dist.mean.sum().backward()
    assert all(parameter.grad is not None for parameter in predictor.encoder.conv_in.parameters())


def test_published_configuration():
    """The keys and shapes of the published file are those of the default configuration."""
    published = json.loads((FIXTURES / "noise_predictor_full_keys.json").read_text())
    with torch.device("meta"):
        predictor = InvSRNoisePredictor()
        tensors = {key: torch.empty(shape) for key, shape in published["state_dict"].items()}
    check_state_dict(tensors, predictor.state_dict(), "published")
    assert sum(parameter.numel() for parameter in predictor.parameters()) == published["parameters"]
    for name, value in published["config"].items():
        expected = predictor.config[name]
        assert value == (list(expected) if isinstance(expected, tuple) else expected), name


def test_wrong_configuration():
    with pytest.raises(
        ValueError, match=r"(?s)does not fit .* missing \(.* of another shape \(.* instead of "
    ) as error:
        load_noise_predictor(CHECKPOINT)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_another_file(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="`source` must be a folder or a .*.safetensors file, got '.*photo.png'"):
        load_noise_predictor(tmp_path / "photo.png")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("encoder.conv_in.bias"), r"1 missing \(encoder.conv_in.bias\)\.$"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)\.$"),
        (
            lambda tensors: tensors.update({"encoder.conv_in.bias": torch.zeros(7)}),
            r"1 of another shape \(encoder.conv_in.bias \(7,\) instead of \(32,\)\)\.$",
        ),
        (
            lambda tensors: [tensors.pop(key) for key in list(tensors) if "conv_shortcut" in key or "mid" in key],
            r"\d+ missing \(.*, .*, .*, \.\.\.\)\.$",
        ),
    ],
    ids=["missing", "unexpected", "shape", "many"],
)
def test_wrong_keys_and_shapes(state_dict, config, tmp_path, change, message):
    tensors = dict(state_dict)
    change(tensors)
    torch.save(tensors, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=message):
        load_noise_predictor(tmp_path / "wrong.pth", config)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", EVIL_PICKLE])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_not_a_checkpoint(config, tmp_path, content, suffix):
    file = tmp_path / f"file.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a file of tensors") as refusal:
        load_noise_predictor(file, config)
    assert "weights_only" not in str(refusal.value)


def test_no_tensors(config, tmp_path):
    torch.save({"state_dict": {"encoder.conv_in.bias": [1.0]}}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="must hold named tensors"):
        load_noise_predictor(tmp_path / "file.pth", config)


@pytest.mark.parametrize(
    "source", ["OAOA/InvSR", "OAOA/InvSR/noise_predictor_sd_turbo_v5_diftune.pth", "nobody/nothing", "no such folder"]
)
def test_what_cannot_be_fetched(source):
    with pytest.raises(FetchError, match=r"could not be fetched from the Hub .*local copy.*`--model tiny`") as error:
        load_noise_predictor(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.pth", "folder/missing.pth", "./a/b/missing.safetensors", "/a/b/c.pt"])
def test_missing_file(source):
    with pytest.raises(FileNotFoundError, match="is neither a file nor one on the Hub"):
        load_noise_predictor(source)


def test_convert(base, config, tmp_path, state_dict):
    output = tmp_path / "deep" / "invsr"
    pipe = convert(CHECKPOINT, base, output, config)
    assert type(pipe) is InvSRPipeline
    assert_has(pipe.noise_predictor, state_dict)
    assert isinstance(pipe.scheduler, InvSRScheduler)
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert [entry.name for entry in output.parent.iterdir()] == ["invsr"]
    assert (enlarge(InvSRPipeline.from_pretrained(output)) - enlarge(pipe)).abs().max() < 1e-5
    assert (output / "pipeline.py").is_file() and (output / "noise_predictor" / "diffusers_invsr.py").is_file()
    card = (output / "README.md").read_text()
    assert "non-commercial" in card
    assert "license: other" in card


def test_convert_without_saving(base, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predictor = load_noise_predictor(CHECKPOINT, config)
    pipe = convert(predictor, base, dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
    assert list(tmp_path.iterdir()) == []


def test_output_is_not_replaced_unasked(base, config, tmp_path):
    output = tmp_path / "invsr"
    output.mkdir()
    (output / "diary.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="exists already: only a pipeline is replaced"):
            convert(CHECKPOINT, base, output, config, overwrite=overwrite)
    assert [file.name for file in output.iterdir()] == ["diary.txt"]

    output = tmp_path / "other"
    convert(CHECKPOINT, base, output, config)
    with pytest.raises(FileExistsError, match="with `overwrite=True`"):
        convert(CHECKPOINT, base, output, config)
    convert(CHECKPOINT, base, output, config, model_card={"license": "mit"}, overwrite=True)
    assert "license: mit" in (output / "README.md").read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["invsr", "other"]


def test_embeddings_have_as_many_tokens_as_the_fixed_negative_prompt(base, config):
    pipe = convert(CHECKPOINT, base, config=config)
    embeds = torch.zeros(1, 154, pipe.unet.config.cross_attention_dim)
    with pytest.raises(ValueError, match="Prompt and negative prompt must have equally many tokens, got 154 and 77"):
        pipe(torch.rand(1, 3, 32, 32), prompt_embeds=embeds, guidance_scale=2.0)


def test_a_failed_replacement_leaves_the_old_pipeline(base, config, tmp_path, monkeypatch):
    pipe = convert(CHECKPOINT, base, tmp_path / "invsr", config)
    (tmp_path / "invsr" / "README.md").write_text("mine")
    rename = Path.rename

    def fail_at_last(path: Path, target: Path):
        if path.name == "new":
            raise OSError("the disk has gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_last)
    with pytest.raises(OSError, match="the disk has gone"):
        save_whole(pipe, tmp_path / "invsr")
    assert (tmp_path / "invsr" / "README.md").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["invsr"]


def test_a_loaded_predictor_needs_no_configuration(base, config):
    predictor = load_noise_predictor(CHECKPOINT, config)
    with pytest.raises(ValueError, match="`config` cannot be given with a `noise_predictor` that is loaded already"):
        convert(predictor, base, config=config)


def test_nothing_is_left_of_a_failure(config, base, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        convert(CHECKPOINT, base, tmp_path / "output")
    with pytest.raises(FetchError, match="stabilityai/sd-turbo"):
        convert(CHECKPOINT, output=tmp_path / "output", config=config)
    assert list(tmp_path.iterdir()) == []


def test_card_follows_the_weights(base, config):
    inherited = load_noise_predictor(CHECKPOINT, config)
    assert inherited.config["model_card"] == PUBLISHED_MODEL_CARD
    own = load_noise_predictor(CHECKPOINT, {**config, "model_card": {"license": "mit", "training_data": "My photos."}})

    card = create_model_card(convert(inherited, base), "me/inherited")
    assert card.data.license == "other"
    assert "S-Lab License" in card.text and "Stability AI Community License" in card.text and "LSDIR" in card.text
    for model in (own, convert(own, base)):
        card = create_model_card(model, "me/own")
        assert card.data.license == "mit"
        assert "My photos." in card.text
        assert "S-Lab" not in card.text and "Stability" not in card.text and "LSDIR" not in card.text
    card = create_model_card(InvSRNoisePredictor(**config), "me/unknown")
    assert card.data.license is None
    assert "has not stated a licence" in card.text


@pytest.mark.parametrize("content", ["{bad", "[1]"])
def test_config_file_has_to_be_a_json_object(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="`config` must be a file with a JSON object, got '.*config.json'"):
        load_noise_predictor(FIXTURES / "noise_predictor_original.pth", config=tmp_path / "config.json")


def test_dtype_has_to_be_a_floating_point_type():
    with pytest.raises(ValueError, match="`dtype` must be a floating-point type .* got 'float16'"):
        load_noise_predictor(FIXTURES / "noise_predictor_original.pth", dtype="float16")
