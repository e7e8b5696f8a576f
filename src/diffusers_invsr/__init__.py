"""InvSR for diffusers: super-resolution by diffusion inversion, at any number of steps."""

import sys
from pathlib import Path

import diffusers

from .conversion import convert, load_noise_predictor
from .devices import auto_dtype, keep_freed_memory
from .noise_predictor import InvSRNoisePredictor, InvSRNoisePredictorOutput
from .pipeline_invsr import InvSRPipeline
from .pipeline_output import InvSRPipelineOutput
from .prompt_embeds import InvSRPromptEmbeds
from .scheduling_invsr import InvSRScheduler


__version__ = "0.2.0"

__all__ = [
    "TINY",
    "InvSRNoisePredictor",
    "InvSRNoisePredictorOutput",
    "InvSRPipeline",
    "InvSRPipelineOutput",
    "InvSRPromptEmbeds",
    "InvSRScheduler",
    "auto_dtype",
    "convert",
    "keep_freed_memory",
    "load_noise_predictor",
]

TINY = str(Path(__file__).parent / "tiny")
"""Folder of the small model that comes with the package, for `InvSRPipeline.from_pretrained`."""

# What diffusers needs to find these classes by the names in a model_index.json, ["diffusers_invsr", "InvSRScheduler"].
# It records a class's `__module__`, looks the library up in `diffusers.pipelines` and the pipeline in `diffusers`.
for _class in (InvSRNoisePredictor, InvSRPipeline, InvSRPromptEmbeds, InvSRScheduler):
    _class.__module__ = __name__
diffusers.pipelines.diffusers_invsr = sys.modules[__name__]
diffusers.InvSRPipeline = InvSRPipeline
