#!/usr/bin/env python
"""
Train InvSR's noise predictor (section 3 of https://arxiv.org/abs/2412.09013), on one CPU process or many GPUs.

    python examples/training/train_invsr.py examples/training/configs/tiny.yaml --train_data photos/
    accelerate launch examples/training/train_invsr.py examples/training/configs/sd_turbo.yaml \
        --train_data 'LSDIR' 'FFHQ[:20000]'

A YAML file with settings may come first; options on the command line take precedence over it. `--help` lists all of
them, those of the degradation included. `--resume latest` continues an interrupted run. `accelerate launch` chooses
DDP, FSDP or DeepSpeed (`--use_deepspeed --zero_stage 2`, with `pip install ".[deepspeed]"`).

To fine-tune the published predictor on your own photographs (the discriminator is new and warms up first):

    accelerate launch examples/training/train_invsr.py examples/training/configs/sd_turbo.yaml \
        --noise_predictor OAOA/InvSR --train_data my-photos --max_iterations 5000 --dis_init_iterations 1000 \
        --output_dir my-invsr

The output folder gets `pipeline/` (for `InvSRPipeline.from_pretrained`), `log.jsonl`, `validation/` (pictures), the
tracker's logs and the latest checkpoints. Needs `pip install ".[training]"`.
"""

import itertools
import json
import logging
import math
import shutil
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import diffusers
import numpy as np
import torch
import transformers
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
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from diffusers_invsr import TINY, InvSRNoisePredictor, InvSRPipeline, convert, load_noise_predictor
from diffusers_invsr.files import module_fingerprint
from diffusers_invsr.hub import card_metadata
from diffusers_invsr.scheduling_invsr import START_TIMESTEPS
from diffusers_invsr.training import (
    DISCRIMINATOR_RANGE,
    Checkpoints,
    CropDataset,
    CropStream,
    Degradation,
    DegradationSettings,
    InvSRDiscriminator,
    LatentCache,
    LatentLPIPS,
    PairPool,
    RunLog,
    SkipReport,
    StepwiseMeter,
    StopRequest,
    TrainingError,
    ValidationSet,
    batch_generator,
    check_crop_size,
    check_unchanged,
    clipped_step,
    configure_deepspeed,
    degrade_batch,
    draw_starts,
    encode_posterior,
    hinge_discriminator,
    hinge_generator,
    latent_l2,
    list_files,
    load_latent_lpips,
    make_dataset,
    make_loader,
    one_step_estimate,
    parse_settings,
    plain_config,
    read_log,
    require_at_least,
    require_norm,
    setting,
    settings_table,
    training_errors,
    vae_fingerprint,
    validation_table,
    whole_parameters,
)


FIXED_RUN_SETTINGS = ("seed", "batch_size", "gradient_accumulation_steps", "start_timesteps")  # in a resumed run
FIXED_DATA_SETTINGS = ("train_data", "crop_size", "crops_per_image", "pool_batches", "num_workers")

logger = get_logger(__name__)
diffusers.utils.logging.set_verbosity_error()  # it warns of every component that is not its own, in full
transformers.utils.logging.set_verbosity_warning()


# 1. Settings


@dataclass
class ModelSettings:
    base_model: str = setting(
        "Folder or Hub id of the frozen diffusion model; `tiny` is the model in the package.", "stabilityai/sd-turbo"
    )
    variant: str | None = setting("Variant of the base model's files, such as `fp16`.")
    noise_predictor: str | None = setting("Predictor to start from: a folder, file or Hub id. None: a new one.")
    noise_predictor_config: dict | str | None = setting("Configuration of a new predictor. None: the published one.")
    discriminator: str | None = setting("Folder of a discriminator to start from. None: a new one.")
    discriminator_config: dict | str | None = setting("Configuration of a new one. None: the published one.")
    latent_lpips: str | None = setting("Folder or file of the latent LPIPS; required unless `lpips_weight` is 0.")


@dataclass
class DataSettings:
    train_data: list[str] = setting("HR images: folders, `folder[:N]`, lists, `webdataset:...`, `datasets:...`.", [])
    validation_data: str | None = setting("HR images for validation: a folder, `folder[:N]` or a list. None: none.")
    crop_size: int = setting("Height and width of the HR crops in pixels.", 512)
    crops_per_image: int | None = setting("Fixed crops per image, the same in every epoch. None: always new ones.")
    latent_cache: str | None = setting("Folder that caches the latents of HR crops; requires `crops_per_image`.")
    pool_batches: int = setting("Size in batches of the pool that mixes degradations; 0 for none.", 10)
    num_workers: int = setting("Processes that load images, per training process.", 4)


