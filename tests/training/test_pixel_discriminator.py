import torch

from diffusers_invsr.training.losses import hinge_discriminator
from diffusers_invsr.training.pixel_discriminator import BoundedConv2d, PixelDiscriminator


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


def test_discriminator_finds_a_weave_within_a_few_steps():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    discriminator = PixelDiscriminator(width=16, num_layers=2)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    weave = 0.02 * torch.randn(1, 3, 4, 4, generator=generator).repeat(1, 1, 16, 16)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.rand(4, 3, 64, 64, generator=generator) / 8
        images = images + torch.rand(4, 3, 1, 1, generator=generator) / 2
        return images, images.flip(0) + weave

    for _ in range(60):
        photographs, results = draw()
        loss = hinge_discriminator([discriminator(photographs)], [discriminator(results)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    photographs, results = draw()
    logits = discriminator(photographs)
    assert logits.shape == (4, 1, 16, 16)
    assert logits.mean() > discriminator(results).mean() + 0.5


def test_discriminator_does_not_see_brightness():
    discriminator, images = PixelDiscriminator(), torch.rand(1, 3, 32, 32) / 2
    torch.testing.assert_close(discriminator(images), discriminator(images + 0.3), atol=1e-4, rtol=1e-4)
