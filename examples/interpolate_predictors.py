"""A noise predictor between two: `(1 - weight) * first + weight * second`, weight by weight.

    python examples/interpolate_predictors.py my-l2/pipeline my-perceptual/pipeline --weight 0.5 --output between

Of one that was trained for fidelity and one that went on from it with perceptual and adversarial losses, this chooses
a balance without training again (network interpolation, https://arxiv.org/abs/1809.00219). `--output` gets the first
pipeline with the new predictor; what its card says of training is the first one's.
"""

import argparse
from pathlib import Path

import torch

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline, convert


@torch.no_grad()
def interpolate(first: InvSRNoisePredictor, second: InvSRNoisePredictor, weight: float) -> InvSRNoisePredictor:
    """Moves the weights of `first` towards those of `second`, in place."""
    others = second.state_dict()
    if {name: value.shape for name, value in first.state_dict().items()} != {
        name: value.shape for name, value in others.items()
    }:
        raise ValueError("The two predictors have to have the same keys and shapes.")
    for name, value in first.state_dict().items():
        value.lerp_(others[name].to(value), weight)
    return first


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="saved pipeline; the result has all of it but the predictor")
    parser.add_argument("second", type=Path, help="saved pipeline")
    parser.add_argument("--weight", type=float, required=True, help="share of the second, from 0 to 1")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the pipeline")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.weight <= 1:
        parser.error(f"--weight has to be from 0 to 1, but is {arguments.weight}")
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} exists already: name a new folder")
    for folder in (arguments.first, arguments.second):
        if not (folder / "model_index.json").is_file():
            parser.error(f"{folder} has to be the folder of a saved pipeline, but has no model_index.json")
    pipe, other = (InvSRPipeline.from_pretrained(folder) for folder in (arguments.first, arguments.second))
    try:
        predictor = interpolate(pipe.noise_predictor, other.noise_predictor, arguments.weight)
    except ValueError as error:
        parser.error(str(error))
    convert(predictor, base=str(arguments.first), output=arguments.output)


if __name__ == "__main__":
    main()
