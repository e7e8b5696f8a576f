"""From published files to a pipeline: the noise predictor's checkpoint and SD-Turbo."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError

from .checkpoint_files import CHECKPOINT_SUFFIXES, FetchError, check_state_dict, find_checkpoint, read_checkpoint
from .hub import create_model_card, write_code
from .noise_predictor import InvSRNoisePredictor
from .pipeline_invsr import InvSRPipeline
from .scheduling_invsr import InvSRScheduler


PUBLISHED_BASE = "stabilityai/sd-turbo"
PUBLISHED_REPO = "OAOA/InvSR"
PUBLISHED_FILE = "noise_predictor_sd_turbo_v5.pth"
# What the card of converted weights says of them.
PUBLISHED_MODEL_CARD = {
    "license": "other",
    "license_name": "stability-ai-community-and-s-lab-1.0",
    "license_link": "https://github.com/zsyOAOA/InvSR/blob/master/LICENSE",
    "base_model": [PUBLISHED_BASE, PUBLISHED_REPO],
    "training_data": (
        "The noise predictor was trained by its authors on LSDIR and the first 20,000 faces of FFHQ, with"
        " low-resolution images made by the Real-ESRGAN degradation pipeline. The diffusion model is SD-Turbo,"
        " unchanged."
    ),
}


def check_dtype(dtype: torch.dtype | None):
    """Raises a ValueError for what is neither `None` nor a floating-point type of PyTorch."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be a floating-point type such as `torch.float16`, got {dtype!r}.")