@dataclass
class RunSettings:
    output_dir: str = setting("Folder for everything that the run writes.", "invsr-training")
    resume: str | None = setting("`latest`, or a checkpoint's folder. Later ones in the output folder are removed.")
    seed: int = setting("Seed of every random choice.", 0)
    max_iterations: int = setting("Iterations (updates of the weights).", 100_000)
    batch_size: int = setting("Images per micro-batch and process.", 16)
    gradient_accumulation_steps: int = setting("Micro-batches per update.", 1)
    learning_rate: float = setting("Learning rate of both networks.", 5e-5)
    warmup_iterations: int = setting("Iterations in which the predictor's learning rate rises.", 2_000)
    start_timesteps: list[int] = setting("Starting timesteps to draw from, counted from 1.", list(START_TIMESTEPS))
    lpips_weight: float = setting("Weight of the latent LPIPS.", 2.0)
    adversarial_weight: float = setting("Weight of the adversarial loss; 0: no discriminator.", 0.1)
    dis_init_iterations: int = setting("Iterations before the adversarial loss is added.", 10_000)
    discriminator_weight_decay: float = setting("Weight decay of the discriminator's Adam.", 1e-3)
    ema_decay: float = setting("Upper bound of the moving average's decay, min(bound, (1 + i) / (10 + i)).", 0.999)
    max_grad_norm: float | None = setting("Upper bound of the gradients' norm. None: no bound.")
    max_skipped_steps: int = setting("Consecutive iterations with non-finite gradients before the run stops.", 10)
    mixed_precision: str | None = setting("`no`, `bf16` or `fp16`. None: as in `accelerate config`.")
    gradient_checkpointing: bool = setting("Recompute activations in the backward pass to save memory.", False)
    use_8bit_adam: bool = setting("Keep the optimizers' states in 8 bits; requires bitsandbytes.", False)
    channels_last: bool = setting("Use the channels-last memory format; faster on GPUs.", False)
    compile: bool = setting("Compile the networks.", False)
    log_every: int = setting("Iterations between lines of the log.", 10)
    validate_every: int = setting("Iterations between validations.", 5_000)
    checkpoint_every: int = setting("Iterations between checkpoints.", 1_000)
    keep_checkpoints: int = setting("How many checkpoints to keep.", 3)
    report_to: str = setting("Tracker: `tensorboard`, `wandb`, ... or `none`.", "tensorboard")
    push_to_hub: bool = setting("Publish the finished pipeline.", False)
    license: str | None = setting("License of the trained weights for the model card, such as `cc0-1.0`.")
    hub_model_id: str | None = setting("Hub repository, `owner/name`. None: the output folder's name.")


class Settings(NamedTuple):
    model: ModelSettings
    data: DataSettings
    run: RunSettings
    degradation: DegradationSettings


def parse_args(argv: list[str]) -> Settings:
    """The settings, checked as far as possible without reading other files."""
    usage = "%(prog)s [SETTINGS.yaml] [--setting value ...]"
    classes = (ModelSettings, DataSettings, RunSettings, DegradationSettings)
    parser = HfArgumentParser(classes, usage=usage, description=__doc__.strip().splitlines()[0])
    model, data, run, degradation = parse_settings(parser, argv)
    for name in ("noise_predictor_config", "discriminator_config"):
        if isinstance(getattr(model, name), str):
            try:
                setattr(model, name, json.loads(getattr(model, name)))
            except ValueError:
                parser.error(f"`--{name}` must be JSON, got {getattr(model, name)!r}.")

    if not data.train_data:
        parser.error("`--train_data` must name at least one source of images.")
    require_at_least(0, parser, data, "pool_batches", "num_workers")
    require_at_least(1, parser, run, "max_iterations", "batch_size", "gradient_accumulation_steps")
    require_at_least(1, parser, run, "log_every", "validate_every", "checkpoint_every", "keep_checkpoints")
    require_at_least(1, parser, run, "max_skipped_steps")
    require_norm(parser, run.max_grad_norm)
    starts = run.start_timesteps
    if not starts or not all(isinstance(start, int) and 1 <= start <= 1000 for start in starts):
        parser.error(f"`--start_timesteps` must be integers from 1 to 1000, got {starts}.")
    if len(set(starts)) < len(starts):
        parser.error(f"`--start_timesteps` must be different from each other, got {starts}.")
    if run.lpips_weight and not model.latent_lpips:
        parser.error("`--latent_lpips` is required unless `--lpips_weight 0`: see train_latent_lpips.py.")
    if data.latent_cache and data.crops_per_image is None:
        parser.error("`--latent_cache` requires `--crops_per_image`: crops that never repeat cannot be cached.")
    return Settings(model, data, run, degradation)


