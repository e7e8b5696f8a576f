#!/usr/bin/env python
"""
Train InvSR's noise predictor (section 3 of https://arxiv.org/abs/2412.09013), on one CPU process or many GPUs.

    python examples/training/train_invsr.py examples/training/configs/tiny.yaml --train_data photos/
    accelerate launch examples/training/train_invsr.py examples/training/configs/sd_turbo.yaml \
        --train_data 'LSDIR' 'FFHQ[:20000]'

A YAML file with settings may come first; options on the command line win over it. `--help` lists all of them, the
settings of the degradation included. A run that was interrupted goes on with `--resume latest`. `accelerate launch`
chooses DDP, FSDP or DeepSpeed (`--use_deepspeed --zero_stage 2`, with `pip install ".[deepspeed]"`).

To fine-tune the published predictor on your own photographs (the discriminator starts anew and warms up first):

    accelerate launch examples/training/train_invsr.py examples/training/configs/sd_turbo.yaml \
        --noise_predictor OAOA/InvSR --train_data my-photos --max_iterations 5000 --dis_init_iterations 1000 \
        --output_dir my-invsr

The output folder gets `pipeline/` (what `InvSRPipeline.from_pretrained` loads), `log.jsonl`, `validation/` (pictures),
the tracker's logs and the latest checkpoints. Needs `pip install ".[training]"`.
"""

import dataclasses
import json
import logging
import math
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from uuid import uuid4

import diffusers
import numpy as np
import torch
import transformers
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    convert_outputs_to_fp32,
    gather_object,
    parse_flag_from_env,
)
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.optimization import get_constant_schedule_with_warmup
from diffusers.training_utils import EMAModel
from huggingface_hub import auth_check, create_repo
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.utils.versions import require_version

import diffusers_invsr
from diffusers_invsr import TINY, InvSRNoisePredictor, InvSRPipeline, convert, load_noise_predictor
from diffusers_invsr.files import module_fingerprint
from diffusers_invsr.hub import card_metadata
from diffusers_invsr.resampling import enlarge
from diffusers_invsr.scheduling_invsr import START_TIMESTEPS
from diffusers_invsr.training import (
    DISCRIMINATOR_RANGE,
    Checkpoints,
    Degradation,
    DegradationSettings,
    InvSRDiscriminator,
    LatentCache,
    PairPool,
    RunLog,
    SkipReport,
    StepwiseMeter,
    ValidationSet,
    draw_latents,
    encode_posterior,
    hinge_discriminator,
    hinge_generator,
    latent_l2,
    list_files,
    load_latent_lpips,
    make_dataset,
    make_loader,
    one_step_estimate,
    read_log,
    vae_fingerprint,
)


VALIDATION_TIMEOUT = timedelta(hours=2)  # for which the other processes wait while one validates
FIXED_RUN_SETTINGS = ("seed", "batch_size", "gradient_accumulation_steps", "start_timesteps")  # to resume a run
FIXED_DATA_SETTINGS = ("train_data", "crop_size", "crops_per_image", "pool_batches", "num_workers")

logger = get_logger(__name__)
diffusers.utils.logging.set_verbosity_error()  # it warns of every component that is not its own, in full
transformers.utils.logging.set_verbosity_warning()