def load_noise_predictor(
    source: str | os.PathLike = PUBLISHED_REPO,
    config: dict[str, Any] | str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> InvSRNoisePredictor:
    r"""
    Load a noise predictor from a published-style checkpoint or from what `save_pretrained` wrote.

    Args:
        source (`str` or `os.PathLike`, defaults to `"OAOA/InvSR"`):
            A checkpoint (`.pth`, `.pt`, `.safetensors`); one on the Hub, as `"OAOA/InvSR/<file>"` or as `"OAOA/InvSR"`
            for the published default; or a folder or Hub id in diffusers' format.
        config (`dict` or path of a JSON file, *optional*):
            Configuration of the network in a checkpoint; by default the published one.
        dtype (`torch.dtype`, *optional*): Type of the weights; by default `torch.float32`.
        token (`str` or `bool`, *optional*): Access token for the Hub.
        revision (`str`, *optional*): Revision on the Hub.

    Returns:
        [`InvSRNoisePredictor`]: The model, in evaluation mode.

    Raises:
        FetchError: If it could not be fetched from the Hub.
        FileNotFoundError: If `source` is the path of a checkpoint that does not exist.
        ValueError: If names or shapes in the checkpoint are not those of the configuration.
    """
    check_dtype(dtype)
    name = f"{PUBLISHED_REPO}/{PUBLISHED_FILE}" if str(source) == PUBLISHED_REPO else str(source)
    if Path(name).suffix not in CHECKPOINT_SUFFIXES:
        if os.path.isfile(name):
            raise ValueError(f"`source` must be a folder or a {', '.join(CHECKPOINT_SUFFIXES)} file, got {name!r}.")
        if config is not None:
            raise ValueError(f"`config` cannot be given with `source={name!r}`, which has a configuration of its own.")
        try:
            model, loaded = InvSRNoisePredictor.from_pretrained(
                name, torch_dtype=dtype or torch.float32, token=token, revision=revision, output_loading_info=True
            )
        except (OSError, HFValidationError) as error:
            if os.path.isdir(name):
                raise
            raise FetchError(name, error) from error
        if loaded["missing_keys"]:  # which diffusers leaves as memory held them
            keys = sorted(loaded["missing_keys"])
            raise ValueError(f"`source={name!r}` lacks {len(keys)} of its tensors ({', '.join(keys[:3])}, ...).")
        return model

    if isinstance(config, (str, os.PathLike)):
        config_file = config
        try:
            config = json.loads(Path(config_file).read_text(encoding="utf-8"))
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise ValueError(f"`config` must be a file with a JSON object, got {str(config_file)!r}.")
    with torch.device("meta"):
        model = InvSRNoisePredictor.from_config({"model_card": PUBLISHED_MODEL_CARD, **(config or {})})
    file = find_checkpoint(name, token, revision)
    state_dict = read_checkpoint(file)
    check_state_dict(state_dict, model.state_dict(), name)
    model.load_state_dict({key: value.to(dtype or torch.float32) for key, value in state_dict.items()}, assign=True)
    return model.eval()


def convert(
    noise_predictor: InvSRNoisePredictor | str | os.PathLike = PUBLISHED_REPO,
    base: str | os.PathLike = PUBLISHED_BASE,
    output: str | os.PathLike | None = None,
    config: dict[str, Any] | str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    drop_text_encoder: bool = False,
    overwrite: bool = False,
    model_card: dict[str, Any] | None = None,
) -> InvSRPipeline:
    r"""
    Assemble a pipeline of SD-Turbo and a noise predictor, and save it if asked to.

    Args:
        noise_predictor ([`InvSRNoisePredictor`], `str` or `os.PathLike`, defaults to `"OAOA/InvSR"`):
            The predictor, or a source for [`load_noise_predictor`].
        base (`str` or `os.PathLike`, defaults to `"stabilityai/sd-turbo"`): Hub id or folder of SD-Turbo.
        output (`str` or `os.PathLike`, *optional*): Folder to save the pipeline in. It appears when it is complete.
        config (`dict` or path of a JSON file, *optional*): Configuration for [`load_noise_predictor`].
        dtype (`torch.dtype`, *optional*):
            Type of all weights that are loaded here; by default `torch.float32`. A predictor that is given keeps its.
        variant (`str`, *optional*): Variant of SD-Turbo's files, such as `"fp16"`.
        token (`str` or `bool`, *optional*): Access token for the Hub.
        drop_text_encoder (`bool`, defaults to `False`):
            Whether the embeddings of the fixed prompts take the place of text encoder and tokenizer.
        overwrite (`bool`, defaults to `False`): Whether a pipeline that `output` already holds is replaced.
        model_card (`dict`, *optional*):
            What the model card says of the weights; by default that of the predictor. See [`InvSRPipeline`].

    Returns:
        [`InvSRPipeline`]: The pipeline.

    Raises:
        FetchError: If something could not be fetched from the Hub.
        FileExistsError: If `output` exists and may not be replaced.
        OSError: If the folder `base` does not hold what it should.
        ValueError: If the predictor's checkpoint does not fit its configuration, or the predictor the base; or if
            `config` is given without a checkpoint.
    """
    check_dtype(dtype)
    if output is not None:
        output = Path(output).absolute()
        replaceable = overwrite and (output / InvSRPipeline.config_name).is_file()
        if output.exists() and not replaceable:
            raise FileExistsError(
                f"`output={str(output)!r}` exists already: only a pipeline is replaced, with `overwrite=True`."
            )
    if not isinstance(noise_predictor, InvSRNoisePredictor):
        noise_predictor = load_noise_predictor(noise_predictor, config, dtype, token)
    elif config is not None:
        raise ValueError("`config` cannot be given with a `noise_predictor` that is loaded already.")
    base = str(base)
    try:
        pipe = InvSRPipeline.from_pretrained(
            base,
            noise_predictor=noise_predictor,
            scheduler=InvSRScheduler.from_pretrained(base, subfolder="scheduler", token=token),
            dtype=dtype or torch.float32,
            variant=variant,
            token=token,
            model_card=model_card,
        )
    except (OSError, HFValidationError) as error:
        if os.path.isdir(base):
            raise OSError(f"`base={base!r}` cannot be loaded: {error}") from error
        raise FetchError(base, error) from error

    pipe.check_components()
    if drop_text_encoder:
        pipe.drop_text_encoder()
    if output is not None:
        save_whole(pipe, output)
    return pipe


def save_whole(pipe: InvSRPipeline, output: Path):
    """Save a pipeline with its code and model card. The folder appears, or is replaced, when it is complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
        new = Path(folder, "new")
        pipe.save_pretrained(new)
        write_code(pipe, new)  # of which the card tells
        create_model_card(pipe, output.name).save(new / "README.md")
        old = Path(folder, "old")
        try:
            if output.exists():
                output.rename(old)
            new.rename(output)
        except BaseException:
            if old.exists() and not output.exists():
                old.rename(output)
            raise
