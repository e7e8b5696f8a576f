"""The scripts behind the tables of findings, on small crops of photographs with the embedded model."""

import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from helpers import FIXTURES
from PIL import Image
from random_sd_turbo import build_pipeline
from safetensors.torch import load_file

from diffusers_invsr import TINY, InvSRPipeline
from diffusers_invsr.metrics import psnr_y, ssim_y
from diffusers_invsr.tiling import TileBlender


pytest.importorskip("kornia")

import findings_common as common  # noqa: E402
import interpolate_predictors  # noqa: E402
import make_training_images  # noqa: E402
import measure_seams  # noqa: E402
import paper_findings  # noqa: E402
import perception_distortion  # noqa: E402
import reproduce_paper  # noqa: E402
import show_degradation  # noqa: E402
import snr_threshold  # noqa: E402
import train_tiny  # noqa: E402
from finetune_in_pixels import deepen  # noqa: E402
from procedural import make_image  # noqa: E402
from simple_degradation import degrade  # noqa: E402


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


def keys(file: Path) -> list[tuple]:
    return [tuple(json.loads(line)["key"]) for line in file.read_text().splitlines()[1:]]


def test_the_simple_degradation_keeps_its_seeds(photos):
    photo = common.read_photographs(photos, ["*.png"])[1]
    lr = common.make_lr("simple", photo.hr, [3, photo.number])
    assert np.array_equal(lr, degrade(np.array(photo.hr), np.random.default_rng([3, 1])))


@pytest.mark.parametrize("scale", (2, 3, 6))
@pytest.mark.parametrize("degradation", ("test", "training", "simple", "blur", "noise"))
def test_degradations_are_reproducible_at_every_scale(degradation, scale):
    hr = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 168, 3), dtype=np.uint8))
    lr = common.make_lr(degradation, hr, [0, 1], scale)
    assert lr.size == (168 // scale, 120 // scale)
    assert np.array_equal(lr, common.make_lr(degradation, hr, [0, 1], scale))
    assert not np.array_equal(lr, common.make_lr(degradation, hr, [0, 2], scale))


def test_blur_and_noise_are_what_they_say():
    hr = Image.fromarray(
        np.tile(np.where(np.arange(128) % 32 < 16, 60, 200).astype(np.uint8)[None, :, None], (128, 1, 3))
    )
    clean = np.array(hr.resize((32, 32), Image.Resampling.BOX), dtype=float)
    error = {name: np.array(common.make_lr(name, hr, [0, 0]), dtype=float) - clean for name in ("blur", "noise")}
    along_edges = {name: np.std(x, axis=0).mean() for name, x in error.items()}  # constant but for the noise
    assert along_edges["noise"] > 10 > 2 > along_edges["blur"]
    across = {name: np.abs(x.mean(axis=0)).max() for name, x in error.items()}
    assert across["blur"] > 25 > across["noise"]


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
    assert difference.sign == 0  # 2.65 standard errors, but of three pairs
    assert common.Difference.of([2.0, 2.1, 1.9], [1.0, 1.0, 1.0]).sign == 1
    assert common.Difference.of([1.0, 1.0, 1.0], [2.0, 2.1, 1.9]).sign == -1
    assert common.Difference.of([2.0], [1.0]).sign is None
    assert common.Difference.of([1.0, 2.0], [1.0, 2.0]).sign == 0


def test_results_are_json_with_one_photograph_too(tmp_path):
    common.write_json(tmp_path / "a.json", {"d": vars(common.Difference.of([3.0], [1.0])), "psnr": [math.inf]})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "d": {"mean": 2.0, "error": None, "count": 1},
        "psnr": [None],
    }


@pytest.mark.parametrize(
    "means, words",
    [
        ((0.5, 0.3), "confirmed here, +0.300"),
        ((0.5, 0.01), "not confirmed here (1 of 2 clearly so, 0 clearly the reverse), +0.010"),
        ((0.5, -0.5), "not confirmed here (1 of 2 clearly so, 1 clearly the reverse), -0.500"),
    ],
)
def test_verdicts_follow_from_the_differences(means, words):
    question = paper_findings.Question("", [("a", "b"), ("c", "d")])
    differences = [{"psnr_y": common.Difference(mean, 0.05, 8)} for mean in means]
    verdict = paper_findings.verdict(question, differences, "psnr_y")
    assert verdict.startswith(f"PSNR Y: {words}") and verdict.endswith("the smallest, of c − d")


