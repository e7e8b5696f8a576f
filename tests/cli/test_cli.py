"""The command line, on real files, with a random pipeline that is small enough to run in no time."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from helpers import FIXTURES
from hub_server import serve
from PIL import ExifTags, Image, ImageCms
from sd_turbo import save_sd_turbo
from typer.testing import CliRunner

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline, InvSRScheduler, __version__, convert
from diffusers_invsr.cli import app
from diffusers_invsr.cli_models import saved_dtypes
from diffusers_invsr.evaluation.pairs import find_named
from diffusers_invsr.image_files import read_image, save_image


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CMYK = b"\0" * 16 + b"CMYK" + b"\0" * 108


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Folder of a pipeline shaped as the embedded one."""
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (16, 16, 16), "decoder_block_out_channels": (16, 16, 16)}
    pipe = InvSRPipeline(
        vae=AutoencoderTiny(num_encoder_blocks=(0, 0, 0), num_decoder_blocks=(1, 1, 1), latent_channels=4, **widths),
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            mid_block_type=None,
            up_block_types=("UpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
        ),
        scheduler=InvSRScheduler(),
        noise_predictor=InvSRNoisePredictor(
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            latent_channels=4,
            mid_block_add_attention=False,
            temb_channels=32,
        ),
    )
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments, status: int = 0) -> str:
    """What a command writes, to both streams; it has to end with the status, in no way but on purpose."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.output


def make_image(size: tuple[int, int] = (12, 10), mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(pixels)
    return image.convert(mode) if mode in ("RGBA", "LA") else image.convert("RGB").convert(mode)


def save(*names: str, **settings):
    """Save an image under each name, each with other pixels."""
    for seed, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        make_image(seed=seed).save(name, **settings)


def names_in(folder: str) -> list[str]:
    """All files below a folder, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def test_version():
    assert run("--version").split() == ["diffusers-invsr", __version__]


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
def test_inputs(folder, model, inputs, results):
    save("in/a.png", "in/a.jpg", "in/deep/a.png", "in/deep/er/b.webp", "in/.hidden/c.png", "in/.c.png")
    Path("in/notes.txt").write_text("no image, and nobody said that it was")
    run("upscale", *inputs, "-o", "out/put", "--model", model)
    assert names_in("out/put") == results
    assert names_in("out") == [f"put/{name}" for name in results]


def test_output_inside_the_input_folder_is_no_input(folder, model):
    save("a.png", "out/old.png")
    run("upscale", ".", "-o", "out", "--model", model)
    assert names_in("out") == ["a.png", "old.png"]


@pytest.mark.parametrize(
    "options, results",
    [
        ([], ["a.JPG", "a.png", "b.webp", "c.png"]),
        (["--format", "png"], ["a.png", "a_2.png", "b.png", "c.png"]),
        (["--format", "jpg", "--suffix", "_x4"], ["a_x4.jpg", "a_x4_2.jpg", "b_x4.jpg", "c_x4.jpg"]),
        (["--format", "webp"], ["a.webp", "a_2.webp", "b.webp", "c.webp"]),
    ],
    ids=["keep", "png", "jpg", "webp"],
)
def test_names_and_formats(folder, model, options, results):
    save("in/a.JPG", "in/a.png", "in/b.webp", "in/c.bmp")
    run("upscale", "in", "-o", "out", "--model", model, *options)
    assert names_in("out") == results
    for name in results:
        with Image.open(f"out/{name}") as image:
            assert image.size == (48, 40)
            assert image.format == {"jpg": "JPEG", "png": "PNG", "ebp": "WEBP"}[name.lower()[-3:]]


@pytest.mark.parametrize("name", ["b.png", "new/b.jpeg", "b.webp"])
def test_output_file(folder, model, name):
    save("a.png")
    run("upscale", "a.png", "-o", name, "--model", model, "--scale", 2.5, "--steps", 2, "--color-fix", "ycbcr")
    assert Image.open(name).size == (30, 25)


def test_an_output_file_says_its_format(folder, model):
    save("a.png")
    for name, image_format in (("b.jpeg", "jpg"), ("c.PNG", "png")):
        run("upscale", "a.png", "-o", name, "--format", image_format, "--model", model)
    assert names_in(".") == ["a.png", "b.jpeg", "c.PNG"]