# 2. Processes


def build_accelerators(run: RunSettings) -> tuple[Accelerator, Accelerator]:
    """The accelerator, and that of the discriminator: DeepSpeed needs one per network, all others share one."""
    # A plugin rather than a number, which `accelerate launch --use_deepspeed` would replace by its own
    accumulation = GradientAccumulationPlugin(num_steps=run.gradient_accumulation_steps)
    group = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # the other processes wait while one validates
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not torch.accelerator.is_available():
        group.backend = "gloo"  # accelerate chooses none for DeepSpeed on CPUs
    folders = ProjectConfiguration(project_dir=run.output_dir, logging_dir=str(Path(run.output_dir, "logs")))
    with training_errors():  # of the precision or the tracker
        accelerator = Accelerator(
            gradient_accumulation_plugin=accumulation,
            mixed_precision=run.mixed_precision,
            log_with=None if run.report_to == "none" else run.report_to,
            project_config=folders,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False), group],
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise TrainingError("FSDP 1 hides the weights that the moving average needs: use `--fsdp_version 2`.")
    if accelerator.scaler is not None and run.gradient_accumulation_steps > 1 and run.adversarial_weight:
        raise TrainingError(
            "`mixed_precision='fp16'` cannot be combined with `gradient_accumulation_steps` above 1: accelerate would"
            " unscale the discriminator's gradients with the predictor's: use 'bf16'."
        )
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is None:
        return accelerator, accelerator
    configure_deepspeed(deepspeed.deepspeed_config, run.batch_size, run.gradient_accumulation_steps, run.max_grad_norm)
    return accelerator, Accelerator(gradient_accumulation_plugin=accumulation)


def check_output_folder(run: RunSettings, checkpoints: Checkpoints):
    """A folder with checkpoints is for resuming one of them, not for another run."""
    folder = checkpoints.folder.resolve()
    resumes_here = run.resume and (run.resume == "latest" or Path(run.resume).resolve().parent == folder)
    if not resumes_here and checkpoints.list():
        raise TrainingError(
            f"`output_dir={run.output_dir!r}` has checkpoints of another run: resume it with `--resume latest`, or"
            " choose another folder."
        )


def check_hub_access(repository: str):
    """Before the training rather than after it."""
    try:
        auth_check(create_repo(repository, exist_ok=True).repo_id, write=True)
    except Exception as error:  # of many kinds: no token, no connection, no such owner, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"`push_to_hub` requires write access to the Hub repository {repository!r} ({reason}): log in with"
            " `hf auth login`, or name another one with `hub_model_id`."
        ) from error


# 3. Models


@dataclass
class Models:
    """What is trained, as the accelerators prepared it, and what computes the losses."""

    accelerator: Accelerator
    dis_accelerator: Accelerator
    pipe: InvSRPipeline  # frozen; its noise predictor gets the averaged weights for validation and saving
    base_fingerprint: str
    prompt_embeds: torch.Tensor | None  # (1, tokens, width)
    latent_lpips: LatentLPIPS | None  # frozen
    noise_predictor: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    ema: EMAModel
    discriminator: nn.Module | None
    dis_optimizer: torch.optim.Optimizer | None

    @property
    def trained(self) -> list[nn.Module]:
        return [self.noise_predictor] if self.discriminator is None else [self.noise_predictor, self.discriminator]


