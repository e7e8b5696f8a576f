"""What a training's validation measures."""

import numpy as np
import pytest
import torch
from helpers import FIXTURES
from PIL import Image

from diffusers_invsr import TINY, InvSRPipeline


pytest.importorskip("kornia")

from diffusers_invsr.metrics import psnr_y  # noqa: E402
from diffusers_invsr.training import (  # noqa: E402
    Degradation,
    EvaluationDegradationSettings,
    TrainingError,
    ValidationSet,
)
from diffusers_invsr.training.validation import to_image, to_tensor  # noqa: E402


def test_scores_are_those_of_the_pictures_each_time():
    validation = ValidationSet([str(FIXTURES / "photos" / "kodim20_hr.png")], 64)
    pipe = InvSRPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    scores, rows = validation.measure(pipe)
    assert validation.measure(pipe)[0] == scores
    _, lr, hr = validation.pairs[0]
    assert lr.size == (16, 16) and hr.size == (64, 64) and rows[0].width == 5 * 64
    test_sets = Degradation(EvaluationDegradationSettings())
    assert lr == to_image(test_sets(to_tensor(hr), torch.Generator().manual_seed(0)))
    results = {"bicubic": lr.resize(hr.size, Image.Resampling.BICUBIC)}
    for name, steps in (("1_step", 1), ("3_steps", 3)):
        generator = torch.Generator().manual_seed(0)
        results[name] = pipe(lr, num_steps=steps, tile_size=None, generator=generator).images[0]
    for name, result in results.items():
        assert scores[f"psnr_y/{name}"] == psnr_y(np.array(result), np.array(hr))


def test_an_unusable_image_is_an_error(tmp_path):
    data = (FIXTURES / "photos" / "kodim20_hr.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (100, 63)).save(tmp_path / "flat.png")
    with pytest.raises(TrainingError, match="flat.png' must be at least 64 pixels high and wide, got 63x100"):
        ValidationSet([str(tmp_path / "flat.png")], 64)
    with pytest.raises(TrainingError, match="The validation image '.*cut.png' could not be read: "):
        ValidationSet([str(tmp_path / "cut.png")], 64)
