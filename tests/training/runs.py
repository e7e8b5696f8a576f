"""Runs of `examples/training/train_invsr.py`, in this process or in others, and what they left behind."""

import os
import subprocess
import sys
import time

import torch
from helpers import EXAMPLES, reset_accelerate
from safetensors.torch import load_file


SCRIPT = EXAMPLES / "training" / "train_invsr.py"
DISCRIMINATOR = {
    "in_channels": 16,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "num_attention_heads": 4,
    "cross_attention_dim": None,
    "norm_num_groups": 8,  # a group of one channel would lose what the time embedding adds to it
}
SETTINGS = {
    "base_model": "tiny",
    "noise_predictor_config": {
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "block_out_channels": [32],
        "layers_per_block": [1],
        "latent_channels": 16,
        "mid_block_add_attention": False,
        "temb_channels": 32,
        "attention_head_dim": 32,
    },
    "discriminator_config": DISCRIMINATOR,
    "crop_size": 64,
    "batch_size": 2,
    "pool_batches": 2,
    "num_workers": 0,
    "learning_rate": 1e-3,
    "warmup_iterations": 2,
    "max_iterations": 6,
    "dis_init_iterations": 2,
    "log_every": 1,
    "validate_every": 100,
    "checkpoint_every": 2,
    "report_to": "none",
}


def train(settings, output, *options):
    """A run in this process, on the CPU."""
    import train_invsr

    reset_accelerate()
    train_invsr.main([settings, "--output_dir", str(output), *options])


def environment(threads=1):
    """Several threads only slow small models down."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def start(settings, output, *options, processes=1, threads=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = [*launcher, str(SCRIPT), settings, "--output_dir", str(output), *options]
    return subprocess.Popen(
        command, env=environment(threads), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(settings, output, *options, **start_options):
    """A run in processes of its own, which must succeed."""
    process = start(settings, output, *options, **start_options)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return text


def kill_after(path, process):
    """Kill a run as soon as a file or folder is there."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.kill()
    process.communicate()


def assert_same_end(one, other, iteration=6):
    """Two runs logged the same losses and ended with the same weights, to the last bit."""
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    files = [f"checkpoint-{iteration}/model.safetensors", f"checkpoint-{iteration}/model_1.safetensors"]
    for name in (*files, "pipeline/noise_predictor/diffusion_pytorch_model.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name
