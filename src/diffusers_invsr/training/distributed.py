"""What FSDP and DeepSpeed need to train the same as one process."""

from typing import Any

from torch import nn
from transformers.utils.versions import require_version

from .errors import TrainingError


def whole_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The weights of a network, gathered if FSDP has sharded them. All processes must call it."""
    parameters = list(network.parameters())
    return [nn.Parameter(p.full_tensor()) if hasattr(p, "full_tensor") else p for p in parameters]


def configure_deepspeed(
    config: dict[str, Any], batch_size: int, gradient_accumulation_steps: int, max_grad_norm: float | None = None
):
    r"""
    Put the settings of a run into DeepSpeed's configuration, in place.

    Args:
        config (`dict[str, Any]`): The configuration, `accelerator.state.deepspeed_plugin.deepspeed_config`.
        batch_size (`int`): Images per micro-batch and process.
        gradient_accumulation_steps (`int`): Micro-batches per update.
        max_grad_norm (`float`, *optional*): Bound of the gradients' norm; by default there is none.

    Raises:
        ImportError: If DeepSpeed is too old.
        TrainingError: If the configuration would not train the same as without DeepSpeed.
    """
    stage = config["zero_optimization"].get("stage", 0)
    if stage not in (1, 2):
        raise TrainingError(
            f"DeepSpeed's ZeRO stage must be 1 or 2, got {stage}: stage 0 is DDP, stage 3 is for larger networks."
        )
    if config["fp16"]["enabled"]:
        raise TrainingError("`mixed_precision='fp16'` is not supported with DeepSpeed: use 'bf16', DDP or FSDP.")
    require_version("deepspeed>=0.19.8", "Earlier versions do not skip updates that are not finite.")
    config |= {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": max_grad_norm or 0.0,
        "bf16": {"enabled": False},  # autocast as elsewhere; the weights, and so their average, stay in float32
        "zero_force_ds_cpu_optimizer": False,  # the learning rate's schedule keeps PyTorch's optimizer
    }
