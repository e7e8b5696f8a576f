"""Training at the sizes that people use; `pytest -m long`."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers import EXAMPLES
from random_sd_turbo import UNET, VAE, make_tokenizer
from runs import assert_same_end, kill_after, run, start
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_invsr import InvSRNoisePredictor
from diffusers_invsr.training import InvSRDiscriminator, LatentLPIPS
from diffusers_invsr.training.logs import read_log


pytestmark = [pytest.mark.long, pytest.mark.usefixtures("fresh_accelerator")]


def test_tiny_configuration_improves_and_survives_a_kill(photos, tmp_path):
    pytest.importorskip("lpips", exc_type=Exception)
    torch.manual_seed(0)
    LatentLPIPS(in_channels=16, block_out_channels=(16, 32, 64, 64, 64)).save_pretrained(tmp_path / "lpips")
    tiny = str(EXAMPLES / "training" / "configs" / "tiny.yaml")
    options = ["--train_data", str(photos), "--latent_lpips", str(tmp_path / "lpips"), "--max_iterations", "200"]
    options += ["--validation_data", f"{photos}[:2]", "--validate_every", "100", "--checkpoint_every", "40"]
    run(tiny, tmp_path / "whole", *options)
    records = read_log(tmp_path / "whole" / "log.jsonl")
    for name in ("l2", "lpips", "adversarial", "discriminator", "total", "grad_norm", "discriminator_grad_norm"):
        assert any(name in record for record in records), name
    before, *_, after = [record["psnr_y/1_step"] for record in records if "psnr_y/1_step" in record]
    assert after > before + 0.2

    kill_after(tmp_path / "killed" / "checkpoint-120", start(tiny, tmp_path / "killed", *options))
    run(tiny, tmp_path / "killed", *options, "--resume", "latest")
    assert_same_end(tmp_path / "whole", tmp_path / "killed", iteration=200)


def test_two_processes_are_resumed_to_the_last_bit(settings, tmp_path):
    options = ["--max_iterations", "3", "--checkpoint_every", "1"]
    run(settings, tmp_path / "whole", *options, processes=2)
    later = shutil.ignore_patterns("checkpoint-[23]", "pipeline")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", ignore=later)
    run(settings, tmp_path / "resumed", *options, "--resume", "latest", processes=2)
    assert_same_end(tmp_path / "whole", tmp_path / "resumed", iteration=3)


@pytest.fixture
def sd_turbo_size(tmp_path):
    """SD-Turbo's shapes with random weights; the text encoder is small, for the prompt is embedded only once."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    for model in (unet, vae):
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "sd-turbo")
    return tmp_path / "sd-turbo"


def test_the_full_size_steps_on_a_cpu(sd_turbo_size, photos, tmp_path):
    pytest.importorskip("lpips", exc_type=Exception)
    from PIL import Image

    large = tmp_path / "photos"
    large.mkdir()
    for file in photos.iterdir():
        Image.open(file).resize((512, 512), Image.Resampling.BICUBIC).save(large / file.name)
    torch.manual_seed(0)
    LatentLPIPS().save_pretrained(tmp_path / "lpips")
    options = ["--base_model", str(sd_turbo_size), "--latent_lpips", str(tmp_path / "lpips")]
    options += ["--train_data", str(large), "--batch_size", "1", "--max_iterations", "1", "--dis_init_iterations", "0"]
    options += ["--mixed_precision", "no", "--num_workers", "0", "--log_every", "1", "--report_to", "none"]
    run(str(EXAMPLES / "training" / "configs" / "sd_turbo.yaml"), tmp_path / "run", *options, threads=2)
    shutil.rmtree(sd_turbo_size)
    record = read_log(tmp_path / "run" / "log.jsonl")[-1]
    assert all(record[name] is not None for name in ("l2", "lpips", "adversarial", "discriminator", "grad_norm"))
    sizes = {
        "noise predictor": InvSRNoisePredictor.from_pretrained(tmp_path / "run" / "pipeline" / "noise_predictor"),
        "discriminator": InvSRDiscriminator.from_pretrained(tmp_path / "run" / "discriminator"),
        "latent LPIPS": LatentLPIPS.from_pretrained(tmp_path / "lpips"),
    }
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in sizes.items()}
    assert sizes == {"noise predictor": 33_837_576, "discriminator": 112_082_532, "latent LPIPS": 14_716_736}
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "run.json").read_text())["progress"]["iteration"] == 1
