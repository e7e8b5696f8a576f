import json
from pathlib import Path

import numpy as np
import pytest
from helpers import FIXTURES
from PIL import Image


pytest.importorskip("kornia")
pytest.importorskip("stlpips_pytorch")

import start_slider  # noqa: E402


@pytest.fixture
def photos(tmp_path) -> Path:
    for name in ("kodim20", "kodim24"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        photo = Image.open(FIXTURES / "photos" / f"{name}_hr.png").crop((64, 64, 128, 128))
        photo.save(tmp_path / "photos" / f"{name}.png")
    return tmp_path / "photos"


def test_table_has_a_row_for_each_start_and_a_stopped_run_resumes(photos, tmp_path, capsys):
    arguments = ["--hr", str(photos), "--output", str(tmp_path / "out"), "--models", "ours=tiny", "--starts", "100"]
    start_slider.main(arguments)
    start_slider.main([*arguments, "250"])
    table = (tmp_path / "out" / "slider.md").read_text()
    assert table in capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ours")]
    assert [row[1] for row in rows] == ["100", "250"] * 2  # simple, test
    scores = (tmp_path / "out" / "scores.jsonl").read_text().splitlines()[1:]
    assert len(scores) == len({tuple(json.loads(line)["key"]) for line in scores}) == 2 * 2 * 3  # bicubic, 100, 250
    means = {}
    for record in map(json.loads, scores):
        degradation, _, model, start = record["key"]
        means.setdefault((degradation, model, start), []).append(record["scores"]["psnr_y"])
    gain = np.mean(means["simple", "ours", 100]) - np.mean(means["simple", "bicubic", None])
    assert float(rows[0][3]) == pytest.approx(gain, abs=0.006)
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


def test_models_need_names(photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        start_slider.main(["--hr", str(photos), "--output", str(tmp_path), "--models", "tiny"])
    assert "'tiny' must be NAME=FOLDER" in capsys.readouterr().err