def test_tables_are_complete():
    for tables in paper_findings.TABLES.values():
        for table in tables:
            assert {label for q in table.questions for pair in q.pairs for label in pair} <= set(table.rows)
    runs = {run for tables in paper_findings.TABLES.values() for table in tables for run in table.rows.values()}
    assert len({(run.degradation, run.scale, run.name) for run in runs}) == len(runs)


@pytest.mark.slow
def test_findings(tiny, photos, tmp_path):
    scores = tmp_path / "scores.jsonl"
    paper_findings.main(options(photos, tmp_path, "--tables", "main"))
    first = keys(scores)
    assert len(first) == len(set(first)) == 2 * 2 * 6  # photographs, degradations, rows

    # The table's numbers are those of the pipeline's results.
    one_step, bicubic = [], []
    for number, name in enumerate(("kodim20", "kodim24")):
        hr = Image.open(photos / f"{name}.png")
        lr = Image.fromarray(degrade(np.array(hr), np.random.default_rng([0, number])))
        result = tiny(lr, tile_size=None, generator=torch.Generator().manual_seed(0)).images[0]
        one_step.append([metric(np.array(result), np.array(hr)) for metric in (psnr_y, ssim_y)])
        bicubic.append(psnr_y(np.array(lr.resize(hr.size, Image.Resampling.BICUBIC)), np.array(hr)))
        assert np.array_equal(lr, Image.open(tmp_path / "pictures" / f"{name}_simple_x4_lr.png"))
    table = json.loads((tmp_path / "findings.json").read_text())["tables"][1]
    row = table["means"]["predicted noise, 1 step [200]"]
    assert (row["psnr_y"], row["ssim_y"]) == pytest.approx(tuple(np.mean(one_step, axis=0)))
    pair = table["questions"][0]["pairs"][0]
    assert pair["psnr_y"]["mean"] == pytest.approx(np.mean([x[0] for x in one_step]) - np.mean(bicubic))
    text = (tmp_path / "findings.md").read_text()
    assert f"| predicted noise, 1 step [200] | {row['psnr_rgb']:.2f} | {row['psnr_y']:.2f} |" in text

    # Going on after a kill: the half line is computed anew, rows that other tables share are not.
    scores.write_text(scores.read_text()[:-10])
    paper_findings.main(options(photos, tmp_path, "--tables", "main", "scales"))
    both = keys(scores)
    assert len(both) == len(set(both)) and both[: len(first) - 1] == first[:-1]
    assert len(both) == len(first) + 2 * 2 * 3 * 2  # photographs, degradations, the other three scales, rows
    assert len(json.loads((tmp_path / "findings.json").read_text())["tables"]) == 4

    with pytest.raises(SystemExit, match=r"scores of another seed: choose another --output"):
        paper_findings.main(options(photos, tmp_path, "--tables", "main", "--seed", "1"))