def build_models(settings: Settings, accelerator: Accelerator, dis_accelerator: Accelerator) -> Models:
    model, run, device = settings.model, settings.run, accelerator.device
    frozen_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)

    # 3.1 Load or make the networks
    latent_lpips, discriminator = None, None
    with training_errors():
        if model.noise_predictor is None:
            noise_predictor = InvSRNoisePredictor(**(model.noise_predictor_config or {}))
        else:
            noise_predictor = load_noise_predictor(model.noise_predictor)
        averaged = InvSRNoisePredictor.from_config(noise_predictor.config)
        pipe = convert(averaged, base=TINY if model.base_model == "tiny" else model.base_model, variant=model.variant)
        if run.lpips_weight:
            latent_lpips = load_latent_lpips(model.latent_lpips).to(device, frozen_dtype)
        if run.adversarial_weight:
            discriminator = load_discriminator(model).train()
    noise_predictor.train()
    averaged.eval().requires_grad_(False).load_state_dict(noise_predictor.state_dict())
    # Of the weights in float32, whatever they are cast to: a resumed run may have another precision
    base_fingerprint = " and ".join(module_fingerprint(part, with_config=False)[:12] for part in (pipe.unet, pipe.vae))
    freeze(pipe, frozen_dtype)
    pipe.to(device)
    prompt_embeds, _ = pipe.encode_prompt(do_classifier_free_guidance=False)

    # 3.2 Save memory and time
    networks = [noise_predictor] if discriminator is None else [noise_predictor, discriminator]
    with_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if run.gradient_checkpointing:
        for network in (pipe.unet, *networks):
            network.enable_gradient_checkpointing()
    if run.channels_last:
        # DeepSpeed arranges the weights that it trains by itself
        for network in (pipe.unet, pipe.vae, *(() if with_deepspeed else networks)):
            network.to(memory_format=torch.channels_last)
    if run.compile:
        for network in (pipe.unet, pipe.vae.encoder, *networks):
            network.compile()
    if with_deepspeed and frozen_dtype != torch.float32:
        for network in networks:  # which accelerate does in all other cases
            autocast = torch.autocast(device.type, frozen_dtype)
            network.forward = convert_outputs_to_fp32(autocast(network.forward))

    # 3.3 Optimizers and moving average
    optimizer = build_optimizer("AdamW", noise_predictor, run, weight_decay=0.0)
    lr_scheduler = get_constant_schedule_with_warmup(optimizer, run.warmup_iterations)
    ema = EMAModel(noise_predictor.parameters(), decay=run.ema_decay)
    ema.to(device)
    noise_predictor, optimizer = accelerator.prepare(noise_predictor, optimizer)
    dis_optimizer = None
    if discriminator is not None:
        dis_optimizer = build_optimizer("Adam", discriminator, run, run.discriminator_weight_decay)
        discriminator, dis_optimizer = dis_accelerator.prepare(discriminator, dis_optimizer)
    accelerator.register_for_checkpointing(ema, lr_scheduler)
    return Models(
        accelerator,
        dis_accelerator,
        pipe,
        base_fingerprint,
        prompt_embeds,
        latent_lpips,
        noise_predictor,
        optimizer,
        lr_scheduler,
        ema,
        discriminator,
        dis_optimizer,
    )


def freeze(pipe: InvSRPipeline, dtype: torch.dtype):
    """The diffusion model is not trained: it is in half precision where the training is."""
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        if part is not None:
            part.eval().requires_grad_(False).to(dtype)
    if pipe.takes_text and pipe.text_encoder is not None:
        pipe.drop_text_encoder()  # the prompt is embedded once
    if dtype == torch.float16 and pipe.vae.config.get("force_upcast", False):
        pipe.vae.float()  # it overflows in float16
    pipe.set_progress_bar_config(disable=True)


def build_optimizer(name: str, network: nn.Module, run: RunSettings, weight_decay: float) -> torch.optim.Optimizer:
    """`Adam` or `AdamW`, which differ in how the weights decay, with their state in 8 bits if asked for."""
    optimizers = torch.optim
    if run.use_8bit_adam:
        try:
            from bitsandbytes import optim as optimizers
        except ImportError as error:
            raise TrainingError("`use_8bit_adam` requires bitsandbytes: `pip install bitsandbytes`.") from error
        name = f"{name}8bit"
    return getattr(optimizers, name)(network.parameters(), lr=run.learning_rate, weight_decay=weight_decay)


def load_discriminator(model: ModelSettings) -> InvSRDiscriminator:
    if model.discriminator is None:
        return InvSRDiscriminator(**(model.discriminator_config or {}))
    if not Path(model.discriminator).is_dir():
        raise TrainingError(f"`discriminator` must be an existing folder, got {model.discriminator!r}.")
    return InvSRDiscriminator.from_pretrained(model.discriminator)


# 4. Data


