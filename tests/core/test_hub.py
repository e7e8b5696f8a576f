"""Publishing and loading through the real Hub client, with and without the package installed."""

import ast
import json
from pathlib import Path

import pytest
from helpers import FIXTURES
from hub_server import serve
from subprocesses import make_environment_without, run

from diffusers_invsr.hub import MODULES, bundle


CODE_FILES = {
    "pipeline.py",
    "noise_predictor/diffusers_invsr.py",
    "scheduler/diffusers_invsr.py",
    "fixed_prompt/diffusers_invsr.py",
}


@pytest.fixture(scope="module")
def hub():
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


def publish(fixtures: str):
    """Make a pipeline, save it and push it and its predictor."""
    import json
    from pathlib import Path

    import torch
    from huggingface_hub import ModelCard, upload_file
    from sd_turbo import enlarge, save_sd_turbo

    from diffusers_invsr import InvSRPipeline, convert

    cases = json.loads(Path(fixtures, "cases.json").read_text())
    save_sd_turbo(Path("base"), cases)
    convert(f"{fixtures}/noise_predictor_original.pth", "base", "converted", config=cases["noise_predictor"])

    pipe = InvSRPipeline.from_pretrained("converted")
    pipe.drop_text_encoder()
    pipe.push_to_hub("pushed")
    pipe.noise_predictor.push_to_hub("predictor")
    pipe = InvSRPipeline.from_pretrained("converted", dtype=torch.float16)
    pipe.save_pretrained("saved", variant="fp16", push_to_hub=True, repo_id="user/saved")

    # A card that its owner has edited, before the model is pushed once more
    pipe.push_to_hub("variants")
    card = str(ModelCard.load("user/variants")) + "\nAn owner's remark.\n"
    upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="user/variants")
    pipe.push_to_hub("variants", variant="fp16")

    torch.save(enlarge(InvSRPipeline.from_pretrained("converted")), "expected.pt")


@pytest.fixture(scope="module")
def published(hub, homes) -> Path:
    """A folder with a pipeline's result in `expected.pt`. It and what it was made of are on the Hub."""
    home = homes / "author"
    run(publish, str(FIXTURES), home=home, hub=hub.url)
    base = {str(file.relative_to(home / "base")): file.read_bytes() for file in (home / "base").rglob("*.*")}
    hub.commit("stabilityai/sd-turbo", base)
    checkpoint = (FIXTURES / "noise_predictor_original.pth").read_bytes()
    hub.commit("OAOA/InvSR", {"noise_predictor_sd_turbo_v5.pth": checkpoint, "folder/other.pth": checkpoint})
    return home


def load_installed(expected: str, config: dict) -> dict:
    """Load from the Hub in every way there is with the package installed; returns each way's largest difference."""
    import torch
    from diffusers import DiffusionPipeline
    from sd_turbo import enlarge

    from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline, convert, load_noise_predictor

    expected = torch.load(expected)
    ways = {
        "InvSRPipeline": lambda: InvSRPipeline.from_pretrained("user/pushed"),
        "DiffusionPipeline": lambda: DiffusionPipeline.from_pretrained("user/pushed"),
        "noise_predictor": lambda: InvSRPipeline.from_pretrained(
            "user/pushed", noise_predictor=InvSRNoisePredictor.from_pretrained("user/predictor")
        ),
        "load_noise_predictor": lambda: InvSRPipeline.from_pretrained(
            "user/pushed", noise_predictor=load_noise_predictor("user/predictor")
        ),
        "fp16 variant": lambda: InvSRPipeline.from_pretrained("user/variants", variant="fp16", dtype=torch.float16).to(
            dtype=torch.float32
        ),
        "saved and pushed": lambda: DiffusionPipeline.from_pretrained("user/saved", variant="fp16"),
        "published files": lambda: convert(config=config),
        "another published file": lambda: convert("OAOA/InvSR/folder/other.pth", config=config),
        "balanced": lambda: DiffusionPipeline.from_pretrained("user/pushed", device_map="balanced"),
    }
    return {name: (enlarge(load()) - expected).abs().max().item() for name, load in ways.items()}


def test_load_installed(hub, homes, published, cases):
    home = homes / "installed"
    arguments = (str(published / "expected.pt"), cases["noise_predictor"])
    differences = run(load_installed, *arguments, home=home, hub=hub.url)
    for way, difference in differences.items():
        assert difference < (2e-2 if way in ("fp16 variant", "saved and pushed") else 1e-5), way
    assert not (home / "cache" / "modules" / "diffusers_modules").exists(), "code from the Hub was run"


