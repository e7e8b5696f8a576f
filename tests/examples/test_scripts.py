"""The short scripts at the top of `examples/`, with the embedded model's weights and small tiles."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import EXAMPLES, FIXTURES, pixels
from hub_server import serve
from PIL import Image
from safetensors.torch import load
from sd_turbo import save_sd_turbo
from subprocesses import run

from diffusers_invsr import TINY, InvSRPipeline, convert
from diffusers_invsr.metrics import psnr, psnr_y, ssim_y


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The embedded model in float32, with tiles of 16 so that little is padded."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    InvSRPipeline.from_pretrained(TINY, tile_size=16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(model) -> InvSRPipeline:
    pipe = InvSRPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def converted(tmp_path_factory, cases) -> str:
    """A model like the published one, with a text encoder and an `AutoencoderKL`, but with tiny modules and tiles."""
    folder = tmp_path_factory.mktemp("converted")
    save_sd_turbo(folder / "sd", cases)
    pipe = convert(FIXTURES / "noise_predictor_original.pth", folder / "sd", config=cases["noise_predictor"])
    pipe.register_to_config(tile_size=16)
    pipe.save_pretrained(folder / "pipe")
    return str(folder / "pipe")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Runs a script of `examples/` in a folder with the pictures `a.png` and `b.png`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("diffusers_invsr.auto_dtype", lambda device: torch.float32)
    photo = Image.open(FIXTURES / "photos" / "kodim24_lr.png").convert("RGB")
    photo.crop((8, 8, 28, 24)).save("a.png")
    photo.crop((30, 20, 46, 52)).save("b.png")

    def run_example(name: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run_example


def upscaled(pipe: InvSRPipeline, file: str, **arguments) -> np.ndarray:
    return np.array(pipe(Image.open(file), generator=torch.Generator().manual_seed(0), **arguments).images[0])


def test_scripts_are_short_and_listed():
    scripts = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
    index = (EXAMPLES / "README.md").read_text()
    for name, text in scripts.items():
        assert 15 <= len(text.splitlines()) <= 40, name
        command = re.search(rf"python (examples/{name}[^\n]*)", text)[1]
        assert command in index, name
    for folder in ("training", "tiny", "benchmarks", "research"):
        for path in (EXAMPLES / folder).glob("*.py"):
            assert "__main__" not in path.read_text() or f"({folder}/{path.name})" in index, path


@pytest.mark.parametrize("folder", ["", "training", "tiny", "benchmarks", "research"])
def test_no_script_imports_a_script_or_another_folder(folder):
    modules = {path.stem: path for path in EXAMPLES.rglob("*.py")}
    for path in (EXAMPLES / folder).glob("*.py"):
        for name in re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE):
            if name in modules:
                assert modules[name].parent == path.parent, f"{path.name} imports {name} of another folder"
                assert "__main__" not in modules[name].read_text(), f"{path.name} imports the script {name}"


def test_upscale_image(example, model, tiny):
    example("upscale_image.py", "a.png", "--model", model, "--output", "out.png")
    assert np.array_equal(pixels("out.png"), upscaled(tiny, "a.png"))


def test_upscale_several(example, model, tiny):
    example("upscale_several.py", "a.png", "b.png", "--model", model, "--output", "out")
    for name in ("a.png", "b.png"):
        assert np.array_equal(pixels(f"out/{name}"), upscaled(tiny, name))


@pytest.mark.parametrize("script", ["upscale_several.py", "compile_pipeline.py"])
def test_no_result_replaces_another(example, model, script, capsys):
    with pytest.raises(SystemExit):
        example(script, "a.png", "others/a.jpg", "--model", model, "--output", "out")
    assert "the names of the pictures must differ without their extensions" in capsys.readouterr().err
    assert not Path("out").exists()


def test_compare_steps(example, model, tiny):
    example("compare_steps.py", "a.png", "--model", model, "--output", "out.png")
    sheet = pixels("out.png")
    assert sheet.shape == (3 * 64, 3 * 80, 3)
    places = {(0, 1): {"start_timestep": 250}, (0, 2): {}, (1, 2): {"num_steps": 2}, (2, 2): {"num_steps": 5}}
    for (row, column), arguments in places.items():
        cell = sheet[64 * row : 64 * (row + 1), 80 * column : 80 * (column + 1)]
        assert np.array_equal(cell[40:], upscaled(tiny, "a.png", **arguments)[40:])  # below the label


def test_upscale_panorama(example, model, tiny):
    example("upscale_panorama.py", "b.png", "--tile-size", "16", "--model", model)
    expected = upscaled(tiny, "b.png", tile_size=16, tile_overlap=4)
    assert np.array_equal(pixels("upscaled.png"), expected)


def test_text_to_image(example, model, cases, capsys):
    save_sd_turbo(Path("sd"), {**cases, "unet": {**cases["unet"], "sample_size": 8}})
    example("text_to_image.py", "a lighthouse", "--text-to-image", "sd", "--model", model)
    before, after = map(int, re.search(r"(\d+)x\d+ -> upscaled.png: (\d+)x", capsys.readouterr().out).groups())
    assert pixels("upscaled.png").shape[1] == after == 4 * before


def test_low_memory(example, model, tiny):
    example("low_memory.py", "a.png", "--tile-size", "16", "--model", model)
    assert np.array_equal(pixels("upscaled.png"), upscaled(tiny, "a.png"))


def test_low_memory_with_text_encoder_and_tiled_vae(example, converted):
    example("low_memory.py", "a.png", "--tile-size", "16", "--model", converted)
    expected = upscaled(InvSRPipeline.from_pretrained(converted), "a.png", tile_size=16).astype(int)
    assert np.abs(pixels("upscaled.png") - expected).max() <= 1


def test_load_lora(example, model, tiny):
    peft = pytest.importorskip("peft")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False))
    InvSRPipeline.save_lora_weights("lora", unet_lora_layers=peft.get_peft_model_state_dict(unet))
    plain = upscaled(tiny, "a.png")
    results = {}
    for weight in ("0", "1"):
        example("load_lora.py", "a.png", "lora", "--model", model, "--weight", weight)
        results[weight] = pixels("upscaled.png")
    assert np.abs(results["0"].astype(int) - plain).max() <= 1
    assert psnr(results["1"], plain) < 50


@pytest.mark.slow
def test_compile_pipeline(example, converted, capsys):
    torch._dynamo.reset()
    example("compile_pipeline.py", "a.png", "b.png", "--model", converted, "--backend", "eager", "--output", "out")
    torch._dynamo.reset()
    assert re.findall(r"^(.\.png): [\d.]+ s$", capsys.readouterr().out, re.MULTILINE) == ["a.png", "b.png"]
    pipe = InvSRPipeline.from_pretrained(converted)
    for name in ("a.png", "b.png"):
        expected = upscaled(pipe, name, tile_size=16).astype(int)
        assert np.abs(pixels(f"out/{name}") - expected).max() <= 1


def push(script: str, model: str):
    import runpy
    import sys

    sys.argv = [script, model, "user/published", "--dtype", "float16"]
    runpy.run_path(script, run_name="__main__")


@pytest.mark.slow
def test_push_to_hub(model, tmp_path):
    with serve() as hub:
        run(push, str(EXAMPLES / "push_to_hub.py"), model, home=tmp_path / "home", hub=hub.url)
        files = hub.files("user/published")
        assert not {"private", "visibility"} & set(hub.created["user/published"])  # the owner's default
    assert {"model_index.json", "pipeline.py", "unet/diffusion_pytorch_model.safetensors"} <= set(files)
    assert "license: cc0-1.0" in files["README.md"].decode()
    assert json.loads(files["model_index.json"])["tile_size"] == 16
    weights = load(files["unet/diffusion_pytorch_model.safetensors"])
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_measure_quality(example, model, tiny, capsys):
    names = ("a.png", "night/b.png")
    for folder in ("lr", "hr"):
        Path(folder, "night").mkdir(parents=True)
        for name in names:
            image = Image.open(Path(name).name)
            (image if folder == "lr" else image.resize((4 * image.width, 4 * image.height))).save(f"{folder}/{name}")
    with pytest.raises(SystemExit):
        example("measure_quality.py", "--lr", "lr", "--hr", "nowhere", "--model", model)
    assert "`--hr` must be a folder of images, got nowhere" in capsys.readouterr().err
    example("measure_quality.py", "--lr", "lr", "--hr", "hr", "--model", model)
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == [*names, "mean"]
    scores = []
    for name in names:
        result, hr = upscaled(tiny, f"lr/{name}"), pixels(f"hr/{name}")
        scores.append((psnr_y(result, hr), ssim_y(result, hr)))
        assert f"-> {scores[-1][0]:.2f} dB" in lines[name] and f"-> {scores[-1][1]:.4f}" in lines[name]
    assert f"-> {np.mean([psnr for psnr, _ in scores]):.2f} dB" in lines["mean"]
