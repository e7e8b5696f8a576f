"""Publish a model on the Hub with its weights, code and model card.

    python examples/push_to_hub.py my-invsr me/my-invsr

Log in with `hf auth login` first.
"""

import argparse

import torch

from diffusers_invsr import InvSRPipeline


parser = argparse.ArgumentParser()
parser.add_argument("model", help="folder of a saved pipeline")
parser.add_argument("repo_id", help="where it is published: OWNER/NAME")
parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights")
parser.add_argument("--private", action="store_true", help="create a private repository")
args = parser.parse_args()

pipe = InvSRPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
# The model card is made from the configuration. You can edit it on the Hub: later pushes keep it
pipe.push_to_hub(args.repo_id, private=args.private or None)  # None: as the owner's settings say

# Anyone can load it now. Where `diffusers_invsr` is not installed, the code comes from the Hub:
# DiffusionPipeline.from_pretrained(repo_id, custom_pipeline="pipeline", trust_remote_code=True)
