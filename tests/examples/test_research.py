"""The scripts behind the tables of findings, on small crops of photographs with the embedded model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FIXTURES
from PIL import Image

from diffusers_invsr import TINY
from diffusers_invsr.metrics import psnr_y, ssim_y


pytest.importorskip("kornia")
pytest.importorskip("matplotlib")

import findings_common as common  # noqa: E402
import paper_findings  # noqa: E402
import perception_distortion  # noqa: E402
import reproduce_paper  # noqa: E402
import snr_threshold  # noqa: E402

from diffusers_invsr.degradation.simple import simple_degradation  # noqa: E402


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("kodim20", "kodim24"):
        Image.open(FIXTURES / "photos" / f"{name}_hr.png").crop((64, 64, 128, 128)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def tiny():
    return common.load_pipeline(TINY, "cpu")


def options(photos: Path, output: Path, *others: str) -> list[str]:
    return ["--hr", str(photos), "--output", str(output), "--device", "cpu", *others]


def scores_in(file: Path) -> dict[tuple, dict[str, float]]:
    records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert len({tuple(record["key"]) for record in records}) == len(records)
    return {tuple(record["key"]): record["scores"] for record in records}


def rows_of(text: str) -> dict[str, list[str]]:
    """The last table's rows by their first cell, of each such cell."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {label: cells for label, *cells in rows}


@pytest.mark.parametrize("scale", (2, 3, 6))
@pytest.mark.parametrize("degradation", ("test", "training", "simple", "blur", "noise"))
def test_degradations_are_reproducible_at_every_scale(degradation, scale):
    hr = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 168, 3), dtype=np.uint8))
    lr = common.make_lr(degradation, hr, [0, 1], scale)
    assert lr.size == (168 // scale, 120 // scale)
    assert np.array_equal(lr, common.make_lr(degradation, hr, [0, 1], scale))
    assert not np.array_equal(lr, common.make_lr(degradation, hr, [0, 2], scale))


def test_blur_and_noise_dominate_where_they_are_named():
    hr = Image.fromarray(
        np.tile(np.where(np.arange(128) % 32 < 16, 60, 200).astype(np.uint8)[None, :, None], (128, 1, 3))
    )
    clean = np.array(hr.resize((32, 32), Image.Resampling.BOX), dtype=float)
    error = {name: np.array(common.make_lr(name, hr, [0, 0]), dtype=float) - clean for name in ("blur", "noise")}
    along_edges = {name: np.std(x, axis=0).mean() for name, x in error.items()}  # constant but for the noise
    assert along_edges["noise"] > 10 > 2 > along_edges["blur"]
    across = {name: np.abs(x.mean(axis=0)).max() for name, x in error.items()}
    assert across["blur"] > 25 > across["noise"]


@pytest.mark.parametrize("hr", [np.zeros((8, 9, 3), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3))])
def test_simple_degradation_of_other_arrays(hr):
    with pytest.raises(ValueError, match="`hr` must be a uint8 RGB array whose sides are multiples of 4, got"):
        simple_degradation(hr, np.random.default_rng(0))


@pytest.mark.parametrize("logvar, spread", [(0.0, 1.0), (-30.0, 0.0)])
def test_constant_noise(tiny, logvar, spread):
    noise = common.with_constant_noise(tiny, logvar).noise_predictor(torch.rand(1, 3, 16, 16), 199).latent_dist
    assert noise.mean.abs().max() == 0
    assert torch.allclose(noise.std, torch.tensor(spread), atol=1e-6)
    assert tiny.noise_predictor(torch.rand(1, 3, 16, 16), 199).latent_dist.mean.abs().max() > 0


def test_differences():
    difference = common.Difference.of([2.0, 3.0, 5.0], [1.0, 1.0, 1.0])
    assert difference.mean == pytest.approx(7 / 3)
    assert difference.error == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert difference.direction == 0  # 2.65 standard errors, but of three pairs
    assert common.Difference.of([2.0, 2.1, 1.9], [1.0, 1.0, 1.0]).direction == 1
    assert common.Difference.of([1.0, 1.0, 1.0], [2.0, 2.1, 1.9]).direction == -1
    assert common.Difference.of([2.0], [1.0]).direction is None
    assert common.Difference.of([1.0, 2.0], [1.0, 2.0]).direction == 0


