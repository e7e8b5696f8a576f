#!/usr/bin/env python
"""
Make the embedded model `TINY`: the diffusion model, then the noise predictor and the decoder in pixels.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 \
        examples/tiny/recipe.py examples/tiny/recipe.yaml --data data/ --work work/

`data/` has a folder of photographs for each group in the YAML file. `work/` gets the decoded pictures, a checkpoint
and a log for each stage, and `pipeline/`, at each validation and at the end. A run that was stopped, at any moment,
resumes with the same command and gives the same weights as one that was not. One process and two give the same; more
find no work.

The start step is the slider between fidelity and realism: the weights of the losses depend on it. At 100 squared error
counts, from there to 250 more and more the perceptual and the adversarial loss.

Needs `pip install ".[training]"`.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from crops import Crops, decode
from torch import nn

from diffusers_invsr import TINY, InvSRPipeline
from diffusers_invsr.files import save_atomically
from diffusers_invsr.metrics import gradient_ratio, psnr_y, ssim_y
from diffusers_invsr.resampling import enlarge
from diffusers_invsr.training import (
    Degradation,
    DegradationSettings,
    PixelDiscriminator,
    RunLog,
    ShiftTolerantLPIPS,
    hinge_discriminator,
    hinge_generator,
    lattice_energy,
    lattice_loss,
    lattice_prominence,
    one_step_estimate,
    weights_by_start,
)


STAGES = ("prior", "slider")
WARMUP = 100  # iterations in which a learning rate rises
EMA_DECAY = 0.999
MAX_GRAD_NORM = 1.0
LOSSES = ("mse", "lattice", "lpips", "adversarial")  # of the slider, each with a weight by start
MAX_SHIFT = 4  # pixels by which the perceptual network sees results shifted, against the lattice of the latents


@dataclass
class Chunk:
    """HR images of a part of a batch and the sources of all other randomness of this part."""

    hr: torch.Tensor
    rng: np.random.Generator
    generator: torch.Generator


def draw_chunks(crops: Crops, settings: dict, stage: str, iteration: int) -> Iterator[Chunk]:
    """The parts of a batch that this process computes. They depend on their numbers alone: resuming needs no state."""
    for number in range(rank(), settings[stage]["chunks"], world_size()):
        sequence = np.random.SeedSequence((settings["seed"], STAGES.index(stage), iteration, number))
        rng, generator = np.random.default_rng(sequence), torch.Generator()
        generator.manual_seed(int(rng.integers(2**62)))
        yield Chunk(crops.draw(settings[stage]["chunk_size"], rng), rng, generator)


# Processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share_gradients(parameters: list[nn.Parameter], chunks: int):
    """The mean of all chunks' gradients, from each process' sum."""
    gradients = torch.cat([parameter.grad.flatten() for parameter in parameters])
    if dist.is_initialized():
        dist.all_reduce(gradients)
    for parameter, gradient in zip(parameters, gradients.split([p.numel() for p in parameters])):
        parameter.grad.copy_(gradient.view_as(parameter) / chunks)


class Trained:
    r"""
    A network under training: its optimizer, its learning rates and the moving average of its weights.

    Args:
        groups (`dict[float, list[nn.Parameter]]`): Parameters by their peak learning rate.
        stage (`dict`): `iterations` in all, and `cooldown`, the last ones, in which learning rates fall by a cosine.
        betas (`tuple[float, float]`): Of AdamW.
    """

    def __init__(self, groups: dict[float, list[nn.Parameter]], stage: dict, betas=(0.9, 0.99)):
        self.parameters = [parameter for group in groups.values() for parameter in group]
        groups = [{"params": group, "peak": rate} for rate, group in groups.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=1e-4)
        self.cooldown = stage["cooldown"]
        self.cooldown_from = stage["iterations"] - self.cooldown
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        for parameter in self.parameters:  # those of a loss that counts for no image of a batch are zero
            parameter.grad = torch.zeros_like(parameter)

    def step(self, iteration: int, chunks: int) -> float:
        """Descend the gradients of iteration `iteration`, counted from 0; returns their norm."""
        share_gradients(self.parameters, chunks)
        norm = nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM).item()
        decay = 0.02 + 0.49 * (1 + math.cos(math.pi * max(0, iteration - self.cooldown_from) / self.cooldown))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, (iteration + 1) / WARMUP) * decay
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        weight = 1 - min(EMA_DECAY, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, weight)
        return norm

    @contextlib.contextmanager
    def averaged(self):
        """The moving average in place of the weights."""
        weights = [parameter.detach().clone() for parameter in self.parameters]
        self.write(self.average)
        yield
        self.write(weights)

    @torch.no_grad()
    def write(self, values: list[torch.Tensor]):
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)

    def state_dict(self) -> dict:
        return {
            "weights": [parameter.detach() for parameter in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict):
        self.write(state["weights"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])


# Stages


class PriorStage:
    """The diffusion model, on the latents of HR images, at the noise levels that sampling visits (from 1)."""

    def __init__(self, pipe: InvSRPipeline, settings: dict):
        stage = settings["prior"]
        self.pipe, self.last_step = pipe, stage["last_step"]
        pipe.unet.requires_grad_(True).train().to(memory_format=torch.channels_last)
        groups = {stage["learning_rate"]: list(pipe.unet.parameters())}
        self.trained = {"unet": Trained(groups, stage)}

    def losses(self, chunk: Chunk, iteration: int) -> dict[str, float]:
        """The losses' values, of which the gradients are added to those of the parameters."""
        latents = self.pipe.encode_image(chunk.hr, torch.zeros(1))
        noise = torch.randn(latents.shape, generator=chunk.generator)
        timesteps = torch.randint(self.last_step, (len(noise),), generator=chunk.generator)
        loss = self.loss(latents, timesteps, noise)
        loss.backward()
        return {"loss": loss.item()}

    def loss(self, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        alphas = self.pipe.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.pipe.unet(noisy, timesteps, encoder_hidden_states=None).sample
        return F.mse_loss(predicted.float(), noise)

    @torch.no_grad()
    def validate(self, pictures: list[torch.Tensor]) -> dict[str, float]:
        values = {}
        for start in (50, 100, 150, 200, 250, 320, 400):
            generator, losses = torch.Generator().manual_seed(start), []
            for hr in pictures:
                latents = self.pipe.encode_image(hr, torch.zeros(1))
                noise = torch.randn(latents.shape, generator=generator)
                losses.append(self.loss(latents, torch.tensor([start - 1]), noise).item())
            values[f"val_loss/{start}"] = float(np.mean(losses))
        return values


def spread(values: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    """Values at their places among `count`, zeros elsewhere."""
    return values.new_zeros(count).index_copy(0, places, values)


class SliderStage:
    """
    Noise predictor and decoder, through the frozen diffusion model, on decoded pixels; the weights of the losses
    depend on the start.
    """

    def __init__(self, pipe: InvSRPipeline, settings: dict):
        stage = self.stage = settings["slider"]
        if stage["chunk_size"] % len(stage["start_timesteps"]):
            raise SystemExit("The slider's `chunk_size` must be a multiple of its number of `start_timesteps`.")
        self.pipe = pipe
        pipe.unet.requires_grad_(False)
        pipe.noise_predictor.train()
        for module in (pipe.noise_predictor, pipe.unet, pipe.vae.decoder):
            module.to(memory_format=torch.channels_last)  # faster on a CPU
        self.lpips = ShiftTolerantLPIPS("vgg").to(memory_format=torch.channels_last)
        torch.manual_seed(settings["seed"])
        self.discriminator = PixelDiscriminator(pipe.config.scale)
        by_time, others = [], list(pipe.vae.decoder.parameters())
        for name, parameter in pipe.noise_predictor.named_parameters():
            (by_time if "time_emb" in name else others).append(parameter)
        groups = {stage["learning_rate"]: others, stage["time_learning_rate"]: by_time}
        self.trained = {
            "generator": Trained(groups, stage),
            "discriminator": Trained(
                {stage["discriminator_learning_rate"]: list(self.discriminator.parameters())},
                stage,
                betas=(0.5, 0.99),
            ),
        }
        self.degradations, shares = [], []
        for entry in stage["degradations"]:
            shares.append(entry["share"])
            values = {name: value for name, value in entry.items() if name != "share"}
            self.degradations.append(Degradation(DegradationSettings(**values), pipe.config.scale))
        self.shares = np.array(shares) / sum(shares)
        self.judge = ShiftTolerantLPIPS("alex") if rank() == 0 else None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents / self.pipe.vae.config.scaling_factor
        with torch.autocast("cpu", torch.bfloat16):
            return self.pipe.vae.decoder(latents.contiguous(memory_format=torch.channels_last)).float() / 2 + 0.5

    def estimate(self, lr: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The decoded one-step estimates of LR images, in [0, 1], not clamped."""
        lr_latents = self.pipe.encode_image(enlarge(lr, self.pipe.config.scale), noise)
        with torch.autocast("cpu", torch.bfloat16):
            latents = one_step_estimate(
                self.pipe.noise_predictor, self.pipe.unet, self.pipe.scheduler, lr, lr_latents, timesteps, noise
            )
        return self.decode(latents)

    def features(self, images: torch.Tensor, shift: tuple[int, int]) -> list[torch.Tensor]:
        """Perceptual features of images that are shifted by cutting off their borders."""
        (top, left), (height, width) = shift, (side - MAX_SHIFT for side in images.shape[2:])
        images = images[..., top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            return self.lpips.features(images)

    def adversarial_losses(self, real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The discriminator's loss and the generator's, of each image, without gradients for the other."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = hinge_discriminator([self.discriminator(real)], [self.discriminator(fake.detach())])
            self.discriminator.requires_grad_(False)
            adversarial = hinge_generator([self.discriminator(fake)])
            self.discriminator.requires_grad_(True)
        return loss, adversarial

    def losses(self, chunk: Chunk, iteration: int) -> dict[str, float]:
        """The losses' values, of which the gradients are added to those of the parameters."""
        hr, generator, stage = chunk.hr, chunk.generator, self.stage
        lr = self.degradations[chunk.rng.choice(len(self.shares), p=self.shares)](hr, generator)
        starts = torch.tensor(stage["start_timesteps"])
        order = torch.randperm(len(starts), generator=generator).repeat(len(hr) // len(starts))
        starts = starts[order]  # each equally often, ...
        jitter = torch.randint(-stage["start_jitter"], stage["start_jitter"] + 1, starts.shape, generator=generator)
        timesteps = starts + jitter - 1  # ... and those between them, which are to work too
        hr_latents = self.pipe.encode_image(hr, torch.zeros(1))
        noise = torch.randn(hr_latents.shape, generator=generator)
        weights = {name: weights_by_start(stage[f"{name}_weight"], timesteps) for name in LOSSES}
        if iteration < stage["discriminator_from"]:
            weights["adversarial"].zero_()

        images = self.estimate(lr, timesteps, noise)
        losses = {"mse": (images - hr).square().flatten(1).mean(dim=1), "lattice": lattice_loss(images, hr)}
        # These are computed only for images for which they count
        seen = weights_by_start(stage["lpips_weight"], timesteps).nonzero().flatten()
        shift = tuple(chunk.rng.integers(MAX_SHIFT, size=2).tolist())
        with torch.no_grad():
            real = self.features(hr[seen], shift)
        fake = self.features(images[seen], shift)
        losses["lpips"] = spread(self.lpips.distance(fake, real), seen, len(hr))
        judged = weights_by_start(stage["adversarial_weight"], timesteps).nonzero().flatten()
        discriminator_loss, adversarial = self.adversarial_losses(hr[judged], images[judged])
        losses["adversarial"] = spread(adversarial, judged, len(hr))
        reconstruction = F.mse_loss(self.decode(hr_latents[:1]), hr[:1])

        discriminator_loss.mean().backward()
        loss = sum((weights[name] * losses[name]).mean() for name in LOSSES)
        (loss + stage["reconstruction_weight"] * reconstruction).backward()

        values = {"reconstruction": reconstruction.item(), "discriminator": discriminator_loss.mean().item()}
        for name, by_image in losses.items():
            values |= {f"{name}/{start}": value for start, value in zip(starts.tolist(), by_image.tolist())}
        return values

    @torch.no_grad()
    def validate(self, pictures: list[torch.Tensor]) -> dict[str, float]:
        """Means by start over the simple and the test degradation."""
        scores, degradations = {}, self.degradations[1:] or self.degradations
        for number, hr in enumerate(pictures):
            for other, degradation in enumerate(degradations):
                lr = degradation(hr, torch.Generator().manual_seed(number + 1000 * other))
                bicubic = enlarge(lr, self.pipe.config.scale).clamp(0, 1)
                results = {"bicubic": bicubic}
                for start in self.stage["start_timesteps"]:
                    shape = (1, self.pipe.vae.config.latent_channels, *lr.shape[2:])
                    noise = torch.randn(shape, generator=torch.Generator().manual_seed(number))
                    results[start] = self.estimate(lr, torch.tensor([start - 1]), noise).clamp(0, 1)
                for name, result in results.items():
                    for metric, value in self.measure(result, hr).items():
                        scores.setdefault(f"{metric}/{name}", []).append(value)
        return {f"val_{name}": float(np.mean(values)) for name, values in scores.items()}

    def measure(self, result: torch.Tensor, hr: torch.Tensor) -> dict[str, float]:
        images = [(255 * x[0]).round().byte().permute(1, 2, 0).numpy() for x in (result, hr)]
        functions = {"psnr": psnr_y, "ssim": ssim_y, "gradient": gradient_ratio}
        functions |= {"lattice": lattice_energy, "prominence": lattice_prominence}
        return {"lpips": self.judge(result, hr).item()} | {name: f(*images) for name, f in functions.items()}


def course_of(settings: dict, stage: str) -> dict:
    """All that the weights of a stage depend on."""
    course = {key: settings[key] for key in ("model", "seed", "data")} | settings[stage]
    return {key: value for key, value in course.items() if key not in ("validate_every", "checkpoint_every")}


def train(name: str, stage, settings: dict, crops: Crops, pictures: list[torch.Tensor], work: Path):
    """Run a stage from its checkpoint, or from its beginning, to its end."""
    file, iterations, iteration, seconds = work / f"{name}.pt", settings[name]["iterations"], 0, 0.0
    course = course_of(settings, name)
    if file.is_file():
        state = torch.load(file, weights_only=False)
        iteration, seconds = state["iteration"], state["seconds"]
        for key, trained in stage.trained.items():
            trained.load_state_dict(state[key])
        changed = {key for key in course if course[key] != state["course"].get(key)}
        if iteration <= min(run["iterations"] for run in (course, state["course"])) - course["cooldown"]:
            changed -= {"iterations"}  # so far that has changed nothing
        if changed:
            raise SystemExit(f"{file} is of a run with another {' and '.join(changed)}: choose another --work.")
    log = RunLog(work / f"{name}.jsonl", iteration or None) if rank() == 0 else None
    sums, beginning = {}, time.monotonic() - seconds
    if iteration == 0 and log is not None:
        log.append(0, stage.validate(pictures))
    while iteration < iterations:
        for chunk in draw_chunks(crops, settings, name, iteration):
            for key, value in stage.losses(chunk, iteration).items():
                sums.setdefault(key, []).append(value)
        norms = {f"norm/{key}": t.step(iteration, settings[name]["chunks"]) for key, t in stage.trained.items()}
        for key, value in norms.items():
            sums.setdefault(key, []).append(value)
        iteration += 1
        if log is not None and (iteration % settings[name]["checkpoint_every"] == 0 or iteration == iterations):
            values = {key: float(np.mean(value)) for key, value in sums.items()}
            sums = {}
            if iteration % settings[name]["validate_every"] == 0 or iteration == iterations:
                with contextlib.ExitStack() as stack:
                    for trained in stage.trained.values():
                        stack.enter_context(trained.averaged())
                    values |= stage.validate(pictures)
                    save_pipeline(stage.pipe, work / "pipeline")
            seconds = time.monotonic() - beginning
            log.append(iteration, {"seconds": seconds} | values)
            states = {key: trained.state_dict() for key, trained in stage.trained.items()}
            save_atomically(states | {"iteration": iteration, "seconds": seconds, "course": course}, file)
            print(f"{name} {iteration} of {iterations}, {seconds / 60:.0f} minutes", flush=True)
    for trained in stage.trained.values():
        trained.write(trained.average)


def save_pipeline(pipe: InvSRPipeline, folder: Path):
    """Write a pipeline in half precision."""
    modules = {name: copy.deepcopy(getattr(pipe, name)).half() for name in ("vae", "unet", "noise_predictor")}
    InvSRPipeline(**pipe.components | modules, scale=pipe.config.scale).save_pretrained(folder)
    # AutoencoderTiny saves an entry that it warns of when it is loaded; it derives it by itself
    config = folder / "vae" / "config.json"
    entries = json.loads(config.read_text())
    entries.pop("block_out_channels", None)
    config.write_text(json.dumps(entries, indent=2) + "\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("settings", type=Path, help="YAML file with all that the weights depend on.")
    parser.add_argument("--data", type=Path, required=True, help="Folder with a folder of photographs for each group.")
    parser.add_argument("--work", type=Path, required=True, help="Folder of all that the run writes.")
    args = parser.parse_args(argv)
    for path in (args.settings, args.data):
        if not path.exists():
            parser.error(f"{path} does not exist.")
    return args


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    settings = yaml.safe_load(args.settings.read_text(encoding="utf-8"))
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    data, cache = settings["data"], args.work / "pictures"
    if rank() == 0:
        decode(args.data, cache, data, settings["seed"])
    if dist.is_initialized():
        dist.barrier()
    crops = Crops(cache, data["shares"], data["crop_size"], data["held_back"])
    pictures = [middle(cache / Path(name).with_suffix(".npy")) for name in data["held_back"]]
    model = TINY if settings["model"] == "tiny" else settings["model"]
    pipe = InvSRPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.vae.requires_grad_(False)
    pipe.vae.decoder.requires_grad_(True)
    for name, stage in (("prior", PriorStage), ("slider", SliderStage)):
        train(name, stage(pipe, settings), settings, crops, pictures, args.work)
    if rank() == 0:
        save_pipeline(pipe, args.work / "pipeline")


def middle(file: Path) -> torch.Tensor:
    """The middle of a decoded picture, `(1, 3, 256, 256)` in [0, 1]."""
    picture = np.load(file)
    top, left = ((side - 256) // 2 for side in picture.shape[:2])
    picture = picture[top : top + 256, left : left + 256]
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


if __name__ == "__main__":
    main()