def load_without_package(expected: str) -> dict:
    """Load in every way there is without the package; returns the largest differences, and what else happened."""
    import importlib.util

    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
    from huggingface_hub import snapshot_download
    from sd_turbo import enlarge

    expected = torch.load(expected)
    installed = importlib.util.find_spec("diffusers_invsr") is not None
    remote_code = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    snapshot = snapshot_download("user/pushed", local_dir="copy")
    differences = {}
    for name, source in {"Hub": "user/pushed", "copy": snapshot}.items():
        pipe = DiffusionPipeline.from_pretrained(source, **remote_code)
        differences[name] = (enlarge(pipe) - expected).abs().max().item()
    pipe.save_pretrained("again")
    differences["from_pipe"] = (enlarge(type(pipe).from_pipe(pipe)) - expected).abs().max().item()

    predictor_class = get_class_from_dynamic_module(
        "user/predictor", "diffusers_invsr.py", class_name="InvSRNoisePredictor", trust_remote_code=True
    )
    pipe.register_modules(noise_predictor=predictor_class.from_pretrained("user/predictor"))
    differences["noise_predictor"] = (enlarge(pipe) - expected).abs().max().item()
    pipe.compile(backend="eager")
    differences["compiled"] = (enlarge(pipe) - expected).abs().max().item()

    pipe = DiffusionPipeline.from_pretrained("user/variants", variant="fp16", dtype=torch.float16, **remote_code)
    dtype = str(pipe.unet.dtype)
    differences["fp16 variant"] = (enlarge(pipe.to(dtype=torch.float32)) - expected).abs().max().item()
    try:
        DiffusionPipeline.from_pretrained("user/pushed", custom_pipeline="pipeline")
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return {"installed": installed, "differences": differences, "dtype": dtype, "refusal": refusal}


def test_load_without_package(hub, homes, published):
    python = make_environment_without("diffusers_invsr", homes / "environment")
    home = homes / "stranger"
    result = run(load_without_package, str(published / "expected.pt"), home=home, hub=hub.url, python=python)
    assert not result["installed"]
    assert result["differences"].pop("fp16 variant") < 2e-2
    assert max(result["differences"].values()) < 1e-5, result["differences"]
    assert result["dtype"] == "torch.float16"
    assert "trust_remote_code=True" in result["refusal"]
    # What is saved from there names the package, so that it loads where the package is installed.
    index = json.loads((home / "again" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_invsr", "InvSRScheduler"]


def test_repositories(hub, published):
    assert set(hub.files("user/pushed")) == CODE_FILES | {
        ".gitattributes",
        "README.md",
        "model_index.json",
        "fixed_prompt/config.json",
        "fixed_prompt/diffusion_pytorch_model.safetensors",
        "noise_predictor/config.json",
        "noise_predictor/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert set(hub.files("user/predictor")) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "diffusers_invsr.py",
        "diffusion_pytorch_model.safetensors",
    }
    assert set(hub.files("user/saved")) > CODE_FILES - {"fixed_prompt/diffusers_invsr.py"}
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.files("user/variants")


@pytest.mark.parametrize("repo", ["user/pushed", "user/predictor", "user/saved"])
def test_no_local_path_is_published(hub, published, repo):
    for path, content in hub.files(repo).items():
        if path.endswith((".json", ".md", ".py")):
            assert str(published).encode() not in content, path
            assert b"_name_or_path" not in content or path.endswith(".py"), path
            assert b"converted" not in content or not path.endswith(".json"), path


@pytest.mark.parametrize("repo", ["user/pushed", "user/predictor", "user/saved"])
def test_card(hub, published, repo):
    from huggingface_hub import ModelCard

    card = ModelCard(hub.files(repo)["README.md"].decode())
    assert card.data.license == "other"
    assert card.data.license_name and card.data.license_link
    assert card.data.base_model == ["stabilityai/sd-turbo", "OAOA/InvSR"]
    assert card.data.pipeline_tag == "image-to-image"
    assert card.data.library_name == "diffusers"
    assert "invsr" in card.data.tags
    assert card.data.metrics
    for text in (
        f'from_pretrained("{repo}"',
        "non-commercial",
        "Stability AI Community License",
        "## Limits",
        "LSDIR",
    ):
        assert text in card.text


def test_edited_card_is_kept(hub, published):
    card = hub.files("user/variants")["README.md"].decode()
    assert card.count("An owner's remark.") == 1
    assert card.count("## Limits") == 1


@pytest.mark.parametrize("class_name", MODULES)
def test_bundle_is_self_contained(class_name):
    tree = ast.parse(bundle(class_name))
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    defined = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert len(defined) == len(set(defined)), "modules that are put together define the same name"
    assert class_name in defined


def test_bundle_imports_nothing_of_the_package():
    """Nor in functions: diffusers would advise to install it."""
    nodes = list(ast.walk(ast.parse(bundle("InvSRPipeline"))))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert "torch" in modules and not any(module.startswith("diffusers_invsr") for module in modules)
