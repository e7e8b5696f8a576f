import pytest
import torch


pytest.importorskip("stlpips_pytorch")

from diffusers_invsr.training.perceptual import ShiftTolerantLPIPS  # noqa: E402


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
