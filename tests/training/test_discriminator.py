import pytest
import torch
import torch.nn.functional as F

from diffusers_invsr.training.discriminator import InvSRDiscriminator


# For the embedded model, whose latents have 16 channels and which takes no text.
TINY = {
    "in_channels": 16,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D"),
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "num_attention_heads": 2,
    "cross_attention_dim": None,
    "input_feature_channels": 16,
    "norm_num_groups": 8,
}
# The published layout in small.
SMALL = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": (1, 2, 2),
    "num_attention_heads": (1, 2, 2),
    "cross_attention_dim": 24,
    "addition_embed_type_num_heads": 4,
    "input_feature_channels": 8,
    "norm_num_groups": 4,
}
CONFIGS = pytest.mark.parametrize("config", [SMALL, TINY], ids=["text", "no text"])


def make(config: dict, batch: int = 2, size: tuple[int, int] = (13, 9)) -> tuple:
    """A discriminator, latents, timesteps and text embeddings."""
    torch.manual_seed(0)
    model = InvSRDiscriminator(**config)
    width = model.config["cross_attention_dim"]
    text = None if width is None else torch.randn(batch, 5, width)
    timesteps = torch.tensor([199, 99, 249, 149])[:batch]
    return model, torch.randn(batch, model.config["in_channels"], *size), timesteps, text


def gradients(model: InvSRDiscriminator, *inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(logits.sum() for logits in model(*inputs).logits).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_default_configuration_has_the_published_size():
    with torch.device("meta"):
        model = InvSRDiscriminator()
    assert model.num_parameters() == 112_082_532
    assert model.conv_features.weight.shape == (32, 4, 3, 3)
    assert model.time_embedding.linear_2.out_features == model.add_embedding.proj.out_features == 512
    assert model.add_embedding.pool.num_heads == 64
    heads = [block.attentions[0].num_attention_heads for block in model.down_blocks[1:]]
    heads += [block.attentions[0].num_attention_heads for block in (model.mid_block, *model.up_blocks[:2])]
    assert heads == [16] * 5


def test_configuration_for_the_embedded_model_is_small():
    model, *inputs = make(TINY, size=(32, 32))
    assert model.num_parameters() == 745_716
    assert [tuple(logits.shape) for logits in model(*inputs).logits] == [
        (2, 1, 8, 8),
        (2, 1, 16, 16),
        (2, 1, 32, 32),
        (2, 1, 32, 32),
    ]


@pytest.mark.parametrize("size", [(16, 24), (13, 9), (1, 2)])
@pytest.mark.parametrize("cross_attention_dim", [None, 24])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_a_map_after_the_middle_and_after_every_up_block(levels, cross_attention_dim, size):
    block_type = "DownBlock2D" if cross_attention_dim is None else "CrossAttnDownBlock2D"
    config = {
        "down_block_types": (block_type,) * levels,
        "block_out_channels": (8, 16, 24, 32)[:levels],
        "layers_per_block": (2, 1, 1, 2)[:levels],
        "num_attention_heads": 2,
        "cross_attention_dim": cross_attention_dim,
    }
    model, *inputs = make(SMALL | config, size=size)
    outputs = model(*inputs, return_dict=False)[0]
    sizes = [size]
    for _ in range(levels - 1):
        sizes.insert(0, tuple((side + 1) // 2 for side in sizes[0]))
    assert [tuple(logits.shape) for logits in outputs] == [(2, 1, *size) for size in [*sizes, sizes[-1]]]


@CONFIGS
def test_every_parameter_learns(config):
    for name, gradient in gradients(*make(config)).items():
        # A bias of the keys adds the same to all scores of a query: the softmax removes it.
        if not name.endswith(("k_proj.bias", "to_k.bias")):
            assert gradient.abs().max() > 1e-6, name


@CONFIGS
@pytest.mark.parametrize("size", [(16, 16), (13, 9)])
def test_every_down_block_sees_the_resized_features_of_the_latents(config, size):
    model, sample, *condition = make(config, size=size)
    seen = []
    for block in model.down_blocks:
        block.register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    channels = model.config["input_feature_channels"]
    with torch.no_grad():
        model(sample, *condition)
        features = model.conv_features(sample)
    for inputs, previous in zip(seen, (16, 16, 32), strict=True):
        resized = F.interpolate(features, size=inputs.shape[-2:], mode="bicubic", align_corners=False)
        assert inputs.shape[1] == previous + channels
        torch.testing.assert_close(inputs[:, -channels:], resized)
    assert torch.equal(seen[0][:, -channels:], features)


@pytest.mark.parametrize("path", ["whole text", "pooled text", "cross-attention", "timestep", "sample"])
def test_every_map_depends_on_every_input(path):
    model, sample, timesteps, text = make(SMALL)
    with torch.no_grad():
        if path == "cross-attention":
            # Removes the pooled text's part of the time embedding.
            model.add_embedding.norm2.weight.zero_()
        elif path == "pooled text":
            for name, parameter in model.named_parameters():
                if "attn2.to_out" in name:
                    parameter.zero_()
        before = model(sample, timesteps, text).logits
        if path == "timestep":
            timesteps = timesteps - 50
        elif path == "sample":
            sample = sample.roll(1, dims=-1)
        else:
            text = text.flip(0)
        after = model(sample, timesteps, text).logits
    for first, second in zip(before, after, strict=True):
        assert (first - second).abs().max() > 1e-4


def test_timestep_and_text_may_be_one_for_all_or_one_for_each():
    model, sample, _, text = make(SMALL)
    with torch.no_grad():
        expected = model(sample, torch.tensor([199, 199]), text[:1].repeat(2, 1, 1)).logits
        for timestep in (199, torch.tensor(199), torch.tensor([199.0])):
            torch.testing.assert_close(model(sample, timestep, text[:1]).logits, expected)


def test_without_text_embeddings_are_ignored():
    model, sample, timesteps, _ = make(TINY)
    with torch.no_grad():
        expected = model(sample, timesteps).logits
        torch.testing.assert_close(model(sample, timesteps, torch.randn(1, 5, 32)).logits, expected, atol=0, rtol=0)


@CONFIGS
def test_logits_do_not_depend_on_the_rest_of_the_batch(config):
    model, *inputs = make(config, batch=3)
    with torch.no_grad():
        together = model(*inputs).logits
        for index in range(3):
            alone = model(*(x if x is None else x[index : index + 1] for x in inputs)).logits
            expected = [logits[index : index + 1] for logits in together]
            torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-4)


@CONFIGS
def test_gradient_checkpointing_keeps_the_gradients(config):
    model, *inputs = make(config)
    plain = gradients(model, *inputs)
    model.enable_gradient_checkpointing()
    model.train()
    calls = []
    model.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for name, gradient in gradients(model, *inputs).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)
    assert len(calls) == 2


@CONFIGS
def test_saves_and_loads(config, tmp_path):
    model, *inputs = make(config)
    model.save_pretrained(tmp_path)
    loaded = InvSRDiscriminator.from_pretrained(tmp_path)
    for name, value in config.items():
        assert loaded.config[name] == (list(value) if isinstance(value, tuple) else value)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs).logits, model.eval()(*inputs).logits, atol=0, rtol=0)