@pytest.mark.parametrize(
    "means, words",
    [
        ((0.5, 0.3), "confirmed here, +0.300"),
        ((0.5, 0.01), "not confirmed here (1 of 2 clearly so, 0 clearly the reverse), +0.010"),
        ((0.5, -0.5), "not confirmed here (1 of 2 clearly so, 1 clearly the reverse), -0.500"),
    ],
)
def test_verdicts_follow_from_the_differences(means, words):
    differences = [common.Difference(mean, 0.05, 8) for mean in means]
    verdict = paper_findings.verdict([("a", "b"), ("c", "d")], differences, "psnr_y")
    assert verdict.startswith(f"PSNR Y: {words}") and verdict.endswith("the smallest, of c − d")


def test_tables_are_complete():
    tables = [table for tables in paper_findings.TABLES.values() for table in tables]
    for table in tables:
        assert {label for q in table.questions for pair in q.pairs for label in pair} <= set(table.rows)
    runs = {run for table in tables for run in table.rows.values()}
    assert len({(run.degradation, run.scale, run.name) for run in runs}) == len(runs)


def test_findings(tiny, photos, tmp_path):
    file = tmp_path / "scores.jsonl"
    paper_findings.main(options(photos, tmp_path, "--tables", "main"))
    first = scores_in(file)
    assert len(first) == 2 * 2 * 6  # photographs, degradations, rows

    # The table's numbers are those of the pipeline's results.
    one_step, bicubic = [], []
    for number, name in enumerate(("kodim20", "kodim24")):
        hr = Image.open(photos / f"{name}.png")
        lr = Image.fromarray(simple_degradation(np.array(hr), np.random.default_rng([0, number])))
        result = tiny(lr, tile_size=None, generator=torch.Generator().manual_seed(0)).images[0]
        one_step.append([metric(np.array(result), np.array(hr)) for metric in (psnr_y, ssim_y)])
        bicubic.append(psnr_y(np.array(lr.resize(hr.size, Image.Resampling.BICUBIC)), np.array(hr)))
        assert np.array_equal(lr, Image.open(tmp_path / "pictures" / f"{name}_simple_x4_lr.png"))
    rows = rows_of((tmp_path / "findings.md").read_text())  # the last table is that of the simple degradation
    psnr, ssim = np.mean(one_step, axis=0)
    assert rows["predicted noise, 1 step [200]"][1:3] == [f"{psnr:.2f}", f"{ssim:.4f}"]
    difference, *_ = rows["predicted noise, 1 step [200] − bicubic"]
    assert difference.startswith(f"{psnr - np.mean(bicubic):+.3f} ± ")

    # Resuming after a kill: the line that was cut off is computed again, rows that other tables share are not.
    file.write_text(file.read_text()[:-10])
    paper_findings.main(options(photos, tmp_path, "--tables", "main", "scales"))
    both = scores_in(file)
    assert list(both)[: len(first) - 1] == list(first)[:-1]
    assert len(both) == len(first) + 2 * 2 * 3 * 2  # photographs, degradations, the other three scales, rows
    assert (tmp_path / "findings.md").read_text().count("\n## ") == 3

    with pytest.raises(SystemExit, match=r"scores of another seed: choose another --output"):
        paper_findings.main(options(photos, tmp_path, "--tables", "main", "--seed", "1"))


@pytest.mark.parametrize(
    "others, message",
    [
        (["--patterns", "*.tif"], r"holds no file \*\.tif"),
        (["--crop", "0"], "`--crop` must be a positive integer, got 0"),
    ],
)
def test_findings_of_nothing(photos, tmp_path, others, message):
    with pytest.raises(SystemExit, match=message):
        paper_findings.main(options(photos, tmp_path / "out", *others))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", (250, 100))