@dataclass
class Data:
    dataset: CropDataset | CropStream
    degradation: Degradation
    pool: PairPool
    cache: LatentCache | None
    validation: ValidationSet | None  # in the main process
    skip_report: SkipReport


def build_data(settings: Settings, accelerator: Accelerator, pipe: InvSRPipeline) -> Data:
    data, run = settings.data, settings.run
    degradation = Degradation(settings.degradation, pipe.config.scale).to(accelerator.device)
    check_crop_size(data.crop_size, degradation)
    pool = PairPool(data.pool_batches)
    cache = LatentCache(data.latent_cache, vae_fingerprint(pipe.vae)) if data.latent_cache else None
    with training_errors():
        dataset = make_dataset(data.train_data, data.crop_size, seed=run.seed, crops_per_image=data.crops_per_image)
    validation = None
    if data.validation_data is not None and accelerator.is_main_process:
        validation = ValidationSet(list_files(data.validation_data), data.crop_size, pipe.config.scale, run.seed)
    return Data(dataset, degradation, pool, cache, validation, SkipReport())


class Inputs(NamedTuple):
    """A micro-batch of `B` images."""

    lr: torch.Tensor  # (B, 3, h, w), in [0, 1]
    timesteps: torch.Tensor  # (B,), τ − 1
    noise: torch.Tensor  # (B, C, H, W), ξ₁ of the noise predictor
    lr_latents: torch.Tensor  # (B, C, H, W)
    hr_latents: torch.Tensor  # (B, C, H, W), z₀


@torch.no_grad()
def prepare_inputs(batch: dict, models: Models, data: Data, run: RunSettings, generator: torch.Generator) -> Inputs:
    """Degrade a batch of the loader and encode it. All that is random in it is drawn by `generator`."""
    hr = batch["hr"].to(models.accelerator.device, non_blocking=True).float() / 255
    posterior = encode_posterior(models.pipe.vae, hr, data.cache, batch["keys"]).float()
    lr = degrade_batch(data.degradation, hr, generator)
    lr, posterior = data.pool.exchange(lr, posterior, generator=generator)
    return Inputs(lr, *draw_starts(models.pipe, lr, posterior, run.start_timesteps, generator))


# 5. The method