def setting(text: str, default=None):
    """A field of the settings below, with the text that `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelSettings:
    base_model: str = setting(
        "Folder or Hub id of the frozen diffusion model; `tiny` is the model in the package.", "stabilityai/sd-turbo"
    )
    variant: str | None = setting("Variant of the base model's files, such as `fp16`.")
    noise_predictor: str | None = setting("Predictor to go on from: a folder, file or Hub id. None: from nothing.")
    noise_predictor_config: dict | str | None = setting("Configuration of a new predictor. None: the published one.")
    discriminator: str | None = setting("Folder of a discriminator to go on from. None: from nothing.")
    discriminator_config: dict | str | None = setting("Configuration of a new one. None: the published one.")
    latent_lpips: str | None = setting("Folder or file of the latent LPIPS; needed unless `lpips_weight` is 0.")


@dataclass
class DataSettings:
    train_data: list[str] = setting("HR images: folders, `folder[:N]`, lists, `webdataset:...`, `datasets:...`.", [])
    validation_data: str | None = setting("HR images for validation: a folder, `folder[:N]` or a list. None: none.")
    crop_size: int = setting("Side of the HR crops in pixels.", 512)
    crops_per_image: int | None = setting("Crops that an image has, the same in every epoch. None: new ones always.")
    latent_cache: str | None = setting("Folder that keeps the HR crops' latents; needs `crops_per_image`.")
    pool_batches: int = setting("Size of the pool that mixes degradations, in batches; 0 for none.", 10)
    num_workers: int = setting("Processes that read images, for each process that trains.", 4)


@dataclass
class RunSettings:
    output_dir: str = setting("Folder of everything that the run writes.", "invsr-training")
    resume: str | None = setting("`latest`, or a checkpoint's folder. Later ones in the output folder are removed.")
    seed: int = setting("Seed of every random choice.", 0)
    max_iterations: int = setting("Iterations (updates of the weights).", 100_000)
    batch_size: int = setting("Images a process takes at once.", 16)
    gradient_accumulation_steps: int = setting("Batches an update is made of.", 1)
    learning_rate: float = setting("Learning rate of both networks.", 5e-5)
    warmup_iterations: int = setting("Iterations in which the predictor's learning rate rises.", 2_000)
    start_timesteps: list[int] = setting("Starting steps to draw from, counted from 1.", list(START_TIMESTEPS))
    lpips_weight: float = setting("Weight of the latent LPIPS.", 2.0)
    adversarial_weight: float = setting("Weight of the adversarial loss; 0: no discriminator.", 0.1)
    dis_init_iterations: int = setting("Iterations before the adversarial loss joins.", 10_000)
    discriminator_weight_decay: float = setting("Weight decay of the discriminator's Adam.", 1e-3)
    ema_decay: float = setting("Bound of the moving average's decay, min(bound, (1 + i) / (10 + i)).", 0.999)
    max_grad_norm: float | None = setting("Bound of the gradients' norm. None: no bound.")
    max_skipped_steps: int = setting("Iterations in a row whose gradients are not finite before the run stops.", 10)
    mixed_precision: str | None = setting("`no`, `bf16` or `fp16`. None: what `accelerate config` says.")
    gradient_checkpointing: bool = setting("Compute activations twice rather than keep them.", False)
    channels_last: bool = setting("Keep images with their channels last; faster on GPUs.", False)
    compile: bool = setting("Compile the networks.", False)
    use_8bit_adam: bool = setting("Keep Adam's state in 8 bits (needs bitsandbytes).", False)
    log_every: int = setting("Iterations between lines of the log.", 10)
    validate_every: int = setting("Iterations between validations.", 5_000)
    checkpoint_every: int = setting("Iterations between checkpoints.", 1_000)
    keep_checkpoints: int = setting("How many checkpoints stay.", 3)
    report_to: str = setting("Tracker: `tensorboard`, `wandb`, ... or `none`.", "tensorboard")
    push_to_hub: bool = setting("Publish the finished pipeline.", False)
    license: str | None = setting("Licence of the trained weights that the model card names, such as `cc0-1.0`.")
    hub_model_id: str | None = setting("Hub repository, `owner/name`. None: the output folder's name.")


CLASSES = (ModelSettings, DataSettings, RunSettings, DegradationSettings)


def parse_settings(parser: HfArgumentParser, argv: list[str], ignored: tuple[type, ...] = ()) -> tuple:
    """
    Settings of the command line over those of a YAML file, which may come first, over the defaults, by the parser's
    data classes. The file may also have settings of the classes `ignored`.
    """
    if argv and not argv[0].startswith("-"):
        if not Path(argv[0]).is_file():
            parser.error(f"{argv[0]} is not a file with settings.")
        try:
            values = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            parser.error(f"{argv[0]} cannot be read as a YAML file of settings: {error}.")
        if not isinstance(values, dict):
            parser.error(f"{argv[0]} has to hold settings, `name: value`, but does not.")
        types = {f.name: f.type for cls in parser.dataclass_types for f in dataclasses.fields(cls)}
        unknown = set(values) - set(types)
        values = {name: value for name, value in values.items() if name in types}
        unknown -= {f.name for cls in ignored for f in dataclasses.fields(cls)}
        if unknown:
            parser.error(f"{argv[0]} has settings that do not exist: {', '.join(sorted(unknown))}.")
        # A list of one may be written without its brackets
        lists = [name for name in values if str(types[name]).startswith("list") and not isinstance(values[name], list)]
        values |= {name: [values[name]] for name in lists}
        optional = [name for name in values if parser.get_default(name) is None]
        values = {name: None if value == "None" and name in optional else value for name, value in values.items()}
        parser.set_defaults(**{name: as_argument(value, types[name]) for name, value in values.items()})
        argv = argv[1:]
    *settings, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"there is no such setting: {' '.join(unknown)}.")
    return tuple(settings)


def as_argument(value, kind: type):
    """A value of a YAML file as a text, which argparse turns into what the setting is; no change to lists and such."""
    if isinstance(value, bool) and kind is not bool:  # what YAML takes `no` for
        return "yes" if value else "no"
    return str(value) if isinstance(value, (bool, int, float)) else value


def require_positive(parser: HfArgumentParser, settings, *names: str):
    for name in names:
        if getattr(settings, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(settings, name)}.")


def require_bound(parser: HfArgumentParser, max_grad_norm: float | None):
    if max_grad_norm is not None and not max_grad_norm > 0:  # nothing would learn
        parser.error(f"--max_grad_norm has to be above 0, but is {max_grad_norm}.")


def parse_args(argv: list[str]) -> tuple[ModelSettings, DataSettings, RunSettings, DegradationSettings]:
    """The settings, checked."""
    usage = "%(prog)s [SETTINGS.yaml] [--setting value ...]"
    parser = HfArgumentParser(CLASSES, usage=usage, description=__doc__.strip().splitlines()[0])
    model, data, run, degradation = parse_settings(parser, argv)
    for name in ("noise_predictor_config", "discriminator_config"):
        if isinstance(getattr(model, name), str):
            try:
                setattr(model, name, json.loads(getattr(model, name)))
            except ValueError:
                parser.error(f"--{name} has to be JSON, but is {getattr(model, name)!r}.")

    if not data.train_data:
        parser.error("--train_data has to name at least one source of images.")
    require_positive(parser, run, "max_iterations", "batch_size", "gradient_accumulation_steps", "max_skipped_steps")
    require_positive(parser, run, "log_every", "validate_every", "checkpoint_every", "keep_checkpoints")
    require_bound(parser, run.max_grad_norm)
    starts = run.start_timesteps
    if not starts or not all(isinstance(start, int) and 1 <= start <= 1000 for start in starts):
        parser.error(f"--start_timesteps have to be integers in 1 ... 1000, but are {starts}.")
    if len(set(starts)) < len(starts):
        parser.error(f"--start_timesteps has to name different steps, but is {starts}.")
    if run.lpips_weight and not model.latent_lpips:
        parser.error("--latent_lpips is needed, or `--lpips_weight 0`: see examples/training/train_latent_lpips.py.")
    if data.latent_cache and data.crops_per_image is None:
        parser.error("--latent_cache needs --crops_per_image: crops that never come again cannot be kept.")
    return model, data, run, degradation


class StopRequest:
    """Ctrl-C and SIGTERM ask the loop to stop at the end of its iteration; a second Ctrl-C stops at once."""

    def __init__(self):
        self.received = False
        self.previous = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(self, number: int, frame: FrameType | None):
        self.received = True
        self.restore()

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def batch_generator(seed: int, number: int) -> torch.Generator:
    """The source of all randomness of the run's micro-batch `number`: nothing has to be remembered to resume."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]))


