"""The command line `diffusers-invsr`: upscale image files; convert, publish and describe models; measure them."""

import logging
import signal
import sys
import warnings
from typing import Annotated

import typer

from .. import __version__
from .common import error_message
from .evaluation import degrade, evaluate
from .models import convert, info, push
from .upscale import upscale


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main():
    """Entry point of `diffusers-invsr`: runs the app without the log messages of the libraries it uses."""
    warnings.simplefilter("ignore")  # the pipeline logs its own
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed
            stream.reconfigure(errors="backslashreplace")  # file names can contain bytes that cannot be printed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    for name in ("diffusers", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except OSError as error:  # a path without permission, or an output that cannot be written to
        sys.exit(f"Error: {error_message(error)}")


def print_version(value: bool):
    if value:
        typer.echo(f"diffusers-invsr {__version__}")
        raise typer.Exit


@app.callback()
def callback(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
):
    """InvSR super-resolution: upscale images by diffusion inversion, in any number of steps."""


for command in (upscale, convert, push, info, degrade, evaluate):
    app.command()(command)