def training_step(
    models: Models, inputs: Inputs, run: RunSettings, adversarial: bool
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    r"""
    Train both networks on a micro-batch (section 3.3 of the paper):

        L = L2(ẑ₀, z₀) + 2.0 · LPIPS(ẑ₀, z₀) + 0.1 · adversarial(ẑ₀)

    Args:
        models, inputs: The networks and the micro-batch.
        run ([`RunSettings`]): Has the weights of the losses.
        adversarial (`bool`): Whether the predictor has its adversarial loss yet.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, float]]`: Losses by name, each `(B,)`; and the norms of the gradients
        by name, if the micro-batch was the last one of its iteration and the networks were updated.
    """
    lr, timesteps, noise, lr_latents, hr_latents = inputs
    accelerator, discriminator, pipe = models.accelerator, models.discriminator, models.pipe
    norms = {}

    # 5.1 Noise predictor
    estimate = one_step_estimate(
        models.noise_predictor, pipe.unet, pipe.scheduler, lr, lr_latents, timesteps, noise, models.prompt_embeds
    )  # ẑ₀, (B, C, H, W)
    losses = {"l2": latent_l2(estimate, hr_latents)}
    loss = losses["l2"]
    if models.latent_lpips is not None:
        losses["lpips"] = models.latent_lpips(estimate, hr_latents)
        loss = loss + run.lpips_weight * losses["lpips"]
    bounded = estimate.clamp(-DISCRIMINATOR_RANGE, DISCRIMINATOR_RANGE)
    if discriminator is not None and adversarial:
        discriminator.requires_grad_(False)  # it is frozen here and only passes gradients on
        judge = accelerator.unwrap_model(discriminator)  # outside of what synchronizes its gradients
        losses["adversarial"] = hinge_generator(judge(bounded, timesteps, models.prompt_embeds).logits)
        loss = loss + run.adversarial_weight * losses["adversarial"]
    losses["total"] = loss
    accelerator.backward(loss.mean())
    if accelerator.sync_gradients:
        norm = clipped_step(accelerator, models.noise_predictor, models.optimizer, run.max_grad_norm)
        models.lr_scheduler.step()
        if math.isfinite(norm):
            models.ema.step(whole_parameters(models.noise_predictor))
        norms["grad_norm"] = norm

    # 5.2 Discriminator, to which the estimate is a constant
    if discriminator is not None:
        discriminator.requires_grad_(True)
        both = torch.cat([hr_latents, bounded.detach()])  # (2B, C, H, W)
        logits = discriminator(both, timesteps.repeat(2), models.prompt_embeds).logits
        real, fake = zip(*(output.chunk(2) for output in logits))
        losses["discriminator"] = hinge_discriminator(real, fake)
        models.dis_accelerator.backward(losses["discriminator"].mean())
        if accelerator.sync_gradients:
            norms["discriminator_grad_norm"] = clipped_step(
                models.dis_accelerator, discriminator, models.dis_optimizer, run.max_grad_norm
            )
    return losses, norms


# 6. Where a run stands


@dataclass
class Progress:
    iteration: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    tracker_id: str = field(default_factory=lambda: uuid4().hex)


class RunState:
    """
    How far a run is, its log, and its checkpoints: networks, optimizers and moving average, which accelerate saves,
    and what is in the pool and the meter. Random numbers need no state: they follow from the seed and the iteration.
    """

    def __init__(self, settings: Settings, models: Models, data: Data, checkpoints: Checkpoints):
        self.run, self.models, self.data, self.checkpoints = settings.run, models, data, checkpoints
        self.accelerator, self.output = models.accelerator, checkpoints.folder
        self.progress, self.meter = Progress(), StepwiseMeter(settings.run.start_timesteps)
        self.fixed = self.fixed_settings(settings)

    def fixed_settings(self, settings: Settings) -> dict:
        """What a resumed run cannot change."""
        discriminator, deepspeed = self.models.discriminator, self.accelerator.state.deepspeed_plugin
        fixed = {
            "num_processes": self.accelerator.num_processes,
            "zero_stage": None if deepspeed is None else deepspeed.zero_stage,
            "fsdp": self.accelerator.distributed_type == DistributedType.FSDP,
            "discriminator": discriminator is not None,
            "base_model": f"weights {self.models.base_fingerprint}",
            "noise_predictor_config": plain_config(self.models.pipe.noise_predictor),
            "discriminator_config": discriminator and plain_config(self.accelerator.unwrap_model(discriminator)),
            **{name: getattr(settings.run, name) for name in FIXED_RUN_SETTINGS},
            **{name: getattr(settings.data, name) for name in FIXED_DATA_SETTINGS},
        }
        if isinstance(self.data.dataset, CropDataset):
            del fixed["num_workers"]  # only the order of a stream depends on it
        return fixed

    def start(self):
        """Resume if the settings say so, and open the log and the trackers where the run stands."""
        checkpoint = None if self.run.resume is None else self.checkpoints.find(self.run.resume)
        if checkpoint is not None:
            self.load(checkpoint)
            logger.info(f"Resuming from {checkpoint}.")
        elif self.run.resume is not None:
            logger.info(f"{self.output} has no checkpoint yet: starting from the beginning.")
        iteration = self.progress.iteration
        if self.run.report_to != "none":
            # A resumed run leaves no second curve beside the first
            wandb = {"id": self.progress.tracker_id, "resume": "allow", "dir": self.output}
            trackers = {"tensorboard": {"purge_step": iteration + 1}, "wandb": wandb}
            self.accelerator.init_trackers("invsr", init_kwargs=trackers)
        if self.accelerator.is_main_process:
            self.checkpoints.remove_later(iteration)  # first: the newest one always belongs to the log
            self.run_log = RunLog(self.output / "log.jsonl", None if checkpoint is None else iteration)

    def save(self) -> Path:
        with self.checkpoints.save(self.progress.iteration) as folder:
            self.accelerator.save_state(str(folder))
            if self.models.dis_accelerator is not self.accelerator:
                self.models.dis_accelerator.save_state(str(folder / "discriminator"))
            state = {name: part.state_dict() for name, part in self.parts().items()}
            torch.save(state, folder / f"process_{self.accelerator.process_index}.pt")
            if self.accelerator.is_main_process:
                state = {"progress": vars(self.progress), "fixed": self.fixed}
                (folder / "run.json").write_text(json.dumps(state, indent=2))
        return self.checkpoints.path(self.progress.iteration)

    def load(self, checkpoint: Path):
        stored = json.loads((checkpoint / "run.json").read_text())
        check_unchanged(self.fixed, stored["fixed"])
        self.progress = Progress(**stored["progress"])
        if self.progress.iteration > self.run.max_iterations:
            raise TrainingError(
                f"`max_iterations` must be at least {self.progress.iteration}, the iterations of the run to resume,"
                f" got {self.run.max_iterations}."
            )
        if self.models.dis_accelerator is not self.accelerator:
            self.models.dis_accelerator.load_state(str(checkpoint / "discriminator"))
        self.accelerator.load_state(str(checkpoint))
        self.apply_settings()
        state = torch.load(checkpoint / f"process_{self.accelerator.process_index}.pt", weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])

    def parts(self) -> dict:
        """What each process saves for itself."""
        return {"pool": self.data.pool, "meter": self.meter, "skip_report": self.data.skip_report}

    def apply_settings(self):
        """The settings of the resumed run take precedence over what the loaded states remember."""
        run, models = self.run, self.models
        models.ema.to(self.accelerator.device)  # accelerate loads it to the CPU
        models.ema.decay, models.lr_scheduler.base_lrs = run.ema_decay, [run.learning_rate]
        warmup = models.lr_scheduler.lr_lambdas[0](models.lr_scheduler.last_epoch)
        models.optimizer.param_groups[0]["lr"] = run.learning_rate * warmup
        if models.dis_optimizer is not None:
            now = {"lr": run.learning_rate, "weight_decay": run.discriminator_weight_decay}
            models.dis_optimizer.param_groups[0] |= now

    def count(self, norms: dict[str, float]):
        """One more iteration, with these norms of the gradients."""
        finite = all(math.isfinite(norm) for norm in norms.values())
        self.progress.iteration += 1
        self.progress.skipped_in_a_row = 0 if finite else self.progress.skipped_in_a_row + 1
        self.progress.skipped_steps += not finite

    def log(self, values: dict[str, float]):
        self.accelerator.log(values, step=self.progress.iteration)
        if self.accelerator.is_main_process:
            self.run_log.append(self.progress.iteration, values)

    def log_losses(self, norms: dict[str, float]) -> dict[str, float]:
        """Log, and return, the means of the losses since the last time, and where the run stands."""
        values = self.meter.compute(self.accelerator) | norms
        values["learning_rate"] = self.models.lr_scheduler.get_last_lr()[0]
        values["skipped_steps"] = self.progress.skipped_steps
        values["skipped_images"] = len(set(gather_object(list(self.data.skip_report.reasons))))
        self.log(values)
        return values


