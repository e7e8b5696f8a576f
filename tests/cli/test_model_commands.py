"""Loading models on the command line, and the commands `convert`, `push` and `info`."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import FIXTURES, files_below, run_command
from hub_server import serve
from image_makers import save_images
from programs import start_program
from sd_turbo import save_sd_turbo

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline, convert


@pytest.mark.parametrize("name", ["tinny", "./missing/folder/here", "empty", "file.pth", "broken", "other"])
def test_models_that_do_not_exist(folder, model, name):
    save_images("a.png")
    Path("empty").mkdir()
    Path("file.pth").touch()
    for copy in ("broken", "other"):
        shutil.copytree(model, copy)
    Path("broken/unet/diffusion_pytorch_model.safetensors").write_text("no tensors")
    Path("other/model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    output = run_command("upscale", "a.png", "-o", "out", "--model", name, status=1)
    assert output.startswith(f"Error: {name!r} ")
    assert output.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("part", ["vae", "unet", "noise_predictor"])
def test_missing_weights(folder, model, part):
    save_images("a.png")
    shutil.copytree(model, "model")
    file = Path("model", part, "diffusion_pytorch_model.safetensors")
    weights = safetensors.torch.load_file(file)
    name = next(name for name in weights if name.endswith(".weight"))
    del weights[name]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    output = run_command("upscale", "a.png", "-o", "out", "--model", "model", status=1)
    assert output.startswith("Error: 'model' cannot be loaded because weights are missing: ") and name in output
    assert output.count("\n") == 1
    if part == "noise_predictor":
        output = run_command("convert", f"model/{part}", "-o", "new", "--base", model, status=1)
        assert f"`source='model/noise_predictor'` lacks 1 of its tensors ({name}, ...)" in output


def test_missing_weights_of_the_text_encoder(folder, cases):
    save_images("a.png")
    save_sd_turbo(Path("base"), cases)
    predictor = InvSRNoisePredictor(**cases["noise_predictor"])
    convert(predictor, "base", "model")
    file = Path("model/text_encoder/model.safetensors")
    weights = safetensors.torch.load_file(file)
    del weights[next(name for name in weights if name.endswith("fc1.weight"))]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    output = run_command("upscale", "a.png", "-o", "out", "--model", "model", status=1)
    assert output.startswith("Error: 'model' cannot be loaded because weights are missing: ") and "fc1" in output


@pytest.mark.parametrize("scale", [0, "4", 2.5])
def test_invalid_scale(folder, model, scale):
    save_images("a.png")
    shutil.copytree(model, "model")
    index = json.loads(Path("model/model_index.json").read_text()) | {"scale": scale}
    Path("model/model_index.json").write_text(json.dumps(index))
    output = run_command("upscale", "a.png", "-o", "out", "--model", "model", status=1)
    assert "`scale`" in output and repr(scale) in output


def test_components_that_do_not_fit(folder, model):
    shutil.copytree(model, "model")
    index = json.loads(Path("model/model_index.json").read_text()) | {"scale": 2}
    Path("model/model_index.json").write_text(json.dumps(index))
    assert "'model' cannot be run: `noise_predictor` must reduce" in run_command("info", "model", status=1)
    assert "`noise_predictor` must reduce" in run_command(
        "convert", "model/noise_predictor", "--base", "model", "-o", "b", status=1
    )
    assert not Path("b").exists()


def test_info(model):
    pipe = InvSRPipeline.from_pretrained(model)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    num_parameters = sum(p.numel() for module in modules for p in module.parameters())
    lines = dict(line.split(":", 1) for line in run_command("info", model).splitlines())
    values = {name.strip(): value.strip() for name, value in lines.items()}
    assert values["scale"].startswith("x4")
    assert values["tile size"] == "128 pixels, or other multiples of 2 with --tile-size"
    assert values["memory for weights"] == f"{4 * num_parameters / 1e6:,.0f} MB in float32"
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
    assert licence in run_command("info", "model")


def test_convert(folder, cases):
    save_images("a.png")
    save_sd_turbo(Path("base"), cases)
    Path("config.json").write_text(json.dumps(cases["noise_predictor"]))
    command = ["convert", FIXTURES / "noise_predictor_original.pth", "--base", "base", "--config", "config.json"]
    run_command(*command, "-o", "full")
    assert Path("full/text_encoder").is_dir()
    assert "exists" in run_command(*command, "-o", "full", status=1)
    run_command(*command, "-o", "full", "--overwrite", "--drop-text-encoder", "--dtype", "float16")
    assert not Path("full/text_encoder").exists()
    assert Path("full/fixed_prompt").is_dir()
    assert "no (fixed prompts)" in run_command("info", "full")
    assert "does not fit" in run_command(*command[:-2], "-o", "published", status=1)  # not the published network
    run_command("upscale", "a.png", "-o", "out", "--model", "full", "--tile-size", "none")
    assert files_below("out") == ["a.png"]


@pytest.mark.slow
def test_push(folder, model):
    """The files of the folder as they are, which may have the name of another model, with code and model card."""
    pipe = InvSRPipeline.from_pretrained(model, dtype=torch.float16)
    pipe.unet.float()
    pipe.save_pretrained("tiny")
    Path("tiny/.hidden").touch()
    saved = {name: Path("tiny", name).read_bytes() for name in files_below("tiny") if name != ".hidden"}
    with serve() as hub:
        process = start_program(folder, "push", "tiny", "me/model", "--token", "hf_test", HF_ENDPOINT=hub.url)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "cannot run with `cpu` device" not in errors
        assert output.endswith("me/model\n")
        pushed = hub.files("me/model")
    assert saved.items() <= pushed.items()
    code = {f"{name}/diffusers_invsr.py" for name in ("noise_predictor", "scheduler")} | {"pipeline.py", "README.md"}
    assert pushed.keys() - saved.keys() == {*code, ".gitattributes"}
    assert 'InvSRPipeline.from_pretrained("me/model"' in pushed["README.md"].decode()
    assert {name: Path("tiny", name).read_bytes() for name in saved} == saved
    assert files_below("tiny") == sorted([*saved, ".hidden"])
