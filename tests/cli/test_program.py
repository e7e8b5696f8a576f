"""The program as a whole: entry points, signals, outputs that cannot be written, and the network."""

import io
import logging
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from helpers import files_below, run_command
from image_makers import make_image, save_images
from programs import MODULE, SCRIPT, start_program

from diffusers_invsr import __version__
from diffusers_invsr.cli import main


@pytest.fixture
def run_main(monkeypatch):
    """Runs the program in this process, whose settings it changes, with given outputs; returns the exit status."""
    sigterm = signal.getsignal(signal.SIGTERM)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]

    def run(*arguments, stdout: io.TextIOBase | None) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["diffusers-invsr", *(str(argument) for argument in arguments)])
        with redirect_stdout(stdout), pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code

    yield run
    signal.signal(signal.SIGTERM, sigterm)
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


def check_alternatives(errors: str):
    """An unreachable Hub is reported in one line that names the alternatives."""
    assert errors.count("\n") == 1
    assert "--model tiny" in errors
    assert "local copy" in errors


def test_version():
    assert run_command("--version").split() == ["diffusers-invsr", __version__]


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, number, status", [(SCRIPT, signal.SIGINT, 130), (MODULE, signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_interruption(folder, model, program, number, status):
    save_images("a.png")
    make_image((200, 200)).save("b.png")
    options = ("-o", "out", "--model", model, "--tile-size", 8)
    process = start_program(folder, "upscale", "a.png", "b.png", *options, program=program)
    assert process.stdout.readline() == "a.png -> out/a.png (12x10 to 48x40)\n"
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == status
    assert errors == ""
    assert files_below("out") == ["a.png"]


@pytest.mark.slow
def test_hub_that_cannot_be_reached(folder):
    save_images("a.png")
    options = ("-o", "out", "--model", "owner/no-such-model")
    process = start_program(folder, "upscale", "a.png", *options, HF_ENDPOINT="http://127.0.0.1:9")
    output, errors = process.communicate()
    assert (process.returncode, output) == (1, "")
    check_alternatives(errors)


@pytest.mark.parametrize("model", ["owner/no-such-model", "sd-turbo"])
def test_hub_that_is_switched_off(folder, monkeypatch, model):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    save_images("a.png")
    check_alternatives(run_command("upscale", "a.png", "-o", "out", "--model", model, status=1))


def test_names_that_cannot_be_printed(folder, model, run_main):
    name = os.fsdecode(b"caf\xe9.png")
    save_images("a.png")
    shutil.copy("a.png", name)
    for message in ("->", "skipped"):
        output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
        assert run_main("upscale", name, "a.png", "-o", "out", "--model", model, stdout=output) == 0
        text = output.buffer.getvalue().decode()
        assert "caf\\udce9.png" in text and message in text
        assert files_below("out") == ["a.png", name]


def test_closed_output(folder, model, run_main):
    save_images("a.png")
    with redirect_stderr(io.TextIOWrapper(io.BytesIO(), write_through=True)) as errors:
        assert run_main("upscale", "a.png", "-o", "out", "--model", model, stdout=None) == 0
    assert errors.buffer.getvalue() == b"" and files_below("out") == ["a.png"]


@pytest.mark.slow
def test_full_output(folder):
    process = subprocess.run(f"{SCRIPT[0]} --version > /dev/full", shell=True, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.startswith("Error: ") and process.stderr.count("\n") == 1