# 7. The run


@torch.no_grad()
def validate(models: Models, validation: ValidationSet | None, state: RunState):
    """Measure the averaged predictor, and log pictures of what it makes."""
    if validation is None:
        return
    models.ema.copy_to(models.pipe.noise_predictor.parameters())
    metrics, rows = validation.measure(models.pipe)
    state.log(metrics)
    logger.info(f"Validation: {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}")
    iteration = state.progress.iteration
    folder = state.output / "validation" / f"iteration-{iteration:07d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for (name, *_), row in zip(validation.pairs, rows):
        row.save(folder / f"{name}.png")
        for tracker in models.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(row)[None]}, iteration, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [row]}, iteration)


def train(settings: Settings):
    # 7.1 Build
    run = settings.run
    accelerator, dis_accelerator = build_accelerators(run)
    checkpoints = Checkpoints(Path(run.output_dir), accelerator, run.keep_checkpoints)
    check_output_folder(run, checkpoints)
    if run.push_to_hub and accelerator.is_main_process:
        check_hub_access(run.hub_model_id or checkpoints.folder.name)
    with training_errors():
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.seed)
    models = build_models(settings, accelerator, dis_accelerator)
    data = build_data(settings, accelerator, models.pipe)
    state = RunState(settings, models, data, checkpoints)
    state.start()
    progress = state.progress
    loader = make_loader(
        data.dataset,
        run.batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        start_batch=progress.iteration * run.gradient_accumulation_steps,
        num_workers=settings.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )

    # 7.2 Loop
    bar = tqdm(total=run.max_iterations, initial=progress.iteration, disable=not accelerator.is_local_main_process)
    with bar, StopRequest() as stop:
        if progress.iteration == 0:
            validate(models, data.validation, state)
        batches = iter(loader)
        numbers = itertools.count(progress.iteration * run.gradient_accumulation_steps)
        while progress.iteration < run.max_iterations:
            with accelerator.accumulate(*models.trained):
                batch, number = next(batches), next(numbers)
                data.skip_report.add(batch["skipped"])
                number = number * accelerator.num_processes + accelerator.process_index
                inputs = prepare_inputs(batch, models, data, run, batch_generator(run.seed, number))
                adversarial = progress.iteration >= run.dis_init_iterations
                losses, norms = training_step(models, inputs, run, adversarial)
            for name, values in losses.items():
                state.meter.add(name, values, inputs.timesteps)
            if not accelerator.sync_gradients:
                continue

            state.count(norms)
            bar.update()
            finished = progress.iteration == run.max_iterations
            diverged = progress.skipped_in_a_row >= run.max_skipped_steps
            if progress.iteration % run.log_every == 0 or finished:
                values = state.log_losses(norms)
                bar.set_postfix({name: f"{values[name]:.4f}" for name in losses})
            if progress.iteration % run.validate_every == 0 or finished:
                validate(models, data.validation, state)
            if stop.received:
                accelerator.set_trigger()
            stopped = accelerator.check_trigger()  # in all processes if in one
            if progress.iteration % run.checkpoint_every == 0 or finished or diverged or stopped:
                saved = state.save()
            if diverged:
                raise TrainingError(
                    f"The gradients of {run.max_skipped_steps} consecutive iterations were not finite. The last good"
                    f" weights are in {saved}: lower `learning_rate`, or train in bf16 or without mixed precision."
                )
            if stopped and not finished:
                logger.info(f"Stopped. Resume with `--resume {saved}`.")
                break

    # 7.3 Finish
    data.skip_report.add(gather_object(list(data.skip_report.reasons.items())))
    if data.skip_report:
        logger.warning(data.skip_report.summary())
    if models.discriminator is not None:
        save_discriminator(models, state)
    if accelerator.is_main_process and progress.iteration == run.max_iterations:
        save_pipeline(settings, models, checkpoints.folder)
    accelerator.end_training()


