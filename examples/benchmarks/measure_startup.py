"""How long it takes to start: the import beyond what diffusers' own pipelines import, and the command line.

    python examples/benchmarks/measure_startup.py --repeats 5

Everything runs in fresh interpreters, in turns, after one turn that is not measured (files are not in the system's
cache yet). "First tile" is the whole command for an image of one tile with the embedded model, from its start to its
end.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark_common import positive
from PIL import Image


# What a Stable Diffusion pipeline of diffusers imports
DIFFUSERS = (
    "import torch; from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel;"
    " from transformers import CLIPTextModel, CLIPTokenizer"
)
TIMED = "import time; start = time.perf_counter(); import diffusers_invsr; print(time.perf_counter() - start)"
BEYOND = "diffusers_invsr beyond diffusers, within one interpreter"
# LR pixels of a side: the embedded model pads smaller images to one tile
SIDE = 32


def time_command(command: list[str]) -> tuple[float, str]:
    """Seconds of a program, and what it printed."""
    start = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, check=True, capture_output=True, env=environment, text=True).stdout
    return time.perf_counter() - start, output


def main(args: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=5, help="turns that are measured (default: %(default)s)")
    arguments = parser.parse_args(args)

    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "lr.png")
        Image.effect_noise((SIDE, SIDE), 64).convert("RGB").save(image)
        upscale = ["upscale", str(image), "-o", f"{folder}/out", "--device", "cpu", "--overwrite"]
        commands = {
            "interpreter": ["pass"],
            "diffusers": [DIFFUSERS],
            BEYOND: [f"{DIFFUSERS}; {TIMED}"],
            "diffusers_invsr alone": ["import diffusers_invsr"],
            "first tile of the command line": ["from diffusers_invsr.cli import main; main()", *upscale],
        }
        times = {name: [] for name in commands}
        for turn in range(arguments.repeats + 1):
            for name, command in commands.items():
                elapsed, output = time_command([sys.executable, "-c", *command])
                if turn > 0:
                    times[name].append(float(output) if name == BEYOND else elapsed)

    print("| | seconds, median | range |", "| --- | --- | --- |", sep="\n")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f}–{max(values):.2f} |")


if __name__ == "__main__":
    main()
