"""`examples/finetune_in_pixels.py` as a user runs it, on the embedded model."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import FIXTURES

from diffusers_invsr import TINY, InvSRPipeline
from diffusers_invsr.training.logs import read_log


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # the scripts import one another
pytest.importorskip("kornia")

import finetune_in_pixels  # noqa: E402


SETTINGS = [str(EXAMPLES / "configs" / "tiny_degradation.yaml"), "--train_data", str(FIXTURES / "photos")]
OPTIONS = {
    "crop_size": 64,
    "batch_size": 2,
    "num_workers": 0,
    "max_iterations": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "validation_data": FIXTURES / "photos[:1]",
}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its state for the life of a process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    pipe = InvSRPipeline.from_pretrained(folder, dtype=torch.float32)
    networks = {"noise_predictor": pipe.noise_predictor, "unet": pipe.unet, "vae": pipe.vae}
    return {f"{name}.{key}": value for name, part in networks.items() for key, value in part.state_dict().items()}


def test_the_decoder_and_the_predictor_learn_and_a_resumed_run_is_the_same(tmp_path):
    """The latter with the last checkpoint lost, as if the run had been killed at iteration 3."""
    options = OPTIONS | {"output_dir": tmp_path}
    run = [*SETTINGS, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
    finetune_in_pixels.main(run)
    trained, log = weights(tmp_path / "pipeline"), read_log(tmp_path / "log.jsonl")
    changed = {name for name, value in weights(TINY).items() if not torch.equal(value, trained[name])}
    assert {name.partition(".")[0] for name in changed} == {"noise_predictor", "vae"}
    assert changed and all(name.startswith(("noise_predictor", "vae.decoder")) for name in changed)
    assert [record["iteration"] for record in log if "mse" in record] == [1, 2, 3, 4]
    assert [record["iteration"] for record in log if "psnr_y/1_step" in record] == [0, 4]

    (tmp_path / "checkpoint-4").rename(tmp_path / "lost")
    with pytest.raises(SystemExit, match="holds checkpoints of another run"):
        finetune_in_pixels.main(run)
    finetune_in_pixels.main([*run, "--resume", "latest"])
    assert read_log(tmp_path / "log.jsonl") == log
    for name, value in weights(tmp_path / "pipeline").items():
        assert torch.equal(value, trained[name]), name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.yaml"], "missing.yaml is not a file"),
        ([SETTINGS[0]], "--train_data has to name at least one source"),
        ([*SETTINGS, "--batch_size", "0"], "--batch_size has to be at least 1, but is 0"),
        ([*SETTINGS, "--speed", "9"], "there is no such setting: --speed 9"),
    ],
)
def test_wrong_settings_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        finetune_in_pixels.main(arguments)
    assert message in capsys.readouterr().err
