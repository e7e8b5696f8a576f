import json
import shutil

import pytest
import torch
from helpers import FIXTURES
from runs import SETTINGS, train


@pytest.fixture(scope="session")
def latent_lpips(tmp_path_factory):
    pytest.importorskip("lpips", reason="lpips needs torchvision", exc_type=Exception)
    from diffusers_invsr.training import LatentLPIPS

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("latent-lpips")
    LatentLPIPS(in_channels=16, block_out_channels=(8, 8, 8, 8, 8)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for file in (FIXTURES / "photos").glob("*_hr.png"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def settings(latent_lpips, photos, tmp_path_factory):
    """A run of six small iterations with all three losses, as a YAML file."""
    file = tmp_path_factory.mktemp("settings") / "settings.yaml"
    values = SETTINGS | {"latent_lpips": latent_lpips, "train_data": [str(photos)]}
    file.write_text(json.dumps(values))  # JSON is YAML
    return str(file)


@pytest.fixture(scope="session")
def uninterrupted(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        train(settings, output)
    return output