def test_one_step_is_that_of_the_pipeline(tiny, photos, start):
    lr = Image.open(photos / "kodim20.png").resize((16, 16))
    expected = tiny(lr, timesteps=[start], tile_size=None, generator=torch.Generator().manual_seed(5)).images[0]
    result = snr_threshold.one_step(tiny, lr, start, seed=5)
    assert np.abs(np.array(result, dtype=int) - np.array(expected, dtype=int)).max() <= 1


def test_the_quality_turns_where_it_is_clearly_worse():
    quality = {100: [20.0, 25.0, 30.0], 200: [20.5, 25.4, 30.6], 300: [20.5, 25.3, 30.6], 400: [19.5, 24.4, 29.6]}
    text = snr_threshold.turning_point(quality, "psnr_y")
    assert text.startswith("PSNR Y: best at start 200; with more noise, start 400 is the first that is clearly worse")
    del quality[300], quality[400]
    text = snr_threshold.turning_point(quality, "psnr_y")
    assert text == "PSNR Y: best at start 200; no start with more noise, up to 200, is clearly worse"


def test_snr_threshold(photos, tmp_path):
    arguments = options(photos, tmp_path, "--model", TINY, "--degradations", "simple", "--starts", "400", "100")
    snr_threshold.main(arguments)
    scores = scores_in(tmp_path / "scores.jsonl")
    assert len(scores) == 2 * 2 * 2  # photographs, noises, starts
    rows = rows_of((tmp_path / "threshold.md").read_text())
    assert [rows[start][0] for start in ("100", "400")] == ["8.57", "0.74"]  # SNR
    mean = np.mean([values["psnr_y"] for key, values in scores.items() if key[1:3] == ("predicted", 400)])
    assert rows["400"][1] == f"{mean:.2f}"
    snr_threshold.main(arguments)
    assert scores_in(tmp_path / "scores.jsonl") == scores


@pytest.mark.parametrize("starts", (["0"], ["1001", "50"]))
def test_snr_threshold_knows_its_range(photos, tmp_path, starts, capsys):
    with pytest.raises(SystemExit):
        snr_threshold.main(options(photos, tmp_path / "out", "--model", TINY, "--starts", *starts))
    assert "`--starts` must be between 1 and 1000" in capsys.readouterr().err


def test_curve_of_perception_and_distortion(photos, tmp_path, capsys):
    arguments = options(photos, tmp_path, "--patterns", "kodim20.png", "--grain", "6", "--models", f"ours={TINY}")
    perception_distortion.main(arguments)
    text = capsys.readouterr().out
    assert (tmp_path / "curve.md").read_text() in text
    rows, scores = rows_of(text), scores_in(tmp_path / "scores.jsonl")
    psnr = scores["simple", "kodim20", "ours"]["psnr_y"]
    assert float(rows["ours + grain 6"][3]) > float(rows["ours"][3])
    assert float(rows["ours + grain 6"][1]) < float(rows["ours"][1])
    assert rows["ours"][1] == f"{psnr:.2f}"
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".md", ".png"}
    with pytest.raises(SystemExit):
        perception_distortion.main([*arguments, f"ours={TINY}"])
    assert "`--models` must have different names, got ours ours." in capsys.readouterr().err


def test_the_tables_of_the_paper(photos, tmp_path, capsys):
    arguments = ["--sets", str(tmp_path), "--output", str(tmp_path / "out"), "--model", "tiny", "--device", "cpu"]
    with pytest.raises(SystemExit):
        reproduce_paper.main(arguments)
    assert "`--sets` must contain at least one of" in capsys.readouterr().err
    (tmp_path / "RealSR" / "lq").mkdir(parents=True)
    Image.open(photos / "kodim20.png").resize((16, 16)).save(tmp_path / "RealSR" / "lq" / "a.png")
    reproduce_paper.main(arguments)
    table = capsys.readouterr().out
    assert "| RealSR | 200 | NIQE | 4.22 | not measured here |" in table
    assert (tmp_path / "out" / "comparison.md").read_text() in table
    settings = json.loads((tmp_path / "out" / "RealSR" / "settings.json").read_text())
    sampling = settings["evaluation"]
    assert (sampling["color_fix"], sampling["tile_size"], sampling["tile_overlap"]) == ("wavelet", "auto", 64)
