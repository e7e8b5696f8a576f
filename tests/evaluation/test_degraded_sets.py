"""Synthetic test sets, on real files: reproducible for a seed whatever else is there, and complete or not there."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import files_below, pixels, run_command
from PIL import ExifTags, Image

from diffusers_invsr.evaluation import make_test_set


pytest.importorskip("kornia")
SIZE = 64


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with three HR images in the folder `hr`."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.png", "b.jpg", "deep/c.png")):
        save(Path("hr", name), seed)
    return tmp_path


def make_image(seed: int, size: tuple[int, int] = (90, 70)) -> Image.Image:
    """Noise over a slope, so that every stage of the degradation has something to act on."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 180, size[0])[None, :, None] + np.zeros((size[1], 1, 3))
    return Image.fromarray((slope + rng.integers(0, 75, slope.shape)).astype(np.uint8))


def save(path: Path, seed: int, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(seed).save(path, **settings)


def degrade(*arguments, status: int = 0) -> str:
    size = () if "--size" in arguments else ("--size", SIZE)
    return run_command("degrade", "hr", *arguments, *size, status=status)


@pytest.mark.parametrize("setting, scale", [("test", 4), ("training", 2)])
def test_files_and_settings(folder, setting, scale):
    assert "3 degraded, 0 failed" in degrade("-o", "set", "--setting", setting, "--scale", scale, "--seed", 3)
    images = ["a.png", "b.png", "deep/c.png"]
    files = [f"{part}/{name}" for part in ("gt", "lq") for name in images]
    assert files_below("set") == [*files, "settings.json"]
    description = json.loads(Path("set/settings.json").read_text())
    assert list(description["images"]) == images
    assert (description["setting"], description["scale"], description["seed"]) == (setting, scale, 3)
    assert (description["degradation"]["second_order_probability"] > 0) == (setting == "training")
    assert np.array_equal(pixels("set/gt/a.png"), pixels("hr/a.png")[3 : 3 + SIZE, 13 : 13 + SIZE])
    for name in images:
        lr, record = pixels(f"set/lq/{name}"), description["images"][name]
        assert lr.shape == (SIZE // scale, SIZE // scale, 3)
        assert record["lq_sha256"] == hashlib.sha256(lr.tobytes()).hexdigest()
        assert 0 < record["drawn"]["jpeg_quality"] <= 100
    assert len({record["seed"] for record in description["images"].values()}) == 3
    assert description["images"]["b.png"]["source"] == "b.jpg"


def test_an_image_does_not_depend_on_the_others(folder):
    degrade("-o", "all")
    degrade("-o", "other", "--seed", 1)
    Path("hr/a.png").unlink()
    Path("hr/b.jpg").unlink()
    save(Path("hr/0.png"), 9)
    degrade("-o", "one")
    assert Path("one/lq/deep/c.png").read_bytes() == Path("all/lq/deep/c.png").read_bytes()
    before, after = (json.loads(Path(out, "settings.json").read_text())["images"] for out in ("all", "one"))
    assert before["deep/c.png"] == after["deep/c.png"]
    assert not np.array_equal(pixels("all/lq/deep/c.png"), pixels("other/lq/deep/c.png"))


def test_both_spellings_of_an_accent_are_one_name(folder):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    save(Path("hr", f"{composed}.png"), 5)
    degrade("-o", "one")
    Path("hr", f"{composed}.png").rename(Path("hr", f"{decomposed}.png"))
    degrade("-o", "two")
    one, two = (json.loads(Path(out, "settings.json").read_text())["images"] for out in ("one", "two"))
    assert one[f"{composed}.png"]["lq_sha256"] == two[f"{decomposed}.png"]["lq_sha256"]


@pytest.mark.slow
def test_the_same_pixels_on_an_older_processor(folder):
    degrade("-o", "here")
    # PyTorch and oneDNN choose kernels by these; what they compute differs in the last bits.
    env = os.environ | {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "2"}
    program = "from diffusers_invsr.cli import main; main()"
    command = [sys.executable, "-c", program, "degrade", "hr", "-o", "there", "--size", str(SIZE)]
    subprocess.run(command, env=env, check=True, capture_output=True)
    here, there = (json.loads(Path(out, "settings.json").read_text())["images"] for out in ("here", "there"))
    assert here == there


def test_whole_images_are_cropped_to_multiples(folder):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    save(Path("hr/turned.png"), 7, exif=exif.tobytes())
    degrade("-o", "set", "--size", "none")
    assert Image.open("set/gt/a.png").size == (88, 68) and Image.open("set/lq/a.png").size == (22, 17)
    assert Image.open("set/gt/turned.png").size == (68, 88)


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "P"])
def test_kinds_of_images(folder, mode):
    grey = make_image(3).convert("L")
    image = Image.fromarray(np.array(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    image.save("hr/kind.png")
    grey.save("hr/grey.png")
    degrade("-o", "set")
    assert np.array_equal(pixels("set/gt/kind.png"), pixels("set/gt/grey.png"))


def test_bad_images_are_reported_and_the_rest_is_degraded(folder):
    make_image(0, (SIZE - 1, SIZE)).save("hr/small.png")
    Path("hr/broken.png").write_bytes(Path("hr/a.png").read_bytes()[:300])
    output = degrade("-o", "set", status=1)
    assert "3 degraded, 2 failed" in output
    for name in ("small.png", "broken.png"):
        assert sum(line.startswith(f"hr/{name}: ") for line in output.splitlines()) == 1, output
    assert "63x64" in output
    assert files_below("set/gt") == ["a.png", "b.png", "deep/c.png"]


def test_nothing_is_written_if_no_image_can_be_degraded(folder):
    error = degrade("-o", "set", "--size", 512, status=2).splitlines()[-1]
    reason = "90x70 pixels, but at least 512 per side are required"
    assert error.endswith(f"has none (hr/a.png: {reason}; hr/b.jpg: {reason}; hr/deep/c.png: {reason}).")
    assert [path.name for path in folder.iterdir()] == ["hr"]


def test_from_python(folder):
    (folder / "hr/broken.png").touch()
    test_set = make_test_set("hr", "set", size=SIZE)
    assert test_set.images == json.loads(Path("set/settings.json").read_text())["images"]
    assert list(test_set.problems) == [folder / "hr/broken.png"]


def test_only_a_test_set_is_replaced(folder):
    degrade("-o", "set")
    Path("hr/a.png").unlink()
    assert "exists" in degrade("-o", "set", status=2)
    assert Path("set/lq/a.png").exists()
    degrade("-o", "set", "--overwrite")
    assert files_below("set/lq") == ["b.png", "deep/c.png"]
    Path("set/notes.txt").write_text("mine")
    assert "exists" in degrade("-o", "set", "--overwrite", status=2)
    assert {path.name for path in folder.iterdir()} == {"hr", "set"}


@pytest.mark.parametrize("place", ["here", "a link"])
def test_an_existing_folder_is_filled_but_not_replaced(folder, monkeypatch, place):
    """The working directory of a shell, or the target of a link, which can also be another disk."""
    Path("set").mkdir()
    if place == "here":
        monkeypatch.chdir("set")
    else:
        Path("link").symlink_to("set")
    options = ["../hr", "-o", "."] if place == "here" else ["hr", "-o", "link"]
    for overwrite in ([], ["--overwrite"]):
        run_command("degrade", *options, "--size", SIZE, *overwrite)
        assert {path.name for path in (folder / "set").iterdir()} == {"gt", "lq", "settings.json"}
    assert {path.name for path in folder.iterdir()} - {"link"} == {"hr", "set"}


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_replacement_that_fails_leaves_the_old_set(folder, monkeypatch, failing):
    degrade("-o", "set")
    before = {name: Path("set", name).read_bytes() for name in files_below("set")}
    Path("hr/a.png").unlink()
    replace, moves = os.replace, []

    def replace_some(source, target):
        if Path(source).name in ("gt", "lq", "settings.json"):
            moves.append(source)
            if len(moves) == failing:
                raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_some)
    degrade("-o", "set", "--overwrite", status=1)
    assert {name: Path("set", name).read_bytes() for name in files_below("set")} == before


def test_a_set_does_not_replace_what_it_is_made_of(folder):
    degrade("-o", "set")
    before = files_below("set")
    output = run_command("degrade", "set/gt", "-o", "set", "--overwrite", "--size", SIZE, status=2)
    assert "must not contain `hr`" in output and "contains set/gt" in output
    assert files_below("set") == before


def test_missing_package(folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("kornia", "diffusers_invsr.degradation"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kornia", None)
    output = degrade("-o", "set", status=1)
    assert output.startswith("Error: ") and "pip install 'diffusers-invsr[evaluation]'" in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["-o", "set", "--size", "big"], "--size"),
        (["-o", "set", "--size", "30"], "`size`"),
        (["-o", "set", "--size", "16"], "at least 28"),
        (["-o", "set", "--setting", "simple"], "--setting"),
        (["-o", "set", "--scale", "0"], "--scale"),
        (["-o", "hr/a.png"], "exists"),
    ],
)
def test_wrong_usage(folder, arguments, word):
    assert word in degrade(*arguments, status=2).splitlines()[-1]
    assert files_below(".") == ["hr/a.png", "hr/b.jpg", "hr/deep/c.png"]
