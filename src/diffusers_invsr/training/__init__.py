"""The parts of training (section 3 of the paper); `examples/training/train_invsr.py` puts them together."""

from ..degradation import Degradation, DegradationSettings, EvaluationDegradationSettings
from .checkpoints import Checkpoints
from .data import CropDataset, CropStream, SkipReport, make_dataset, make_loader
from .discriminator import InvSRDiscriminator, InvSRDiscriminatorOutput
from .latent_cache import LatentCache, vae_fingerprint
from .latent_lpips import LatentLPIPS, load_latent_lpips
from .latents import draw_latents, encode_posterior
from .lattice import lattice_energy, lattice_loss, lattice_prominence
from .logs import RunLog, StepwiseMeter, read_log
from .losses import (
    DISCRIMINATOR_RANGE,
    hinge_discriminator,
    hinge_generator,
    latent_l2,
    one_step_estimate,
    weights_by_start,
)
from .pair_pool import PairPool
from .perceptual import ShiftTolerantLPIPS
from .pixel_discriminator import PixelDiscriminator
from .sources import list_files
from .validation import ValidationSet


__all__ = [
    "DISCRIMINATOR_RANGE",
    "Checkpoints",
    "CropDataset",
    "CropStream",
    "Degradation",
    "DegradationSettings",
    "EvaluationDegradationSettings",
    "InvSRDiscriminator",
    "InvSRDiscriminatorOutput",
    "LatentCache",
    "LatentLPIPS",
    "PairPool",
    "PixelDiscriminator",
    "RunLog",
    "ShiftTolerantLPIPS",
    "SkipReport",
    "StepwiseMeter",
    "ValidationSet",
    "draw_latents",
    "encode_posterior",
    "hinge_discriminator",
    "hinge_generator",
    "latent_l2",
    "lattice_energy",
    "lattice_loss",
    "lattice_prominence",
    "list_files",
    "load_latent_lpips",
    "make_dataset",
    "make_loader",
    "one_step_estimate",
    "read_log",
    "vae_fingerprint",
    "weights_by_start",
]
