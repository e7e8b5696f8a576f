"""What `benchmark.py` compares: the settings of a variant, and a pipeline that runs with them."""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from diffusers_invsr import InvSRPipeline
from diffusers_invsr.tiling import TILE_WINDOWS


@dataclass(frozen=True)
class Settings:
    """One way to run a pipeline. Each field is an option of the script and a key of `--variant`."""

    dtype: str = field(default="float32", metadata={"choices": ("float32", "bfloat16", "float16")})
    compile: str = field(
        default="no",
        metadata={
            "choices": ("no", "full", "graphs", "regional"),
            "help": "`pipe.compile()`, with `mode='reduce-overhead'` (CUDA graphs), or only the UNet's repeated blocks"
            " (`pipe.unet.compile_repeated_blocks()`)",
        },
    )
    layout: str = field(
        default="auto",
        metadata={
            "choices": ("auto", "nchw"),
            "help": "memory format of the networks' inputs: the pipeline's, or NCHW",
        },
    )
    vae: str = field(
        default="own",
        metadata={"choices": ("own", "tiny"), "help": "the model's, or an `AutoencoderTiny` with random weights"},
    )
    tile_size: int | str | None = field(
        default="auto", metadata={"words": {"auto": "auto", "none": None}, "minimum": 1, "help": "LR pixels"}
    )
    tile_overlap: int | None = field(
        default=None,
        metadata={"words": {"auto": None}, "minimum": 0, "help": "LR pixels; auto: the default of the pipeline"},
    )
    tile_window: str = field(
        default="auto", metadata={"choices": ("auto", *TILE_WINDOWS), "help": "auto: the default of the pipeline"}
    )
    tile_batch_size: int = field(default=1, metadata={"minimum": 1, "help": "tiles at once"})
    pool: str = field(
        default="yes", metadata={"choices": ("yes", "no"), "help": "all images in one call, or one by one"}
    )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


FIELDS = {item.name: item for item in fields(Settings)}


def parse_setting(name: str, text: str):
    """A value of a field of [`Settings`]; an `argparse` type."""
    rules = FIELDS[name].metadata
    if "choices" in rules:
        if text not in rules["choices"]:
            raise argparse.ArgumentTypeError(f"{name} must be one of {', '.join(rules['choices'])}, got {text!r}")
        return text
    words = rules.get("words", {})
    if text in words:
        return words[text]
    if not text.isdecimal() or int(text) < rules["minimum"]:
        accepted = " or ".join([f"an integer of at least {rules['minimum']}", *words])
        raise argparse.ArgumentTypeError(f"{name} must be {accepted}, got {text!r}")
    return int(text)


def parse_variant(text: str) -> tuple[str, dict]:
    """Name and changed settings of `NAME:key=value,key=value`; an `argparse` type."""
    name, colon, changes = text.partition(":")
    pairs = [pair.partition("=") for pair in changes.split(",")]
    if not name or not colon or not all(key and equals and value for key, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"must be NAME:key=value,key=value, got {text!r}")
    values = {}
    for key, _, value in pairs:
        key = key.replace("-", "_")
        if key not in FIELDS or key in values:
            raise argparse.ArgumentTypeError(f"must name each of {', '.join(FIELDS)} at most once, got {text!r}")
        values[key] = parse_setting(key, value)
    return name, values


@dataclass(frozen=True)
class Variant:
    """Settings with a name."""

    name: str
    settings: Settings


def make_variants(options: dict[str, list], combinations: list[tuple[str, dict]], published: bool) -> list[Variant]:
    r"""
    The first values of all options together, each further value instead of the first one, and the combinations.

    Args:
        options (`dict[str, list]`): Values by field of [`Settings`].
        combinations (`list[tuple[str, dict]]`): Names and changed settings of further variants.
        published (`bool`): Whether the published procedure goes first, with the base's dtype and tile size.

    Raises:
        ValueError: If a name occurs twice.
    """
    base = Settings(**{name: values[0] for name, values in options.items()})
    variants = [Variant("base", base)]
    for name, values in options.items():
        variants += [Variant(f"{name}={value}", replace(base, **{name: value})) for value in values[1:]]
    variants += [Variant(name, replace(base, **changes)) for name, changes in combinations]
    if published:
        published_settings = {"layout": "nchw", "tile_window": "gaussian", "pool": "no"}
        reference = Settings(dtype=base.dtype, tile_size=base.tile_size, **published_settings)
        variants.insert(0, Variant("published", reference))
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the variant {name!r} occurs {names.count(name)} times")
    return variants


def fix_tile_size(variant: Variant, tile_size: int) -> Variant:
    """The variant with `tile_size` instead of "auto", which fits tiles to the image unless they are compiled."""
    if variant.settings.tile_size != "auto":
        return variant
    return replace(variant, settings=replace(variant.settings, tile_size=tile_size))


def parts_of(pipe: InvSRPipeline) -> dict[str, nn.Module]:
    """The networks that are measured one by one."""
    parts = {
        "text encoder": pipe.text_encoder,
        "noise predictor": pipe.noise_predictor,
        "VAE encoder": pipe.vae.encoder,
        "UNet": pipe.unet,
        "VAE decoder": pipe.vae.decoder,
    }
    return {name: part for name, part in parts.items() if part is not None}