def noise_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A source for noise, of which there is much, on the device itself; on a CPU `generator`."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(torch.randint(2**62, (), generator=generator).item())


def degrade(degradation: Degradation, hr: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """LR images, with settings that `generator` draws and noise from the images' device."""
    draw = degradation.draw(len(hr), generator)
    return degradation.apply(hr, draw, noise_generator(generator, hr.device))


def draw_starts(
    pipe: InvSRPipeline,
    lr: torch.Tensor,
    posterior: torch.Tensor,
    start_timesteps: list[int],
    generator: torch.Generator,
) -> tuple[torch.Tensor, ...]:
    """
    Starting steps of a batch as schedule indices, the predictor's ξ₁, and the latents of the LR and the HR images.
    """
    # ξ₁ for the predictor, ξ₂ and ξ₃ for the posteriors of the LR and the HR image
    shape = (3, len(lr), pipe.vae.config.latent_channels, *posterior.shape[-2:])
    source = noise_generator(generator, lr.device)
    noise = torch.randn(shape, generator=source, device=source.device)
    starts = torch.randint(len(start_timesteps), (len(lr),), generator=generator)
    timesteps = (torch.tensor(start_timesteps)[starts] - 1).to(lr.device)
    lr_latents = pipe.encode_image(enlarge(lr, pipe.config.scale), noise[1])
    return timesteps, noise[0], lr_latents, draw_latents(pipe.vae, posterior, noise[2])


def adam(parameters, run: RunSettings, weight_decay: float, decoupled: bool) -> torch.optim.Optimizer:
    """AdamW (decoupled weight decay) or Adam, in 8 bits if asked for."""
    name = "AdamW" if decoupled else "Adam"
    if run.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise SystemExit("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`.") from error
        return getattr(bitsandbytes.optim, f"{name}8bit")(parameters, lr=run.learning_rate, weight_decay=weight_decay)
    return getattr(torch.optim, name)(parameters, lr=run.learning_rate, weight_decay=weight_decay)


def configure_deepspeed(config: dict, run: RunSettings):
    """
    Put this script's settings into DeepSpeed's configuration, in place.

    Raises:
        ValueError: If the configuration asks for what would not train the same as without DeepSpeed.
    """
    stage = config["zero_optimization"].get("stage", 0)
    if stage not in (1, 2):
        raise ValueError(
            f"DeepSpeed's ZeRO stage is {stage}, and has to be 1 or 2: stage 0 is DDP, stage 3 is for larger networks."
        )
    if config["fp16"]["enabled"]:
        raise ValueError("`mixed_precision='fp16'` is not possible with DeepSpeed: use `bf16`, DDP or FSDP.")
    config |= {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": run.batch_size,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "gradient_clipping": run.max_grad_norm or 0.0,
        "bf16": {"enabled": False},  # autocast as elsewhere; the weights, and so their average, stay in float32
        "zero_force_ds_cpu_optimizer": False,  # the learning rate's schedule holds on to the optimizer of PyTorch
    }


def descend(accelerator: Accelerator, model, optimizer, max_grad_norm: float | None) -> float:
    """One update, skipped if a gradient is not finite. Returns the gradients' norm, the same in all processes."""
    norm = accelerator.clip_grad_norm_(model.parameters(), math.inf if max_grad_norm is None else max_grad_norm)
    norm = float(norm)
    # The gradient scaler of float16 skips by itself, and has to see the step to lower its scale. With DeepSpeed,
    # `backward` has done all of this already, skipping included: only the norm is still to be had.
    if math.isfinite(norm) or accelerator.scaler is not None:
        optimizer.step()
    optimizer.zero_grad()
    return norm


def whole_parameters(model) -> list[torch.nn.Parameter]:
    """The weights of a model, put together where FSDP has spread them over the processes."""
    parameters = list(model.parameters())
    return [torch.nn.Parameter(p.full_tensor()) if hasattr(p, "full_tensor") else p for p in parameters]


def describe(parts: tuple, log: list[dict]) -> str:
    """What the model card says of a run with these (data classes of) settings: how it was made and what came out."""
    settings = {}
    for part in parts:
        defaults = type(part)
        for f in dataclasses.fields(defaults):
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            if getattr(part, f.name) != default or f.name in ("max_iterations", "batch_size", "learning_rate", "seed"):
                settings[f.name] = getattr(part, f.name)
    for name in ("output_dir", "resume", "hub_model_id", "push_to_hub", "report_to"):
        settings.pop(name, None)
    lines = ["| setting | value |", "| --- | --- |", *(f"| {key} | `{value}` |" for key, value in settings.items())]
    validations = [record for record in log if any(key.startswith("psnr_y/") for key in record)]
    if validations:
        first, last = validations[0], validations[-1]
        # LPIPS is missing where a part of the run had no network; a value that was not finite is None
        names = [key for key in first if key != "iteration" and None not in (first[key], last.get(key))]
        lines += ["", f"| iteration | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
        for record in (first, last):
            lines.append(f"| {record['iteration']} | {' | '.join(f'{record[name]:.4f}' for name in names)} |")
    return "\n".join(lines)


def plain_config(network) -> dict:
    """What a network's configuration says of its shape, as JSON gives it back."""
    config = {key: value for key, value in network.config.items() if key[0] != "_" and key != "model_card"}
    return json.loads(json.dumps(config))


def train(model: ModelSettings, data: DataSettings, run: RunSettings, degradation_settings: DegradationSettings):
    # 1. Accelerator
    output = Path(run.output_dir)
    # A plugin rather than a number: `accelerate launch --use_deepspeed` would put its own in the place of that
    accumulation = GradientAccumulationPlugin(num_steps=run.gradient_accumulation_steps)
    group = InitProcessGroupKwargs(timeout=VALIDATION_TIMEOUT)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not torch.accelerator.is_available():
        group.backend = "gloo"  # accelerate chooses none for DeepSpeed on CPUs
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), group]
    accelerator = Accelerator(
        gradient_accumulation_plugin=accumulation,
        mixed_precision=run.mixed_precision,
        log_with=None if run.report_to == "none" else run.report_to,
        project_config=ProjectConfiguration(project_dir=run.output_dir, logging_dir=str(output / "logs")),
        kwargs_handlers=handlers,
    )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 hides the weights that the moving average needs: launch with `--fsdp_version 2`.")
    if accelerator.scaler is not None and run.gradient_accumulation_steps > 1 and run.adversarial_weight:
        raise ValueError(
            "`mixed_precision='fp16'` with `gradient_accumulation_steps` above 1 would scale the discriminator's"
            " gradients wrongly, because accelerate unscales those of all networks at once: use 'bf16'."
        )
    precision, dis_accelerator = accelerator.mixed_precision, accelerator
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None:
        require_version("deepspeed>=0.19.8", "Before, an update that was not finite was made all the same.")
        configure_deepspeed(deepspeed.deepspeed_config, run)
        dis_accelerator = Accelerator(gradient_accumulation_plugin=accumulation)  # one for each network
    checkpoints = Checkpoints(output, accelerator, run.keep_checkpoints)
    elsewhere = run.resume not in (None, "latest") and Path(run.resume).resolve().parent != output.resolve()
    if (run.resume is None or elsewhere) and checkpoints.list():
        raise ValueError(
            f"`output_dir={run.output_dir!r}` holds checkpoints of another run: continue it with `--resume latest`,"
            " or choose another folder."
        )
    repository = run.hub_model_id or output.name
    if run.push_to_hub and accelerator.is_main_process:
        try:  # now, rather than after all iterations
            auth_check(create_repo(repository, exist_ok=True).repo_id, write=True)
        except Exception as error:  # of many kinds: no token, no connection, no such owner, ...
            raise ValueError(
                f"`push_to_hub` needs the repository {repository!r} on the Hub, which cannot be written"
                f" ({(str(error).strip() or type(error).__name__).splitlines()[0]}): log in with `hf auth login`, or"
                " name another with `hub_model_id`."
            ) from error
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.seed)

    # 2. Frozen models, in half precision where the training is
    frozen_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    if model.noise_predictor is None:
        noise_predictor = InvSRNoisePredictor(**(model.noise_predictor_config or {}))
    else:
        noise_predictor = load_noise_predictor(model.noise_predictor)
    noise_predictor.train()
    ema_predictor = InvSRNoisePredictor.from_config(noise_predictor.config).eval().requires_grad_(False)
    ema_predictor.load_state_dict(noise_predictor.state_dict())
    base = TINY if model.base_model == "tiny" else model.base_model
    pipe = convert(ema_predictor, base=base, variant=model.variant)
    # Of the weights in float32, whatever they are cast to: a resumed run may have another precision
    base_fingerprint = " and ".join(module_fingerprint(part, with_config=False)[:12] for part in (pipe.unet, pipe.vae))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        if part is not None:
            part.eval().requires_grad_(False).to(frozen_dtype)
    if pipe.takes_text and pipe.text_encoder is not None:
        pipe.drop_text_encoder()  # the prompt is embedded once and for all
    if frozen_dtype == torch.float16 and pipe.vae.config.get("force_upcast", False):
        pipe.vae.float()  # it overflows in float16
    pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    prompt_embeds, _ = pipe.encode_prompt(do_classifier_free_guidance=False)
    latent_lpips = None
    if run.lpips_weight:
        latent_lpips = load_latent_lpips(model.latent_lpips).to(accelerator.device, frozen_dtype)

    # 3. Trained models
    discriminator = None
    if run.adversarial_weight and model.discriminator is None:
        discriminator = InvSRDiscriminator(**(model.discriminator_config or {}))
    elif run.adversarial_weight:
        if not Path(model.discriminator).is_dir():
            raise ValueError(f"`discriminator={model.discriminator!r}` has to be a folder, but there is none.")
        discriminator = InvSRDiscriminator.from_pretrained(model.discriminator)
    discriminator_config = None if discriminator is None else plain_config(discriminator)
    networks = [noise_predictor] if discriminator is None else [noise_predictor, discriminator.train()]
    if run.gradient_checkpointing:
        for network in (pipe.unet, *networks):
            network.enable_gradient_checkpointing()
    if run.channels_last:
        # DeepSpeed arranges the weights that it trains by itself
        for network in (pipe.unet, pipe.vae, *(networks if deepspeed is None else ())):
            network.to(memory_format=torch.channels_last)
    if run.compile:
        for network in (pipe.unet, pipe.vae.encoder, *networks):
            network.compile()
    if deepspeed is not None and frozen_dtype != torch.float32:
        for network in networks:  # which accelerate does in all other cases
            autocast = torch.autocast(accelerator.device.type, frozen_dtype)
            network.forward = convert_outputs_to_fp32(autocast(network.forward))
    optimizer = adam(noise_predictor.parameters(), run, weight_decay=0.0, decoupled=True)
    lr_scheduler = get_constant_schedule_with_warmup(optimizer, run.warmup_iterations)
    ema = EMAModel(noise_predictor.parameters(), decay=run.ema_decay)
    ema.to(accelerator.device)
    noise_predictor, optimizer = accelerator.prepare(noise_predictor, optimizer)
    networks = [noise_predictor]
    if discriminator is not None:
        dis_optimizer = adam(discriminator.parameters(), run, run.discriminator_weight_decay, decoupled=False)
        discriminator, dis_optimizer = dis_accelerator.prepare(discriminator, dis_optimizer)
        networks.append(discriminator)
    accelerator.register_for_checkpointing(ema, lr_scheduler)

    # 4. Data
    degradation = Degradation(degradation_settings, pipe.config.scale).to(accelerator.device)
    pool, meter, skip_report = PairPool(data.pool_batches), StepwiseMeter(run.start_timesteps), SkipReport()
    cache = LatentCache(data.latent_cache, vae_fingerprint(pipe.vae)) if data.latent_cache else None
    dataset = make_dataset(data.train_data, data.crop_size, seed=run.seed, crops_per_image=data.crops_per_image)
    validation = None
    if data.validation_data is not None and accelerator.is_main_process:
        validation = ValidationSet(list_files(data.validation_data), data.crop_size, pipe.config.scale, run.seed)

    # 5. Where the run stands
    progress = {"iteration": 0, "skipped_steps": 0, "skipped_in_a_row": 0, "tracker_id": uuid4().hex}
    fixed = {  # what a run cannot change half way
        "num_processes": accelerator.num_processes,
        "zero_stage": None if deepspeed is None else deepspeed.zero_stage,
        "fsdp": accelerator.distributed_type == DistributedType.FSDP,
        "discriminator": discriminator is not None,
        "base_model": f"weights {base_fingerprint}",
        "noise_predictor_config": plain_config(ema_predictor),
        "discriminator_config": discriminator_config,
        **{name: getattr(run, name) for name in FIXED_RUN_SETTINGS},
        **{name: getattr(data, name) for name in FIXED_DATA_SETTINGS},
    }
    if not hasattr(dataset, "shuffle_buffer"):
        del fixed["num_workers"]  # only the order of a stream depends on it

    def write_checkpoint(folder: Path):
        accelerator.save_state(str(folder))
        if dis_accelerator is not accelerator:
            dis_accelerator.save_state(str(folder / "discriminator"))
        state = {"pool": pool.state_dict(), "meter": meter.state_dict(), "skip_report": skip_report.state_dict()}
        torch.save(state, folder / f"process_{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            (folder / "run.json").write_text(json.dumps({"progress": progress, "fixed": fixed}, indent=2))

    checkpoint = None if run.resume is None else checkpoints.find(run.resume)
    if checkpoint is not None:
        stored = json.loads((checkpoint / "run.json").read_text())
        for name, value in stored["fixed"].items():
            if isinstance(value, dict) and isinstance(fixed.get(name), dict):
                # A newer release may have added to a configuration
                changed = [key for key in value if fixed[name].get(key) != value[key]]
                if changed:
                    raise ValueError(f"`{name}` contradicts the run to resume in {' and '.join(changed)}.")
            elif fixed.get(name) != value:
                raise ValueError(f"`{name}={fixed.get(name)!r}` contradicts the run to resume, where it is {value!r}.")
        if stored["progress"]["iteration"] > run.max_iterations:
            raise ValueError(
                f"`max_iterations={run.max_iterations}` has to be at least {stored['progress']['iteration']}, the"
                " iterations that the run to resume has behind it."
            )
        if dis_accelerator is not accelerator:
            dis_accelerator.load_state(str(checkpoint / "discriminator"))
        accelerator.load_state(str(checkpoint))
        ema.to(accelerator.device)  # accelerate reads it to the CPU
        # What is asked for now counts, not what the states remember
        ema.decay, lr_scheduler.base_lrs = run.ema_decay, [run.learning_rate]
        rate = run.learning_rate * lr_scheduler.lr_lambdas[0](lr_scheduler.last_epoch)
        optimizer.param_groups[0]["lr"] = rate
        if discriminator is not None:
            dis_optimizer.param_groups[0] |= {"lr": run.learning_rate, "weight_decay": run.discriminator_weight_decay}
        state = torch.load(checkpoint / f"process_{accelerator.process_index}.pt", weights_only=True)
        pool.load_state_dict(state["pool"])
        meter.load_state_dict(state["meter"])
        skip_report.load_state_dict(state["skip_report"])
        progress |= stored["progress"]
        logger.info(f"Resuming at iteration {progress['iteration']} from {checkpoint}.")
    elif run.resume is not None:
        logger.info(f"There is no checkpoint in {output} yet: the run starts anew.")
    loader = make_loader(
        dataset,
        run.batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        start_batch=progress["iteration"] * run.gradient_accumulation_steps,
        num_workers=data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    if run.report_to != "none":
        # A resumed run leaves no second curve beside the first
        wandb = {"id": progress["tracker_id"], "resume": "allow", "dir": output}
        start = {"tensorboard": {"purge_step": progress["iteration"] + 1}, "wandb": wandb}
        accelerator.init_trackers("invsr", init_kwargs=start)
    if accelerator.is_main_process:
        checkpoints.remove_later(progress["iteration"])  # first: what is newest always goes with the log
        run_log = RunLog(output / "log.jsonl", None if checkpoint is None else progress["iteration"])

    def log(values: dict[str, float]):
        accelerator.log(values, step=progress["iteration"])
        if accelerator.is_main_process:
            run_log.append(progress["iteration"], values)

    @torch.no_grad()
    def validate():
        if validation is None:
            return
        ema.copy_to(ema_predictor.parameters())
        metrics, rows = validation.measure(pipe)
        log(metrics)
        logger.info(f"Validation: {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}")
        folder = output / "validation" / f"iteration-{progress['iteration']:07d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for (name, *_), row in zip(validation.pairs, rows):
            row.save(folder / f"{name}.png")
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.log_images({name: np.asarray(row)[None]}, progress["iteration"], dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({name: [row]}, progress["iteration"])

    # 6. Loop
    stop, micro_batch = StopRequest(), 0
    bar = tqdm(total=run.max_iterations, initial=progress["iteration"], disable=not accelerator.is_local_main_process)
    if progress["iteration"] == 0:
        validate()
    batches = iter(loader)
    while progress["iteration"] < run.max_iterations:
        with accelerator.accumulate(*networks):
            # 6.1 A batch: all that is random in it comes from one generator
            batch = next(batches)
            skip_report.add(batch["skipped"])
            number = progress["iteration"] * run.gradient_accumulation_steps + micro_batch
            generator = batch_generator(run.seed, number * accelerator.num_processes + accelerator.process_index)
            with torch.no_grad():
                hr = batch["hr"].to(accelerator.device, non_blocking=True).float() / 255
                posterior = encode_posterior(pipe.vae, hr, cache, batch["keys"])
                lr, posterior = pool.exchange(
                    degrade(degradation, hr, generator), posterior.float(), generator=generator
                )
                timesteps, noise, lr_latents, hr_latents = draw_starts(
                    pipe, lr, posterior, run.start_timesteps, generator
                )

            # 6.2 Noise predictor: the discriminator is frozen and hands on gradients
            estimate = one_step_estimate(
                noise_predictor, pipe.unet, pipe.scheduler, lr, lr_latents, timesteps, noise, prompt_embeds
            )
            losses = {"l2": latent_l2(estimate, hr_latents)}
            loss = losses["l2"]
            if latent_lpips is not None:
                losses["lpips"] = latent_lpips(estimate, hr_latents)
                loss = loss + run.lpips_weight * losses["lpips"]
            bounded = estimate.clamp(-DISCRIMINATOR_RANGE, DISCRIMINATOR_RANGE)
            if discriminator is not None and progress["iteration"] >= run.dis_init_iterations:
                discriminator.requires_grad_(False)
                judge = accelerator.unwrap_model(discriminator)  # outside of what synchronises its gradients
                losses["adversarial"] = hinge_generator(judge(bounded, timesteps, prompt_embeds).logits)
                loss = loss + run.adversarial_weight * losses["adversarial"]
            losses["total"] = loss
            accelerator.backward(loss.mean())
            norms = {}
            if accelerator.sync_gradients:
                norms["grad_norm"] = descend(accelerator, noise_predictor, optimizer, run.max_grad_norm)
                lr_scheduler.step()
                if math.isfinite(norms["grad_norm"]):
                    ema.step(whole_parameters(noise_predictor))

            # 6.3 Discriminator: the estimate is a constant
            if discriminator is not None:
                discriminator.requires_grad_(True)
                logits = discriminator(
                    torch.cat([hr_latents, bounded.detach()]), timesteps.repeat(2), prompt_embeds
                ).logits
                real, fake = zip(*(output.chunk(2) for output in logits))
                losses["discriminator"] = hinge_discriminator(real, fake)
                dis_accelerator.backward(losses["discriminator"].mean())
                if accelerator.sync_gradients:
                    norms["discriminator_grad_norm"] = descend(
                        dis_accelerator, discriminator, dis_optimizer, run.max_grad_norm
                    )
            for name, values in losses.items():
                meter.add(name, values, timesteps)
        micro_batch += 1
        if not accelerator.sync_gradients:
            continue

        # 6.4 The iteration is over: count, log, validate, save
        micro_batch = 0
        progress["iteration"] += 1
        bar.update()
        finite = all(math.isfinite(norm) for norm in norms.values())
        progress["skipped_in_a_row"] = 0 if finite else progress["skipped_in_a_row"] + 1
        progress["skipped_steps"] += not finite
        finished = progress["iteration"] == run.max_iterations
        if progress["iteration"] % run.log_every == 0 or finished:
            values = meter.compute(accelerator) | norms | {"learning_rate": lr_scheduler.get_last_lr()[0]}
            skipped_images = len(set(gather_object(list(skip_report.reasons))))
            values |= {"skipped_steps": progress["skipped_steps"], "skipped_images": skipped_images}
            log(values)
            bar.set_postfix({name: f"{values[name]:.4f}" for name in losses})
        if progress["iteration"] % run.validate_every == 0 or finished:
            validate()
        diverged = progress["skipped_in_a_row"] >= run.max_skipped_steps
        if stop.received:
            accelerator.set_trigger()
        stopped = accelerator.check_trigger()
        if progress["iteration"] % run.checkpoint_every == 0 or finished or diverged or stopped:
            saved = checkpoints.save(progress["iteration"], write_checkpoint)
        if diverged:
            raise RuntimeError(
                f"The gradients of {run.max_skipped_steps} iterations in a row were not finite. The last good weights"
                f" are in {saved}: lower `learning_rate`, or train in bf16 or without mixed precision."
            )
        if stopped and not finished:
            logger.info(f"Stopped. `--resume {saved}` goes on.")
            break
    bar.close()
    stop.restore()
    skip_report.add(gather_object(list(skip_report.reasons.items())))
    if skip_report:
        logger.warning(skip_report.summary())

    # 7. Save and publish the pipeline
    if discriminator is not None:
        dis_weights = whole_parameters(discriminator)
    if accelerator.is_main_process and progress["iteration"] == run.max_iterations:
        ema.copy_to(ema_predictor.parameters())
        card = card_metadata(pipe)
        if run.license is not None:
            card["license"] = run.license
        if not Path(base).is_dir():
            card.setdefault("base_model", base)
        card["training"] = describe((model, data, run, degradation_settings), read_log(output / "log.jsonl"))
        card["training_data"] = f"High-resolution images: {', '.join(f'`{source}`' for source in data.train_data)}."
        finished_pipe = convert(
            ema_predictor.cpu(),
            base=base,
            output=output / "pipeline",
            variant=model.variant,
            overwrite=True,
            model_card=card,
        )
        if discriminator is not None:
            whole = InvSRDiscriminator.from_config(accelerator.unwrap_model(discriminator).config)
            with torch.no_grad():
                for parameter, trained in zip(whole.parameters(), dis_weights, strict=True):
                    parameter.copy_(trained)
            whole.save_pretrained(output / "discriminator")
        logger.info(f"The pipeline is in {output / 'pipeline'}.")
        if run.push_to_hub:
            finished_pipe.push_to_hub(repository)
    accelerator.end_training()


def out_of_memory_advice(data: DataSettings, run: RunSettings) -> str:
    return (
        f"Out of memory with `batch_size={run.batch_size}` and `crop_size={data.crop_size}`: set"
        " `gradient_checkpointing`, with which a run can be resumed; or, in a new run, halve `batch_size` and double"
        " `gradient_accumulation_steps`, which trains the same, or lower `crop_size`."
    )


def is_refusal(error: Exception) -> bool:
    """Whether an error is a sentence for the user, raised on purpose by a script here or the package, and no fault."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    file, package = Path(frame.filename).resolve(), Path(diffusers_invsr.__file__).resolve().parent
    ours = file.parent == Path(__file__).resolve().parent or file.is_relative_to(package)
    return frame.line.startswith("raise ") and ours


@contextmanager
def refusals_as_sentences():
    """Ends the program with the sentence alone where an error is one for the user, and no traceback is of use."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if is_refusal(error):
            raise SystemExit(str(error)) from error
        raise


@refusals_as_sentences()
def main(argv: list[str] | None = None):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it names every file of a checkpoint
    model, data, run, degradation = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        train(model, data, run, degradation)
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise SystemExit(out_of_memory_advice(data, run)) from error
        raise


if __name__ == "__main__":
    main()
