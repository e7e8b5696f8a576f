#!/usr/bin/env python
"""
Train a miniature InvSR model from scratch on a CPU: autoencoder, diffusion prior and noise predictor.

    python examples/tiny/train_tiny.py --kodak kodak/ --work work/ --output tiny-model/

The stages run in the order of `STAGES`, each within its budget of minutes, and resume from their last checkpoint in
`--work`. `autoencoder` and `prior` do not need each other and may run side by side (`--stage autoencoder`, ...).
Seeds are fixed, but with a budget in minutes the number of iterations depends on the machine.

What differs from the published model, and why:

- The autoencoder reduces by 4, not 8, so that latents have the resolution of the LR image and the predictor needs no
  downsampling. Its encoder is not learned but a PCA of 4x4 patches, see `pca_autoencoder.py`.
- The prior is unconditional and learns only the noise levels that sampling visits (steps 1 to 260 of 1000;
  `--prior-steps` for more).
- The predictor is trained with L2 of latents, and later also with L1 of pixels. Without perceptual and adversarial
  losses the results are faithful but smooth.

Half of the training samples are crops of photographs 1 to 16 of the Kodak set, half are procedural (`procedural.py`).
Kodak 17 to 24 are left for measurements. Two of the sixteen are held back for validation.
Needs `pip install ".[training]"`.
"""

import argparse
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from pca_autoencoder import LATENT_CHANNELS, build_vae, set_pca_encoder
from PIL import Image
from procedural import draw_image

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline, InvSRScheduler
from diffusers_invsr.degradation.simple import SCALE, simple_degradation
from diffusers_invsr.files import save_atomically
from diffusers_invsr.resampling import enlarge
from diffusers_invsr.scheduling_invsr import START_TIMESTEPS
from diffusers_invsr.training import one_step_estimate


