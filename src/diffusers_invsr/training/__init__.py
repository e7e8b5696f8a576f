"""The parts of training (section 3 of the paper); `examples/training/train_invsr.py` puts them together."""

from ..degradation import Degradation, DegradationSettings, EvaluationDegradationSettings
from .batches import batch_generator, check_crop_size, degrade_batch, draw_starts
from .checkpoints import Checkpoints
from .data import CropDataset, CropStream, SkipReport, make_dataset, make_loader
from .discriminator import InvSRDiscriminator, InvSRDiscriminatorOutput
from .distributed import configure_deepspeed, whole_parameters
from .errors import TrainingError, training_errors
from .growth import deepen
from .latent_cache import LatentCache, vae_fingerprint
from .latent_lpips import LatentLPIPS, load_latent_lpips
from .latents import draw_latents, encode_posterior
from .lattice import lattice_energy, lattice_loss, lattice_prominence
from .logs import RunLog, StepwiseMeter, read_log, validation_table
from .loop import StopRequest, clipped_step
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
from .settings import (
    check_unchanged,
    parse_settings,
    plain_config,
    require_at_least,
    require_norm,
    setting,
    settings_table,
)
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
    "StopRequest",
    "TrainingError",
    "ValidationSet",
    "batch_generator",
    "check_crop_size",
    "check_unchanged",
    "clipped_step",
    "configure_deepspeed",
    "deepen",
    "degrade_batch",
    "draw_latents",
    "draw_starts",
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
    "parse_settings",
    "plain_config",
    "read_log",
    "require_at_least",
    "require_norm",
    "setting",
    "settings_table",
    "training_errors",
    "vae_fingerprint",
    "validation_table",
    "whole_parameters",
    "weights_by_start",
]
