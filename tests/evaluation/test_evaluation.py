"""Evaluations on real files with the embedded model: tables, resuming, errors and unavailable metrics."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import pixels, run_command
from PIL import Image

from diffusers_invsr import TINY, InvSRPipeline
from diffusers_invsr.evaluation import METRICS, Evaluator, MetricSuite, Sampling, evaluate, save_plot, save_sheets
from diffusers_invsr.evaluation.evaluate import pipeline_fingerprint, schedule_name
from diffusers_invsr.evaluation.metric_suite import MetricUnavailable
from diffusers_invsr.evaluation.pictures import choose_crops
from diffusers_invsr.metrics import gradient_ratio, psnr_y, ssim_y


pytest.importorskip("skimage")
NAMES = ("a", "b", "deep/c")
FAST = ("psnr_y", "ssim_y", "gradient_ratio")
UNTILED = ("--tile-size", "none")  # a tile would be many times as large as these images


@pytest.fixture(scope="module")
def pipe() -> InvSRPipeline:
    pipe = InvSRPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with LR images (16x12), HR images (64x48) and results of another program."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        hr = make_image(seed)
        save(hr, "gt", name, ".jpg" if name == "b" else ".png")
        save(hr.resize((16, 12), Image.Resampling.BICUBIC), "lq", name)
        save(hr.resize((32, 24)).resize((64, 48)), "other", name)
    return tmp_path


def make_image(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def save(image: Image.Image, folder: str, name: str, suffix: str = ".png"):
    path = Path(folder, name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def evaluate_fast(pipe, out="out", gt="gt", **settings):
    return evaluate(out, "lq", gt, pipe, **{"metrics": FAST, "sampling": Sampling(tile_size=None), **settings})


def test_numbers(folder, pipe):
    evaluation = evaluate_fast(pipe, schedules=[[200, 100], [200], [200, 100]], sampling=Sampling(5, tile_size=None))
    assert [run.name for run in evaluation.runs] == ["bicubic", "200", "200-100"]
    for name in NAMES:
        lr, hr = Image.open(f"lq/{name}.png"), pixels(next(Path("gt").glob(f"{name}.*")))
        results = {"bicubic": lr.resize((64, 48), Image.Resampling.BICUBIC)}
        for schedule in ("200", "200-100"):
            steps = [int(step) for step in schedule.split("-")]
            generator = torch.Generator().manual_seed(5)
            results[schedule] = pipe(lr, timesteps=steps, tile_size=None, generator=generator).images[0]
        for measured in evaluation.runs:
            result = np.array(results[measured.name])
            assert np.array_equal(pixels(f"out/{measured.name}/images/{name}.png"), result)
            expected = {"psnr_y": psnr_y(result, hr), "ssim_y": ssim_y(result, hr)}
            expected["gradient_ratio"] = gradient_ratio(result, hr)
            assert measured.images[name] == pytest.approx(expected, rel=1e-12)
    mean = np.mean([values["psnr_y"] for values in evaluation.runs[1].images.values()])
    assert evaluation.runs[1].mean("psnr_y") == pytest.approx(mean)


def test_tables(folder, pipe):
    evaluation = evaluate_fast(pipe)
    tables = json.loads(Path("out/results.json").read_text())
    rows = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    text = Path("out/results.md").read_text()
    assert [row["image"] for row in rows] == [*NAMES, "mean"] * 2
    for measured in evaluation.runs:
        table = tables["runs"][measured.name]
        assert table["num_images"] == 3 and table["images"] == measured.images
        for metric in FAST:
            mean = measured.mean(metric)
            assert table["mean"][metric] == mean
            (row,) = (row for row in rows if (row["run"], row["image"]) == (measured.name, "mean"))
            assert float(row[metric]) == mean
        cells = [f"{measured.mean(metric):.{METRICS[metric].digits}f}" for metric in FAST]
        assert f"| {measured.name} | 3 | {' | '.join(cells)} |" in text
        for name, values in measured.images.items():
            assert f"| {name} | {values['psnr_y']:.2f} | " in text
    assert "n/a" not in text


def test_crop_border(folder):
    (measured,) = evaluate("out", gt="gt", results="other", metrics=FAST, crop_border=4).runs
    result, hr = (pixels(f"{part}/a.png") for part in ("other", "gt"))
    inner = (slice(4, -4), slice(4, -4))
    assert measured.images["a"]["psnr_y"] == psnr_y(result[inner], hr[inner])
    assert measured.images["a"]["ssim_y"] == ssim_y(result[inner], hr[inner])
    assert measured.images["a"]["gradient_ratio"] == gradient_ratio(result, hr)


def test_gradient_ratio():
    hr = pixels_of_ramp(step=4)
    assert gradient_ratio(hr, hr) == 1
    assert gradient_ratio(pixels_of_ramp(step=2), hr) == pytest.approx(0.5)
    assert math.isnan(gradient_ratio(hr, np.zeros_like(hr)))


def pixels_of_ramp(step: int) -> np.ndarray:
    return np.repeat(np.arange(0, 40 * step, step, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(20, axis=0)


def test_equal_images_have_no_number_in_json(folder):
    evaluation = evaluate("out", gt="gt", results="gt", metrics=FAST)
    table = json.loads(Path("out/results.json").read_text())["runs"]["results"]
    assert table["mean"] == {"psnr_y": None, "ssim_y": 1.0, "gradient_ratio": 1.0}
    assert "infinite" in table["reasons"]["psnr_y"]
    assert evaluation.runs[0].mean("psnr_y") == math.inf and "| inf |" in Path("out/results.md").read_text()
    assert evaluate("out", gt="gt", results="gt", metrics=FAST).runs == evaluation.runs


def test_it_resumes_at_the_image_where_it_was(folder, pipe):
    whole = evaluate_fast(pipe, "whole")
    evaluate_fast(pipe, limit=1)
    first = Path("out/200/images/a.png")
    first_time = first.stat().st_mtime_ns
    # What is left if the program is killed: a result without a record, and half a line
    records = Path("out/200/records.jsonl")
    save(Image.open("whole/200/images/b.png"), "out/200/images", "b")
    second_time = Path("out/200/images/b.png").stat().st_mtime_ns
    with records.open("a") as stream:
        stream.write('{"image": "b", "val')
    resumed = evaluate_fast(pipe)
    assert resumed.runs == whole.runs
    assert first.stat().st_mtime_ns == first_time
    assert Path("out/200/images/b.png").stat().st_mtime_ns != second_time  # made from unknown inputs
    assert [json.loads(line)["image"] for line in records.read_text().splitlines()] == list(NAMES)


def test_a_result_of_unknown_inputs_is_replaced(folder, pipe):
    whole = evaluate_fast(pipe, "whole", limit=1)
    save(Image.new("RGB", (64, 48), "red"), "out/200/images", "a")
    Path("out/settings.json").write_bytes(Path("whole/settings.json").read_bytes())
    assert evaluate_fast(pipe, limit=1).runs == whole.runs


def test_overwriting_leaves_nothing_of_the_evaluation_before(folder, pipe):
    save_sheets(evaluate_fast(pipe), Path("out"))
    Path("out/200/records.jsonl").unlink()
    evaluate_fast(pipe, limit=1, overwrite=True)
    assert not list(Path("out").rglob("b.png")) and not Path("out/grids").exists()


def test_overwriting_keeps_what_is_not_part_of_an_evaluation(folder, pipe):
    evaluate_fast(pipe, limit=1)
    save(Image.new("RGB", (64, 48)), "out/mine/images", "a")
    Path("out/results.txt").write_text("mine")
    evaluate_fast(pipe, limit=1, overwrite=True)
    assert Path("out/mine/images/a.png").exists() and Path("out/results.txt").exists()
    with pytest.raises(ValueError, match="`overwrite` cannot replace out, which contains `results`"):
        evaluate("out", gt="gt", results="out/200/images", metrics=FAST, overwrite=True)
    assert Path("out/200/images/a.png").exists()


def test_names_may_be_any_bytes(folder, pipe):
    name = os.fsdecode(b"caf\xe9")
    for part in ("lq", "gt"):
        for file in Path(part).iterdir():
            if file.is_file() and file.stem == "a":
                file.rename(file.with_stem(name))
    assert name in evaluate_fast(pipe).runs[-1].images
    assert "caf\\udce9" in Path("out/results.csv").read_text()


def test_a_result_that_changed_after_it_was_measured_is_refused(folder, pipe):
    evaluate_fast(pipe, limit=1)
    save(Image.new("RGB", (64, 48), "red"), "out/200/images", "a")
    with pytest.raises(ValueError, match="`result` must be the same as when out was begun, but .*a.png has"):
        evaluate_fast(pipe, limit=1)


def test_a_last_line_without_its_end_is_completed(folder, pipe):
    whole = evaluate_fast(pipe)
    records = Path("out/200/records.jsonl")
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:2]).rstrip("\n"))
    assert evaluate_fast(pipe).runs == whole.runs
    assert [json.loads(line)["image"] for line in records.read_text().splitlines()] == list(NAMES)


def test_the_output_may_not_lie_among_the_inputs(folder, pipe):
    with pytest.raises(ValueError, match="`out` must be outside `lq`"):
        evaluate_fast(pipe, "lq/out")


def test_a_border_that_is_too_large(folder):
    evaluation = evaluate("out", gt="gt", results="other", metrics=FAST, crop_border=24)
    assert "psnr_y" not in evaluation.runs[0].images["a"]
    assert "`crop_border=24` is too large for 64x48" in Path("out/results.md").read_text()
    with pytest.raises(ValueError, match="`crop_border` must be a non-negative integer, got 1.5"):
        evaluate("new", gt="gt", results="other", metrics=FAST, crop_border=1.5)


@pytest.mark.slow
def test_killed_command(folder, pipe):
    for number in range(12):
        save(make_image(number), "gt", f"more/{number}")
        save(make_image(number).resize((16, 12)), "lq", f"more/{number}")
    program = "from diffusers_invsr.cli import main; main()"
    options = ["--metric", "psnr_y", "--steps", "5", *UNTILED]
    arguments = ["evaluate", "--model", "tiny", "--lq", "lq", "--gt", "gt", "-o", "out", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    records = Path("out/250-200-150-100-50/records.jsonl")
    while process.poll() is None and not (records.is_file() and records.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = records.read_text().count("\n")
    assert 3 <= done < 15
    times = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.png")}
    assert run_command("evaluate", *arguments[1:]).count("250-200-150-100-50 more/") == 12
    assert {path: path.stat().st_mtime_ns for path in times} == times
    again = evaluate_fast(pipe, "again", schedules=[[250, 200, 150, 100, 50]], metrics=["psnr_y"])
    table = json.loads(Path("out/results.json").read_text())["runs"]["250-200-150-100-50"]
    assert table["images"] == again.runs[1].images


def test_results_are_yielded_as_they_are_measured(folder, pipe):
    whole = Path("lq/b.png").read_bytes()
    Path("lq/b.png").write_bytes(whole[:80])
    evaluator = Evaluator("out", "lq", "gt", pipe, metrics=["psnr_y", "niqe"], sampling=Sampling(tile_size=None))
    assert not Path("out").exists()
    results = evaluator.measure()
    first = next(results)
    assert (first.run, first.image, first.error) == ("bicubic", "a", None)
    assert first.values == evaluator.evaluation.runs[0].images["a"]
    assert Path("out/bicubic/images/a.png").exists() and not Path("out/results.json").exists()
    rest = {(result.run, result.image): result for result in results}
    assert len(rest) == 5 and Path("out/results.json").exists()
    assert {key: result.error for key, result in rest.items() if result.error} == evaluator.evaluation.failed
    assert rest["200", "b"].error and not rest["200", "b"].values
    Path("lq/b.png").write_bytes(whole)
    assert not any(result.error for result in evaluator.measure()) and not evaluator.evaluation.failed


def test_metrics_and_schedules_can_be_added(folder, pipe):
    first = evaluate_fast(pipe, metrics=["psnr_y"])
    times = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.png")}
    second = evaluate_fast(pipe, schedules=[[200], [100]])
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert second.runs[1].images["a"]["psnr_y"] == first.runs[1].images["a"]["psnr_y"]
    assert set(second.runs[1].images["a"]) == set(FAST) and second.runs[2].name == "100"


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"sampling": Sampling(seed=1, tile_size=None)}, "`seed`"),
        ({"sampling": Sampling(color_fix="wavelet", tile_size=None)}, "`color_fix`"),
        ({"sampling": Sampling(tile_size=16)}, "`tile_size`"),
        ({"crop_border": 2}, "`crop_border`"),
    ],
)
def test_other_settings_are_refused(folder, pipe, settings, word):
    evaluate_fast(pipe, limit=1)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"{word} must be the same as when out was begun"):
        evaluate_fast(pipe, **settings)
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    evaluate_fast(pipe, overwrite=True, limit=1, **settings)


def test_another_model_is_refused(folder, pipe):
    evaluate_fast(pipe, limit=1)
    other = InvSRPipeline.from_pretrained(TINY)
    assert pipeline_fingerprint(other) == pipeline_fingerprint(pipe)
    with torch.no_grad():
        next(other.unet.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="`weights`"):
        evaluate_fast(other)


@pytest.mark.parametrize("part", ["lq", "gt"])
def test_other_images_are_refused(folder, pipe, part):
    evaluate_fast(pipe, limit=1)
    save(Image.open(f"{part}/a.png").rotate(180), part, "a")
    with pytest.raises(ValueError, match=f"`{part}` .*a.png has changed"):
        evaluate_fast(pipe)


def test_folder_of_something_else_is_left_alone(folder, pipe):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="`out`"):
        evaluate_fast(pipe, overwrite=True)
    assert [path.name for path in Path("out").iterdir()] == ["notes.txt"]


def test_names_and_sizes_that_do_not_match_are_listed(folder, pipe):
    Path("gt/b.jpg").unlink()
    save(make_image(0), "gt", "z")
    with pytest.raises(ValueError, match=r"`lq` \(lq\) must have the same images as .* lacks z\."):
        evaluate_fast(pipe)
    Path("gt/z.png").unlink()
    with pytest.raises(ValueError, match=r"`gt` \(gt\) .* lacks b\."):
        evaluate_fast(pipe)
    for number in range(20):
        save(make_image(0), "lq", f"y{number:02}")
    with pytest.raises(ValueError, match=r"b, y00, .*y08 and 11 more\."):
        evaluate_fast(pipe)
    with pytest.raises(ValueError, match=r"do not match: a \(gt 64x48, results 60x48\)\."):
        save(Image.open("other/a.png").resize((60, 48)), "other", "a")
        save(make_image(1), "gt", "b")
        evaluate("out", gt="gt", results="other", metrics=FAST)
    save(make_image(0), "gt", "a", ".jpg")
    with pytest.raises(ValueError, match="`gt` contains images that differ only in the extension: a"):
        evaluate("out", gt="gt", results="other", metrics=FAST)
    assert not Path("out").exists()


def test_size_that_is_not_the_scale_times_the_lr_image(folder, pipe):
    save(Image.open("lq/a.png").resize((16, 13)), "lq", "a")
    with pytest.raises(ValueError, match=r"at scale 4: a \(lq 16x13, gt 64x48\)"):
        evaluate_fast(pipe)
    for name in NAMES:
        save(Image.open(f"lq/{name}.png").resize((32, 24)), "lq", name)
    assert len(evaluate_fast(pipe, sampling=Sampling(scale=2, tile_size=None)).runs[1].images) == 3


def test_damaged_image_is_reported_and_the_rest_is_measured(folder, pipe):
    Path("lq/b.png").write_bytes(Path("lq/b.png").read_bytes()[:80])
    command = ["--model", "tiny", "--lq", "lq", "--gt", "gt", "-o", "out", "--metric", "psnr_y", *UNTILED]
    output = run_command("evaluate", *command, status=1)
    assert "200 b: " in output and "| 200 | 2 | " in output
    failed = json.loads(Path("out/results.json").read_text())["failed"]
    assert [(entry["run"], entry["image"]) for entry in failed] == [("bicubic", "b"), ("200", "b")]
    save(make_image(1).resize((16, 12)), "lq", "b")
    assert "| 200 | 3 | " in run_command("evaluate", *command)


def test_sweep_on_the_command_line(folder):
    model = ["--model", "tiny", "--lq", "lq", "--gt", "gt", "--metric", "psnr_y,ssim_y", "--limit", 1, *UNTILED]
    starts = ["--steps", 1, "--steps", 2, "--start-timestep", 150, "--start-timestep", 100]
    output = run_command("evaluate", *model, "-o", "out", *starts, "--timesteps", "250,150,50")
    table = [line.split(" | ")[0].strip("| ") for line in output.splitlines() if line.startswith("| ")]
    assert table == ["mean", "---", "bicubic", "150", "100", "150-50", "100-50", "250-150-50"]
    runs = json.loads(Path("out/results.json").read_text())["runs"]
    assert runs["150-50"]["timesteps"] == [150, 50] and runs["bicubic"]["timesteps"] is None


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--lq", "lq"], "model"),
        (["--lq", "lq", "--model", "tiny", "--results", "other"], "model"),
        (["--model", "tiny"], "LR images"),
        (["--model", "tiny", "--lq", "nothing"], "`lq`"),
        (["--model", "tiny", "--lq", "lq", "--steps", "0"], "--steps"),
        (["--model", "tiny", "--lq", "lq", "--start-timestep", "120"], "start_timestep"),
        (["--model", "tiny", "--lq", "lq", "--timesteps", "50,250"], "descend"),
        (["--model", "tiny", "--lq", "lq", "--timesteps", "many"], "--timesteps"),
        (["--model", "tiny", "--lq", "lq", "--metric", "psnr"], "psnr_y"),
        (["--model", "tiny", "--lq", "lq", "--metric", "lpips,niqe"], "lpips need HR images: give --gt"),
        (["--results", "other", "--gt", "gt", "--steps", "3"], "'--steps': applies to a model, not to given results"),
        (["--results", "other", "--gt", "gt", "--seed", "0"], "'--seed': applies to a model, not to given results"),
        (["--model", "tiny", "--lq", "lq", "--tile-size", "33"], "tile_size"),
        (["--model", "tiny", "--lq", "lq", "--color-fix", "sepia"], "--color-fix"),
    ],
)
def test_wrong_usage(folder, arguments, word):
    assert word in run_command("evaluate", *arguments, "-o", "out", status=2).splitlines()[-1]
    assert not Path("out").exists()


def test_metrics_that_need_hr_images(folder, pipe):
    evaluate_fast(pipe, gt=None)
    table = json.loads(Path("out/results.json").read_text())
    assert list(table["runs"]) == ["200"]
    assert table["runs"]["200"]["mean"] == dict.fromkeys(FAST)
    assert table["metrics"]["psnr_y"]["unavailable"] == "requires `gt`"
    text = Path("out/results.md").read_text()
    assert "| 200 | 3 | n/a [1] | n/a [1] | n/a [1] |" in text and "[1] requires `gt`" in text
    assert len(evaluate_fast(pipe).runs[1].images["a"]) == 3


def test_image_too_small_for_a_metric(folder):
    save(Image.new("RGB", (8, 8)), "gt", "a")
    save(Image.new("RGB", (8, 8), "grey"), "other", "a")
    (measured,) = evaluate("out", gt="gt", results="other", metrics=FAST).runs
    assert "psnr_y" in measured.images["a"] and "ssim_y" not in measured.images["a"]
    table = json.loads(Path("out/results.json").read_text())["runs"]["results"]
    assert table["images"]["a"]["ssim_y"] is None and "over 2 of 3 images" in table["reasons"]["ssim_y"]


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """No weights on disk, and a proxy that does not respond, as on a machine without network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_weights_that_cannot_be_downloaded(folder, pipe, no_network):
    pytest.importorskip("lpips", reason="lpips needs torchvision", exc_type=Exception)
    evaluate_fast(pipe, metrics=["psnr_y", "lpips"])
    table = json.loads(Path("out/results.json").read_text())
    assert table["runs"]["200"]["mean"]["lpips"] is None
    assert "weights could not be downloaded" in table["runs"]["200"]["reasons"]["lpips"]
    assert all(values["lpips"] is None for values in table["runs"]["200"]["images"].values())
    assert "| n/a [1] |" in Path("out/results.md").read_text()
    rows = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    assert all(row["lpips"] == "" and row["psnr_y"] for row in rows)