def copy_sharing_weights(
    source: InvSRPipeline | nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], converted: dict
) -> InvSRPipeline | nn.Module:
    r"""
    A copy whose modules can be hooked and compiled separately, but which shares its weights with other copies.

    Args:
        source ([`InvSRPipeline`] or `nn.Module`): What is copied.
        convert (`Callable`): Makes the copy's weight from one of the source.
        converted (`dict`): The weights of earlier copies by the ids of the source's weights, to be reused.
    """
    modules = source.components.values() if isinstance(source, InvSRPipeline) else [source]
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()) if isinstance(module, nn.Module) else ():
            if id(tensor) not in converted:
                value = convert(tensor.detach())
                parameter = isinstance(tensor, nn.Parameter)
                converted[id(tensor)] = nn.Parameter(value, requires_grad=False) if parameter else value
    return copy.deepcopy(source, dict(converted))


def make_tiny_vae(pipe: InvSRPipeline) -> AutoencoderTiny:
    """A random `AutoencoderTiny` with the latent channels and the reduction of the pipeline's VAE."""
    levels = len(pipe.vae.config.block_out_channels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderTiny(
            latent_channels=pipe.vae.config.latent_channels,
            encoder_block_out_channels=(64,) * levels,
            decoder_block_out_channels=(64,) * levels,
            num_encoder_blocks=(1, *(3,) * (levels - 1)),
            num_decoder_blocks=(*(3,) * (levels - 1), 1),
        ).eval()


@dataclass
class Calls:
    """The calls of a component: arguments and batch size of the first one, the items of all, and their number."""

    args: tuple
    kwargs: dict
    batch: int
    items: int = 0
    count: int = 0

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the arguments; `None` if they are integers."""
        tensors = (item for item in tree_iter((self.args, self.kwargs)) if isinstance(item, torch.Tensor))
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


@contextmanager
def record_calls(pipe: InvSRPipeline) -> Iterator[dict[str, Calls]]:
    """Records the calls of all components by name."""
    calls, handles = {}, []
    for name, part in parts_of(pipe).items():

        def record(_, args, kwargs, name=name):
            batch = next(item for item in tree_iter((args, kwargs)) if isinstance(item, torch.Tensor)).shape[0]
            entry = calls.setdefault(name, Calls(args, kwargs, batch))
            entry.items += batch
            entry.count += 1

        handles.append(part.register_forward_pre_hook(record, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def as_called(part: nn.Module, calls: Calls) -> Iterator[None]:
    """Converts a component to the dtype of its recorded call: a VAE in float16 may have run in float32."""
    before = next(part.parameters()).dtype
    part.to(calls.dtype or before)
    try:
        yield
    finally:
        part.to(before)


@torch.no_grad()
def count_flops(part: nn.Module, calls: Calls) -> int:
    """Floating-point operations of the recorded call, counted from shapes alone (on the device "meta")."""

    def to_meta(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta", torch.float32 if tensor.is_floating_point() else None)

    part = copy_sharing_weights(part, to_meta, {})
    args, kwargs = tree_map_only(torch.Tensor, to_meta, (calls.args, calls.kwargs))
    with FlopCounterMode(display=False) as counter:
        part(*args, **kwargs)
    return counter.get_total_flops()


class Runner:
    r"""
    A variant that is ready to run.

    Args:
        variant ([`Variant`]): The variant.
        source ([`InvSRPipeline`]): The model, eager and in float32.
        weights (`dict`): The weights that all runners of one dtype share, by dtype.
        device (`torch.device`): Where it runs.
    """

    def __init__(self, variant: Variant, source: InvSRPipeline, weights: dict, device: torch.device):
        self.variant, self.settings = variant, variant.settings
        dtype = self.settings.torch_dtype

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        self.pipe = copy_sharing_weights(source, convert, weights.setdefault(dtype, {}))
        if self.settings.vae == "tiny":
            self.pipe.register_modules(vae=make_tiny_vae(source).to(device, dtype))
        self.pipe.set_progress_bar_config(disable=True)
        if self.settings.layout == "nchw":
            for name, part in parts_of(self.pipe).items():
                if name != "text encoder":
                    part.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))

    @property
    def weight_bytes(self) -> int:
        networks = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())

    def compile(self):
        """Compile what the settings say. The next run includes the compiler's time."""
        # Beyond the limit a module would silently run eagerly.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        if self.settings.compile == "full":
            self.pipe.compile()
        elif self.settings.compile == "graphs":
            self.pipe.compile(mode="reduce-overhead")
        elif self.settings.compile == "regional":
            self.pipe.unet.compile_repeated_blocks()

    def run(self, images: list[Image.Image], num_steps: int) -> list[Image.Image]:
        """The results, with the same noise each time and in all variants."""
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(images))]
        settings, pipe = self.settings, self.pipe
        options = {
            "num_steps": num_steps,
            "tile_size": settings.tile_size,
            "tile_overlap": settings.tile_overlap,
            "tile_window": None if settings.tile_window == "auto" else settings.tile_window,
            "tile_batch_size": settings.tile_batch_size,
        }
        if settings.pool == "yes":
            return pipe(images, generator=generators, **options).images
        return [pipe(image, generator=each, **options).images[0] for image, each in zip(images, generators)]
