"""A model between two: `(1 - weight) * first + weight * second`, for the weights of noise predictor and VAE.

    python examples/tiny/interpolate_predictors.py my-l2/pipeline my-perceptual/pipeline --weight 0.5 --output between

The two models are a pipeline and what further training made of it, with other losses or another degradation. This
chooses a balance without training again (network interpolation, https://arxiv.org/abs/1809.00219). The second
predictor may be deeper, as by `--extra_layers` of `finetune_in_pixels.py`. `--output` gets the first pipeline with the
new networks; its model card describes the training of both. Needs `pip install ".[training]"`.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import nn

from diffusers_invsr import InvSRPipeline
from diffusers_invsr.conversion import save_whole
from diffusers_invsr.hub import card_metadata


@torch.no_grad()
def interpolate(first: nn.Module, second: nn.Module, weight: float, may_grow: bool = False) -> nn.Module:
    """
    The network between two. With `may_grow`, a residual layer that only `second` has counts as one of `first` that
    adds zero.

    Raises:
        ValueError: If `second` lacks a weight of `first` or gives it another shape, or, without `may_grow`, has more.
    """
    network = copy.deepcopy(second)
    known, weights = first.state_dict(), network.state_dict()
    fits = all(name in weights and weights[name].shape == value.shape for name, value in known.items())
    if not fits or (len(weights) > len(known) and not may_grow):
        raise ValueError(f"The {type(first).__name__} of both pipelines must have the same weights.")
    for name, value in weights.items():
        if name in known:
            start = known[name].to(value)
        else:  # what a new layer adds comes from its last convolution or projection
            start = torch.zeros_like(value) if ".conv2." in name or ".to_out.0." in name else value.clone()
        value.copy_(torch.lerp(start, value, weight))
    return network


def card_of_both(first: InvSRPipeline, second: InvSRPipeline, weight: float) -> dict[str, str]:
    """What the model card says: that of the first pipeline, with the licence, data and training of both."""
    cards = {"first": card_metadata(first), "second": card_metadata(second)}
    card = dict(cards["first"])
    licences = [each.get("license_name") or each.get("license") or "not stated" for each in cards.values()]
    if licences[0] != licences[1]:
        card.pop("license_link", None)
        card |= {"license": "other", "license_name": " and ".join(licences)}
    card["training"] = f"Between two models: {1 - weight:g} of the first and {weight:g} of the second."
    for name, each in cards.items():
        card["training"] += f"\n\nThe {name}:\n\n{each.get('training') or 'Not stated.'}"
    data = [each.get("training_data") for each in cards.values()]
    if data[0] != data[1]:
        texts = (text or "Not stated." for text in data)
        card["training_data"] = "The first model: {}\n\nThe second: {}".format(*texts)
    return card


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="saved pipeline, which also gives all but the two networks")
    parser.add_argument("second", type=Path, help="saved pipeline")
    parser.add_argument("--weight", type=float, required=True, help="share of the second, between 0 and 1")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the pipeline")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.weight <= 1:
        parser.error(f"`--weight` must be between 0 and 1, got {arguments.weight}.")
    if arguments.output.exists():
        parser.error(f"`--output` must be a new folder, but {arguments.output} exists.")
    pipe, other = (InvSRPipeline.from_pretrained(folder) for folder in (arguments.first, arguments.second))
    try:
        networks = {
            name: interpolate(getattr(pipe, name), getattr(other, name), arguments.weight, may_grow)
            for name, may_grow in (("noise_predictor", True), ("vae", False))
        }
    except ValueError as error:
        parser.error(str(error))
    pipe.register_modules(**networks)
    card = card_of_both(pipe, other, arguments.weight)
    pipe.register_to_config(model_card=card)
    pipe.noise_predictor.register_to_config(model_card=card)
    save_whole(pipe.to(getattr(torch, arguments.dtype)), arguments.output)


if __name__ == "__main__":
    main()