@pytest.mark.parametrize("inputs", ["photos", "photos/**/*"])
def test_results_beside_their_images_are_no_inputs_of_the_next_run(folder, model, inputs):
    save("photos/a.png", "photos/a.jpg", "photos/below/b.bmp", "photos/c_x4.png")
    options = ("upscale", inputs, "-o", "photos", "--suffix", "_x4", "--format", "png", "--model", model)
    assert "4 enlarged" in run(*options)
    files = names_in("photos")
    assert len(files) == 8 and {"a_x4.png", "a_x4_2.png", "below/b_x4.png", "c_x4_x4.png"} <= set(files)
    output = run(*options)
    assert "4 left out: by their names (_x4) they are results" in output
    assert "0 enlarged, 4 skipped, 0 failed" in output
    assert names_in("photos") == files
    # Of an image of another folder, too
    save("others/d.png")
    for enlarged in (1, 0):
        assert f"{enlarged} enlarged, {5 - enlarged} skipped" in run(options[0], "others", *options[1:])
    assert set(names_in("photos")) - set(files) == {"d_x4.png"}
    # By its name, a result is an image like any other
    run("upscale", "photos/a_x4.png", "-o", "photos", "--suffix", "_x4", "--model", model)
    assert Image.open("photos/a_x4_x4.png").size == (192, 160)


def test_existing_results(folder, model):
    save("a.png")
    Path("out").mkdir()
    Path("out/a.png").write_text("old")
    assert "--overwrite" in run("upscale", "a.png", "-o", "out", "--model", model)
    assert Path("out/a.png").read_text() == "old"
    run("upscale", "a.png", "-o", "out", "--model", model, "--overwrite")
    assert Image.open("out/a.png").size == (48, 40)


def test_results_depend_on_the_seed_alone(folder, model):
    save("a.png", "b.png")
    for out, inputs, seed in (("one", ["b.png"], 3), ("two", ["a.png", "b.png"], 3), ("other", ["b.png"], 4)):
        run("upscale", *inputs, "-o", out, "--model", model, "--seed", seed, "--tile-size", 8)
    one, two, other = (Path(out, "b.png").read_bytes() for out in ("one", "two", "other"))
    assert one == two != other


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
@pytest.mark.parametrize("source", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_metadata(folder, model, source, image_format):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ExifImageWidth: 12, ExifTags.Base.ExposureTime: 0.5}
    save(source, exif=exif.tobytes(), icc_profile=SRGB)
    run("upscale", source, "-o", "out", "--model", model, "--format", image_format)
    with Image.open(f"out/a.{image_format}") as image:
        assert image.size == (40, 48)
        assert image.info["icc_profile"] == SRGB
        exif = image.getexif()
        assert exif.get(ExifTags.Base.Orientation, 1) == 1
        assert exif[ExifTags.Base.Make] == "Camera"
        assert exif.get_ifd(ExifTags.IFD.Exif) == {ExifTags.Base.ExifImageWidth: 40, ExifTags.Base.ExposureTime: 0.5}
        assert not {ExifTags.Base.ImageWidth, ExifTags.Base.StripOffsets} & set(exif)


def test_profile_of_other_pixels_is_left_out(folder, model):
    make_image(mode="CMYK").save("a.jpg", icc_profile=CMYK)
    run("upscale", "a.jpg", "-o", "out", "--model", model)
    assert "icc_profile" not in Image.open("out/a.jpg").info


@pytest.mark.parametrize(
    "mode, source, image_format, result",
    [
        ("I;16", "a.png", "png", "L"),
        ("I;16", "a.tif", "webp", "RGB"),
        ("P", "a.png", "png", "RGB"),
        ("1", "a.png", "jpg", "L"),
        ("LA", "a.png", "png", "LA"),
        ("RGBA", "a.webp", "keep", "RGBA"),
        ("RGBA", "a.png", "jpg", "RGB"),
        ("LA", "a.png", "jpg", "L"),
    ],
)
def test_kinds_of_images(folder, model, mode, source, image_format, result):
    make_image(mode=mode).save(source)
    run("upscale", source, "-o", "out", "--model", model, "--format", image_format)
    (name,) = names_in("out")
    assert Image.open(f"out/{name}").mode == result


def test_transparency_becomes_white_in_jpeg(folder, model):
    image = make_image(mode="RGBA")
    image.putalpha(0)
    image.save("a.png")
    run("upscale", "a.png", "-o", "a.jpg", "--model", model)
    assert np.array(Image.open("a.jpg")).min() >= 254


