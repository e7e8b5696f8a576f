#!/usr/bin/env python
"""
Fine-tune the noise predictor and the VAE's decoder together, on the squared error of the decoded pixels.

    python examples/training/finetune_in_pixels.py examples/training/configs/tiny_degradation.yaml \
        --model my-run/pipeline --train_data photos/ --output_dir finetuned

This goes beyond the paper, whose losses are all in latent space and whose VAE is frozen. A decoder that was trained
only on latents of sharp images learns to decode one-step estimates from degraded ones. A quarter of the HR images are
also decoded from their own latents, and that error counts as much, so that the decoder remains an inverse of the
encoder, which is frozen like the diffusion model. For small models: gradients pass through the decoder at the full
resolution.

The YAML file may be one of `train_invsr.py`: settings that only that script has are ignored, with a warning. On
CPUs `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 examples/training/finetune_in_pixels.py ...` starts one process
per core. The same command with `--resume` continues from the last checkpoint, on CPUs to the very same weights. The
output folder gets `pipeline/` (in float16), `log.jsonl` and the checkpoints. Needs `pip install ".[training]"`.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, InitProcessGroupKwargs, gather_object, set_seed
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from huggingface_hub.errors import HFValidationError
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from diffusers_invsr import TINY, InvSRPipeline, keep_freed_memory
from diffusers_invsr.checkpoint_files import FetchError
from diffusers_invsr.conversion import save_whole
from diffusers_invsr.hub import card_metadata
from diffusers_invsr.scheduling_invsr import START_TIMESTEPS
from diffusers_invsr.training import (
    Checkpoints,
    Degradation,
    DegradationSettings,
    RunLog,
    SkipReport,
    TrainingError,
    ValidationSet,
    batch_generator,
    check_crop_size,
    check_unchanged,
    clipped_step,
    deepen,
    degrade_batch,
    draw_starts,
    encode_posterior,
    list_files,
    make_dataset,
    make_loader,
    one_step_estimate,
    parse_settings,
    read_log,
    require_at_least,
    require_norm,
    setting,
    settings_table,
    training_errors,
    validation_table,
)


CLEAN_SHARE = 4  # one in so many images is also decoded from its own latents
MAX_SKIPPED_STEPS = 25  # in a row; the first ones of float16 are, until its scale fits
# Of a resumed run: what does not change the weights, and `also_degraded_by`, which is compared by its content
FREE_SETTINGS = ("output_dir", "resume", "num_workers", "cuda_graphs", "validation_data", "validation_size")
FREE_SETTINGS += ("log_every", "validate_every", "checkpoint_every", "also_degraded_by")
# Only train_invsr.py has these, and so may a YAML file that both scripts read
OTHER_SETTINGS = (
    "adversarial_weight", "base_model", "channels_last", "compile", "crops_per_image", "dis_init_iterations",
    "discriminator", "discriminator_config", "discriminator_weight_decay", "gradient_accumulation_steps",
    "gradient_checkpointing", "hub_model_id", "keep_checkpoints", "latent_cache", "latent_lpips", "license",
    "lpips_weight", "max_skipped_steps", "noise_predictor", "noise_predictor_config", "pool_batches",
    "push_to_hub", "report_to", "start_timesteps", "use_8bit_adam", "variant",
)  # fmt: skip


@dataclass
class Settings:
    model: str | None = setting("Folder or Hub id of the pipeline to start from, or `tiny`, the model in the package.")
    train_data: list[str] = setting("HR images: folders, `folder[:N]`, lists, `webdataset:...`, `datasets:...`.", [])
    validation_data: str | None = setting("HR images for validation: a folder, `folder[:N]` or a list. None: none.")
    validation_size: int = setting("Height and width of their central crops in pixels.", 512)
    extra_layers: int = setting("ResNet layers to add to the predictor's last level; at first they change nothing.", 0)
    output_dir: str = setting("Folder for everything that the run writes.", "finetuned")
    resume: bool = setting("Resume from the last checkpoint in the output folder.", False)
    seed: int = setting("Seed of every random choice.", 0)
    crop_size: int = setting("Height and width of the HR crops in pixels.", 128)
    batch_size: int = setting("Images per batch and process.", 16)
    also_degraded_by: str | None = setting("YAML file of another degradation, for every other batch.")
    num_workers: int = setting("Processes that load images, per training process.", 1)
    max_iterations: int = setting("Iterations (updates of the weights).", 1_000)
    warmup_iterations: int = setting("Iterations in which the learning rate rises; then it falls by a cosine.", 50)
    learning_rate: float = setting("Peak learning rate of both networks.", 2e-4)
    max_grad_norm: float = setting("Upper bound of the gradients' norm.", 1.0)
    cuda_graphs: bool = setting("On one CUDA device: run the networks as graphs, which keep their memory.", True)
    mixed_precision: str | None = setting("`no`, `bf16` or `fp16`. None: as in `accelerate config`.")
    ema_decay: float = setting("Upper bound of the moving average's decay, min(bound, (1 + i) / (10 + i)).", 0.999)
    log_every: int = setting("Iterations between lines of the log.", 20)
    validate_every: int = setting("Iterations between validations.", 250)
    checkpoint_every: int = setting("Iterations between checkpoints.", 100)


def parse_args(argv: list[str]) -> tuple[Settings, list[DegradationSettings]]:
    """The settings, checked as far as possible without models and images, and those of one degradation or two."""
    usage = "%(prog)s [SETTINGS.yaml] [--setting value ...]"
    description = __doc__.strip().splitlines()[0]
    parser = HfArgumentParser((Settings, DegradationSettings), usage=usage, description=description)
    settings, *degradations = parse_settings(parser, argv, ignored=OTHER_SETTINGS)
    if settings.model is None:
        parser.error("`--model` must name the pipeline to start from.")
    if not settings.train_data:
        parser.error("`--train_data` must name at least one source of images.")
    require_at_least(0, parser, settings, "extra_layers", "num_workers")
    require_at_least(1, parser, settings, "max_iterations", "batch_size")
    require_at_least(1, parser, settings, "log_every", "validate_every", "checkpoint_every")
    require_norm(parser, settings.max_grad_norm)
    if settings.also_degraded_by is not None:
        degradations += parse_settings(HfArgumentParser(DegradationSettings, usage=usage), [settings.also_degraded_by])
    return settings, degradations


def prefetch(batches: Iterator[tuple], device: torch.device) -> Iterator[tuple]:
    """
    The same batches. On CUDA a thread prepares the next one, on a stream of its own, while the last is in use:
    degrading consists of many small steps that wait for one another.
    """
    if device.type != "cuda":
        yield from batches
        return
    # Of high priority, so that these small steps come between those of the networks
    stream, main = torch.cuda.Stream(device, priority=-1), torch.cuda.current_stream(device)
    stream.wait_stream(main)  # for the weights

    def prepare_next() -> tuple | None:
        with torch.cuda.stream(stream):
            return next(batches, None)

    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(prepare_next)
        while (batch := following.result()) is not None:
            main.wait_stream(stream)
            for tensor in batch:
                tensor.record_stream(main)
            following = thread.submit(prepare_next)
            yield batch


class DecodedEstimate(nn.Module):
    """From LR images to pixels through one step of the frozen diffusion model, and from latents to pixels."""

    def __init__(self, pipe: InvSRPipeline, prompt_embeds: torch.Tensor | None):
        super().__init__()
        self.noise_predictor, self.vae = pipe.noise_predictor, pipe.vae
        self.frozen = (pipe.unet, pipe.scheduler)  # in a tuple, so that they are not submodules
        self.prompt_embeds = prompt_embeds  # (1, tokens, width)

    def forward(self, lr, lr_latents, timesteps, noise, hr_latents) -> tuple[torch.Tensor, ...]:
        """The decoded one-step estimates `(B, 3, H, W)` and the decoded `hr_latents`, in [0, 1], not clamped."""
        estimate = one_step_estimate(
            self.noise_predictor, *self.frozen, lr, lr_latents, timesteps, noise, self.prompt_embeds
        )
        latents = torch.cat([estimate, hr_latents]) / self.vae.config.scaling_factor
        pixels = self.vae.decode(latents.contiguous(memory_format=torch.channels_last)).sample.float() / 2 + 0.5
        return pixels[: len(lr)], pixels[len(lr) :]


@torch.no_grad()
def make_inputs(
    pipe: InvSRPipeline, hr: torch.Tensor, lr: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """The inputs of [`DecodedEstimate`], for HR images `(B, 3, H, W)` and LR images `(B, 3, h, w)` in [0, 1]."""
    posterior = encode_posterior(pipe.vae, hr)
    timesteps, noise, lr_latents, hr_latents = draw_starts(pipe, lr, posterior, START_TIMESTEPS, generator)
    return lr, lr_latents, timesteps, noise, hr_latents[: math.ceil(len(hr) / CLEAN_SHARE)]


def capture(model: DecodedEstimate, inputs: tuple[torch.Tensor, ...], accelerator: Accelerator):
    """
    Make the model run as CUDA graphs, forward and backward, for inputs of these shapes, so that its many small kernels
    need not be launched one by one.
    """
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # worthwhile: the shapes stay
    with accelerator.autocast(AutocastKwargs(cache_enabled=False)):
        torch.cuda.make_graphed_callables(model, inputs)
    torch.backends.cudnn.benchmark = benchmark


def freeze(pipe: InvSRPipeline):
    """Let only the noise predictor and the decoding part of the VAE be trained."""
    pipe.unet.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    pipe.vae.decoder.requires_grad_(True)
    if getattr(pipe.vae, "post_quant_conv", None) is not None:
        pipe.vae.post_quant_conv.requires_grad_(True)


def load_pipeline(settings: Settings, device: torch.device) -> InvSRPipeline:
    """The pipeline to start from, in float32, with all but the trained parts frozen."""
    model = TINY if settings.model == "tiny" else settings.model
    with training_errors():
        try:
            pipe = InvSRPipeline.from_pretrained(model, dtype=torch.float32)
        except (OSError, HFValidationError) as error:
            if Path(model).is_dir():
                message = f"`model={settings.model!r}` could not be loaded as a pipeline: {error}"
                raise TrainingError(message) from error
            raise FetchError(model, error) from error
    pipe.set_progress_bar_config(disable=True)
    if pipe.takes_text and pipe.text_encoder is not None:
        pipe.drop_text_encoder()  # the prompt is embedded once
    if settings.extra_layers:
        pipe.register_modules(noise_predictor=deepen(pipe.noise_predictor, settings.extra_layers))
    freeze(pipe)
    pipe.to(device)
    pipe.vae.decoder.to(memory_format=torch.channels_last)
    # A CUDA graph cannot copy them from the CPU
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)
    return pipe


def fixed_settings(settings: Settings, degradations: list[DegradationSettings], accelerator: Accelerator) -> dict:
    """What a resumed run cannot change: all that the weights depend on."""
    first, *others = map(dataclasses.asdict, degradations)
    fixed = {name: value for name, value in (vars(settings) | first).items() if name not in FREE_SETTINGS}
    fixed |= {"num_processes": accelerator.num_processes, "device": accelerator.device.type}  # where noise is drawn
    return fixed | {"also_degraded_by": others}


def make_batches(
    loader: Iterator[dict],
    numbers: range,
    pipe: InvSRPipeline,
    degradations: list[Degradation],
    settings: Settings,
    accelerator: Accelerator,
    skip_report: SkipReport,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """HR images `(B, 3, H, W)` in [0, 1] and the inputs of [`DecodedEstimate`], for each number of an iteration."""
    for number, batch in zip(numbers, loader):
        skip_report.add(batch["skipped"])
        generator = batch_generator(settings.seed, number * accelerator.num_processes + accelerator.process_index)
        hr = batch["hr"].to(accelerator.device, non_blocking=True).float() / 255
        lr = degrade_batch(degradations[number % len(degradations)], hr, generator)
        yield hr, *make_inputs(pipe, hr, lr, generator)


def finetune(settings: Settings, degradation_settings: list[DegradationSettings]):
    # 1. Where the run stands
    handlers = [InitProcessGroupKwargs(timeout=timedelta(hours=2))]  # the other processes wait while one validates
    with training_errors():
        accelerator = Accelerator(mixed_precision=settings.mixed_precision, kwargs_handlers=handlers)
    device, on_cuda = accelerator.device, accelerator.device.type == "cuda"
    if device.type == "cpu":
        keep_freed_memory()
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(settings.seed)
    checkpoints = Checkpoints(output, accelerator, keep=2)
    if not settings.resume and checkpoints.list():
        raise TrainingError(
            f"`output_dir={settings.output_dir!r}` has checkpoints of another run: resume it with `--resume`, or"
            " choose another folder."
        )
    fixed = fixed_settings(settings, degradation_settings, accelerator)
    iteration, checkpoint = 0, checkpoints.find("latest") if settings.resume else None
    if checkpoint is not None:
        check_unchanged(fixed, json.loads((checkpoint / "settings.json").read_text(encoding="utf-8")))
        iteration = int(checkpoint.name.rpartition("-")[2])

    # 2. Models and data
    validation, skip_report = None, SkipReport()
    with training_errors():
        dataset = make_dataset(settings.train_data, settings.crop_size, settings.seed)
    pipe = load_pipeline(settings, device)
    degradations = [Degradation(each, pipe.config.scale).to(device) for each in degradation_settings]
    for degradation in degradations:
        check_crop_size(settings.crop_size, degradation)
    if settings.validation_data is not None and accelerator.is_main_process:
        files = list_files(settings.validation_data)
        validation = ValidationSet(files, settings.validation_size, pipe.config.scale, settings.seed)
    prompt_embeds, _ = pipe.encode_prompt(None, do_classifier_free_guidance=False, device=device)
    model = DecodedEstimate(pipe, prompt_embeds)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_iterations, settings.max_iterations)
    if on_cuda and settings.cuda_graphs and accelerator.distributed_type == DistributedType.NO:
        hr = torch.zeros(settings.batch_size, 3, settings.crop_size, settings.crop_size, device=device)
        generator = torch.Generator()
        lr = degrade_batch(degradations[0], hr, generator)
        capture(model, make_inputs(pipe, hr, lr, generator), accelerator)  # before other threads use the device
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
    accelerator.register_for_checkpointing(ema, schedule)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        ema.to(device)  # accelerate loads it to the CPU
    place = (accelerator.process_index, accelerator.num_processes)
    loader = make_loader(dataset, settings.batch_size, *place, iteration, settings.num_workers, on_cuda)
    log = RunLog(output / "log.jsonl", iteration or None) if accelerator.is_main_process else None

    # 3. Loop
    numbers = range(iteration, settings.max_iterations)
    batches = make_batches(iter(loader), numbers, pipe, degradations, settings, accelerator, skip_report)
    bar = tqdm(total=settings.max_iterations, initial=iteration, disable=not accelerator.is_main_process)
    sums, counted, skipped = {}, 0, 0
    if iteration == 0 and validation is not None:
        log.append(0, validate(validation, pipe, ema, parameters))
    accelerator.wait_for_everyone()
    for hr, *inputs in prefetch(batches, device):
        estimates, reconstructions = model(*inputs)
        losses = {
            "mse": F.mse_loss(estimates, hr),
            "reconstruction": F.mse_loss(reconstructions, hr[: len(reconstructions)]),
        }
        accelerator.backward(losses["mse"] + losses["reconstruction"])
        norm = clipped_step(accelerator, model, optimizer, settings.max_grad_norm)
        skipped = 0 if math.isfinite(norm) else skipped + 1
        if skipped == MAX_SKIPPED_STEPS:
            raise TrainingError(
                f"The gradients of {skipped} consecutive iterations were not finite: lower `--learning_rate`, or train"
                " with `--mixed_precision bf16` or `no`, in another folder."
            )
        schedule.step()
        ema.step(parameters)

        iteration, counted = iteration + 1, counted + 1
        bar.update()
        finished = iteration == settings.max_iterations
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        if iteration % settings.log_every == 0 or finished:
            means = {name: accelerator.reduce(value / counted, "mean").item() for name, value in sums.items()}
            sums, counted = {}, 0
            if log is not None:
                log.append(iteration, means | {"learning_rate": schedule.get_last_lr()[0]})
        if iteration % settings.validate_every == 0 or finished:
            if validation is not None:
                log.append(iteration, validate(validation, pipe, ema, parameters))
            accelerator.wait_for_everyone()
        if iteration % settings.checkpoint_every == 0 or finished:
            with checkpoints.save(iteration) as folder:
                accelerator.save_state(str(folder))
                if accelerator.is_main_process:
                    (folder / "settings.json").write_text(json.dumps(fixed), encoding="utf-8")
    bar.close()
    skip_report.add(gather_object(list(skip_report.reasons.items())))
    if skip_report and accelerator.is_main_process:
        print(skip_report.summary(), file=sys.stderr)

    # 4. The pipeline, with the averaged weights
    if accelerator.is_main_process:
        ema.copy_to(parameters)
        card = card_metadata(pipe)
        tables = [
            settings_table((settings, degradation_settings[0])),
            validation_table(read_log(output / "log.jsonl")),
        ]
        for other in degradation_settings[1:]:
            tables += ["Every other batch was degraded by:", settings_table((other,))]
        card["training"] = "\n\n".join(filter(None, tables))
        card["training_data"] = f"High-resolution images: {', '.join(f'`{name}`' for name in settings.train_data)}."
        pipe.register_to_config(model_card=card)
        pipe.noise_predictor.register_to_config(model_card=card)
        save_whole(pipe.to("cpu", torch.float16), output / "pipeline")
    accelerator.end_training()


def validate(
    validation: ValidationSet, pipe: InvSRPipeline, ema: EMAModel, parameters: list[nn.Parameter]
) -> dict[str, float]:
    """Metrics of the averaged weights, by name. The trained ones stay as they are."""
    ema.store(parameters)
    ema.copy_to(parameters)
    metrics, _ = validation.measure(pipe)
    ema.restore(parameters)
    return metrics


def main(argv: list[str] | None = None):
    try:
        finetune(*parse_args(sys.argv[1:] if argv is None else argv))
    except TrainingError as error:  # a sentence for the user; anything else is a bug, with its traceback
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
