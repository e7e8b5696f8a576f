"""A model between two: `(1 - weight) * first + weight * second`, weight by weight of noise predictor and VAE.

    python examples/tiny/interpolate_predictors.py my-l2/pipeline my-perceptual/pipeline --weight 0.5 --output between

Of a pipeline and what training made of it (with other losses, or another degradation), this chooses a balance without
training again (network interpolation, https://arxiv.org/abs/1809.00219). If the second predictor is deeper, by
`--extra_layers` of `finetune_in_pixels.py`, the first one is deepened before. `--output` gets the first pipeline with
the new networks; its card tells of the training of both. Needs `pip install ".[training]"`.
"""

import argparse
from pathlib import Path

import torch
from finetune_in_pixels import deepen
from torch import nn

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline
from diffusers_invsr.conversion import save_whole
from diffusers_invsr.hub import card_metadata


@torch.no_grad()
def interpolate(first: nn.Module, second: nn.Module, weight: float):
    """Moves the weights of `first` towards those of `second`, in place."""
    others = second.state_dict()
    if {name: value.shape for name, value in first.state_dict().items()} != {
        name: value.shape for name, value in others.items()
    }:
        raise ValueError(f"The two pipelines' {type(first).__name__} have to have the same keys and shapes.")
    for name, value in first.state_dict().items():
        value.lerp_(others[name].to(value), weight)


def deepen_like(first: InvSRNoisePredictor, second: InvSRNoisePredictor) -> InvSRNoisePredictor:
    """`first`, or where `second` has more layers in its last level, one with as many, which gives the same."""
    layers, more = (len(predictor.encoder.down_blocks[-1].resnets) for predictor in (first, second))
    return deepen(first, more - layers, like=second) if more > layers else first


def card_of_both(first: InvSRPipeline, second: InvSRPipeline, weight: float) -> dict[str, str]:
    """The first pipeline's card, with the licence, data and training of both."""
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
    parser.add_argument("first", type=Path, help="saved pipeline; the result has all of it but the two networks")
    parser.add_argument("second", type=Path, help="saved pipeline")
    parser.add_argument("--weight", type=float, required=True, help="share of the second, from 0 to 1")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the pipeline")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights"
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.weight <= 1:
        parser.error(f"--weight has to be from 0 to 1, but is {arguments.weight}")
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} exists already: name a new folder")
    for folder in (arguments.first, arguments.second):
        if not (folder / "model_index.json").is_file():
            parser.error(f"{folder} has to be the folder of a saved pipeline, but has no model_index.json")
    pipe, other = (InvSRPipeline.from_pretrained(folder) for folder in (arguments.first, arguments.second))
    pipe.register_modules(noise_predictor=deepen_like(pipe.noise_predictor, other.noise_predictor))
    try:
        for name in ("noise_predictor", "vae"):
            interpolate(getattr(pipe, name), getattr(other, name), arguments.weight)
    except ValueError as error:
        parser.error(str(error))
    card = card_of_both(pipe, other, arguments.weight)
    pipe.register_to_config(model_card=card)
    pipe.noise_predictor.register_to_config(model_card=card)
    save_whole(pipe.to(getattr(torch, arguments.dtype)), arguments.output)


if __name__ == "__main__":
    main()
