"""What the pipeline returns."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class InvSRPipelineOutput(BaseOutput):
    """
    Output of [`InvSRPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The enlarged images: PIL images, an array `(B, H, W, C)` or a tensor `(B, C, H, W)` in [0, 1]; a list of
            arrays or tensors where their shapes differ. Latents for `output_type="latent"`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
