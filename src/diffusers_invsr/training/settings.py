"""Settings of a training script: data classes, filled from a YAML file and the command line."""

import dataclasses
import json
import logging
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import yaml
from diffusers import ModelMixin
from transformers import HfArgumentParser

from .errors import TrainingError, training_errors


ALWAYS_LISTED = ("max_iterations", "batch_size", "learning_rate", "seed")  # in a model card
NEVER_LISTED = ("output_dir", "resume", "hub_model_id", "push_to_hub", "report_to")

logger = logging.getLogger(__name__)


def setting(help: str, default: Any = None, required: bool = False) -> Any:
    r"""
    A field of a data class of settings.

    Args:
        help (`str`): What `--help` says about it.
        default (`Any`, *optional*): Its default; a list is copied for each instance.
        required (`bool`, defaults to `False`): Whether it has no default.
    """
    metadata = {"help": help}
    if required:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_settings(parser: HfArgumentParser, argv: list[str], ignored: Container[str] = ()) -> tuple:
    r"""
    Settings from the command line, which take precedence over those of a YAML file, over the defaults.

    Args:
        parser (`HfArgumentParser`): Holds the data classes.
        argv (`list[str]`): Arguments. The first one is the YAML file if it does not start with `-`.
        ignored (`Container[str]`, defaults to `()`):
            Settings of another script that the file may have. They are ignored, with a warning that names them.

    Returns:
        `tuple`: An instance of each data class.

    Raises:
        SystemExit: With the usage and a message, if there is no such file or setting, or a value is of another type.
        TrainingError: If a data class rejects its values.
    """
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**_read_settings(parser, argv[0], ignored))
        argv = argv[1:]
    with training_errors():
        *settings, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        parser.error(f"unknown setting: {' '.join(unknown)}.")
    return tuple(settings)


def _read_settings(parser: HfArgumentParser, file: str, ignored: Container[str]) -> dict[str, Any]:
    """Values of a YAML file, as defaults for the parser."""
    if not Path(file).is_file():
        parser.error(f"there is no settings file {file!r}.")
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"{file} could not be read as a YAML file of settings: {error}.")
    if not isinstance(values, dict):
        parser.error(f"{file} must hold settings, `name: value`.")
    types = {f.name: f.type for cls in parser.dataclass_types for f in dataclasses.fields(cls)}
    others = sorted(set(values) - set(types))
    unknown = [name for name in others if name not in ignored]
    if unknown:
        parser.error(f"{file} has unknown settings: {', '.join(unknown)}.")
    if others:
        logger.warning(f"{file}: ignored settings of another script: {', '.join(others)}.")
    return {
        name: _as_argument(value, types[name], optional=parser.get_default(name) is None)
        for name, value in values.items()
        if name in types
    }


def _as_argument(value: Any, kind: type | str, optional: bool) -> Any:
    """A value of a YAML file as text, which argparse converts and checks; lists and the like as they are."""
    if value is None or (value == "None" and optional):
        return None
    if str(kind).startswith("list") and not isinstance(value, list):  # a list of one, written without brackets
        return [value]
    if isinstance(value, bool) and kind is not bool:  # YAML's reading of `no`
        return "yes" if value else "no"
    return str(value) if isinstance(value, (bool, int, float)) else value


def require_at_least(minimum: int, parser: HfArgumentParser, settings: Any, *names: str):
    """Exit with the usage and a message if one of these settings is less than the minimum."""
    for name in names:
        if getattr(settings, name) < minimum:
            parser.error(f"`--{name}` must be at least {minimum}, got {getattr(settings, name)}.")


def require_norm(parser: HfArgumentParser, max_grad_norm: float | None):
    """Exit with the usage and a message unless the bound of the gradients' norm is positive or `None`."""
    if max_grad_norm is not None and not max_grad_norm > 0:  # nothing would be learned
        parser.error(f"`--max_grad_norm` must be greater than 0, got {max_grad_norm}.")


def check_unchanged(settings: dict[str, Any], stored: dict[str, Any]):
    r"""
    Check that a resumed run has the settings that it was started with.

    Args:
        settings (`dict[str, Any]`): Settings that may not change, by name.
        stored (`dict[str, Any]`): Those of the checkpoint. A setting that it lacks, because it was written by an
            earlier release, is not compared; nor is an entry that a configuration (a dictionary) lacks.

    Raises:
        TrainingError: If any differs.
    """
    for name, value in stored.items():
        now = settings.get(name)
        if isinstance(value, dict) and isinstance(now, dict):
            changed = [key for key in value if now.get(key) != value[key]]
            if changed:
                raise TrainingError(f"`{name}` must stay the same in a resumed run, but {', '.join(changed)} changed.")
        elif now != value:
            raise TrainingError(f"`{name}` must stay the same in a resumed run: it was {value!r}, got {now!r}.")


def settings_table(parts: Sequence[Any]) -> str:
    """
    A Markdown table for the model card of the settings (instances of data classes) that are not the defaults, and of
    the few that every card names.
    """
    rows = ["| setting | value |", "| --- | --- |"]
    for part in parts:
        for f in dataclasses.fields(part):
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            value = getattr(part, f.name)
            if f.name in ALWAYS_LISTED or (value != default and f.name not in NEVER_LISTED):
                rows.append(f"| {f.name} | `{value}` |")
    return "\n".join(rows)


def plain_config(network: ModelMixin) -> dict[str, Any]:
    """What a network's configuration says about its shape, as it is after a round trip through JSON."""
    config = {key: value for key, value in network.config.items() if key[0] != "_" and key != "model_card"}
    return json.loads(json.dumps(config))
