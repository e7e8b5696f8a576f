from typing import get_args

import pytest
import torch

from diffusers_invsr import color_fix
from diffusers_invsr.cli.common import ColorFix
from diffusers_invsr.color_fix import COLOR_FIXES, apply_color_fix


def test_the_command_line_knows_all():
    assert get_args(ColorFix) == ("none", *COLOR_FIXES)


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_matches_reference(tensors, method):
    fix = getattr(color_fix, f"{method}_color_fix")
    result = fix(tensors["color.0.content"], tensors["color.0.style"])
    torch.testing.assert_close(result, tensors[f"color.0.{method}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("height", [1, 64, 100, 200])
@pytest.mark.parametrize("method", COLOR_FIXES)
def test_bands_change_nothing(monkeypatch, method, height):
    torch.manual_seed(0)
    monkeypatch.setattr(color_fix, "BAND_HEIGHT", 48)
    content, style = torch.rand(2, 2, 3, height, 40)
    expected = getattr(color_fix, f"{method}_color_fix")(content, style).clamp(0, 1)
    result = apply_color_fix(content.clone(), lambda start, stop: style[..., start:stop, :], method)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