STAGES = ("pool", "autoencoder", "prior", "predictor", "assemble")
VALIDATION_PHOTOGRAPHS = (8, 15)  # of Kodak 1 to 16
LR_SIZES = (32, 48)  # patch sides in LR (and latent) pixels; the larger ones keep GroupNorm's statistics honest
LARGE_PATCH_PROBABILITY = 0.2
MODEL_CARD = {
    "license": "cc0-1.0",
    "training_data": (
        "Trained from scratch: half of the samples are crops of photographs 1 to 16 of the Kodak set, half are"
        " procedural images. Degradation: Gaussian blur, x4 downsampling, Gaussian noise, JPEG. Too small a model for"
        " more than demonstrations and tests."
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a miniature InvSR model from scratch.")
    parser.add_argument("--kodak", type=Path, required=True, help="Folder with kodim01.png to kodim16.png.")
    parser.add_argument("--work", type=Path, required=True, help="Folder for the image pool, checkpoints and logs.")
    parser.add_argument("--output", type=Path, required=True, help="Folder the finished pipeline is written to.")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all", help="Stage to run.")
    parser.add_argument("--pool-size", type=int, default=1200, help="Number of procedural images.")
    parser.add_argument("--minutes-autoencoder", type=float, default=14, help="Training time of the decoder.")
    parser.add_argument("--minutes-prior", type=float, default=14, help="Training time of the diffusion prior.")
    parser.add_argument("--minutes-predictor", type=float, default=70, help="Training time of the noise predictor.")
    parser.add_argument("--prior-steps", type=int, default=260, help="The prior learns steps 1 to this one of 1000.")
    parser.add_argument("--batch-size", type=int, default=16, help="Samples per iteration (of the small patch size).")
    parser.add_argument("--lr-autoencoder", type=float, default=2e-3, help="Peak learning rate of the decoder.")
    parser.add_argument("--lr-prior", type=float, default=8e-4, help="Peak learning rate of the prior.")
    parser.add_argument("--lr-predictor", type=float, default=8e-4, help="Peak learning rate of the predictor.")
    parser.add_argument(
        "--pixel-loss-from", type=float, default=0.55, help="Share of the time after which the L1 of pixels is added."
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16 autocast or plain fp32.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Torch device.")
    parser.add_argument("--workers", type=int, default=2, help="Threads that share a batch (1 on a GPU).")
    parser.add_argument("--chunk-size", type=int, default=4, help="Samples that a worker takes at a time.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of every random choice.")
    args = parser.parse_args(argv)
    if not args.kodak.is_dir():
        parser.error(f"`--kodak` must be a folder, but {args.kodak} does not exist.")
    if not START_TIMESTEPS[0] <= args.prior_steps <= 1000:
        parser.error(f"`--prior-steps` must be between {START_TIMESTEPS[0]} and 1000, got {args.prior_steps}.")
    missing = [n for n in range(1, 17) if not (args.kodak / f"kodim{n:02d}.png").is_file()]
    if missing:
        parser.error(f"`--kodak` must have kodim01.png to kodim16.png, but kodim{missing[0]:02d}.png is missing.")
    return args


# Files


def load(args: argparse.Namespace, stage: str) -> dict:
    path = args.work / f"{stage}.pt"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: run `--stage {stage}` first.")
    return torch.load(path, map_location=args.device, weights_only=False)


def log(args: argparse.Namespace, **record) -> None:
    """Append one record to log-<stage>.jsonl (one file per stage, as two stages may run side by side)."""
    record = {key: round(value, 5) if isinstance(value, float) else value for key, value in record.items()}
    print(json.dumps(record), flush=True)
    with open(args.work / f"log-{record['stage']}.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


# Data


class Crops:
    """Random crops: half from photographs, half from the procedural pool, in the eight orientations."""

    def __init__(self, args: argparse.Namespace, stage: str):
        photographs = {n: np.asarray(Image.open(args.kodak / f"kodim{n:02d}.png")) for n in range(1, 17)}
        procedural = load(args, "pool")["images"]
        self.validation = [photographs.pop(n) for n in VALIDATION_PHOTOGRAPHS] + list(procedural[-4:])
        self.natural, self.procedural = list(photographs.values()), procedural[:-4]
        self.device = args.device
        # A resumed stage continues with other samples.
        finished = load(args, stage)["iteration"] if (args.work / f"{stage}.pt").is_file() else 0
        torch.manual_seed(args.seed + finished)
        self.rng = np.random.default_rng((args.seed, STAGES.index(stage), finished))

    def crop(self, size: int, natural: bool) -> np.ndarray:
        source = self.natural if natural else self.procedural
        image = source[self.rng.integers(len(source))]
        y, x = (self.rng.integers(side - size + 1) for side in image.shape[:2])
        image = np.rot90(image[y : y + size, x : x + size], self.rng.integers(4))
        return np.ascontiguousarray(image[:, ::-1] if self.rng.random() < 0.5 else image)

    def hr(self, batch_size: int, size: int) -> torch.Tensor:
        """HR crops (batch, 3, size, size) in [0, 1]."""
        return to_tensor([self.crop(size, i % 2 == 0) for i in range(batch_size)], self.device)

    def pairs(self, batch_size: int, lr_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """LR and HR crops in [0, 1]."""
        hr = [self.crop(SCALE * lr_size, i % 2 == 0) for i in range(batch_size)]
        return to_tensor([simple_degradation(image, self.rng) for image in hr], self.device), to_tensor(
            hr, self.device
        )

    def draw_size(self, batch_size: int) -> tuple[int, int]:
        """Batch size and LR patch side of one iteration, with the number of pixels about constant."""
        side = LR_SIZES[int(self.rng.random() < LARGE_PATCH_PROBABILITY)]
        return max(2, round(batch_size * (LR_SIZES[0] / side) ** 2)), side


def to_tensor(images: list[np.ndarray], device: str) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(device).float() / 255


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over the batch of the PSNR in dB, for values in [0, 1]."""
    return (-10 * (x - y).square().flatten(1).mean(dim=1).log10()).mean().item()


# Models


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LR_SIZES[0],
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=32,  # no block attends to text; the entry is only required
    )


def build_predictor() -> InvSRNoisePredictor:
    return InvSRNoisePredictor(
        down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"],
        block_out_channels=[96],
        layers_per_block=[6],
        latent_channels=LATENT_CHANNELS,
        sample_size=LR_SIZES[0],
        mid_block_add_attention=False,
        temb_channels=256,
        attention_head_dim=32,
    )


def load_vae(args: argparse.Namespace, trained: bool = True) -> tuple[AutoencoderTiny, torch.Tensor]:
    """The frozen autoencoder, with its decoder trained or not yet, and the map from latents to patches."""
    pool, vae = load(args, "pool"), build_vae()
    vae.load_state_dict(pool["vae"])
    vae.register_to_config(scaling_factor=pool["scaling_factor"])
    if trained:
        vae.decoder.load_state_dict(load(args, "autoencoder")["ema_model"])
    return vae.to(args.device).eval().requires_grad_(False), pool["latent_to_patch"].to(args.device)


def load_frozen(args: argparse.Namespace, model: torch.nn.Module, stage: str) -> torch.nn.Module:
    model.load_state_dict(load(args, stage)["ema_model"])
    return model.to(args.device).eval().requires_grad_(False)


# Training


def train(args, stage, model, minutes, learning_rate, draw, loss_function, validate) -> None:
    """
    Train `model` until its minutes are used up, over all runs together.

    AdamW with a linear warm-up and a cosine decay over the *time* used: the rate is near zero when the time is up,
    however fast the machine is. The weights that count are an exponential moving average.

    A batch is cut into chunks that `--workers` threads take from a queue. On a few CPU cores with other work to do
    this is much faster than threads inside each operator, which all wait for the slowest at every layer.

    Args:
        draw (`Callable[[], tuple]`): Draws a batch: tensors whose first dimension is the batch.
        loss_function (`Callable`):
            Takes the share of the time used and (part of) a batch. Returns losses by name; "loss" is minimised.
        validate (`Callable[[], dict]`): Measures the model while it has the averaged weights.
    """
    model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = EMAModel(model.parameters(), decay=0.999)  # with the ramp min(0.999, (1 + i) / (10 + i))
    iteration, seconds, path = 0, 0.0, args.work / f"{stage}.pt"
    if path.is_file():
        state = load(args, stage)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        iteration, seconds = state["iteration"], state["seconds"]
    budget, last_time, last_save, sums, count = 60 * minutes, time.monotonic(), seconds, {}, 0

    def gradients(chunk: tuple[torch.Tensor, ...], share: float) -> tuple[tuple[torch.Tensor, ...], dict]:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16"):
            losses = loss_function(share, *chunk)
        return torch.autograd.grad(losses["loss"], parameters), {k: v.detach() for k, v in losses.items()}

    parameters, workers, batch = list(model.parameters()), ThreadPoolExecutor(args.workers), draw()
    while seconds < budget:
        share = seconds / budget
        for group in optimizer.param_groups:
            decay = 0.01 + 0.495 * (1 + math.cos(math.pi * share))
            group["lr"] = learning_rate * min(1, (iteration + 1) / 200) * decay
        chunks = list(zip(*(tensor.split(args.chunk_size) for tensor in batch)))
        futures = [workers.submit(gradients, chunk, share) for chunk in chunks]
        weights = [len(chunk[0]) / len(batch[0]) for chunk in chunks]
        batch = draw()  # the next one, while the workers compute
        results = [future.result() for future in futures]
        for i, parameter in enumerate(parameters):
            parameter.grad = sum(weight * grads[i] for weight, (grads, _) in zip(weights, results))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.step(model.parameters())
        iteration, count = iteration + 1, count + 1
        for weight, (_, losses) in zip(weights, results):
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + weight * value.item()
        now = time.monotonic()
        seconds, last_time = seconds + now - last_time, now

        if seconds - last_save > 120 or seconds >= budget:
            raw_weights = {name: value.clone() for name, value in model.state_dict().items()}
            ema.copy_to(model.parameters())
            state = {"ema_model": {name: value.clone() for name, value in model.state_dict().items()}}
            model.eval()
            with torch.no_grad():
                metrics = validate()
            model.train().load_state_dict(raw_weights)
            state |= {"model": raw_weights, "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            save_atomically(state | {"iteration": iteration, "seconds": seconds}, path)
            means = {name: value / count for name, value in sums.items()}
            log(args, stage=stage, iteration=iteration, seconds=seconds, seed=args.seed, **means, **metrics)
            last_save, sums, count = seconds, {}, 0


def make_pool(args: argparse.Namespace) -> None:
    """Draw the procedural images, each from its own seed, and set the encoder."""
    if (args.work / "pool.pt").is_file():
        return
    start = time.monotonic()
    images = np.stack([draw_image(np.random.default_rng((args.seed, i))) for i in range(args.pool_size)])
    torch.manual_seed(args.seed)
    photographs = [np.asarray(Image.open(args.kodak / f"kodim{n:02d}.png")) for n in range(1, 17)]
    vae = build_vae()
    latent_to_patch = set_pca_encoder(vae, photographs, images)
    state = {"images": images, "vae": vae.state_dict(), "scaling_factor": vae.config.scaling_factor}
    save_atomically(state | {"latent_to_patch": latent_to_patch}, args.work / "pool.pt")
    log(args, stage="pool", seconds=time.monotonic() - start, images=len(images), seed=args.seed)


def train_autoencoder(args: argparse.Namespace) -> None:
    """Train the decoder to invert the fixed encoder, with L1 and a little MSE (which punishes isolated errors)."""
    vae, _ = load_vae(args, trained=False)
    decoder = vae.decoder.requires_grad_(True)
    crops = Crops(args, "autoencoder")
    validation = to_tensor([image[:256, :256] for image in crops.validation], args.device)

    def draw() -> tuple[torch.Tensor]:
        return (crops.hr(args.batch_size, 64),)

    def loss_function(share: float, hr: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            latents = vae.encode(2 * hr - 1).latents
        error = (decoder(latents.contiguous(memory_format=torch.channels_last)).float() / 2 + 0.5) - hr
        l1, mse = error.abs().mean(), error.square().mean()
        return {"loss": l1 + 2 * mse, "l1": l1, "mse": mse}

    def validate() -> dict[str, float]:
        result = (decoder(vae.encode(2 * validation - 1).latents) / 2 + 0.5).clamp(0, 1)
        return {"psnr_natural": psnr(result[:2], validation[:2]), "psnr_procedural": psnr(result[2:], validation[2:])}

    decoder.to(memory_format=torch.channels_last)  # twice as fast for the decoder, slower for the UNet
    train(args, "autoencoder", decoder, args.minutes_autoencoder, args.lr_autoencoder, draw, loss_function, validate)


def train_prior(args: argparse.Namespace) -> None:
    """Train the diffusion model to predict the noise in scaled latents, at the noise levels that sampling visits."""
    vae, _ = load_vae(args, trained=False)
    crops, unet, abar = Crops(args, "prior"), build_unet(), InvSRScheduler().alphas_cumprod.to(args.device)
    held_back = to_tensor([image[:256, :256] for image in crops.validation], args.device)

    def denoising_loss(hr: torch.Tensor, indices: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        latents = vae.config.scaling_factor * vae.encode(2 * hr - 1).latents.float()
        level = abar[indices].view(-1, 1, 1, 1)
        noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
        return F.mse_loss(unet(noisy, indices, encoder_hidden_states=None).sample.float(), noise)

    def noise_like(hr: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        shape = (len(hr), LATENT_CHANNELS, hr.shape[2] // SCALE, hr.shape[3] // SCALE)
        return torch.randn(shape, generator=generator).to(args.device)

    def draw() -> tuple[torch.Tensor, ...]:
        batch_size, side = crops.draw_size(args.batch_size)
        hr = crops.hr(batch_size, SCALE * side)
        return hr, torch.randint(0, args.prior_steps, (batch_size,), device=args.device), noise_like(hr)

    def loss_function(share: float, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": denoising_loss(*batch)}

    def validate() -> dict[str, float]:
        noise = noise_like(held_back, torch.Generator().manual_seed(0))
        checked = [i for i in (49, 99, 199, 249, 299, 399) if i < args.prior_steps]
        indices = {i: torch.full((len(held_back),), i, device=args.device) for i in checked}
        return {f"loss_{i + 1}": denoising_loss(held_back, index, noise).item() for i, index in indices.items()}

    train(args, "prior", unet, args.minutes_prior, args.lr_prior, draw, loss_function, validate)


def train_predictor(args: argparse.Namespace) -> None:
    """Train the noise predictor through the frozen prior (section 3.2 of the paper): ẑ₀ against the HR latent."""
    vae, latent_to_patch = load_vae(args)
    unet, scheduler = load_frozen(args, build_unet(), "prior"), InvSRScheduler()
    crops, predictor = Crops(args, "predictor"), build_predictor()
    with torch.no_grad():
        # Under L2 the best standard deviation is nearly zero. Starting at exp(-3) saves the time to unlearn one of 1.
        predictor.encoder.conv_out.bias[LATENT_CHANNELS:] = -6.0
        predictor.encoder.conv_out.weight.mul_(0.1)
    rng = np.random.default_rng(args.seed)
    images = [image[y : y + 256, :256] for image in crops.validation for y in (0, image.shape[0] - 256)]
    held_back, held_back_lr = (
        to_tensor(images, args.device),
        to_tensor([simple_degradation(x, rng) for x in images], args.device),
    )

    def one_step(lr: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Scaled latents ẑ₀ of the one-step estimate that starts at `steps` (counted from 1)."""
        latents = vae.config.scaling_factor * vae.encode(2 * enlarge(lr, SCALE) - 1).latents.float()
        return one_step_estimate(predictor, unet, scheduler, lr, latents, steps - 1, torch.randn_like(latents))

    def decode(latents: torch.Tensor) -> torch.Tensor:
        latents = (latents / vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)
        return vae.decoder(latents).float() / 2 + 0.5

    def draw() -> tuple[torch.Tensor, ...]:
        batch_size, side = crops.draw_size(args.batch_size)
        steps = torch.tensor(START_TIMESTEPS)[torch.randint(0, 4, (batch_size,))].to(args.device)
        return *crops.pairs(batch_size, side), steps

    def loss_function(share: float, lr: torch.Tensor, hr: torch.Tensor, steps: torch.Tensor) -> dict:
        target = vae.config.scaling_factor * vae.encode(2 * hr - 1).latents.float()
        estimate = one_step(lr, steps)
        latent_l2 = F.mse_loss(estimate, target)
        # The same error in the metric of pixels, which a linear encoder allows without decoding.
        patch_l2 = torch.einsum("bchw,cp->bphw", (estimate - target).float(), latent_to_patch).square().mean()
        losses = {"loss": 0.5 * latent_l2 + 40 * patch_l2, "latent_l2": latent_l2, "patch_l2": patch_l2}
        if share >= args.pixel_loss_from:
            half = (len(hr) + 1) // 2  # decoding costs as much as all the rest: half of the batch is enough
            pixel_l1 = (decode(estimate[:half]) - hr[:half]).abs().mean()
            losses |= {"loss": losses["loss"] + 2 * pixel_l1, "pixel_l1": pixel_l1}
        return losses

    def validate() -> dict[str, float]:
        results = {"bicubic": enlarge(held_back_lr, SCALE)}
        for step in START_TIMESTEPS:
            steps = torch.full((len(held_back),), step, device=args.device)
            results[str(step)] = decode(one_step(held_back_lr, steps))
        natural = {f"natural_{name}": psnr(x[:4].clamp(0, 1), held_back[:4]) for name, x in results.items()}
        return natural | {f"procedural_{name}": psnr(x[4:].clamp(0, 1), held_back[4:]) for name, x in results.items()}

    vae.decoder.to(memory_format=torch.channels_last)
    train(args, "predictor", predictor, args.minutes_predictor, args.lr_predictor, draw, loss_function, validate)


def assemble(args: argparse.Namespace) -> None:
    """Write the averaged weights of the latest checkpoints as a pipeline, in half precision."""
    vae, _ = load_vae(args)
    noise_predictor = load_frozen(args, build_predictor(), "predictor")
    noise_predictor.register_to_config(model_card=MODEL_CARD)
    pipeline = InvSRPipeline(
        vae=vae.half(),
        text_encoder=None,
        tokenizer=None,
        unet=load_frozen(args, build_unet(), "prior").half(),
        scheduler=InvSRScheduler(),
        noise_predictor=noise_predictor.half(),
        model_card=MODEL_CARD,
    )
    pipeline.save_pretrained(args.output)
    # AutoencoderTiny saves an entry that it derives itself, and about which it warns when it is loaded.
    config = args.output / "vae" / "config.json"
    entries = json.loads(config.read_text())
    del entries["block_out_channels"]
    config.write_text(json.dumps(entries, indent=2) + "\n")
    size = sum(file.stat().st_size for file in args.output.rglob("*.safetensors"))
    log(args, stage="assemble", megabytes=size / 1e6)
    # For the model card: the last record of each stage.
    logs = [args.work / f"log-{stage}.jsonl" for stage in STAGES]
    records = [json.loads(path.read_text().splitlines()[-1]) for path in logs if path.is_file()]
    (args.work / "training.json").write_text(json.dumps(records, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    if torch.device(args.device).type == "cpu":
        torch.set_num_threads(1)  # the workers are the threads
    functions = dict(zip(STAGES, (make_pool, train_autoencoder, train_prior, train_predictor, assemble)))
    for stage in STAGES if args.stage == "all" else (args.stage,):
        functions[stage](args)


if __name__ == "__main__":
    main()
