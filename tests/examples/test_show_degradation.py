"""The contact sheet of degradations."""

import numpy as np
import pytest
from helpers import FIXTURES
from PIL import Image


pytest.importorskip("kornia")

import show_degradation  # noqa: E402


def test_a_sheet_of_degradations(tmp_path, capsys):
    photo = Image.open(FIXTURES / "photos" / "kodim20_hr.png").crop((64, 64, 128, 128))
    photo.save(tmp_path / "photo.png")
    arguments = ["--hr", str(tmp_path / "photo.png"), "--output", str(tmp_path / "sheet.png"), "--draws", "2"]
    show_degradation.main([*arguments, "--crop", "62"])
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert np.array_equal(sheet[:60, :60], np.array(photo)[2:62, 2:62])
    for crop in ("20", "128"):
        with pytest.raises(SystemExit):
            show_degradation.main([*arguments, "--crop", crop])
        assert "between 56 and 64, the photograph's shorter side" in capsys.readouterr().err
