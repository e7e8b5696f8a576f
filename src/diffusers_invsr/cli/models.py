"""The commands `convert`, `push` and `info`: make, publish and describe models."""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..image_paths import display_path
from .common import MODEL_METAVAR, error_message, fail, load_pipeline


if TYPE_CHECKING:
    from ..pipeline_invsr import InvSRPipeline


def convert(
    predictor: Annotated[
        str, typer.Argument(help="The noise predictor: a .pth or .safetensors file, a saved folder, or a Hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new pipeline.")],
    base: Annotated[
        str, typer.Option(metavar="ID_OR_FOLDER", help="The diffusion model that the predictor was trained with.")
    ] = "stabilityai/sd-turbo",
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="JSON",
            help="Configuration of the predictor.  [default: the published one]",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Data type of the saved weights.")
    ] = "float32",
    drop_text_encoder: Annotated[
        bool,
        typer.Option(
            "--drop-text-encoder", help="Save the embeddings of the fixed prompts instead of the text encoder."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pipeline in the folder OUT.")] = False,
):
    """Combine a noise predictor and its diffusion model into a pipeline."""
    import torch

    from ..conversion import convert as convert_to_pipeline

    try:
        convert_to_pipeline(
            predictor,
            base=base,
            output=os.path.expanduser(out),
            config=config,
            dtype=getattr(torch, dtype),
            drop_text_encoder=drop_text_encoder,
            overwrite=overwrite,
        )
    except (OSError, ValueError) as error:
        if isinstance(error, FileExistsError) and error.errno is None:  # not the system's, for a file as folder
            fail(f"{display_path(out.absolute())} already exists: --overwrite replaces a pipeline, nothing else.")
        fail(error_message(error))
    typer.echo(f"{predictor} + {base} -> {display_path(out.absolute())}")


def push(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a saved pipeline.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as private.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Access token for the Hub.  [default: that of `hf auth login`]")
    ] = None,
):
    """Publish a saved pipeline on the Hub: weights, code and model card."""
    # Loaded to check that it is complete; by its absolute path, since `tiny` could be the name of a folder
    pipe = load_pipeline(str(folder.absolute()))
    try:
        # Without --private, the owner's default applies
        upload_pipeline(pipe, folder, repo_id, private=private or None, token=token)
    except (OSError, ValueError) as error:
        fail(f"`{repo_id}` could not be written on the Hub: {error_message(error)}")
    typer.echo(f"{display_path(folder)} -> {repo_id}")


def upload_pipeline(pipe: "InvSRPipeline", folder: Path, repo_id: str, private: bool | None, token: str | None):
    r"""
    Upload the files of a saved pipeline as they are, with the code and the model card that the Hub needs.

    Args:
        pipe ([`InvSRPipeline`]): The pipeline in the folder.
        folder (`Path`): The folder. Hidden files and the folder's own model card are left out.
        repo_id (`str`): Repository on the Hub, created if it does not exist. A model card that it has is kept.
        private (`bool`, *optional*): Visibility of a new repository; `None` for the owner's default.
        token (`str`, *optional*): Access token for the Hub.
    """
    from diffusers.utils.hub_utils import load_or_create_model_card
    from huggingface_hub import create_repo

    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".*", "README.md"), dirs_exist_ok=True)
        load_or_create_model_card(repo_id, token=token).save(Path(copy, "README.md"))
        pipe._upload_folder(copy, repo_id, token=token)  # writes the code, and a model card in place of a placeholder


def info(model: Annotated[str, typer.Argument(metavar=MODEL_METAVAR, help="As for upscale.")]):
    """Describe a model: scale, tile size, licence, parameters, size."""
    from .. import TINY

    pipe = load_pipeline(model)
    try:
        pipe.check_components()
    except ValueError as error:
        fail(f"{model!r} cannot be run: {error}")
    for name, value in describe_model(pipe, Path(TINY if model == "tiny" else model)).items():
        typer.echo(f"{name + ':':<22} {value}")


def describe_model(pipe: "InvSRPipeline", folder: Path) -> dict[str, str]:
    r"""
    What a user needs to know about a model.

    Args:
        pipe ([`InvSRPipeline`]): The pipeline.
        folder (`Path`): Its folder, for its size and its model card; need not exist.

    Returns:
        `dict[str, str]`: Descriptions by name, in the order in which they are shown.
    """
    import torch

    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    num_bytes = sum(p.numel() * p.element_size() for network in networks.values() for p in network.parameters())
    files = [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
    size_on_disk = sum(file.stat().st_size for file in files)
    text = "no (the model takes no text)" if not pipe.takes_text else "no (fixed prompts)"
    return {
        "scale": f"x{pipe.config.scale} (any from 1 to 8 with --scale)",
        "tile size": f"{pipe.config.tile_size} pixels, or other multiples of {pipe.size_multiple} with --tile-size",
        "licence": _licence(pipe, folder),
        "text encoder": "yes" if pipe.text_encoder is not None else text,
        "parameters": f"{sum(counts.values()) / 1e6:,.2f} M",
        **{f"  {name}": f"{count / 1e6:,.2f} M" for name, count in counts.items()},
        "size on disk": f"{size_on_disk / 1e6:,.1f} MB" if files else "not a local folder",
        "memory for weights": f"{num_bytes / 1e6:,.0f} MB in {str(pipe.dtype).removeprefix('torch.')}",
    }


def _licence(pipe: "InvSRPipeline", folder: Path) -> str:
    """The licence in the folder's model card, else the one in the pipeline's configuration."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    from ..hub import card_metadata

    cards = [card_metadata(pipe)]
    if (folder / "README.md").is_file():
        with suppress(ValueError, YAMLError):  # a card with damaged metadata
            cards.insert(0, ModelCard((folder / "README.md").read_text(encoding="utf-8")).data.to_dict())
    for card in cards:
        if name := card.get("license_name") or card.get("license"):
            return f"{name}, {card['license_link']}" if card.get("license_link") else name
    return "not stated"
