import pytest
import torch


pytest.importorskip("stlpips_pytorch")

from diffusers_invsr.training.losses import hinge_generator  # noqa: E402
from diffusers_invsr.training.perceptual import BoundedConv2d, FeatureDiscriminator, ShiftTolerantLPIPS  # noqa: E402


def images(seed: int, smooth: int) -> torch.Tensor:
    pixels = torch.rand(2, 3, 72, 64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(pixels, smooth, stride=1, padding=smooth // 2)


# By the package's own code
@pytest.mark.parametrize("net, expected", [("vgg", [0.6863, 0.6762]), ("alex", [0.5939, 0.5878])])
def test_distance_is_the_published_one(net, expected):
    distance = ShiftTolerantLPIPS(net)(images(0, 5), images(1, 1))
    torch.testing.assert_close(distance, torch.tensor(expected), atol=2e-4, rtol=0)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equal_images_have_no_distance_and_gradients_reach_the_images(net):
    lpips, pixels = ShiftTolerantLPIPS(net), images(0, 3).requires_grad_()
    assert lpips(pixels, pixels).abs().max() == 0
    lpips(pixels, images(0, 5)).sum().backward()
    assert pixels.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_unknown_net():
    with pytest.raises(ValueError, match="`net` must be one of vgg, alex, got 'squeeze'"):
        ShiftTolerantLPIPS("squeeze")


def test_discriminator_has_a_map_for_each_level_and_learns():
    lpips = ShiftTolerantLPIPS("vgg")
    torch.manual_seed(0)
    real, fake = lpips.features(images(0, 1), 2), lpips.features(images(0, 5), 2)
    discriminator = FeatureDiscriminator(real, width=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    logits = discriminator(real)
    assert [tuple(logit.shape) for logit in logits] == [(2, 1, 72, 64), (2, 1, *real[1].shape[2:])]
    for _ in range(20):
        loss = (hinge_generator(discriminator(real)) - hinge_generator(discriminator(fake))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert hinge_generator(discriminator(real)).mean() < hinge_generator(discriminator(fake)).mean() - 0.1


def test_bounded_convolution_has_the_gain_of_its_largest_singular_value():
    torch.manual_seed(0)
    conv, reference = BoundedConv2d(3, 5, 3), torch.nn.Conv2d(3, 5, 3)
    sigma = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
    reference.load_state_dict({"weight": (conv.weight / sigma).detach(), "bias": conv.bias})
    pixels = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(conv(pixels), reference(pixels))
    # Scaling the weights changes nothing, so the gradient has nothing along them
    conv(pixels).square().sum().backward()
    assert (conv.weight.grad * conv.weight).sum().abs() < 1e-4 * conv.weight.grad.norm() * conv.weight.norm()