def test_findings_without_photographs(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no file \*\.tif"):
        paper_findings.main(options(tmp_path, tmp_path / "out", "--patterns", "*.tif"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", (250, 100))
def test_one_step_is_that_of_the_pipeline(tiny, photos, start):
    lr = Image.open(photos / "kodim20.png").resize((16, 16))
    expected = tiny(lr, timesteps=[start], tile_size=None, generator=torch.Generator().manual_seed(5)).images[0]
    result = snr_threshold.one_step(tiny, lr, start, seed=5)
    assert np.abs(np.array(result, dtype=int) - np.array(expected, dtype=int)).max() <= 1


def test_the_quality_turns_where_it_is_clearly_worse():
    quality = {100: [20.0, 25.0, 30.0], 200: [20.5, 25.4, 30.6], 300: [20.5, 25.3, 30.6], 400: [19.5, 24.4, 29.6]}
    text, data = snr_threshold.turning_point([100, 200, 300, 400], quality, "psnr_y")
    assert (data["best"], data["turn"]) == (200, 400)
    assert text.startswith("PSNR Y: best at start 200; with more noise, start 400 is the first that is clearly worse")
    text, data = snr_threshold.turning_point([100, 200], quality, "psnr_y")
    assert data["turn"] is None and "up to 200, is clearly worse" in text


@pytest.mark.slow
def test_snr_threshold(photos, tmp_path):
    arguments = options(photos, tmp_path, "--model", TINY, "--degradations", "simple", "--starts", "400", "100")
    snr_threshold.main(arguments)
    scores = keys(tmp_path / "scores.jsonl")
    assert len(scores) == len(set(scores)) == 2 * 2 * 2  # photographs, noises, starts
    rows = json.loads((tmp_path / "threshold.json").read_text())["degradations"][0]["starts"]
    assert [row["start"] for row in rows] == [100, 400]
    assert rows[0]["snr"] == pytest.approx(8.57, abs=0.01) and rows[1]["snr"] == pytest.approx(0.74, abs=0.01)
    snr_threshold.main(arguments)
    assert keys(tmp_path / "scores.jsonl") == scores


@pytest.mark.parametrize("starts", (["0"], ["1001", "50"]))
def test_snr_threshold_knows_its_range(photos, tmp_path, starts, capsys):
    with pytest.raises(SystemExit):
        snr_threshold.main(options(photos, tmp_path / "out", "--model", TINY, "--starts", *starts))
    assert "--starts have to be from 1 to 1000" in capsys.readouterr().err


@pytest.fixture(scope="module")
def auto():
    pytest.importorskip("pywt", reason="scikit-image's noise estimate needs PyWavelets")
    import fit_auto_start

    return fit_auto_start


def test_features_tell_noise_and_blur(auto):
    photo = Image.open(FIXTURES / "photos" / "kodim24_hr.png")
    clean = np.array(photo, dtype=float)
    noise = 15 * np.random.default_rng(0).standard_normal(clean.shape)
    noisy = Image.fromarray((clean + noise).clip(0, 255).astype(np.uint8))
    blurred = photo.resize((128, 128), Image.Resampling.BOX).resize(photo.size, Image.Resampling.BICUBIC)
    sharp, noisy, blurred = (dict(zip(auto.FEATURES, auto.features(x))) for x in (photo, noisy, blurred))
    assert noisy["noise"] == pytest.approx(np.log1p(15), abs=0.25) and noisy["noise"] > sharp["noise"] + 0.3
    for name, sign in (("gradient ratio of two scales", 1), ("Laplacian without noise", -1)):
        assert sign * (blurred[name] - sharp[name]) > 0.2
    assert auto.features(Image.new("RGB", (64, 64), "grey")) == pytest.approx([0, 0, 0, 0])


def test_the_rule_finds_what_the_scores_follow(auto):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, 4)) * [1, 5, 1, 1] + [0, 3, 0, 0]
    starts = (250, 200, 150, 100)
    gain = np.outer((inputs[:, 1] - 3) / 5, (1.5, 0.5, -0.5, -1.5)) + 0.01 * rng.standard_normal((200, 4))
    scores = np.stack([30 + 3 * rng.standard_normal((200, 1)) + gain, 0.8 + 0.01 * gain], axis=2)
    rule = auto.Rule.fit(inputs[:100], scores[:100], starts)
    choice, expected = rule.choose(inputs[100:]), np.where(inputs[100:, 1] > 3, 0, 3)
    assert (choice == expected).mean() > 0.95


@pytest.mark.slow
def test_auto_start(auto, photos, tmp_path):
    patterns = ["--fit-patterns", "kodim20.png", "--test-patterns", "kodim24.png"]
    arguments = options(photos, tmp_path, *patterns, "--crop", "56", "--crops", "1")
    auto.main(arguments)
    files = [tmp_path / f"{name}_scores.jsonl" for name in ("fit", "test")]
    before = [keys(file) for file in files]
    assert [len(found) for found in before] == [len(auto.DEGRADATIONS)] * 2
    data = json.loads((tmp_path / "auto_start.json").read_text())
    records = [json.loads(line)["scores"] for line in files[1].read_text().splitlines()[1:]]
    for start in (250, 200, 150, 100):
        expected = np.mean([record[str(start)]["psnr_y"] for record in records])
        assert data["test"]["means"][f"start {start}"]["psnr_y"] == pytest.approx(expected)
    best = np.mean([max(record[str(s)]["ssim_y"] for s in (250, 200, 150, 100)) for record in records])
    assert data["test"]["means"]["best start of each image"]["ssim_y"] == pytest.approx(best)
    assert sum(data["test"]["chosen"].values()) == len(records)
    auto.main(arguments)
    assert [keys(file) for file in files] == before


def test_auto_start_keeps_fitting_and_testing_apart(auto, photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        auto.main(options(photos, tmp_path / "out", "--fit-patterns", "*.png", "--test-patterns", "kodim24.png"))
    assert "--fit-patterns and --test-patterns both have kodim24" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("--crop", "--crops"))
def test_sizes_are_positive(auto, photos, tmp_path, name, capsys):
    with pytest.raises(SystemExit):
        auto.main(options(photos, tmp_path / "out", name, "0"))
    assert f"argument {name}: has to be 1 or more, but is 0" in capsys.readouterr().err


def test_a_sheet_of_degradations(photos, tmp_path, capsys):
    arguments = ["--hr", str(photos / "kodim20.png"), "--output", str(tmp_path / "sheet.png"), "--draws", "2"]
    show_degradation.main([*arguments, "--crop", "62"])
    sheet, photo = (np.array(Image.open(path)) for path in (tmp_path / "sheet.png", photos / "kodim20.png"))
    assert np.array_equal(sheet[:60, :60], photo[2:62, 2:62])
    for crop in ("20", "128"):
        with pytest.raises(SystemExit):
            show_degradation.main([*arguments, "--crop", crop])
        message = f"--crop has to be from 56 to the photograph's shorter side, 64, but is {crop}"
        assert message in capsys.readouterr().err


def test_training_images(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (256, 384, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    arguments = ["--photos", str(tmp_path / "photos"), "--count", "1", "--processes", "1"]
    make_training_images.main([*arguments, "--output", str(tmp_path / "images")])
    assert "8 pieces of 1 photographs and 1 procedural images" in capsys.readouterr().out
    first, turned = (
        np.array(Image.open(tmp_path / "images" / "photographs" / f"a_100_0000_0128_{quarter}.png"))
        for quarter in (0, 1)
    )
    assert np.array_equal(first, pixels[:, 128:])
    # One tone curve over channels in some order: wherever a channel was equal it is equal again
    source = np.rot90(pixels[:, 128:])
    curves = [{*zip(source[..., i].flat, turned[..., j].flat)} for i in range(3) for j in range(3)]
    assert sum(len(curve) <= 256 for curve in curves) == 3
    drawn = np.array(Image.open(tmp_path / "images" / "procedural" / "00000.png"))
    assert np.array_equal(drawn, make_image(np.random.default_rng((0, 0))))

    Image.new("RGB", (255, 400)).save(tmp_path / "photos" / "b.png")
    with pytest.raises(SystemExit, match="`--photos` have to be at least 256 pixels high and wide, but b.png is not"):
        make_training_images.main([*arguments, "--output", str(tmp_path / "others")])
    assert not (tmp_path / "others").exists()


def test_the_tables_of_the_paper(photos, tmp_path, monkeypatch, capsys):
    arguments = ["--sets", str(tmp_path), "--output", str(tmp_path / "out"), "--model", "tiny", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", *arguments])
    with pytest.raises(SystemExit):
        reproduce_paper.main()
    assert "has to hold at least one of" in capsys.readouterr().err
    (tmp_path / "RealSR" / "lq").mkdir(parents=True)
    Image.open(photos / "kodim20.png").resize((16, 16)).save(tmp_path / "RealSR" / "lq" / "a.png")
    reproduce_paper.main()
    table = capsys.readouterr().out
    assert "| RealSR | 200 | NIQE | 4.22 | not measured here |" in table
    assert (tmp_path / "out" / "comparison.md").read_text() in table
    settings = json.loads((tmp_path / "out" / "RealSR" / "settings.json").read_text())
    sampling = settings["evaluation"]
    assert (sampling["color_fix"], sampling["tile_size"], sampling["tile_overlap"]) == ("wavelet", "auto", 64)


@pytest.mark.parametrize("steps", ("249", "1001"))
def test_prior_steps(tmp_path, steps, capsys):
    arguments = ["--kodak", str(tmp_path), "--work", str(tmp_path), "--output", str(tmp_path), "--prior-steps", steps]
    with pytest.raises(SystemExit):
        train_tiny.parse_args(arguments)
    assert f"--prior-steps has to be from 250 to 1000, but is {steps}." in capsys.readouterr().err


@pytest.mark.parametrize("overlap, window", [(0, "raised_cosine"), (8, "raised_cosine"), (16, "gaussian")])
def test_tiles_enlarged_one_by_one_are_those_of_the_pipeline(tiny, overlap, window):
    lr = Image.open(FIXTURES / "photos" / "kodim20_lr.png").crop((0, 0, 56, 44))
    enlarge = measure_seams.Enlarger(tiny, lr, seed=0)
    arguments = {"tile_overlap": overlap, "tile_window": window, "generator": torch.Generator().manual_seed(0)}
    expected = 255 * tiny(lr, tile_size=32, output_type="np", **arguments).images[0]
    result = enlarge(enlarge.grid(32, overlap, window))
    assert np.abs(result - expected).mean() < 0.05  # but for the noise, which the embedded model nearly ignores
    assert np.abs(result - enlarge(enlarge.grid(None))).mean() > 0.2


@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("overlap, window", [(0, "gaussian"), (8, "gaussian"), (8, "raised_cosine")])
def test_planted_seams_are_found(tiny, axis, overlap, window):
    """Tiles of another brightness, alone or under noise that no line is in."""
    rng = np.random.default_rng(0)
    grid = measure_seams.Enlarger(tiny, Image.new("RGB", (72, 72)), seed=0).grid(32, overlap, window)
    blender = TileBlender(grid, (1, 3), 4)
    for corner in grid:
        blender.add(torch.full((1, 3, 128, 128), 20.0 * ((corner[axis] > 0) + (corner[axis] > 24))), *corner)
    planted = blender.sum[0].permute(1, 2, 0).double().numpy()
    noise = rng.normal(size=planted.shape)
    measures = {key: measure_seams.seam_measures(x, 0 * x, grid) for key, x in {1: planted + noise, 0: noise}.items()}
    line = {key: values["line"] / values["line elsewhere"] for key, values in measures.items()}
    assert line[1] > 1.3 and line[0] == pytest.approx(1, abs=0.1)
    if overlap == 0:
        assert measures[1]["step"] > 1.5 * measures[1]["step elsewhere"]
    assert measures[0]["step"] == pytest.approx(measures[0]["step elsewhere"], rel=0.1)
    assert measures[0]["band"] == pytest.approx(measures[0]["band elsewhere"], rel=0.1)


def test_seams_are_measured_of_every_setting(photos, tmp_path):
    arguments = options(photos, tmp_path, "--degradation", "none", "--tile-size", "32", "--overlaps", "0", "8")
    measure_seams.main(arguments)
    assert len(keys(tmp_path / "scores.jsonl")) == 2
    data = json.loads((tmp_path / "seams.json").read_text())
    values = {(row["overlap"], row["window"]): row for row in data["settings"]}
    assert list(values) == [(o, w) for o in (0, 8, 16) for w in ("gaussian", "raised_cosine")]  # 16: the published
    assert values[0, "gaussian"]["tiles"] == 4 and values[16, "gaussian"]["tiles"] == 9
    assert values[0, "gaussian"]["step"] > 2 * values[0, "gaussian"]["step elsewhere"]
    assert values[0, "gaussian"]["band"] > values[0, "gaussian"]["band elsewhere"]
    assert values[0, "gaussian"]["psnr"] < values[16, "gaussian"]["psnr"] < data["another seed"]["psnr"]
    assert values[16, "gaussian"]["minus published"]["line"]["mean"] == 0
    assert (
        data["choice"]["overlap"] > 0
        and f"published: {data['choice']['overlap']}," in (tmp_path / "seams.md").read_text()
    )
    assert Image.open(tmp_path / "kodim20.png").size == (5 * 164, 6 * 164)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tile-size", "30"], "--tile-size has to be a multiple of 4, but is 30"),
        (["--tile-size", "32", "--overlaps", "0", "32"], "from 0 to less than --tile-size 32, but are"),
        (["--tile-size", "64"], "has to be larger than the tile, 64"),
    ],
)
def test_seams_of_impossible_settings_are_refused(photos, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        measure_seams.main(options(photos, tmp_path, "--degradation", "none", *arguments))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("extra_layers", [0, 1])
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_model_between_two(tmp_path, weight, extra_layers):
    pipe = InvSRPipeline.from_pretrained(TINY)
    pipe.register_modules(noise_predictor=deepen(pipe.noise_predictor, extra_layers))
    networks = ("noise_predictor", "vae")
    before = {name: copy.deepcopy(getattr(pipe, name).state_dict()) for name in networks}
    with torch.no_grad():
        for value in (*pipe.noise_predictor.parameters(), *pipe.vae.decoder.parameters()):
            value.add_(0.5)
    pipe.register_to_config(model_card={"license": "mit", "training": "| of the other |"})
    pipe.save_pretrained(tmp_path / "other")
    arguments = [TINY, str(tmp_path / "other"), "--output", str(tmp_path / "between"), "--weight"]
    interpolate_predictors.main([*arguments, str(weight)])
    between = InvSRPipeline.from_pretrained(tmp_path / "between")
    # Of a new layer, the last convolution begins at zero and everything else is the second's
    known = InvSRPipeline.from_pretrained(TINY).noise_predictor.state_dict()
    for name in networks:
        for key, value in getattr(between, name).state_dict().items():
            new = name == "noise_predictor" and key not in known and ".conv2." not in key
            share = 0 if name == "vae" and not key.startswith("decoder") else 0.5 if new else 0.5 * weight
            torch.testing.assert_close(value, before[name][key] + share)
    card = (tmp_path / "between" / "README.md").read_text()
    assert "license: other" in card and "license_name: cc0-1.0 and mit" in card
    assert "The first:\n\nNot stated.\n\nThe second:\n\n| of the other |" in card
    assert f"{1 - weight:g} of the first and {weight:g} of the second" in card
    with pytest.raises(SystemExit):
        interpolate_predictors.main([*arguments, "0.5"])  # the folder exists


def test_what_lies_between_is_saved_in_the_type_asked_for(tmp_path):
    interpolate_predictors.main(
        [TINY, TINY, "--weight", "0.3", "--dtype", "float16", "--output", str(tmp_path / "same")]
    )
    same, shipped = (load_file(Path(folder, "vae", SAFETENSORS_WEIGHTS_NAME)) for folder in (tmp_path / "same", TINY))
    assert {value.dtype for value in same.values()} == {torch.float16}
    assert same.keys() == shipped.keys() and all(torch.equal(value, shipped[key]) for key, value in same.items())


def test_new_layers_count_for_nothing_before_interpolation():
    """Also those with attention; and predictors of other widths are left for the check of shapes."""
    pipe = build_pipeline(1 / 16, text=False)
    first, second = pipe.noise_predictor, deepen(pipe.noise_predictor, 1)
    with torch.no_grad():
        for value in second.parameters():
            value.add_(0.1)
        image = 2 * torch.rand(1, 3, 32, 32) - 1
        deeper = interpolate_predictors.deepen_like(first, second)
        torch.testing.assert_close(deeper(image, 199).moments, first(image, 199).moments)
        interpolate_predictors.interpolate(deeper, second, 1)
        torch.testing.assert_close(deeper(image, 199).moments, second(image, 199).moments)
    assert interpolate_predictors.deepen_like(first, first) is first
    other = InvSRPipeline.from_pretrained(TINY).noise_predictor
    with pytest.raises(ValueError, match="same keys and shapes"):
        interpolate_predictors.interpolate(interpolate_predictors.deepen_like(first, other), other, 1)


def test_models_of_other_shapes_have_nothing_between(tmp_path, capsys):
    pipe = InvSRPipeline.from_pretrained(TINY)
    pipe.register_modules(noise_predictor=deepen(pipe.noise_predictor, 1))
    pipe.save_pretrained(tmp_path / "deeper")
    with pytest.raises(SystemExit):
        interpolate_predictors.main(
            [str(tmp_path / "deeper"), TINY, "--weight", "1", "--output", str(tmp_path / "no")]
        )
    assert "InvSRNoisePredictor have to have the same keys and shapes" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_curve_of_perception_and_distortion(photos, tmp_path, capsys):
    arguments = ["--hr", str(photos), "--output", str(tmp_path / "curve"), "--crop", "32", "--grain", "6"]
    arguments += ["--models", f"ours={TINY}"]
    perception_distortion.main(arguments)
    table = capsys.readouterr().out
    assert (tmp_path / "curve" / "curve.md").read_text() in table
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table.splitlines() if line[:1] == "|"}
    scores = [json.loads(line) for line in (tmp_path / "curve" / "scores.jsonl").read_text().splitlines()[1:]]
    ours = [item["scores"]["psnr_y"] for item in scores if item["key"][::2] == ["simple", "ours"]]
    assert float(rows["ours + grain 6"][3]) > float(rows["ours"][3])
    assert float(rows["ours + grain 6"][1]) < float(rows["ours"][1])
    assert len(ours) == 2 and float(rows["ours"][1]) == pytest.approx(np.mean(ours), abs=0.006)  # the last table
    assert {path.suffix for path in (tmp_path / "curve").iterdir()} == {".jsonl", ".md", ".json", ".png"}
    with pytest.raises(SystemExit):
        perception_distortion.main([*arguments, f"ours={TINY}"])
    assert "--models has to give each a name of its own" in capsys.readouterr().err