def test_bad_files_are_reported_and_the_rest_goes_on(folder, model):
    save("in/a.png", "in/truncated.png", "in/z.png")
    Path("in/truncated.png").write_bytes(Path("in/a.png").read_bytes()[:200])
    Path("in/text.jpg").write_text("not an image")
    Path("in/empty.webp").touch()
    make_image((1, 1)).save("in/pixel.png")
    Image.new("1", (14000, 14000)).save("in/bomb.png")
    Image.new("L", (5000, 2)).save("in/wide.webp", lossless=True)
    output = run("upscale", "in", "in/nothing.png", "-o", "out", "--model", model, status=1)
    assert names_in("out") == ["a.png", "z.png"]
    lines = output.splitlines()
    for name in ("truncated.png", "text.jpg", "empty.webp", "pixel.png", "bomb.png", "wide.webp", "nothing.png"):
        assert sum(line.startswith(f"in/{name}: ") for line in lines) == 1, output
    assert "2 enlarged, 0 skipped, 7 failed" in lines
    assert len(lines) == 10


WITHIN_512_MB = """
import resource
from pathlib import Path

from diffusers_invsr import InvSRPipeline
from diffusers_invsr.cli import app

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
app()
"""


def test_out_of_memory_is_explained(folder, model):
    Image.new("RGB", (1500, 1500)).save("a.png")
    arguments = ["upscale", "a.png", "-o", "out", "--model", str(model), "--tile-size", "none"]
    command = [sys.executable, "-c", WITHIN_512_MB, *arguments]
    environment = {**os.environ, "DIFFUSERS_VERBOSITY": "error"}  # it warns of the model's configuration
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    # Neither the whole image nor, after smaller tiles were tried, their sum
    first, last = process.stdout.splitlines()
    assert process.returncode == 1 and first.endswith("beginning again with `tile_size=128`.")
    assert last == "a.png: the memory is not enough; lower --tile-size (or --tile-batch-size)."
    assert not names_in(".")[1:]


def test_interrupted_writing_leaves_nothing(folder):
    class Interrupted(Image.Image):
        def save(self, file: io.IOBase, **settings):
            file.write(b"half of it")
            raise KeyboardInterrupt

    image = Interrupted()
    image._mode = "RGB"
    with pytest.raises(KeyboardInterrupt):
        save_image(image, Path("out/a.png"), make_image())
    assert names_in("out") == []


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
    ],
)
def test_wrong_usage(folder, model, arguments, word):
    save("a.png", "b.jpg")
    Path("empty").mkdir()
    Path("notes.txt").touch()
    before = {name: Path(name).read_bytes() for name in names_in(".")}
    output = run("upscale", *arguments, "--model", model, status=2)
    assert word in output.splitlines()[-1]
    assert {name: Path(name).read_bytes() for name in names_in(".")} == before