@pytest.mark.parametrize("block_type, width", [("CrossAttnDownBlock2D", 24), ("DownBlock2D", None)])
def test_compiles_without_graph_breaks(block_type, width):
    levels = {"block_out_channels": (16, 32), "layers_per_block": 1, "num_attention_heads": 2}
    levels |= {"down_block_types": ("DownBlock2D", block_type), "cross_attention_dim": width}
    model, *inputs = make(SMALL | levels)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs).logits, model(*inputs).logits)


@CONFIGS
def test_runs_in_half_precision(config):
    model, sample, timesteps, text = make(config)
    with torch.no_grad():
        expected = model(sample, timesteps, text).logits
        half = model.to(torch.bfloat16)(sample.bfloat16(), timesteps, text if text is None else text.bfloat16()).logits
    for logits, reference in zip(half, expected, strict=True):
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), reference, atol=0.1, rtol=0.1)


def test_inconsistent_configurations_are_refused():
    """Lengths here, for otherwise an entry too many would be ignored; the rest by diffusers and PyTorch."""
    for config, message in (
        ({"block_out_channels": (16, 32)}, "must have one entry per level, got 3, 2, 3, 3 entries"),
        ({"layers_per_block": (1, 1, 1, 1)}, "got 3, 3, 4, 3 entries"),
        ({"num_attention_heads": (2,)}, "got 3, 3, 3, 1 entries"),
        ({"down_block_types": ("DownBlock2D", "OtherBlock2D", "DownBlock2D")}, "OtherBlock2D does not exist"),
        ({"block_out_channels": (16, 30, 32)}, r"num_channels \(30\) must be divisible by num_groups \(4\)"),
        ({"cross_attention_dim": None}, "cross_attention_dim must be specified for CrossAttnDownBlock2D"),
    ):
        with pytest.raises(ValueError, match=message):
            InvSRDiscriminator(**SMALL | config)


def test_missing_and_misshapen_text_is_refused():
    model, sample, timesteps, text = make(SMALL)
    with pytest.raises(ValueError, match="`encoder_hidden_states` must be text embeddings of width 24, got None"):
        model(sample, timesteps)
    for bad in (text[..., :-1], text[0], text.repeat(2, 1, 1)):
        with pytest.raises(ValueError, match=r"must have the shape `\(1 or 2, tokens, 24\)`, got"):
            model(sample, timesteps, bad)