def save_discriminator(models: Models, state: RunState):
    """For another run to start from, in the format of `from_pretrained`. All processes take part."""
    weights = whole_parameters(models.discriminator)
    if models.accelerator.is_main_process and state.progress.iteration == state.run.max_iterations:
        whole = InvSRDiscriminator.from_config(models.accelerator.unwrap_model(models.discriminator).config)
        with torch.no_grad():
            for parameter, trained in zip(whole.parameters(), weights, strict=True):
                parameter.copy_(trained)
        whole.save_pretrained(state.output / "discriminator")


def save_pipeline(settings: Settings, models: Models, output: Path):
    """The base model, as it was loaded, with the averaged predictor and a model card; published if asked for."""
    model, run = settings.model, settings.run
    base = TINY if model.base_model == "tiny" else model.base_model
    models.ema.copy_to(models.pipe.noise_predictor.parameters())
    card = card_metadata(models.pipe)
    if run.license is not None:
        card["license"] = run.license
    if not Path(base).is_dir():
        card.setdefault("base_model", base)
    card["training"] = f"{settings_table(settings)}\n\n{validation_table(read_log(output / 'log.jsonl'))}".strip()
    card["training_data"] = f"High-resolution images: {', '.join(f'`{name}`' for name in settings.data.train_data)}."
    with training_errors():
        pipe = convert(
            models.pipe.noise_predictor.cpu(),
            base=base,
            output=output / "pipeline",
            variant=model.variant,
            overwrite=True,
            model_card=card,
        )
    logger.info(f"Saved the pipeline in {output / 'pipeline'}.")
    if run.push_to_hub:
        pipe.push_to_hub(run.hub_model_id or output.name)


def out_of_memory_advice(settings: Settings) -> str:
    return (
        f"Out of memory with `batch_size={settings.run.batch_size}` and `crop_size={settings.data.crop_size}`: set"
        " `gradient_checkpointing`, which a resumed run may; or, in a new run, halve `batch_size` and double"
        " `gradient_accumulation_steps`, which trains the same, or lower `crop_size`."
    )


def main(argv: list[str] | None = None):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it names every file of a checkpoint
    try:
        settings = parse_args(sys.argv[1:] if argv is None else argv)
        train(settings)
    except TrainingError as error:  # a sentence for the user; anything else is a bug, with its traceback
        raise SystemExit(str(error)) from error
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise SystemExit(out_of_memory_advice(settings)) from error
        raise


if __name__ == "__main__":
    main()
