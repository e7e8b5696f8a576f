#!/usr/bin/env python
"""
Train the latent LPIPS on judged triplets (section 3.3 of the InvSR paper; the recipe of LPIPS, arXiv 1801.03924).

    # As published: SD-Turbo's VAE and BAPPS (https://github.com/richzhang/PerceptualSimilarity, dataset/2afc)
    python train_latent_lpips.py --data 2afc/ --vae stabilityai/sd-turbo --output_dir latent-lpips/

    # A small one for the embedded model, from random weights, in minutes on a CPU. It needs a higher learning rate.
    python make_triplets.py --photos kodak/ --patterns 'kodim0?.png' 'kodim1[0-6].png' --output triplets/
    python train_latent_lpips.py --data triplets/ --vae tiny --block_out_channels 16 32 64 64 64 \
        --learning_rate 1e-3 --epochs 4 --decay_epochs 2 --output_dir latent-lpips-tiny/

A triplet is a reference and two distorted versions p0 and p1 of it; the judgement is the share of people who find p1
closer. All three go through the frozen VAE encoder, the metric measures d0 = d(ref, p0) and d1 = d(ref, p1), a small
network turns (d0, d1) into the probability that p1 is preferred, and cross-entropy compares it with the judgement.

Data: `<data>/<train|val>/.../<distortion>/{ref,p0,p1}/NAME.png` and `judge/NAME.npy`. Validation is the agreement with
the judgements: the share of people who chose as the metric does, the mean over the distortions.

`output_dir` gets the network (`save_pretrained`) and `metrics.json` after the last epoch, and `checkpoint.pt` after
every epoch, from which `--resume` continues.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoModel
from lpips import Dist2LogitLayer
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import HfArgumentParser

from diffusers_invsr import TINY
from diffusers_invsr.files import save_atomically, write_atomically
from diffusers_invsr.training import (
    LatentLPIPS,
    TrainingError,
    check_unchanged,
    parse_settings,
    require_at_least,
    setting,
    training_errors,
)


PARTS = {"ref": ".png", "p0": ".png", "p1": ".png", "judge": ".npy"}
NAMED_FAULTS = 5  # that a message lists
FREE_SETTINGS = ("data", "vae", "vgg16", "output_dir", "num_workers", "resume")  # in a resumed run; paths may change


@dataclass
class ModelSettings:
    vae: str = setting(
        "`tiny`, or a folder or Hub id: of a pipeline, whose component `vae` is used, or of a VAE.", required=True
    )
    block_out_channels: list[int] | None = setting(
        "Five widths of a network with random weights. By default VGG16's, with its weights."
    )
    vgg16: str | None = setting("File of torchvision's VGG16 weights; by default they are downloaded.")
    train_trunk: bool = setting("Train all layers, as published, not only the linear ones.", True)


@dataclass
class TrainingSettings:
    data: Path = setting("Folder with `train` and `val` in BAPPS' layout.", required=True)
    output_dir: Path = setting("Folder for the network, metrics and checkpoint.", required=True)
    resolution: int = setting("Height and width in pixels that patches are resized to.", 64)
    batch_size: int = setting("Triplets per batch and process.", 50)
    epochs: int = setting("Epochs at the full learning rate.", 5)
    decay_epochs: int = setting("Further epochs in which it falls to zero linearly.", 5)
    learning_rate: float = setting("Learning rate of Adam.", 1e-4)
    mixed_precision: str = setting("`no`, `fp16` or `bf16`.", "no")
    num_workers: int = setting("Processes that load images, per training process.", 0)
    seed: int = setting("Seed of weights, order and dropout.", 0)
    resume: bool = setting("Resume from the checkpoint in `output_dir`, if there is one.", False)


def parse_args(argv: list[str]) -> tuple[ModelSettings, TrainingSettings]:
    parser = HfArgumentParser((ModelSettings, TrainingSettings), description="Train the latent LPIPS.")
    model, training = parse_settings(parser, argv)
    require_at_least(1, parser, training, "batch_size")
    if min(training.epochs, training.decay_epochs) < 0 or training.epochs + training.decay_epochs == 0:
        parser.error(
            "`--epochs` and `--decay_epochs` must be 0 or more and not both 0, got"
            f" {training.epochs} and {training.decay_epochs}."
        )
    return model, training


# Data


class Triplets(Dataset):
    """Judged triplets: RGB images `(3, resolution, resolution)` and the share that prefers p1, all in [0, 1]."""

    def __init__(self, entries: list[tuple[Path, str, float]], resolution: int):
        self.entries = entries
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        folder, name, judge = self.entries[index]
        sample = {"judge": torch.tensor(judge)}
        for part in ("ref", "p0", "p1"):
            image = Image.open(folder / part / f"{name}.png").convert("RGB")
            if image.size != (self.resolution, self.resolution):
                image = image.resize((self.resolution, self.resolution), Image.Resampling.BILINEAR)
            sample[part] = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return sample


def find_triplets(root: Path) -> tuple[dict[str, list[tuple[Path, str, float]]], list[str]]:
    """The good triplets in a folder by distortion, as (folder, name, judgement), and what is wrong with the others."""
    triplets, faults = {}, []
    for folder in sorted(path.parent for path in root.rglob("ref") if path.is_dir()):
        names = {file.stem for part, suffix in PARTS.items() for file in (folder / part).glob(f"*{suffix}")}
        entries = []
        for name in sorted(names):
            try:
                for part in ("ref", "p0", "p1"):
                    file = folder / part / f"{name}.png"
                    with Image.open(file) as image:
                        image.verify()
                file = folder / "judge" / f"{name}.npy"
                judge = np.load(file).item()
                if not 0 <= judge <= 1:
                    raise ValueError(f"{judge} is not in [0, 1]")
                entries.append((folder, name, judge))
            except FileNotFoundError:
                faults.append(f"{file} is missing")
            except Exception as error:  # Pillow and NumPy raise many kinds for a damaged file
                faults.append(f"{file} is unreadable ({error})")
        if entries:
            triplets[str(folder.relative_to(root))] = entries
    return triplets, faults


# Models


def load_vae(source: str) -> torch.nn.Module:
    source = TINY if source == "tiny" else source
    if (Path(source) / "config.json").is_file():
        return AutoModel.from_pretrained(source)
    return AutoModel.from_pretrained(source, subfolder="vae")


@torch.no_grad()
def encode(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Latents of images in [0, 1]: the mean of the posterior, where the VAE has one, times the scaling factor."""
    encoded = vae.encode((2 * images - 1).to(vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return vae.config.scaling_factor * latents


def distances(metric: torch.nn.Module, vae: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """d0 and d1 of a batch, each of shape (batch,)."""
    ref, p0, p1 = encode(vae, torch.cat([batch["ref"], batch["p0"], batch["p1"]])).chunk(3)
    return metric(torch.cat([ref, ref]), torch.cat([p0, p1])).chunk(2)


@torch.no_grad()
def validate(
    metric: torch.nn.Module, vae: torch.nn.Module, loaders: dict[str, DataLoader], accelerator: Accelerator
) -> dict[str, float]:
    """Agreement with the judgements in [0, 1], for each distortion and their mean. A tie counts as half a choice."""
    metric.eval()
    agreement = {}
    for distortion, loader in loaders.items():
        scores = []
        for batch in loader:
            d0, d1 = distances(metric, vae, batch)
            share = torch.where(d0 < d1, 1 - batch["judge"], batch["judge"])
            share = torch.where(d0 == d1, 0.5, share)
            scores.append(accelerator.gather_for_metrics(share))
        agreement[distortion] = torch.cat(scores).mean().item()
    agreement["mean"] = sum(agreement.values()) / len(agreement)
    return agreement


def train(model_args: ModelSettings, args: TrainingSettings):
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # Where the run stands
    checkpoint = args.output_dir / "checkpoint.pt"
    settings = {**asdict(model_args), **asdict(args)}
    fixed = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    if checkpoint.is_file():
        if not args.resume:
            raise TrainingError(
                f"`output_dir={str(args.output_dir)!r}` has a checkpoint of another run: resume it with `--resume`, or"
                " choose another folder."
            )
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if "fixed" not in state:
            raise TrainingError(f"{checkpoint} was written by an earlier release: choose another `output_dir`.")
        check_unchanged(fixed, state["fixed"])

    # Data
    triplets, faults = {}, []
    for split in ("train", "val"):
        triplets[split], found = find_triplets(args.data / split)
        faults += found
        if not triplets[split]:
            raise TrainingError(
                f"{args.data / split} must have triplets in BAPPS' layout (`<distortion>/ref/*.png`, `p0`, `p1`,"
                f" `judge/*.npy`), but has none{f' that is complete: {faults[0]}' if faults else ''}."
            )
    if faults:
        listed = "; ".join(faults[:NAMED_FAULTS]) + ("; ..." if len(faults) > NAMED_FAULTS else "")
        accelerator.print(f"Skipped {len(faults)} bad triplets: {listed}")
    train_set = Triplets([entry for entries in triplets["train"].values() for entry in entries], args.resolution)
    loader_settings = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    order = torch.Generator()
    train_loader = DataLoader(train_set, shuffle=True, generator=order, **loader_settings)
    val_loaders = {
        distortion: accelerator.prepare(DataLoader(Triplets(entries, args.resolution), **loader_settings))
        for distortion, entries in triplets["val"].items()
    }

    # Models: the frozen encoder, the metric, and the small network that turns two distances into a preference
    with training_errors():
        vae = load_vae(model_args.vae)
        in_channels = vae.config.latent_channels
        if model_args.block_out_channels is None:
            metric = LatentLPIPS.from_vgg16(model_args.vgg16, in_channels)
        else:
            metric = LatentLPIPS(in_channels, tuple(model_args.block_out_channels))
    vae.to(accelerator.device).eval().requires_grad_(False)
    metric.net.requires_grad_(model_args.train_trunk)
    preference = Dist2LogitLayer()

    # LPIPS' recipe: a constant learning rate, then a linear decay, an epoch at a time
    parameters = [p for model in (metric, preference) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, betas=(0.5, 0.999))
    num_epochs = args.epochs + args.decay_epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: min(1.0, (num_epochs - epoch) / max(args.decay_epochs, 1))
    )
    metric, preference, optimizer, train_loader = accelerator.prepare(metric, preference, optimizer, train_loader)
    unwrapped = {"metric": accelerator.unwrap_model(metric), "preference": accelerator.unwrap_model(preference)}
    stateful = {**unwrapped, "optimizer": optimizer, "scheduler": scheduler}

    if checkpoint.is_file():
        for name, obj in stateful.items():
            obj.load_state_dict(state[name])
        history = state["history"]
        accelerator.print(f"Resumed after epoch {len(history) - 1} of {num_epochs}")
    else:
        history = [{"epoch": 0, "seconds": 0.0, "agreement": validate(metric, vae, val_loaders, accelerator)}]
        accelerator.print(json.dumps(history[0]))

    # Training
    for epoch in range(len(history), num_epochs + 1):
        set_seed(args.seed + epoch)  # so that a resumed run draws what an uninterrupted one does
        order.manual_seed(args.seed + epoch)
        metric.train()
        start, losses = time.perf_counter(), []
        for batch in train_loader:
            d0, d1 = (d.view(-1, 1, 1, 1) for d in distances(metric, vae, batch))
            probability = preference(d0, d1).flatten().float()
            with torch.autocast(accelerator.device.type, enabled=False):  # it refuses cross-entropy of probabilities
                loss = F.binary_cross_entropy(probability, batch["judge"])
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            unwrapped["metric"].clamp_weights()
            losses.append(loss.detach())
        scheduler.step()

        record = {"epoch": epoch, "seconds": time.perf_counter() - start, "loss": torch.stack(losses).mean().item()}
        record["agreement"] = validate(metric, vae, val_loaders, accelerator)
        history.append(record)
        accelerator.print(json.dumps(record))
        if accelerator.is_main_process:
            state = {name: obj.state_dict() for name, obj in stateful.items()}
            save_atomically({**state, "history": history, "fixed": fixed}, checkpoint)

    if accelerator.is_main_process:
        unwrapped["metric"].save_pretrained(args.output_dir)
        metrics = {
            "before": history[0]["agreement"],
            "after": history[-1]["agreement"],
            "triplets": {split: {name: len(found) for name, found in triplets[split].items()} for split in triplets},
            "left_out": faults,
            "history": history,
            "arguments": settings,
        }
        write_atomically(args.output_dir / "metrics.json", json.dumps(metrics, indent=2, default=str) + "\n")
    accelerator.print(f"Agreement {history[0]['agreement']['mean']:.3f} -> {history[-1]['agreement']['mean']:.3f}")
    accelerator.end_training()


def main(argv: list[str] | None = None):
    try:
        train(*parse_args(sys.argv[1:] if argv is None else argv))
    except TrainingError as error:  # a sentence for the user; anything else is a bug, with its traceback
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
