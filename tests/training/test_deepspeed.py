"""`train_invsr.py` under DeepSpeed, as `accelerate launch` starts it; needs the extra `deepspeed`."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from runs import SCRIPT, environment, run
from safetensors.torch import load_file

from diffusers_invsr import InvSRPipeline
from diffusers_invsr.training.distributed import configure_deepspeed
from diffusers_invsr.training.logs import read_log


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs `pip install '.[deepspeed]'`"
)
NETWORKS = ("pipeline/noise_predictor", "discriminator")


def launch(settings, output, *options, zero_stage=2, processes=1):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--zero_stage", str(zero_stage)]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += [str(SCRIPT), settings, "--output_dir", str(output), *options]
    env = environment() | {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def train(*args, **kwargs):
    process = launch(*args, **kwargs)
    assert process.returncode == 0, process.stdout


def networks(output):
    return [load_file(output / name / "diffusion_pytorch_model.safetensors") for name in NETWORKS]


def assert_nearly_the_same(one, other, rtol, mean):
    """
    Two runs logged nearly the same losses and norms, and ended with weights that differ by `mean` at most on average:
    one by one, Adam makes much of the last bit of a gradient that is nearly 0.
    """
    for first, second in zip(read_log(one / "log.jsonl"), read_log(other / "log.jsonl"), strict=True):
        assert first == pytest.approx(second, rel=rtol, abs=1e-5)
    for first, second in zip(networks(one), networks(other)):
        differences = torch.cat([(value - second[name]).abs().flatten() for name, value in first.items()])
        assert differences.mean() < mean


def resume_half_way(settings, output, folder, half, *options, **launch_options):
    """Run the second half of a finished run again, from its checkpoint: the end must be the same to the last bit."""
    later = ("pipeline", "discriminator", *(f"checkpoint-{i}" for i in range(half + 1, 7)))
    shutil.copytree(output, folder, ignore=lambda path, names: later if path == str(output) else ())
    train(settings, folder, *options, "--resume", "latest", **launch_options)
    assert (output / "log.jsonl").read_text() == (folder / "log.jsonl").read_text()
    for first, second in zip(networks(output), networks(folder)):
        assert all(torch.equal(value, second[name]) for name, value in first.items())


@needs_deepspeed
@pytest.mark.slow
def test_one_process_trains_as_without_deepspeed(settings, uninterrupted, tmp_path):
    output = tmp_path / "zero2"
    train(settings, output)
    assert "adversarial" in read_log(output / "log.jsonl")[-1]
    assert_nearly_the_same(uninterrupted, output, rtol=1e-5, mean=1e-7)
    pipe = InvSRPipeline.from_pretrained(output / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(Image.new("RGB", (16, 16), "teal")).images[0].size == (64, 64)

    resume_half_way(settings, output, tmp_path / "resumed", 2)
    # DeepSpeed would pass over the checkpoint of a run without it, so that may not be resumed, nor the reverse.
    stored = [
        json.loads((folder / "checkpoint-2" / "run.json").read_text())["fixed"] for folder in (uninterrupted, output)
    ]
    assert [fixed["zero_stage"] for fixed in stored] == [None, 2]


@needs_deepspeed
@pytest.mark.slow
def test_two_processes_train_as_ddp_does(settings, tmp_path):
    options = ["--gradient_accumulation_steps", "2", "--max_grad_norm", "0.3"]
    options += ["--max_iterations", "3", "--checkpoint_every", "1"]
    run(settings, tmp_path / "ddp", *options, processes=2)
    for stage in (1, 2):
        train(settings, tmp_path / f"zero{stage}", *options, zero_stage=stage, processes=2)
        assert_nearly_the_same(tmp_path / "ddp", tmp_path / f"zero{stage}", rtol=1e-3, mean=1e-5)
    resume_half_way(settings, tmp_path / "zero1", tmp_path / "resumed", 1, *options, zero_stage=1, processes=2)


@needs_deepspeed
@pytest.mark.slow
def test_bfloat16_keeps_the_weights_in_float32(settings, tmp_path):
    run(settings, tmp_path / "plain", "--mixed_precision", "bf16", "--max_iterations", "3")
    train(settings, tmp_path / "zero2", "--mixed_precision", "bf16", "--max_iterations", "3")
    assert_nearly_the_same(tmp_path / "plain", tmp_path / "zero2", rtol=0.05, mean=3e-4)
    checkpoint = tmp_path / "zero2" / "checkpoint-3" / "pytorch_model" / "mp_rank_00_model_states.pt"
    weights = torch.load(checkpoint, weights_only=False)["module"]
    assert {value.dtype for value in weights.values()} == {torch.float32}


@needs_deepspeed
@pytest.mark.slow
def test_gradients_that_are_not_finite_are_skipped(settings, tmp_path):
    options = ["--learning_rate", "1e30", "--warmup_iterations", "0", "--max_skipped_steps", "2"]
    process = launch(settings, tmp_path, *options)
    assert process.returncode == 1 and "2 consecutive iterations were not finite" in process.stdout
    last = read_log(tmp_path / "log.jsonl")[-1]
    assert last["skipped_steps"] == 2 and last["grad_norm"] is None
    for folder in (".", "discriminator"):
        file = tmp_path / f"checkpoint-{last['iteration']}" / folder / "pytorch_model" / "mp_rank_00_model_states.pt"
        weights = torch.load(file, weights_only=False)["module"]
        assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize(
    "config, message",
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage must be 1 or 2, got 3"),
        ({"zero_optimization": {}}, "ZeRO stage must be 1 or 2, got 0"),
        ({"fp16": {"enabled": True}}, "`mixed_precision='fp16'` is not supported with DeepSpeed"),
    ],
)
def test_what_would_train_differently_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        configure_deepspeed({"zero_optimization": {"stage": 2}, "fp16": {"enabled": False}} | config, 2, 1)
