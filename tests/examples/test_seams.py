"""The measure of seams, on planted seams and with the embedded model."""

from pathlib import Path

import numpy as np
import pytest
from helpers import FIXTURES
from PIL import Image

from diffusers_invsr.tiling import TileAxis


pytest.importorskip("kornia")

import measure_seams  # noqa: E402


def plant(axis: TileAxis, scale: int) -> np.ndarray:
    """A profile of tiles that are ever brighter, with raised-cosine ramps where they overlap."""
    x = np.arange(axis.length * scale) + 0.5
    profile = np.zeros_like(x)
    for start in axis.starts[1:]:
        share = np.clip((x - start * scale) / max(axis.overlap * scale, 1e-3), 0, 1)
        profile += 20 * np.sin(0.5 * np.pi * share) ** 2
    return profile


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("overlap", (0, 8))
def test_planted_seams_are_found(dim, overlap):
    """Tiles of another brightness under noise, against noise alone."""
    axis = TileAxis(72, 32, overlap, 4)
    noise = np.random.default_rng(0).normal(size=(288, 288, 3))
    profile = plant(axis, 4)
    planted = noise + (profile[:, None, None] if dim == 0 else profile[None, :, None])
    found, none = (measure_seams.seam_measures(x, 0 * x, [axis, axis], 4) for x in (planted, noise))
    assert found["line"] / found["line elsewhere"] > 1.3
    assert none["line"] / none["line elsewhere"] == pytest.approx(1, abs=0.1)
    if overlap == 0:
        assert found["step"] > 1.5 * found["step elsewhere"]
    assert none["step"] == pytest.approx(none["step elsewhere"], rel=0.1)
    assert none["band"] == pytest.approx(none["band elsewhere"], rel=0.1)
    assert found["tiles"] == len(axis.starts) ** 2


def options(output: Path, *others: str) -> list[str]:
    return ["--hr", str(FIXTURES / "photos"), "--patterns", "kodim20_lr.png", "--output", str(output), *others]


def test_seams_are_measured_of_every_setting(tmp_path, capsys):
    measure_seams.main(options(tmp_path, "--degradation", "none", "--tile-size", "16", "--overlaps", "0"))
    text = (tmp_path / "seams.md").read_text()
    assert text in capsys.readouterr().out
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    rows = {(int(row[0]), row[1]): row[2:] for row in table}
    windows = ("gaussian", "raised cosine")
    assert list(rows) == [*((0, window) for window in windows), (8, "gaussian")]
    tiles, psnr = ({key: float(row[column]) for key, row in rows.items()} for column in (0, 1))
    assert tiles[0, "gaussian"] < tiles[8, "gaussian"] and psnr[0, "gaussian"] < psnr[8, "gaussian"]
    for column in (2, 6):  # step and band
        seam, elsewhere = map(float, rows[0, "gaussian"][column].split(" / "))
        assert seam > elsewhere
    assert rows[8, "gaussian"][5] == "+0.000 ± 0.000"  # the published tiling minus itself
    assert text.splitlines()[-1].startswith("The smallest overlap that is not worse than the published: ")
    assert Image.open(tmp_path / "kodim20_lr.png").height == 3 * 164


def test_images_may_be_degraded_first(tmp_path):
    arguments = ["--shrink", "2", "--tile-size", "16", "--overlaps", "8", "--windows", "gaussian"]
    measure_seams.main(options(tmp_path, *arguments))
    width, height = Image.open(FIXTURES / "photos" / "kodim20_lr.png").size
    per_axis = [len(TileAxis(side // 2, 16, 8, 4).starts) for side in (height, width)]
    assert f"| 8 | gaussian | {per_axis[0] * per_axis[1]} |" in (tmp_path / "seams.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tile-size", "30"], "`--tile-size` must be a multiple of 4, got 30"),
        (["--tile-size", "32", "--overlaps", "0", "32"], "between 0 and less than `--tile-size 32`, got [0, 32]"),
        (["--tile-size", "640"], "must be larger than the tile, 640"),
        (["--patterns", "*.tif"], "must contain a file *.tif"),
    ],
)
def test_seams_of_impossible_settings_are_refused(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        measure_seams.main(options(tmp_path, "--degradation", "none", *arguments))
    assert message in capsys.readouterr().err
