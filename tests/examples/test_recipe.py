"""The recipe of the embedded model at its smallest size, on the package's own weights."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusers_invsr import InvSRPipeline


pytest.importorskip("kornia")
pytest.importorskip("stlpips_pytorch")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "tiny"))

import recipe  # noqa: E402


@pytest.fixture
def data(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for group, name in (("photos", "one.png"), ("photos", "two.png"), ("kodak", "held.png")):
        (tmp_path / "data" / group).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((272, 256)).save(tmp_path / "data" / group / name)
    return tmp_path / "data"


def write_settings(file: Path, prior: int, slider: int) -> Path:
    settings = yaml.safe_load((EXAMPLES / "tiny" / "recipe.yaml").read_text())
    settings["data"] |= {"crop_size": 64, "shares": {"photos": 0.5, "procedural": 0.5}, "patterns": {}}
    settings["data"] |= {"procedural_count": 1, "held_back": ["photos/two.png"]}
    small = {"chunks": 1, "chunk_size": 2, "validate_every": 2, "checkpoint_every": 1}
    settings["prior"] |= {**small, "iterations": prior, "cooldown": 1}
    settings["slider"] |= {**small, "iterations": slider, "cooldown": 1, "discriminator_from": 1}
    settings["slider"]["start_timesteps"] = [250, 100]
    settings["slider"]["degradations"] = settings["slider"]["degradations"][-1:]
    file.write_text(yaml.safe_dump(settings))
    return file


def weights(model: Path) -> dict[str, torch.Tensor]:
    pipe = InvSRPipeline.from_pretrained(model)
    modules = {"unet": pipe.unet, "predictor": pipe.noise_predictor, "vae": pipe.vae}
    return {f"{key}.{name}": value for key, module in modules.items() for name, value in module.state_dict().items()}


def run(data: Path, work: Path, settings: Path):
    recipe.main([str(settings), "--data", str(data), "--work", str(work)])


@pytest.mark.parametrize("iteration", [2, 3, 5], ids=["second of prior", "first of slider", "third of slider"])
def test_all_stages_train_and_a_stopped_run_goes_on_as_if_it_had_not_stopped(data, tmp_path, monkeypatch, iteration):
    settings = write_settings(tmp_path / "settings.yaml", prior=2, slider=3)
    run(data, tmp_path / "whole", settings)

    stops = [iteration]
    draw_chunks = recipe.draw_chunks

    def stop_at(*arguments):
        stops[0] -= 1
        if stops[0] == 0:
            raise KeyboardInterrupt
        return draw_chunks(*arguments)

    monkeypatch.setattr(recipe, "draw_chunks", stop_at)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "stopped", settings)
    run(data, tmp_path / "stopped", settings)

    first, second = weights(tmp_path / "whole" / "pipeline"), weights(tmp_path / "stopped" / "pipeline")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    before = weights(recipe.TINY)
    changed = {name.split(".")[0] for name, value in first.items() if not torch.equal(value, before[name])}
    assert changed == {"unet", "predictor", "vae"}
    encoder = [name for name in first if name.startswith("vae.encoder")]
    assert all(torch.equal(first[name], before[name]) for name in encoder)


def test_a_run_with_other_settings_is_refused(data, tmp_path):
    settings = write_settings(tmp_path / "settings.yaml", prior=1, slider=1)
    run(data, tmp_path / "work", settings)
    other = yaml.safe_load(settings.read_text())
    other["slider"]["lattice_weight"] = 1.0
    settings.write_text(yaml.safe_dump(other))
    with pytest.raises(SystemExit, match="of a run with another lattice_weight"):
        run(data, tmp_path / "work", settings)
    # Too late for another number of iterations: the learning rate has fallen
    with pytest.raises(SystemExit, match="of a run with another iterations"):
        run(data, tmp_path / "work", write_settings(tmp_path / "settings.yaml", prior=5, slider=1))


def test_the_number_of_iterations_may_change_before_the_cooldown(data, tmp_path):
    work, settings = tmp_path / "work", tmp_path / "settings.yaml"
    run(data, work, write_settings(settings, prior=1, slider=1))
    state = torch.load(work / "slider.pt", weights_only=False)
    state["course"]["iterations"] = 3  # as if that run had been stopped after the first of three
    torch.save(state, work / "slider.pt")
    run(data, work, write_settings(settings, prior=1, slider=2))
    assert torch.load(work / "slider.pt", weights_only=False)["iteration"] == 2
