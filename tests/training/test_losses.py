import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_invsr import InvSRNoisePredictor, InvSRScheduler
from diffusers_invsr.training.discriminator import InvSRDiscriminator
from diffusers_invsr.training.losses import (
    hinge_discriminator,
    hinge_generator,
    latent_l2,
    one_step_estimate,
    weights_by_start,
)


@pytest.fixture
def modules(cases):
    torch.manual_seed(0)
    return InvSRNoisePredictor(**cases["noise_predictor"]), UNet2DConditionModel(**cases["unet"])


def set_output(conv: torch.nn.Conv2d, values: list[float]):
    """Make a network's last layer give these channels whatever the input."""
    torch.nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.bias.copy_(torch.tensor(values))


def test_one_step_estimate_by_hand(modules):
    predictor, unet = modules
    channels = unet.config.in_channels
    set_output(predictor.encoder.conv_out, [0.5] * channels + [2.0] * channels)  # mean 0.5, log-variance 2
    set_output(unet.conv_out, [0.25] * channels)  # ε
    z_lr, xi = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0])
    estimate = one_step_estimate(
        predictor,
        unet,
        InvSRScheduler(),
        lr=torch.rand(2, 3, 16, 16),
        lr_latents=z_lr.view(2, 1, 1, 1).expand(2, channels, 8, 8),
        timesteps=torch.tensor([199, 99]),
        noise=xi.view(2, 1, 1, 1).expand(2, channels, 8, 8),
        prompt_embeds=torch.zeros(1, 7, unet.config.cross_attention_dim),
    )
    # ᾱ is 0.75524 at index 199 (step 200) and 0.89546 at index 99 (step 100), so √((1 − ᾱ) / ᾱ) = 0.56928 and 0.34168.
    # n = 0.5 + e · ξ₁ = 3.21828 and 0.5; ẑ₀ = z_lr + √((1 − ᾱ) / ᾱ) · (n − ε)
    torch.testing.assert_close(estimate[0], torch.full_like(estimate[0], 2 + 0.56928 * 2.96828), atol=1e-4, rtol=0)
    torch.testing.assert_close(estimate[1], torch.full_like(estimate[1], -1 + 0.34168 * 0.25), atol=1e-4, rtol=0)


def test_one_step_estimate_needs_epsilon():
    scheduler = InvSRScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="`prediction_type` of the scheduler must be 'epsilon', got 'v_prediction'"):
        one_step_estimate(None, None, scheduler, *[torch.zeros(1)] * 4)


def test_latent_l2_by_hand():
    estimate = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    target = torch.tensor([[0.0, 4.0], [0.0, 3.0]]).view(2, 1, 1, 2)
    assert latent_l2(estimate, target).tolist() == [2.5, 4.5]  # (1 + 4) / 2 and (0 + 9) / 2


def test_hinge_losses_by_hand():
    # Two outputs of different size, two images: means are over each map first, then over the outputs.
    real = [torch.tensor([[2.0, 0.0], [-1.0, 1.0]]).view(2, 1, 1, 2), torch.tensor([0.5, 3.0]).view(2, 1, 1, 1)]
    fake = [torch.tensor([[-2.0, 0.0], [1.0, 1.0]]).view(2, 1, 1, 2), torch.tensor([-0.5, -3.0]).view(2, 1, 1, 1)]
    # image 0: ½(0.5 + 0.5) and ½(0.5 + 0.5); image 1: ½(1 + 2) and ½(0 + 0)
    assert hinge_discriminator(real, fake).tolist() == [0.5, 0.75]
    # image 0: −(−1 − 0.5) / 2; image 1: −(1 − 3) / 2
    assert hinge_generator(fake).tolist() == [0.75, 1.0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_only_the_predictor(modules, checkpointing):
    predictor, unet = modules
    unet.requires_grad_(False)
    if checkpointing:
        predictor.enable_gradient_checkpointing()
        unet.enable_gradient_checkpointing()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    side = 2 * 2 ** (len(unet.config.block_out_channels) - 1)
    lr = torch.rand(2, 3, 2 * side, 2 * side)
    latents, noise = torch.randn(2, 2, unet.config.in_channels, side, side)
    embeds = torch.randn(1, 7, unet.config.cross_attention_dim)
    estimate = one_step_estimate(
        predictor, unet, InvSRScheduler(), lr, latents, torch.tensor([249, 99]), noise, embeds
    )
    latent_l2(estimate, latents).mean().backward()
    without = [name for name, p in predictor.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias shifts all scores of a query alike, which softmax does not see.
    assert [name for name in without if not name.endswith("to_k.bias")] == []
    assert [name for name, p in unet.named_parameters() if p.grad is not None] == []
    torch.optim.AdamW(predictor.parameters(), lr=1e-2).step()
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_each_side_learns_from_its_own_loss(cases):
    torch.manual_seed(0)
    predictor = InvSRNoisePredictor(**cases["noise_predictor"])
    channels = cases["unet"]["in_channels"]
    discriminator = InvSRDiscriminator(
        in_channels=channels,
        down_block_types=["DownBlock2D"],
        block_out_channels=[32],
        layers_per_block=1,
        num_attention_heads=4,
        cross_attention_dim=None,
        norm_num_groups=8,
    )

    def learning(module):
        return [name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]

    estimate = predictor(torch.rand(2, 3, 16, 16), 199).latent_dist.mean
    discriminator.requires_grad_(False)
    hinge_generator(discriminator(estimate, 199).logits).mean().backward()
    assert learning(discriminator) == [] and len(learning(predictor)) > 10

    predictor.zero_grad()
    discriminator.requires_grad_(True)
    real = discriminator(torch.randn_like(estimate), 199).logits
    hinge_discriminator(real, discriminator(estimate.detach(), 199).logits).mean().backward()
    assert learning(predictor) == [] and len(learning(discriminator)) > 10


def test_weights_by_start_are_interpolated_and_end_with_the_outermost():
    timesteps = torch.tensor([249, 224, 199, 99, 49, 299])  # steps 250, 225, 200, 100, 50, 300
    weights = weights_by_start({250: 2.0, 100: 0.0, 200: 1.0}, timesteps)
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.5, 1.0, 0.0, 0.0, 2.0]))
    assert weights_by_start(0.5, timesteps).tolist() == [0.5] * 6


def test_weights_by_start_need_one():
    with pytest.raises(ValueError, match="`weights` must have a weight"):
        weights_by_start({}, torch.tensor([199]))
