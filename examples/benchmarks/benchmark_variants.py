"""What `benchmark.py` compares: settings of a variant, its pipeline, and the published procedure as a loop."""

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
from diffusers_invsr.resampling import enlarge


@dataclass(frozen=True)
class Settings:
    """One way to run a pipeline. Each field is an option of the script and a key of `--variant`."""

    dtype: str = field(default="float32", metadata={"choices": ("float32", "bfloat16", "float16")})
    compile: str = field(
        default="no",
        metadata={
            "choices": ("no", "full", "graphs", "plain", "regional"),
            "help": "`pipe.compile()`, with `mode='reduce-overhead'` (CUDA graphs), the same without keeping"
            " PyTorch's GroupNorm on a CPU, or only the UNet's repeated blocks"
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
    text: str = field(
        default="cached",
        metadata={"choices": ("cached", "call"), "help": "prompt embedded once, or again in each call"},
    )
    tile_size: int | str | None = field(
        default="auto", metadata={"words": {"auto": "auto", "none": None}, "minimum": 1, "help": "LR pixels"}
    )
    tile_overlap: int | None = field(
        default=None,
        metadata={"words": {"auto": None}, "minimum": 0, "help": "LR pixels; auto: the default of the pipeline"},
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
            raise argparse.ArgumentTypeError(f"{name}={text!r} has to be one of {', '.join(rules['choices'])}")
        return text
    words = rules.get("words", {})
    if text in words:
        return words[text]
    if not text.isdecimal() or int(text) < rules["minimum"]:
        accepted = " or ".join([f"an integer from {rules['minimum']}", *words])
        raise argparse.ArgumentTypeError(f"{name}={text!r} has to be {accepted}")
    return int(text)


def parse_variant(text: str) -> tuple[str, dict]:
    """Name and changed settings of `NAME:key=value,key=value`; an `argparse` type."""
    name, colon, changes = text.partition(":")
    pairs = [pair.partition("=") for pair in changes.split(",")]
    if not name or not colon or not all(key and equals and value for key, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} has to be NAME:key=value,key=value")
    values = {}
    for key, _, value in pairs:
        key = key.replace("-", "_")
        if key not in FIELDS or key in values:
            raise argparse.ArgumentTypeError(f"{text!r} has to name each of {', '.join(FIELDS)} at most once")
        values[key] = parse_setting(key, value)
    return name, values


@dataclass(frozen=True)
class Variant:
    """Settings with a name, or the published procedure."""

    name: str
    settings: Settings
    published: bool = False


def make_variants(options: dict[str, list], combinations: list[tuple[str, dict]], published: bool) -> list[Variant]:
    r"""
    The first values of all options together, each further value instead of the first one, and the combinations.

    Args:
        options (`dict[str, list]`): Values by field of [`Settings`].
        combinations (`list[tuple[str, dict]]`): Names and changed settings of further variants.
        published (`bool`): Whether the published procedure goes first, with the first number type and tile size.

    Raises:
        ValueError: If a name occurs twice.
    """
    base = Settings(**{name: values[0] for name, values in options.items()})
    variants = [Variant("base", base)]
    for name, values in options.items():
        variants += [Variant(f"{name}={value}", replace(base, **{name: value})) for value in values[1:]]
    variants += [Variant(name, replace(base, **changes)) for name, changes in combinations]
    if published:
        reference = Settings(dtype=base.dtype, layout="nchw", text="call", tile_size=base.tile_size, pool="no")
        variants.insert(0, Variant("published", reference, published=True))
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the variant {name!r} occurs {names.count(name)} times")
    return variants


def fix_tile_size(variant: Variant, tile_size: int) -> Variant:
    """The variant with `tile_size` in place of an automatic one, which fits tiles to the image unless compiled."""
    if variant.settings.tile_size != "auto":
        return variant
    return replace(variant, settings=replace(variant.settings, tile_size=tile_size))


@torch.no_grad()
def enlarge_as_published(
    pipe: InvSRPipeline, images: list[Image.Image], generators: list[torch.Generator], num_steps: int, tile_size
) -> list[Image.Image]:
    """The published procedure: tiles that overlap by a half, one by one, the text encoded for each of them."""
    tile_size = pipe.config.tile_size if tile_size == "auto" else tile_size
    pipe.scheduler.set_timesteps(num_steps)
    start, *_ = timesteps = pipe.scheduler.timesteps.tolist()
    text = pipe.config.prompt if pipe.takes_text and pipe.text_encoder is not None else None
    results = []
    for image, generator in zip(images, generators):
        inputs = pipe.image_processor.preprocess(image)
        grid = pipe.cut_into_tiles(inputs, None, None, tile_size, tile_size // 2 if tile_size else None)
        blender = pipe.prepare_blender(grid, "pil")
        for corner in grid:
            prompt_embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, device=pipe.device)
            lr = grid.cut(*corner)[0].to(pipe.device)
            enlarged = enlarge(lr, pipe.config.scale)
            noise = pipe.prepare_noise(1, *lr.shape[-2:], 2, generator, pipe.device)
            latents = pipe.prepare_latents(lr, enlarged, torch.tensor([start], device=pipe.device), noise)
            for timestep in timesteps:
                model_input = latents.to(pipe.unet.dtype)
                noise_pred = pipe.unet(model_input, timestep, encoder_hidden_states=prompt_embeds).sample.float()
                latents = pipe.scheduler.step(noise_pred, timestep, latents).prev_sample
            blender.add(pipe.decode_image(latents), *corner)
        if not blender.sum.isfinite().all():
            raise FloatingPointError(f"the published procedure's result is not finite in {pipe.vae.dtype}")
        results.append(pipe.image_processor.postprocess(blender.sum[0].clamp_(0, 1), inputs[0], "pil"))
    return results


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
    A copy with modules of its own, which can be hooked and compiled, but weights that copies have in common.

    Args:
        source ([`InvSRPipeline`] or `nn.Module`): What is copied.
        convert (`Callable`): Gives the copy's weight for one of the source.
        converted (`dict`): The weights of earlier copies by the sources' ids, which are taken again.
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
    """A random `AutoencoderTiny` of the latent channels and the reduction of the pipeline's VAE."""
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
    """The calls of a component: arguments of the first one, its batch, the images of all and how many they are."""

    args: tuple
    kwargs: dict
    batch: int
    items: int = 0
    count: int = 0


@contextmanager
def record_calls(pipe: InvSRPipeline) -> Iterator[dict[str, Calls]]:
    """Records the calls of all components, by name."""
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


@torch.no_grad()
def count_flops(part: nn.Module, calls: Calls) -> int:
    """Floating-point operations of the recorded call, counted from shapes alone (on the device "meta")."""
    part = copy_sharing_weights(part, lambda tensor: tensor.to("meta"), {})
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (calls.args, calls.kwargs))
    with FlopCounterMode(display=False) as counter:
        part(*args, **kwargs)
    return counter.get_total_flops()


class Runner:
    r"""
    A variant that is ready to run.

    Args:
        variant ([`Variant`]): The variant.
        source ([`InvSRPipeline`]): The model, eager and in float32.
        weights (`dict`): Weights by number type, which all runners of a number type share.
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
        """Compile what the settings say; the first run after it takes the time of the compiler."""
        # Beyond the limit a module would run eagerly in silence, as a compiled one by its name.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        if self.settings.compile == "full":
            self.pipe.compile()
        elif self.settings.compile == "graphs":
            self.pipe.compile(mode="reduce-overhead")
        elif self.settings.compile == "plain":
            self.pipe.compile(options={"pre_grad_custom_pass": None})
        elif self.settings.compile == "regional":
            self.pipe.unet.compile_repeated_blocks()

    def run(self, images: list[Image.Image], num_steps: int) -> list[Image.Image]:
        """The results; the same noise each time and in all variants."""
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(images))]
        settings, pipe = self.settings, self.pipe
        if self.variant.published:
            with pipe.upcast():
                return enlarge_as_published(pipe, images, generators, num_steps, settings.tile_size)
        options = {
            "num_steps": num_steps,
            "tile_size": settings.tile_size,
            "tile_overlap": settings.tile_overlap,
            "tile_batch_size": settings.tile_batch_size,
            "prompt": pipe.config.prompt if settings.text == "call" else None,
        }
        if settings.pool == "yes":
            return pipe(images, generator=generators, **options).images
        return [pipe(image, generator=seed, **options).images[0] for image, seed in zip(images, generators)]
