"""What is published beside the weights: a model card, and the code for users who have not installed the package."""

import ast
import json
import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData


PACKAGE = Path(__file__).parent
# The module of each class that a repository brings along.
MODULES = {
    "InvSRNoisePredictor": "noise_predictor",
    "InvSRPipeline": "pipeline_invsr",
    "InvSRPromptEmbeds": "prompt_embeds",
    "InvSRScheduler": "scheduling_invsr",
}
HEADER = '''# SPDX-License-Identifier: Apache-2.0
# Written by `push_to_hub` of the package diffusers-invsr, for loading with `trust_remote_code=True` without it.


class HubMixin:
    """Stands for the part of the package that publishes models."""


'''
# What diffusers writes into a card that nobody has written.
PLACEHOLDER = "This model card has been automatically generated."


def bundle(class_name: str) -> str:
    r"""
    The code of a public class as one file that needs nothing else of this package.

    diffusers loads one file a component and one for the pipeline, and keeps the files of all components of a local
    folder in one namespace. So the modules of the package are put one after another, without their relative imports.

    Args:
        class_name (`str`): A key of `MODULES`.

    Returns:
        `str`: The source code.
    """
    sources = []
    seen = {"hub"}

    def add(module: str):
        if module in seen:
            return
        seen.add(module)
        source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                add(node.module)
                lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        sources.append("".join(lines))

    add(MODULES[class_name])
    # Under this name the classes are recorded when they are saved again.
    names = [f'{name}.__module__ = "{__package__}"\n' for name, module in MODULES.items() if module in seen]
    return HEADER + "\n\n".join([*sources, "".join(names)])


def write_code(model, folder: str | os.PathLike):
    r"""
    Write the code files that diffusers looks for when the package is not installed.

    Args:
        model ([`InvSRPipeline`] or [`InvSRNoisePredictor`]):
            A pipeline gets `pipeline.py` and `<component>/diffusers_invsr.py` for each component of this package, a
            predictor `diffusers_invsr.py`.
        folder (`str` or `os.PathLike`): Where the model was saved.
    """
    folder = Path(folder)
    if isinstance(model, DiffusionPipeline):
        (folder / "pipeline.py").write_text(bundle("InvSRPipeline"), encoding="utf-8")
        parts = {name: type(part) for name, part in model.components.items()}
    else:
        parts = {"": type(model)}
    for name, part in parts.items():
        if part.__module__ == __package__:
            (folder / name / f"{__package__}.py").write_text(bundle(part.__name__), encoding="utf-8")


def card_metadata(model) -> dict[str, Any]:
    r"""
    What is known of the weights: their licence, base model, training data, ...

    Args:
        model ([`InvSRPipeline`] or [`InvSRNoisePredictor`]): Its config holds it under `model_card`.

    Returns:
        `dict[str, Any]`: Metadata of a Hub card, and two texts, `training_data` and `training` (how the training was
        run). A pipeline that has none of its own takes its noise predictor's.
    """
    metadata = model.config.get("model_card")
    if not metadata and isinstance(model, DiffusionPipeline):
        metadata = model.noise_predictor.config.get("model_card")
    return dict(metadata or {})


def create_model_card(model, repo_id: str) -> ModelCard:
    r"""
    Fill in the template `model_card.md`.

    Args:
        model ([`InvSRPipeline`] or [`InvSRNoisePredictor`]): What the card describes.
        repo_id (`str`): Where it can be loaded from.

    Returns:
        `ModelCard`: The card; its `save(path)` writes it.
    """
    is_pipeline = isinstance(model, DiffusionPipeline)
    metadata = card_metadata(model)
    training_data, training = metadata.pop("training_data", None), metadata.pop("training", None)
    base_models = metadata.get("base_model") or []
    defaults = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": ["invsr", "super-resolution", "image-upscaling"],
        "metrics": ["psnr", "ssim"],
    }
    # In the installed package the template lies beside this file, in a checkout at the top.
    templates = (PACKAGE / "model_card.md", PACKAGE.parents[1] / "model_card.md")
    return ModelCard.from_template(
        ModelCardData(**{**defaults, **metadata}),
        template_path=next(path for path in templates if path.is_file()),
        repo_id=repo_id,
        is_pipeline=is_pipeline,
        scale=model.config["scale"] if is_pipeline else None,
        takes_text=not is_pipeline or model.takes_text,
        license=metadata.get("license_name") or metadata.get("license"),
        license_link=metadata.get("license_link"),
        base_models=[base_models] if isinstance(base_models, str) else base_models,
        training_data=training_data,
        training=training,
    )


class HubMixin:
    """Makes what diffusers saves and uploads of a pipeline or model fit to be published."""

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        # Every way of saving ends here, a pipeline's after its components have been saved.
        super().save_config(save_directory, push_to_hub, **kwargs)
        self._remove_local_paths(save_directory)

    def _upload_folder(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ):
        # Every way of uploading ends here. A card that stands on the Hub already lies in the folder by now.
        self._remove_local_paths(working_dir)
        write_code(self, working_dir)
        card = Path(working_dir, "README.md")
        if card.is_file() and PLACEHOLDER in card.read_text(encoding="utf-8"):
            create_model_card(self, repo_id).save(card)
        return super()._upload_folder(
            working_dir,
            repo_id,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            subfolder=subfolder,
        )

    def _remove_local_paths(self, folder: str | os.PathLike):
        """Remove where a component was loaded from, the key `_name_or_path`, from the saved JSON files."""
        folder = Path(folder)
        files = [folder / self.config_name]
        for name in getattr(self, "components", ()):
            files += (folder / name).glob("*.json")
        for file in files:
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