def test_package_that_is_missing(folder, pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluation = evaluate_fast(pipe, limit=1)
    assert set(evaluation.runs[1].images["a"]) == {"psnr_y", "gradient_ratio"}
    assert "pip install 'diffusers-invsr[evaluation]'" in evaluation.unavailable["ssim_y"]
    output = run_command("evaluate", "--model", "tiny", "--lq", "lq", "--gt", "gt", "-o", "new", "--grid", status=1)
    assert output.startswith("Error: --grid requires matplotlib") and output.count("\n") == 1
    assert not Path("new").exists()


def test_pyiqa_is_not_installed():
    try:
        import pyiqa  # noqa: F401
    except ImportError:
        suite = MetricSuite(["niqe", "fid"], has_gt=True)
        assert set(suite.unavailable) == {"niqe", "fid"}
        assert all("diffusers-invsr[metrics]" in reason for reason in suite.unavailable.values())
    else:
        pytest.skip("pyiqa is installed")


def test_pyiqa_without_weights(no_network, tmp_path, monkeypatch):
    pyiqa = pytest.importorskip("pyiqa")
    monkeypatch.setattr(pyiqa.utils.download_util, "DEFAULT_CACHE_DIR", str(tmp_path / "pyiqa"))
    names = [name for name, metric in METRICS.items() if metric.package == "pyiqa"]
    suite = MetricSuite(names, has_gt=True)
    assert {name: reason.split(" (")[0] for name, reason in suite.unavailable.items()} == dict.fromkeys(
        names, "weights could not be downloaded"
    )


def test_fid_of_one_image():
    suite = MetricSuite([], has_gt=True)
    with pytest.raises(MetricUnavailable, match="2 images"):
        suite.of_set("fid", [Path("a.png")], [Path("b.png")])


def test_sheets_and_plot(folder, pipe):
    pytest.importorskip("matplotlib")
    evaluation = evaluate_fast(pipe, schedules=[[200], [250], [200, 100]])
    sheets = save_sheets(evaluation, Path("out"))
    assert [path.as_posix() for path in sheets] == [f"out/grids/{name}.png" for name in NAMES]
    assert Image.open(sheets[0]).width == 5 * 384 + 4 * 6
    before = sheets[0].read_bytes()
    assert save_sheets(evaluation, Path("out"))[0].read_bytes() == before
    assert np.array(Image.open(save_plot(evaluation, Path("out")))).std() > 0
    assert save_plot(evaluate("results", gt="gt", results="other", metrics=FAST), Path("results")) is None


def test_crops_show_detail():
    pixels = np.zeros((96, 120, 3), dtype=np.uint8)
    pixels[20:30, 90:100] = np.random.default_rng(0).integers(0, 256, (10, 10, 1))
    pixels[70:76, 10:16] = np.random.default_rng(1).integers(0, 256, (6, 6, 1))
    first, second = choose_crops(Image.fromarray(pixels))
    assert first[0] <= 90 and first[2] >= 100 and first[1] <= 20 and first[3] >= 30
    assert second[0] <= 10 and second[2] >= 16 and second[1] <= 70 and second[3] >= 76
    assert len(choose_crops(Image.new("RGB", (20, 16)))) == 1


def test_name_of_a_long_schedule():
    names = [schedule_name(list(range(start, 0, -1))) for start in (250, 249)]
    assert all(len(name) < 60 for name in names) and len(set(names)) == 2
