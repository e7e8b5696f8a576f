"""Which images the inputs of a command stand for, and the names of their results."""

import os
from pathlib import Path

import pytest
from helpers import files_below, run_command
from image_makers import save_images
from PIL import Image

from diffusers_invsr.evaluation.pairs import find_named
from diffusers_invsr.image_paths import find_images, plan_outputs


def planned(inputs: list[str], out: str = "out") -> list[str]:
    """Names of the results of inputs, which must all be images."""
    found = find_images(inputs, Path(out))
    assert not found.problems
    return sorted(path.relative_to(out).as_posix() for path in plan_outputs(found.images, Path(out)).values())


@pytest.mark.parametrize(
    "inputs, results",
    [
        (["in/a.png"], ["a.png"]),
        (["in/a.png", "in/./a.png"], ["a.png"]),
        (["in"], ["a.jpg", "a.png", "deep/a.png", "deep/er/b.webp"]),
        (["in/*.png"], ["a.png"]),
        (["in/**/*.png"], ["a.png", "deep/a.png"]),
        (["in/de*"], ["deep/a.png", "deep/er/b.webp"]),
        (["in/*/../a.*"], ["a.jpg", "a.png"]),
        (["in/a.png", "in/deep/a.png", "in/deep/../a.png"], ["a.png", "a_2.png"]),
        (["in/deep/er/../../a.png"], ["a.png"]),
    ],
    ids=["file", "file twice", "folder", "pattern", "deep pattern", "pattern of folders", "climbing pattern"]
    + ["same names", "climbing file"],
)
def test_inputs(folder, inputs, results):
    save_images("in/a.png", "in/a.jpg", "in/deep/a.png", "in/deep/er/b.webp", "in/.hidden/c.png", "in/.c.png")
    Path("in/notes.txt").write_text("not an image")
    assert planned(inputs) == results


def test_results_keep_subfolders(folder, model):
    save_images("in/a.png", "in/deep/b.png")
    assert "2 upscaled" in run_command("upscale", "in", "-o", "out/put", "--model", model)
    assert files_below("out") == ["put/a.png", "put/deep/b.png"]


def test_output_folder_inside_the_input_folder_is_not_searched(folder):
    save_images("a.png", "out/old.png")
    assert planned(["."]) == ["a.png"]


@pytest.mark.parametrize("inputs", ["photos", "photos/**/*"])
def test_results_beside_their_images_are_not_upscaled_again(folder, model, inputs):
    save_images("photos/a.png", "photos/a.jpg", "photos/below/b.bmp", "photos/c_x4.png")
    options = ("upscale", inputs, "-o", "photos", "--suffix", "_x4", "--format", "png", "--model", model)
    assert "4 upscaled" in run_command(*options)
    files = files_below("photos")
    assert len(files) == 8 and {"a_x4.png", "a_x4_2.png", "below/b_x4.png", "c_x4_x4.png"} <= set(files)
    output = run_command(*options)
    assert "4 left out: results, according to their names (_x4)" in output
    assert "0 upscaled, 4 skipped, 0 failed" in output
    assert files_below("photos") == files
    # Also a result of an image in another folder
    save_images("others/d.png")
    for num_done in (1, 0):
        assert f"{num_done} upscaled, {5 - num_done} skipped" in run_command(options[0], "others", *options[1:])
    assert set(files_below("photos")) - set(files) == {"d_x4.png"}
    # A result that is named explicitly is an image like any other
    run_command("upscale", "photos/a_x4.png", "-o", "photos", "--suffix", "_x4", "--model", model)
    assert Image.open("photos/a_x4_x4.png").size == (192, 160)


def test_results_are_not_renamed_when_files_are_added(folder):
    save_images("in/a.png")
    before = plan_outputs(find_images(["in"], Path("out")).images, Path("out"))
    save_images("in/a.gif", "in/A.bmp")
    after = plan_outputs(find_images(["in"], Path("out")).images, Path("out"))
    assert len(set(after.values())) == 3 and before.items() <= after.items()


def test_links_do_not_multiply_the_work(folder, model):
    save_images("in/a.png")
    Path("in/loop").symlink_to("..")
    output = run_command("upscale", "in/**/*.png", "-o", "out", "--model", model)
    assert output.count("->") == 1 and files_below("out") == ["a.png"]
    assert "left out: links to images found under another name" in output


def test_files_with_several_names(folder):
    """Symbolic links to an image are left out, hard links are images of their own."""
    save_images("in/b.png")
    Path("in/a.png").symlink_to("b.png")
    os.link("in/b.png", "in/c.png")
    Path("via").symlink_to("in")
    for inputs, names, num_duplicates in (
        (["in"], ["b.png", "c.png"], 1),
        (["via"], ["b.png", "c.png"], 1),
        (["in/a.png", "in"], ["a.png", "c.png"], 1),  # a link that is named explicitly
        (["in/b.png", "in/b.png", "in/c.png"], ["b.png", "c.png"], 0),
    ):
        assert planned(inputs) == names
        assert len(find_images(inputs, Path("out")).duplicates) == num_duplicates


def test_paths_that_cannot_be_read_are_reported_and_the_rest_is_upscaled(folder, model):
    save_images("in/a.png")
    Path("in/loop.png").symlink_to("loop.png")
    output = run_command("upscale", "x" * 300, "", "in", "-o", "out", "--model", model, status=1)
    assert f"{'x' * 300}: cannot be read" in output and "\n: no such image" in output
    assert "in/loop.png: cannot be read (Too many levels of symbolic links)" in output
    assert "1 upscaled, 0 skipped, 3 failed" in output
    with pytest.raises(ValueError, match="`lq` contains in/loop.png, which cannot be read"):
        find_named(Path("in"), "lq")


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="the superuser may read everything")
def test_folders_that_cannot_be_read_are_reported(folder):
    save_images("in/a.png", "in/closed/b.png")
    Path("in/closed").chmod(0)
    assert find_images(["in"], Path("out")).problems == {"in/closed": "cannot be read (Permission denied)"}
    Path("in/closed").chmod(0o444)  # may be listed, but not entered
    problems = find_images(["in/*.png", "in/*/*.png"], Path("out")).problems
    assert problems == {"in/closed/b.png": "cannot be read (Permission denied)"}