@pytest.mark.parametrize("name", ["tinny", "./missing/folder/here", "empty", "file.pth", "broken", "other"])
def test_model_that_is_none(folder, model, name):
    save("a.png")
    Path("empty").mkdir()
    Path("file.pth").touch()
    for copy in ("broken", "other"):
        shutil.copytree(model, copy)
    Path("broken/unet/diffusion_pytorch_model.safetensors").write_text("no tensors")
    Path("other/model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    output = run("upscale", "a.png", "-o", "out", "--model", name, status=1)
    assert output.startswith(f"Error: {name!r} ")
    assert output.count("\n") == 1
    assert not Path("out").exists()


def test_info(model):
    pipe = InvSRPipeline.from_pretrained(model)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    num_parameters = sum(p.numel() for module in modules for p in module.parameters())
    lines = dict(line.split(":", 1) for line in run("info", model).splitlines())
    values = {name.strip(): value.strip() for name, value in lines.items()}
    assert values["scale"].startswith("x4")
    assert values["tile"] == "128 or 144 pixels, in multiples of 2"
    assert "(144 to 576 pixels)" in values["memory, one tile"]
    assert values["parameters"] == f"{num_parameters / 1e6:,.2f} M"
    assert values["text encoder"].startswith("no")
    assert values["licence"] == "not stated"


@pytest.mark.parametrize(
    "card, licence",
    [
        ("---\nlicense: cc0-1.0\n---\n# A model\n", "cc0-1.0"),
        ("# A model\n", "mit"),
        ("---\nlicense: [\n---\n# A model\n", "mit"),
    ],
)
def test_info_names_the_licence_of_the_card(folder, model, card, licence):
    pipe = InvSRPipeline.from_pretrained(model)
    pipe.register_to_config(model_card={"license": "mit"})
    pipe.save_pretrained("model")
    Path("model/README.md").write_text(card)
    assert licence in run("info", "model")


def test_convert(folder, cases):
    save("a.png")
    save_sd_turbo(Path("base"), cases)
    Path("config.json").write_text(json.dumps(cases["noise_predictor"]))
    command = ["convert", FIXTURES / "noise_predictor_original.pth", "--base", "base", "--config", "config.json"]
    run(*command, "-o", "full")
    assert Path("full/text_encoder").is_dir()
    assert "exists" in run(*command, "-o", "full", status=1)
    run(*command, "-o", "full", "--overwrite", "--drop-text-encoder", "--dtype", "float16")
    assert not Path("full/text_encoder").exists()
    assert Path("full/fixed_prompt").is_dir()
    assert "no (fixed prompts)" in run("info", "full")
    assert "does not fit" in run(*command[:-2], "-o", "published", status=1)  # not the published network
    run("upscale", "a.png", "-o", "out", "--model", "full", "--tile-size", "none")
    assert names_in("out") == ["a.png"]


def command_line(home: Path, *arguments, **variables) -> subprocess.Popen:
    """Start the installed program, which knows nothing of this process's settings, caches and network."""
    program = Path(sys.executable).parent / "diffusers-invsr"
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {
        "HF_HOME": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_XET": "1",
        **variables,
    }
    command = [program, *(str(argument) for argument in arguments)]
    return subprocess.Popen(
        command,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A job in the background of a script ignores Ctrl-C, and so would the programs that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def check_way_out(errors: str):
    assert errors.count("\n") == 1
    assert "--model tiny" in errors
    assert "local copy" in errors


def test_it_is_a_module_too():
    command = [sys.executable, "-m", "diffusers_invsr", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"diffusers-invsr {__version__}\n"


@pytest.mark.slow
def test_hub_that_cannot_be_reached(folder):
    save("a.png")
    process = command_line(
        folder, "upscale", "a.png", "-o", "out", "--model", "sd-turbo", HF_ENDPOINT="http://127.0.0.1:9"
    )
    output, errors = process.communicate()
    assert (process.returncode, output) == (1, "")
    check_way_out(errors)


def test_hub_that_is_switched_off(folder):
    save("a.png")
    check_way_out(run("upscale", "a.png", "-o", "out", "--model", "owner/no-such-model", status=1))


@pytest.mark.slow
def test_names_that_cannot_be_printed(folder, model):
    name = os.fsdecode(b"caf\xe9.png")
    save("a.png")
    shutil.copy("a.png", name)
    options = ("-o", "out", "--model", model)
    for _ in range(2):  # the second time, both exist
        process = command_line(folder, "upscale", name, "a.png", *options, PYTHONIOENCODING="utf-8:strict")
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "caf\\udce9.png" in output
        assert names_in("out") == ["a.png", name]


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt(folder, model, number, status):
    save("a.png")
    make_image((200, 200)).save("b.png")
    process = command_line(folder, "upscale", "a.png", "b.png", "-o", "out", "--model", model, "--tile-size", 8)
    assert process.stdout.readline() == "a.png -> out/a.png (12x10 to 48x40)\n"
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == status
    assert errors == ""
    assert names_in("out") == ["a.png"]


@pytest.mark.slow
def test_outputs_that_take_nothing(folder, model):
    save("a.png")
    program = f"{Path(sys.executable).parent / 'diffusers-invsr'} upscale a.png -o out --model {model}"
    closed = subprocess.run(f"{program} >&-", shell=True, capture_output=True, text=True)
    assert (closed.returncode, closed.stderr, names_in("out")) == (0, "", ["a.png"])
    full = subprocess.run(f"{program} --overwrite > /dev/full", shell=True, capture_output=True, text=True)
    assert full.returncode == 1 and full.stderr.startswith("Error: ") and full.stderr.count("\n") == 1


@pytest.mark.slow
def test_push(folder, model):
    """In the number types in which the components were saved, and from a folder with the name of another model."""
    pipe = InvSRPipeline.from_pretrained(model, dtype=torch.float16)
    pipe.unet.float()
    pipe.save_pretrained("tiny")
    pipe.unet.half()
    pipe.save_pretrained("tiny", variant="fp16")  # which is not loaded
    shape = pipe.unet.conv_in.weight.shape
    with serve() as hub:
        process = command_line(folder, "push", "tiny", "me/model", "--token", "hf_test", HF_ENDPOINT=hub.url)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "cannot run with `cpu` device" not in errors
        assert output.endswith("me/model\n")
        assert {"model_index.json", "pipeline.py", "README.md"} <= set(hub.files("me/model"))
        for name, dtype in {"unet": torch.float32, "vae": torch.float16, "noise_predictor": torch.float16}.items():
            weights = safetensors.torch.load(hub.files("me/model")[f"{name}/diffusion_pytorch_model.safetensors"])
            assert {value.dtype for value in weights.values()} == {dtype}
            if name == "unet":
                assert weights["conv_in.weight"].shape == shape


def test_number_types_of_a_saved_pipeline(folder):
    """The widest of a component's files; variants, other weights and what cannot be read do not count."""
    half, single = torch.zeros(2, dtype=torch.float16), torch.zeros(2)
    files = {
        "unet/diffusion_pytorch_model-00001-of-00002": {"a": half, "b": torch.zeros(2, dtype=torch.int64)},
        "unet/diffusion_pytorch_model-00002-of-00002": {"c": half},
        "unet/pytorch_lora_weights": {"a": single},
        "unet/diffusion_pytorch_model.fp32": {"a": single},
        "vae/diffusion_pytorch_model": {"a": half, "b": single},
        "text_encoder/model": {"a": half.bfloat16()},
        "counts/model": {"a": torch.zeros(2, dtype=torch.int64)},
    }
    for name, tensors in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, f"{name}.safetensors")
    Path("broken").mkdir()
    Path("broken/model.safetensors").write_bytes(b"no weights")
    Path("broken/model-2.safetensors").symlink_to("nowhere")
    assert saved_dtypes(Path()) == {"unet": torch.float16, "vae": torch.float32, "text_encoder": torch.bfloat16}


def test_names_do_not_change_when_files_join(folder, model):
    save("in/a.png")
    run("upscale", "in", "-o", "out", "--model", model)
    save("in/a.gif", "in/A.bmp")
    assert "2 enlarged, 1 skipped" in run("upscale", "in", "-o", "out", "--model", model)
    assert Image.open("out/a.png").size == (48, 40) and len(names_in("out")) == 3


def test_links_do_not_multiply_the_work(folder, model):
    save("in/a.png")
    Path("in/loop").symlink_to("..")
    output = run("upscale", "in/**/*.png", "-o", "out", "--model", model)
    assert output.count("->") == 1 and names_in("out") == ["a.png"]


def test_files_of_several_names(folder, model):
    """Of symbolic links and their file only that, of hard links all."""
    save("in/b.png")
    Path("in/a.png").symlink_to("b.png")
    os.link("in/b.png", "in/c.png")
    assert "1 left out: through links" in run("upscale", "in", "-o", "out", "--model", model)
    assert names_in("out") == ["b.png", "c.png"]
    Path("via").symlink_to("in")
    assert "1 left out: through links" in run("upscale", "via", "-o", "out2", "--model", model)
    assert names_in("out2") == ["b.png", "c.png"]
    assert "1 left out" in run("upscale", "in/a.png", "in", "-o", "out3", "--model", model)  # one that is named
    assert names_in("out3") == ["a.png", "c.png"]
    assert "left out" not in run("upscale", "in/b.png", "in/b.png", "in/c.png", "-o", "out4", "--model", model)


def test_paths_that_cannot_be_looked_at_are_reported_and_the_rest_goes_on(folder, model):
    save("a.png")
    output = run("upscale", "x" * 300, "", "a.png", "-o", "out", "--model", model, status=1)
    assert f"{'x' * 300}: cannot be read" in output and "\n: no such image" in output
    assert "1 enlarged, 0 skipped, 2 failed" in output


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="the superuser may read everything")
def test_folders_that_cannot_be_read_are_reported(folder, model):
    save("in/a.png", "in/closed/b.png")
    Path("in/closed").chmod(0)
    output = run("upscale", "in", "-o", "out", "--model", model, status=1)
    assert "in/closed: cannot be read (Permission denied)" in output
    assert "1 enlarged, 0 skipped, 1 failed" in output
    Path("in/closed").chmod(0o444)  # names may be read, but not what they stand for
    output = run("upscale", "in/*.png", "in/*/*.png", "-o", "out2", "--model", model, status=1)
    assert "in/closed/b.png: cannot be read (Permission denied)" in output
    assert "1 enlarged, 0 skipped, 1 failed" in output
    with pytest.raises(ValueError, match="closed.* in it cannot be read"):
        find_named(Path("in"), "lq")


@pytest.mark.parametrize("size", [(40, 30), (300, 200)])
def test_damaged_pixels_are_no_image(folder, size):
    """Of a PNG, Pillow reads EXIF data behind the pixels, and forgets what is wrong with these."""
    make_image(size).save("a.png")
    whole = Path("a.png").read_bytes()
    accepted = 0
    for position in range(len(whole) // 4, len(whole) // 2, len(whole) // 50):
        Path("a.png").write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            read_image(Path("a.png"))
            accepted += 1
        except Exception:  # noqa: S110 (of which kind is Pillow's affair)
            pass
    assert accepted == 0


@pytest.mark.parametrize("part", ["vae", "unet", "noise_predictor"])
def test_weights_that_are_missing_are_told(folder, model, part):
    save("a.png")
    shutil.copytree(model, "model")
    file = Path("model", part, "diffusion_pytorch_model.safetensors")
    weights = safetensors.torch.load_file(file)
    name = next(name for name in weights if name.endswith(".weight"))
    del weights[name]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    output = run("upscale", "a.png", "-o", "out", "--model", "model", status=1)
    assert output.startswith("Error: 'model' cannot be loaded, as weights are missing: ") and name in output
    assert output.count("\n") == 1
    if part == "noise_predictor":
        output = run("convert", f"model/{part}", "-o", "new", "--base", model, status=1)
        assert f"`source='model/noise_predictor'` lacks 1 of its tensors ({name}, ...)" in output


def test_weights_of_the_text_encoder_that_are_missing_are_told(folder, cases):
    save("a.png")
    save_sd_turbo(Path("base"), cases)
    predictor = InvSRNoisePredictor(**cases["noise_predictor"])
    convert(predictor, "base", "model")
    file = Path("model/text_encoder/model.safetensors")
    weights = safetensors.torch.load_file(file)
    del weights[next(name for name in weights if name.endswith("fc1.weight"))]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    output = run("upscale", "a.png", "-o", "out", "--model", "model", status=1)
    assert output.startswith("Error: 'model' cannot be loaded, as weights are missing: ") and "fc1" in output


@pytest.mark.parametrize("scale", [0, "4", 2.5])
def test_a_scale_that_is_none_is_told(folder, model, scale):
    save("a.png")
    shutil.copytree(model, "model")
    index = json.loads(Path("model/model_index.json").read_text()) | {"scale": scale}
    Path("model/model_index.json").write_text(json.dumps(index))
    output = run("upscale", "a.png", "-o", "out", "--model", "model", status=1)
    assert f"`scale` has to be a positive integer, but is {scale!r}" in output


def test_components_that_do_not_fit_are_told(folder, model):
    shutil.copytree(model, "model")
    index = json.loads(Path("model/model_index.json").read_text()) | {"scale": 2}
    Path("model/model_index.json").write_text(json.dumps(index))
    assert "'model' cannot run: `noise_predictor` reduces its input by" in run("info", "model", status=1)
    assert "`noise_predictor` reduces" in run(
        "convert", "model/noise_predictor", "--base", "model", "-o", "b", status=1
    )
    assert not Path("b").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-o", "a.txt/sub"], "cannot be made"),
        (["-o", "out", "--suffix", "x" * 300], "longer than 255 bytes"),
        (["-o", "out", "--seed", str(2**64)], "--seed"),
        (["-o", "out", "--device", "meta"], "'meta' cannot be used"),
    ],
)
def test_hopeless_commands_end_before_any_work(folder, model, arguments, message):
    save("a.png")
    Path("a.txt").write_text("not a folder")
    assert message in run("upscale", "a.png", *arguments, "--model", model, status=2)
    assert not Path("out").exists()


def test_damaged_exif_costs_no_picture(folder, model):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Camera"
    make_image().save("a.jpg", exif=exif)
    data = Path("a.jpg").read_bytes()
    Path("a.jpg").write_bytes(data.replace(b"\x01\x0f", b"\x01\x00", 1))  # now the width of the image is "Camera"
    with pytest.raises(Exception), Image.open("a.jpg") as image:  # noqa: B017 (of which kind is Pillow's affair)
        image.getexif().tobytes()
    assert "without its EXIF data, which is damaged" in run("upscale", "a.jpg", "-o", "out", "--model", model)
    assert Image.open("out/a.jpg").size == (40, 48)  # upright


def test_exif_too_long_for_jpeg_is_left_out(folder, model):
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "x" * 70_000
    make_image().save("a.png", exif=exif)
    assert "without its EXIF data" in run("upscale", "a.png", "-o", "out", "--format", "jpg", "--model", model)
    assert Image.open("out/a.jpg").size == (48, 40)
