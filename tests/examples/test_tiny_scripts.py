"""What makes the embedded model: its training, its training images, and models between two."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from random_sd_turbo import build_pipeline
from safetensors.torch import load_file

from diffusers_invsr import TINY, InvSRPipeline


pytest.importorskip("kornia")

import interpolate_predictors  # noqa: E402
import make_training_images  # noqa: E402
import train_tiny  # noqa: E402
from procedural import draw_image  # noqa: E402

from diffusers_invsr.training import deepen  # noqa: E402


def test_training_images(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (256, 384, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    arguments = ["--photos", str(tmp_path / "photos"), "--count", "1", "--processes", "1"]
    make_training_images.main([*arguments, "--output", str(tmp_path / "images")])
    assert "8 pieces of 1 photographs and 1 procedural images" in capsys.readouterr().out
    first, turned = (
        np.array(Image.open(tmp_path / "images" / "photographs" / f"a_100_0000_0128_{quarter}.png"))
        for quarter in (0, 1)
    )
    assert np.array_equal(first, pixels[:, 128:])
    # One tone curve over channels in some order: wherever a channel was equal it is equal again
    source = np.rot90(pixels[:, 128:])
    curves = [{*zip(source[..., i].flat, turned[..., j].flat)} for i in range(3) for j in range(3)]
    assert sum(len(curve) <= 256 for curve in curves) == 3
    drawn = np.array(Image.open(tmp_path / "images" / "procedural" / "00000.png"))
    assert np.array_equal(drawn, draw_image(np.random.default_rng((0, 0))))

    Image.new("RGB", (255, 400)).save(tmp_path / "photos" / "b.png")
    with pytest.raises(SystemExit, match="`--photos` must be at least 256 pixels high and wide, but b.png is not"):
        make_training_images.main([*arguments, "--output", str(tmp_path / "others")])
    assert not (tmp_path / "others").exists()


@pytest.mark.long
def test_training_from_scratch(tmp_path):
    """Every stage for one iteration, and the same command again, which finds all of it done."""
    rng = np.random.default_rng(0)
    for number in range(1, 17):
        pixels = rng.integers(0, 256, (256, 260, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"kodim{number:02d}.png")
    folders = ["--kodak", str(tmp_path), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "model")]
    budget = [word for stage in ("autoencoder", "prior", "predictor") for word in (f"--minutes-{stage}", "1e-6")]
    arguments = [*folders, *budget, "--pool-size", "5", "--batch-size", "2", "--workers", "1", "--device", "cpu"]
    train_tiny.main([*arguments, "--pixel-loss-from", "0", "--precision", "fp32"])
    records = json.loads((tmp_path / "work" / "training.json").read_text())
    assert [record["stage"] for record in records] == list(train_tiny.STAGES)
    assert [record.get("iteration") for record in records] == [None, 1, 1, 1, None]
    pipe = InvSRPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    result = pipe(torch.rand(1, 3, 16, 16), tile_size=None, output_type="pt").images
    assert result.shape == (1, 3, 64, 64) and result.isfinite().all()
    train_tiny.main([*arguments, "--stage", "prior"])
    assert len((tmp_path / "work" / "log-prior.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("steps", ("249", "1001"))
def test_prior_steps(tmp_path, steps, capsys):
    arguments = ["--kodak", str(tmp_path), "--work", str(tmp_path), "--output", str(tmp_path), "--prior-steps", steps]
    with pytest.raises(SystemExit):
        train_tiny.parse_args(arguments)
    assert f"`--prior-steps` must be between 250 and 1000, got {steps}." in capsys.readouterr().err


@pytest.mark.parametrize("extra_layers", [0, 1])
def test_a_model_between_two(tmp_path, extra_layers, capsys):
    pipe = InvSRPipeline.from_pretrained(TINY)
    pipe.register_modules(noise_predictor=deepen(pipe.noise_predictor, extra_layers))
    networks = ("noise_predictor", "vae")
    before = {name: copy.deepcopy(getattr(pipe, name).state_dict()) for name in networks}
    with torch.no_grad():
        for value in (*pipe.noise_predictor.parameters(), *pipe.vae.decoder.parameters()):
            value.add_(0.5)
    pipe.register_to_config(model_card={"license": "mit", "training": "| of the other |"})
    pipe.save_pretrained(tmp_path / "other")
    arguments = [TINY, str(tmp_path / "other"), "--output", str(tmp_path / "between"), "--weight"]
    interpolate_predictors.main([*arguments, "0.25"])
    between = InvSRPipeline.from_pretrained(tmp_path / "between")
    # Of a new layer, the last convolution begins at zero and everything else is the second's
    known = InvSRPipeline.from_pretrained(TINY).noise_predictor.state_dict()
    for name in networks:
        for key, value in getattr(between, name).state_dict().items():
            new = name == "noise_predictor" and key not in known and ".conv2." not in key
            share = 0 if name == "vae" and not key.startswith("decoder") else 0.5 if new else 0.5 * 0.25
            torch.testing.assert_close(value, before[name][key] + share)
    card = (tmp_path / "between" / "README.md").read_text()
    assert "license: other" in card and "license_name: cc0-1.0 and mit" in card
    assert "The first:\n\nNot stated.\n\nThe second:\n\n| of the other |" in card
    assert "0.75 of the first and 0.25 of the second" in card
    with pytest.raises(SystemExit):
        interpolate_predictors.main([*arguments, "0.5"])
    assert "`--output` must be a new folder" in capsys.readouterr().err


def test_the_result_has_the_dtype_asked_for(tmp_path):
    interpolate_predictors.main(
        [TINY, TINY, "--weight", "0.3", "--dtype", "float16", "--output", str(tmp_path / "same")]
    )
    same, shipped = (load_file(Path(folder, "vae", SAFETENSORS_WEIGHTS_NAME)) for folder in (tmp_path / "same", TINY))
    assert {value.dtype for value in same.values()} == {torch.float16}
    assert same.keys() == shipped.keys() and all(torch.equal(value, shipped[key]) for key, value in same.items())


@pytest.mark.parametrize("weight", [0, 1])
def test_a_predictor_between_itself_and_a_deeper_one(weight):
    """Also one with attention: at 0 the new layers add nothing, at 1 the result is the second."""
    first = build_pipeline(1 / 16, text=False).noise_predictor
    second = deepen(first, 1)
    with torch.no_grad():
        for value in second.parameters():
            value.add_(0.1)
        image = 2 * torch.rand(1, 3, 32, 32) - 1
        between = interpolate_predictors.interpolate(first, second, weight, may_grow=True)
        expected = (first, second)[weight](image, 199).moments
        torch.testing.assert_close(between(image, 199).moments, expected)


def test_models_of_other_shapes_have_nothing_between(tmp_path, capsys):
    pipe = InvSRPipeline.from_pretrained(TINY)
    pipe.register_modules(noise_predictor=deepen(pipe.noise_predictor, 1))
    pipe.save_pretrained(tmp_path / "deeper")
    with pytest.raises(SystemExit):
        interpolate_predictors.main(
            [str(tmp_path / "deeper"), TINY, "--weight", "1", "--output", str(tmp_path / "no")]
        )
    assert "The InvSRNoisePredictor of both pipelines must have the same weights." in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_vae_may_not_grow():
    first, second = (InvSRPipeline.from_pretrained(TINY).vae for _ in range(2))
    second.decoder.extra = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="The AutoencoderTiny of both pipelines must have the same weights"):
        interpolate_predictors.interpolate(first, second, 0.5)
