"""A larger network that starts as an equal of a smaller one."""

from ..noise_predictor import InvSRNoisePredictor


def deepen(
    predictor: InvSRNoisePredictor, extra_layers: int, like: InvSRNoisePredictor | None = None
) -> InvSRNoisePredictor:
    r"""
    A predictor with more ResNet layers in its last level that computes the same: what the new layers add is zero.

    Args:
        predictor ([`InvSRNoisePredictor`]): The smaller one. It is not changed.
        extra_layers (`int`): Layers to add.
        like ([`InvSRNoisePredictor`], *optional*):
            Gives the other weights of the new layers, as far as it has them; by default they are random.

    Returns:
        [`InvSRNoisePredictor`]: The deeper one, in evaluation mode, with the device and dtype of `predictor`.
    """
    layers = predictor.config.layers_per_block
    *others, last = [layers] * len(predictor.config.block_out_channels) if isinstance(layers, int) else layers
    deeper = InvSRNoisePredictor.from_config(predictor.config, layers_per_block=[*others, last + extra_layers])
    known, model = predictor.state_dict(), {} if like is None else like.state_dict()
    for name, value in deeper.state_dict().items():
        if name in known:
            value.copy_(known[name])
        elif ".conv2." in name or ".to_out.0." in name:  # what a layer adds comes from there
            value.zero_()
        elif name in model and model[name].shape == value.shape:
            value.copy_(model[name])
    return deeper.to(predictor.device, predictor.dtype).eval()
