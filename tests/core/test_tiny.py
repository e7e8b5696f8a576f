"""The embedded model, on crops of photographs that its training never saw (Kodak 20, 22 and 24, degraded)."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FIXTURES
from PIL import Image

from diffusers_invsr import TINY, InvSRPipeline
from diffusers_invsr.metrics import psnr_y


PHOTOS = ("kodim20", "kodim22", "kodim24")


@pytest.fixture(scope="module")
def tiny() -> InvSRPipeline:
    pipe = InvSRPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photo(name: str, kind: str) -> Image.Image:
    return Image.open(FIXTURES / "photos" / f"{name}_{kind}.png")


def mean_psnr(pipe: InvSRPipeline, **arguments) -> float:
    """PSNR of luma, mean over the photographs."""
    values = []
    for name in PHOTOS:
        result = pipe(photo(name, "lr"), tile_size=None, generator=torch.Generator().manual_seed(0), **arguments)
        values.append(psnr_y(np.array(result.images[0]), np.array(photo(name, "hr"))))
    return float(np.mean(values))


def with_noise(pipe: InvSRPipeline, logvar: float) -> InvSRPipeline:
    """The pipeline with a noise map of mean 0 and this log-variance in place of the predicted one."""
    predictor = copy.deepcopy(pipe.noise_predictor)
    conv = predictor.encoder.conv_out
    torch.nn.init.zeros_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    torch.nn.init.constant_(conv.bias[conv.out_channels // 2 :], logvar)
    other = InvSRPipeline(**{**pipe.components, "noise_predictor": predictor})
    other.set_progress_bar_config(disable=True)
    return other


def test_package_data():
    files = [path for path in Path(TINY).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    for path in files:
        if path.suffix == ".json":
            assert "_name_or_path" not in json.loads(path.read_text()), path


def test_loads_in_float32_on_the_cpu(tiny):
    assert tiny.dtype == torch.float32 and tiny.device.type == "cpu"
    assert tiny.text_encoder is None and tiny.tokenizer is None and not tiny.takes_text


def test_better_than_bicubic(tiny):
    bicubic = []
    for name in PHOTOS:
        enlarged = photo(name, "lr").resize((256, 256), Image.Resampling.BICUBIC)
        bicubic.append(psnr_y(np.array(enlarged), np.array(photo(name, "hr"))))
    assert mean_psnr(tiny) > np.mean(bicubic) + 0.4


@pytest.mark.parametrize("start, margin", [(250, 0.6), (100, 0.35)])
def test_predicted_noise_is_better_than_random_and_than_none(tiny, start, margin):
    predicted = mean_psnr(tiny, timesteps=[start])
    assert predicted > mean_psnr(with_noise(tiny, 0.0), timesteps=[start]) + margin
    assert predicted > mean_psnr(with_noise(tiny, -30.0), timesteps=[start])


def test_more_steps_do_not_break_the_image(tiny):
    assert mean_psnr(tiny, num_steps=3) > mean_psnr(tiny) - 0.3


def test_no_colour_shift(tiny):
    for name in PHOTOS:
        result = np.array(tiny(photo(name, "lr"), tile_size=None).images[0], dtype=float)
        assert (
            np.abs((result - np.array(photo(name, "lr").resize((256, 256)), dtype=float)).mean(axis=(0, 1))).max() < 3
        )


@pytest.mark.parametrize(
    "window, ends", [(None, (56, 64, 96, 120)), ("gaussian", (32, 64, 96, 128))], ids=["default", "published"]
)
def test_seams_do_not_show(tiny, window, ends):
    """Along the tiles' borders the tiled result is as close to the untiled one as elsewhere, within a factor."""
    image = photo("kodim22", "lr").resize((160, 96), Image.Resampling.BICUBIC)
    arguments = {"output_type": "np", "tile_window": window}
    whole = tiny(image, tile_size=None, generator=torch.Generator().manual_seed(0), **arguments).images[0]
    tiled = tiny(image, tile_size=64, generator=torch.Generator().manual_seed(0), **arguments).images[0]
    difference = np.abs(np.diff(tiled - whole, axis=1)).mean(axis=(0, 2))
    borders = [4 * x - 1 for x in ends]
    assert difference[borders].max() < 3 * np.median(difference) + 1 / 255


def test_ignores_the_arguments_of_text_clearly(tiny):
    image = photo("kodim20", "lr")
    with pytest.raises(ValueError, match="`prompt='sharp'` needs a text encoder"):
        tiny(image, prompt="sharp")
    for arguments in ({"guidance_scale": 2.0}, {"prompt_embeds": torch.zeros(1, 77, 32)}):
        with pytest.raises(ValueError, match="UNet takes no text"):
            tiny(image, **arguments)
