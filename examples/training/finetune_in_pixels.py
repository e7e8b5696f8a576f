#!/usr/bin/env python
"""
Fine-tune the noise predictor and the VAE's decoder together, on the squared error of the decoded pixels.

    python examples/training/finetune_in_pixels.py examples/training/configs/tiny_degradation.yaml \
        --model my-run/pipeline --train_data photos/ --output_dir finetuned

Beyond the paper, whose losses are all in latent space and whose VAE stays as it is: a decoder that was trained on
latents of sharp images alone meets others here, one-step estimates from damaged ones. A quarter of the HR images are
decoded from their own latents besides, and their error counts as much, so that it stays an inverse of the encoder,
which is frozen as the diffusion model is. For small models: the decoder is differentiated at the full resolution.

The YAML file may be one of `train_invsr.py`: what is no setting of this script is ignored. On CPUs
`ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 examples/training/finetune_in_pixels.py ...` starts one process per
core. The same command with `--resume` goes on from the last checkpoint, on CPUs to the very same weights. The output
folder gets `pipeline/` (in float16), `log.jsonl` and the checkpoints. Needs `pip install ".[training]"`.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from train_invsr import (
    CLASSES,
    VALIDATION_TIMEOUT,
    batch_generator,
    degrade,
    descend,
    describe,
    draw_starts,
    parse_settings,
    refusals_as_sentences,
    require_bound,
    require_positive,
    setting,
)
from transformers import HfArgumentParser

from diffusers_invsr import TINY, InvSRNoisePredictor, InvSRPipeline, keep_freed_memory
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
    ValidationSet,
    encode_posterior,
    list_files,
    make_dataset,
    make_loader,
    one_step_estimate,
    read_log,
)


CLEAN_SHARE = 4  # one in so many images is also decoded from its own latents
MAX_SKIPPED_STEPS = 25  # in a row; the first ones of float16 are, until its scale fits
COURSE = "settings.json"  # of a checkpoint: all that the weights hang on


@dataclass
class Settings:
    model: str | None = setting("Folder or Hub id of the pipeline to go on from, or `tiny`, the model in the package.")
    train_data: list[str] = setting("HR images: folders, `folder[:N]`, lists, `webdataset:...`, `datasets:...`.", [])
    validation_data: str | None = setting("HR images for validation: a folder, `folder[:N]` or a list. None: none.")
    validation_size: int = setting("Side of the part of them that is used, in the middle, in pixels.", 512)
    extra_layers: int = setting("ResNet layers to add to the predictor's last level; at first they change nothing.", 0)
    output_dir: str = setting("Folder of everything that the run writes.", "finetuned")
    resume: bool = setting("Go on from the last checkpoint in the output folder.", False)
    seed: int = setting("Seed of every random choice.", 0)
    crop_size: int = setting("Side of the HR crops in pixels.", 128)
    batch_size: int = setting("Images a process takes at once.", 16)
    also_degraded_by: str | None = setting("YAML file of another degradation, for every other batch.", None)
    num_workers: int = setting("Processes that read images, for each process that trains.", 1)
    max_iterations: int = setting("Iterations (updates of the weights).", 1_000)
    warmup_iterations: int = setting("Iterations in which the learning rate rises; then it falls by a cosine.", 50)
    learning_rate: float = setting("Peak learning rate of both networks.", 2e-4)
    max_grad_norm: float = setting("Bound of the gradients' norm.", 1.0)
    cuda_graphs: bool = setting("On one CUDA device: run the networks as graphs, which hold their memory.", True)
    mixed_precision: str | None = setting("`no`, `bf16` or `fp16`. None: what `accelerate config` says.")
    ema_decay: float = setting("Bound of the moving average's decay, min(bound, (1 + i) / (10 + i)).", 0.999)
    log_every: int = setting("Iterations between lines of the log.", 20)
    validate_every: int = setting("Iterations between validations.", 250)
    checkpoint_every: int = setting("Iterations between checkpoints.", 100)


def parse_args(argv: list[str]) -> tuple[Settings, list[DegradationSettings]]:
    """The settings, checked, and those of one degradation or two."""
    usage = "%(prog)s [SETTINGS.yaml] [--setting value ...]"
    description = __doc__.strip().splitlines()[0]
    parser = HfArgumentParser((Settings, DegradationSettings), usage=usage, description=description)
    settings, *degradations = parse_settings(parser, argv, ignored=CLASSES)
    if settings.model is None:
        parser.error("--model has to name the pipeline to go on from.")
    if not settings.train_data:
        parser.error("--train_data has to name at least one source of images.")
    if settings.extra_layers < 0:
        parser.error(f"--extra_layers has to be 0 or more, but is {settings.extra_layers}.")
    require_positive(
        parser, settings, "max_iterations", "batch_size", "log_every", "validate_every", "checkpoint_every"
    )
    require_bound(parser, settings.max_grad_norm)
    if settings.also_degraded_by is not None:
        degradations += parse_settings(HfArgumentParser(DegradationSettings, usage=usage), [settings.also_degraded_by])
    return settings, degradations


def deepen(
    predictor: InvSRNoisePredictor, extra_layers: int, like: InvSRNoisePredictor | None = None
) -> InvSRNoisePredictor:
    """
    A predictor with more ResNet layers in its last level, which gives the same: the new ones add zero. The rest of
    their weights is that of `like`, as far as it has them, or else random.
    """
    layers = predictor.config.layers_per_block
    *others, last = [layers] * len(predictor.config.block_out_channels) if isinstance(layers, int) else layers
    deeper = InvSRNoisePredictor.from_config(predictor.config, layers_per_block=[*others, last + extra_layers])
    known, model = predictor.state_dict(), {} if like is None else like.state_dict()
    for name, value in deeper.state_dict().items():
        if name in known:
            value.copy_(known[name])
        elif ".conv2." in name or ".to_out.0." in name:  # what a layer adds comes from there
            value.zero_()
        elif name in model and model[name].shape == value.shape:
            value.copy_(model[name])
    return deeper.to(predictor.device, predictor.dtype).eval()


def prefetch(prepare: Callable[[int], tuple], numbers: range, device: torch.device) -> Iterator[tuple]:
    """
    `prepare(number)` for each number. On CUDA the next batch is prepared by a thread, on a stream of its own, while
    the last is in use: degrading is many small steps that wait for one another.
    """
    if device.type != "cuda":
        yield from map(prepare, numbers)
        return
    # Of high priority, so that these small steps come between those of the networks
    stream, main = torch.cuda.Stream(device, priority=-1), torch.cuda.current_stream(device)
    stream.wait_stream(main)  # for the weights

    def prepare_aside(number: int) -> tuple:
        with torch.cuda.stream(stream):
            return prepare(number)

    with ThreadPoolExecutor(1) as thread:
        batches = (thread.submit(prepare_aside, number) for number in numbers)
        following = next(batches, None)
        while following is not None:
            batch = following.result()
            main.wait_stream(stream)
            for tensor in batch:
                tensor.record_stream(main)
            following = next(batches, None)
            yield batch


class DecodedEstimate(nn.Module):
    """From LR images to pixels through one step of the frozen diffusion model, and from latents to pixels."""

    def __init__(self, pipe: InvSRPipeline, prompt_embeds: torch.Tensor | None):
        super().__init__()
        self.noise_predictor, self.vae = pipe.noise_predictor, pipe.vae
        self.frozen = (pipe.unet, pipe.scheduler)  # in a tuple, so that they are no parts of this module
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
    """What [`DecodedEstimate`] takes, of HR images `(B, 3, H, W)` and LR images `(B, 3, h, w)` in [0, 1]."""
    posterior = encode_posterior(pipe.vae, hr)
    timesteps, noise, lr_latents, hr_latents = draw_starts(pipe, lr, posterior, START_TIMESTEPS, generator)
    return lr, lr_latents, timesteps, noise, hr_latents[: math.ceil(len(hr) / CLEAN_SHARE)]


def capture(model: DecodedEstimate, inputs: tuple[torch.Tensor, ...], accelerator: Accelerator):
    """
    Has the model run as CUDA graphs, forward and backward, for `inputs` of these shapes (of [`make_inputs`]): so the
    many small kernels need not be launched one by one.
    """
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # worthwhile: the shapes stay
    with accelerator.autocast(AutocastKwargs(cache_enabled=False)):
        torch.cuda.make_graphed_callables(model, inputs)
    torch.backends.cudnn.benchmark = benchmark


def freeze(pipe: InvSRPipeline):
    """Leaves gradients to the noise predictor and to what decodes."""
    pipe.unet.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    pipe.vae.decoder.requires_grad_(True)
    if getattr(pipe.vae, "post_quant_conv", None) is not None:
        pipe.vae.post_quant_conv.requires_grad_(True)


@refusals_as_sentences()
def main(argv: list[str] | None = None):
    settings, degradation_settings = parse_args(sys.argv[1:] if argv is None else argv)
    handlers = [InitProcessGroupKwargs(timeout=VALIDATION_TIMEOUT)]
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, kwargs_handlers=handlers)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(settings.seed)

    # 1. Where it goes on
    checkpoints = Checkpoints(output, accelerator, keep=2)
    if not settings.resume and checkpoints.list():
        raise SystemExit(
            f"`output_dir={settings.output_dir!r}` holds checkpoints of another run: continue it with `--resume`, or"
            " choose another folder."
        )
    # All but what does not change the weights has to stay
    course = {
        name: value
        for name, value in (dataclasses.asdict(settings) | dataclasses.asdict(degradation_settings[0])).items()
        if name not in ("also_degraded_by", "output_dir", "resume", "num_workers", "cuda_graphs")
        and not name.startswith("validation_")
        and not name.endswith("_every")
    }
    course |= {"num_processes": accelerator.num_processes, "device": accelerator.device.type}  # where noise is drawn
    course["also_degraded_by"] = [dataclasses.asdict(other) for other in degradation_settings[1:]]
    iteration, checkpoint = 0, checkpoints.find("latest") if settings.resume else None
    if checkpoint is not None:
        # Checkpoints from before there were these settings do not tell them
        before = {"extra_layers": 0, "also_degraded_by": [], "device": "cpu"}
        before |= json.loads((checkpoint / COURSE).read_text(encoding="utf-8"))
        changed = [name for name in course if course[name] != before.get(name)]
        if changed:
            raise SystemExit(f"{checkpoint} is of a run with other {' and '.join(changed)}: choose another folder.")
        iteration = int(checkpoint.name.rpartition("-")[2])

    # 2. Models
    dataset = make_dataset(settings.train_data, settings.crop_size, settings.seed)
    model = TINY if settings.model == "tiny" else settings.model
    try:
        pipe = InvSRPipeline.from_pretrained(model, dtype=torch.float32)
    except (OSError, HFValidationError) as error:
        if Path(model).is_dir():
            raise ValueError(f"`model={settings.model!r}` cannot be loaded as a pipeline: {error}") from error
        raise FetchError(model, error) from error
    pipe.set_progress_bar_config(disable=True)
    if pipe.takes_text and pipe.text_encoder is not None:
        pipe.drop_text_encoder()  # the prompt is embedded once and for all
    if settings.extra_layers:
        pipe.register_modules(noise_predictor=deepen(pipe.noise_predictor, settings.extra_layers))
    freeze(pipe)
    pipe.to(accelerator.device)
    pipe.vae.decoder.to(memory_format=torch.channels_last)
    prompt_embeds, _ = pipe.encode_prompt(None, do_classifier_free_guidance=False, device=accelerator.device)
    # A CUDA graph cannot copy them from the CPU
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(accelerator.device)
    degradations = [Degradation(each, pipe.config.scale).to(accelerator.device) for each in degradation_settings]
    model = DecodedEstimate(pipe, prompt_embeds)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_cuda = accelerator.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_iterations, settings.max_iterations)
    if on_cuda and settings.cuda_graphs and accelerator.distributed_type == DistributedType.NO:
        hr = torch.zeros(settings.batch_size, 3, settings.crop_size, settings.crop_size, device=accelerator.device)
        generator = torch.Generator()
        lr = degrade(degradations[0], hr, generator)
        capture(model, make_inputs(pipe, hr, lr, generator), accelerator)  # before other threads use the device
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
    accelerator.register_for_checkpointing(ema, schedule)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        ema.to(accelerator.device)  # accelerate reads it to the CPU

    def write_checkpoint(folder: Path):
        accelerator.save_state(str(folder))
        if accelerator.is_main_process:
            (folder / COURSE).write_text(json.dumps(course), encoding="utf-8")

    log = RunLog(output / "log.jsonl", iteration or None) if accelerator.is_main_process else None

    # 3. Data
    place = (accelerator.process_index, accelerator.num_processes)
    batches = iter(make_loader(dataset, settings.batch_size, *place, iteration, settings.num_workers, on_cuda))
    validation, skip_report = None, SkipReport()
    if settings.validation_data is not None and accelerator.is_main_process:
        validation = ValidationSet(
            list_files(settings.validation_data), settings.validation_size, pipe.config.scale, settings.seed
        )

    def prepare(number: int) -> tuple[torch.Tensor, ...]:
        generator = batch_generator(settings.seed, number * place[1] + place[0])
        batch = next(batches)
        skip_report.add(batch["skipped"])
        hr = batch["hr"].to(accelerator.device, non_blocking=True).float() / 255
        lr = degrade(degradations[number % len(degradations)], hr, generator)
        return hr, *make_inputs(pipe, hr, lr, generator)

    def validate():
        if validation is not None:
            ema.store(parameters)
            ema.copy_to(parameters)
            metrics, _ = validation.measure(pipe)
            ema.restore(parameters)
            log.append(iteration, metrics)
        accelerator.wait_for_everyone()

    # 4. Loop
    if iteration == 0:
        validate()
    bar = tqdm(total=settings.max_iterations, initial=iteration, disable=not accelerator.is_main_process)
    sums, counted, skipped = {}, 0, 0
    numbers = range(iteration, settings.max_iterations)
    for hr, *inputs in prefetch(prepare, numbers, accelerator.device):
        estimates, reconstructions = model(*inputs)
        losses = {
            "mse": F.mse_loss(estimates, hr),
            "reconstruction": F.mse_loss(reconstructions, hr[: len(reconstructions)]),
        }
        accelerator.backward(losses["mse"] + losses["reconstruction"])
        norm = descend(accelerator, model, optimizer, settings.max_grad_norm)
        skipped = 0 if math.isfinite(norm) else skipped + 1
        if skipped == MAX_SKIPPED_STEPS:
            raise SystemExit(
                f"The gradients of {skipped} iterations in a row were not finite: lower `--learning_rate`, or train"
                " with `--mixed_precision bf16` or `no`, in another folder."
            )
        schedule.step()
        ema.step(parameters)

        iteration, counted = iteration + 1, counted + 1
        bar.update()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        if iteration % settings.log_every == 0 or iteration == settings.max_iterations:
            means = {name: accelerator.reduce(value / counted, "mean").item() for name, value in sums.items()}
            sums, counted = {}, 0
            if log is not None:
                log.append(iteration, means | {"learning_rate": schedule.get_last_lr()[0]})
        if iteration % settings.validate_every == 0 or iteration == settings.max_iterations:
            validate()
        if iteration % settings.checkpoint_every == 0 or iteration == settings.max_iterations:
            checkpoints.save(iteration, write_checkpoint)
    bar.close()
    skip_report.add(gather_object(list(skip_report.reasons.items())))
    if skip_report and accelerator.is_main_process:
        print(skip_report.summary(), file=sys.stderr)

    # 5. The pipeline, with the averaged weights
    if accelerator.is_main_process:
        ema.copy_to(parameters)
        card = card_metadata(pipe)
        card["training"] = describe((settings, degradation_settings[0]), read_log(output / "log.jsonl"))
        for other in degradation_settings[1:]:
            card["training"] += f"\n\nEvery other batch was degraded by:\n\n{describe((other,), [])}"
        card["training_data"] = f"High-resolution images: {', '.join(f'`{name}`' for name in settings.train_data)}."
        pipe.register_to_config(model_card=card)
        pipe.noise_predictor.register_to_config(model_card=card)
        save_whole(pipe.to("cpu", torch.float16), output / "pipeline")
    accelerator.end_training()


if __name__ == "__main__":
    main()
