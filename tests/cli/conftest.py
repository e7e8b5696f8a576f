from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline, InvSRScheduler


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Folder of a random pipeline shaped like the embedded one, but small enough to run in no time."""
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (16, 16, 16), "decoder_block_out_channels": (16, 16, 16)}
    pipe = InvSRPipeline(
        vae=AutoencoderTiny(num_encoder_blocks=(0, 0, 0), num_decoder_blocks=(1, 1, 1), latent_channels=4, **widths),
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            mid_block_type=None,
            up_block_types=("UpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
        ),
        scheduler=InvSRScheduler(),
        noise_predictor=InvSRNoisePredictor(
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            latent_channels=4,
            mid_block_add_attention=False,
            temb_channels=32,
        ),
    )
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
