"""What `upscale` refuses, and files that it reports and skips."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import files_below, run_command
from image_makers import make_image, save_images
from PIL import Image

from diffusers_invsr.image_files import read_image


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["nothing.png", "-o", "out"], "INPUTS"),
        (["empty", "-o", "out"], "INPUTS"),
        (["a.png"], "--out"),
        (["a.png", "-o", "."], "--suffix"),
        (["a.png", "-o", "a.png"], "--out"),
        (["a.png", "b.jpg", "-o", "c.png"], "--out"),
        (["a.png", "-o", "c.tiff"], ".webp"),
        (["a.png", "-o", "c.png", "--format", "jpg"], "--format"),
        (["a.png", "-o", "notes.txt"], "--out"),
        (["a.png", "-o", "out", "--suffix", "/../../x"], "--suffix"),
        (["a.png", "-o", "out", "--format", "gif"], "--format"),
        (["a.png", "-o", "out", "--scale", "9"], "--scale"),
        (["a.png", "-o", "out", "--steps", "0"], "--steps"),
        (["a.png", "-o", "out", "--start-timestep", "120"], "start_timestep"),
        (["a.png", "-o", "out", "--steps", "200", "--start-timestep", "100"], "num_steps"),
        (["a.png", "-o", "out", "--tile-size", "big"], "--tile-size"),
        (["a.png", "-o", "out", "--tile-size", "33"], "tile_size"),
        (["a.png", "-o", "out", "--tile-size", "16", "--tile-overlap", "16"], "tile_overlap"),
        (["a.png", "-o", "out", "--color-fix", "sepia"], "--color-fix"),
        (["a.png", "-o", "out", "--device", "abacus"], "--device"),
        (["a.png", "-o", "out", "--device", "meta"], "'meta' is unavailable"),
        (["a.png", "-o", "out", "--seed", str(2**64)], "--seed"),
        (["a.png", "-o", "out", "--suffix", "x" * 300], "longer than 255 bytes"),
        (["a.png", "-o", "notes.txt/sub"], "cannot be created"),
    ],
)
def test_wrong_usage(folder, model, arguments, word):
    save_images("a.png", "b.jpg")
    Path("empty").mkdir()
    Path("notes.txt").touch()
    before = {name: Path(name).read_bytes() for name in files_below(".")}
    output = run_command("upscale", *arguments, "--model", model, status=2)
    assert word in output.splitlines()[-1]
    assert {name: Path(name).read_bytes() for name in files_below(".")} == before


def test_bad_files_are_reported_and_the_rest_is_upscaled(folder, model):
    save_images("in/a.png", "in/truncated.png", "in/z.png")
    Path("in/truncated.png").write_bytes(Path("in/a.png").read_bytes()[:200])
    Path("in/text.jpg").write_text("not an image")
    Path("in/empty.webp").touch()
    make_image((1, 1)).save("in/pixel.png")
    Image.new("1", (14000, 14000)).save("in/bomb.png")
    Image.new("L", (5000, 2)).save("in/wide.webp", lossless=True)
    output = run_command("upscale", "in", "in/nothing.png", "-o", "out", "--model", model, status=1)
    assert files_below("out") == ["a.png", "z.png"]
    lines = output.splitlines()
    for name in ("truncated.png", "text.jpg", "empty.webp", "pixel.png", "bomb.png", "wide.webp", "nothing.png"):
        assert sum(line.startswith(f"in/{name}: ") for line in lines) == 1, output
    assert "2 upscaled, 0 skipped, 7 failed" in lines
    assert len(lines) == 10


@pytest.mark.parametrize("size", [(40, 30), (300, 200)])
def test_damaged_pixels_are_refused(folder, size):
    """Pillow reads the EXIF data of a PNG after the pixels, and then no longer reports damage to them."""
    make_image(size).save("a.png")
    whole = Path("a.png").read_bytes()
    accepted = 0
    for position in range(len(whole) // 4, len(whole) // 2, len(whole) // 50):
        Path("a.png").write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            read_image(Path("a.png"))
            accepted += 1
        except Exception:  # noqa: S110 (Pillow raises various exceptions)
            pass
    assert accepted == 0


WITHIN_256_MB = """
import resource
from pathlib import Path

from diffusers_invsr import InvSRPipeline
from diffusers_invsr.cli import app

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
app()
"""


def test_out_of_memory_is_explained(folder, model):
    Image.new("RGB", (1100, 1100)).save("a.png")
    arguments = ["upscale", "a.png", "-o", "out", "--model", str(model), "--tile-size", "none"]
    command = [sys.executable, "-c", WITHIN_256_MB, *arguments]
    # Without warnings about the configuration, and with as much memory for threads on every machine
    environment = {**os.environ, "DIFFUSERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    # Neither the whole image fits nor, with smaller tiles, their sum
    first, last = process.stdout.splitlines()
    assert process.returncode == 1 and "`tile_size=128`" in first
    assert last == "a.png: out of memory; reduce --tile-size (or --tile-batch-size)."
    assert not files_below(".")[1:]
