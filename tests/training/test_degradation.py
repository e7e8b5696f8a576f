import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from helpers import FIXTURES
from PIL import Image
from transformers import HfArgumentParser


pytest.importorskip("kornia")
pytest.importorskip("scipy")

from diffusers_invsr.degradation.blur_kernels import KERNEL_KINDS, BlurKernels  # noqa: E402
from diffusers_invsr.degradation.degradation import (  # noqa: E402
    Degradation,
    DegradationSettings,
    EvaluationDegradationSettings,
    Noise,
    add_noise,
    jpeg,
    jpeg_again,
)
from diffusers_invsr.metrics import psnr  # noqa: E402


# Nothing but the resize to the LR size and JPEG at its best.
NOTHING = {
    "blur_sigma": [0.001, 0.001],
    "blur_kernel_probabilities": [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "blur_sinc_probability": 0.0,
    "resize_probabilities": [0.0, 0.0, 1.0],
    "noise_sigma": [0.0, 0.0],
    "noise_poisson_scale": [0.0, 0.0],
    "jpeg_quality": [100.0, 100.0],
    "second_order_probability": 0.0,
    "final_sinc_probability": 0.0,
    "final_jpeg_quality": [100.0, 100.0],
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """HR images of shape (2, 3, 128, 128)."""
    images = [Image.open(FIXTURES / "photos" / f"{name}_hr.png") for name in ("kodim20", "kodim24")]
    arrays = [np.asarray(image.convert("RGB").crop((0, 0, 128, 128))) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def kernels(kind: str, size=7, sigma_x=1.5, sigma_y=1.5, angle=0.0, beta=1.0, cutoff=2.0) -> BlurKernels:
    numbers = (size, sigma_x, sigma_y, angle, beta, cutoff)
    return BlurKernels(torch.tensor([KERNEL_KINDS.index(kind)]), *(torch.tensor([x]) for x in numbers))


@pytest.mark.parametrize("frame", [13, 15, 21])
def test_kernels_fill_their_support_and_sum_to_1(frame):
    settings = DegradationSettings(blur_kernel_size=frame, blur_sinc_probability=0.3)
    blur = Degradation(settings).draw(500, seeded(0)).blur
    assert set(blur.kind.tolist()) == set(range(7))
    rendered = blur.render(frame)
    assert rendered.shape == (500, frame, frame) and rendered.dtype == torch.float32
    torch.testing.assert_close(rendered.sum(dim=(1, 2)), torch.ones(500), atol=1e-5, rtol=0)
    distance = (torch.arange(frame) - frame // 2).abs()
    outside = torch.maximum(distance[:, None], distance[None, :]) > (blur.size // 2)[:, None, None]
    assert (rendered[outside] == 0).all()
    wide = blur.kind != KERNEL_KINDS.index("iso")
    edge = torch.maximum(distance[:, None], distance[None, :]) == (blur.size // 2)[:, None, None]
    assert (torch.where(edge, rendered, 0).abs().sum(dim=(1, 2)) > 0)[wide].float().mean() > 0.8
    # All are symmetric about the center, so that correlation is convolution.
    torch.testing.assert_close(rendered, rendered.flip(1, 2), atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", ["iso", "generalized_iso", "plateau_iso", "sinc"])
def test_isotropic_kernels_are_symmetric(kind):
    kernel = kernels(kind, beta=1.7).render(9)[0]
    for other in (kernel.T, kernel.flip(0), kernel.flip(1)):
        torch.testing.assert_close(other, kernel, atol=1e-7, rtol=0)


def test_gaussian_kernel_by_hand():
    # Offset (1, 0) over the center: exp(-1 / (2 * 1.5^2)); offset (1, 1): twice the exponent.
    kernel = kernels("iso").render(9)[0]
    torch.testing.assert_close((kernel[4, 5] / kernel[4, 4]).item(), math.exp(-1 / 4.5), atol=1e-6, rtol=0)
    torch.testing.assert_close((kernel[5, 5] / kernel[4, 4]).item(), math.exp(-2 / 4.5), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "kind, function", [("generalized_aniso", lambda p: math.exp(-p / 2)), ("plateau_aniso", lambda p: 1 / (1 + p))]
)
def test_anisotropic_kernel_by_hand(kind, function):
    kernel = kernels(kind, sigma_x=2.0, sigma_y=0.5, beta=1.5).render(9)[0]
    # Along x one pixel is half a standard deviation, along y two.
    torch.testing.assert_close((kernel[4, 5] / kernel[4, 4]).item(), function(0.25**1.5), atol=1e-6, rtol=0)
    torch.testing.assert_close((kernel[5, 4] / kernel[4, 4]).item(), function(4**1.5), atol=1e-6, rtol=0)
    turned = kernels(kind, sigma_x=2.0, sigma_y=0.5, beta=1.5, angle=math.pi / 2).render(9)[0]
    torch.testing.assert_close(turned, kernel.T)
    # A quarter of a half turn lays the long axis along x = y.
    diagonal = kernels(kind, sigma_x=2.0, sigma_y=0.5, beta=1.5, angle=math.pi / 4).render(9)[0]
    assert diagonal[5, 5] > 10 * diagonal[5, 3]


def test_sinc_kernel_by_hand():
    # w J1(w r) / (2 pi r) with w = 2 at r = 1, J1(2) = 0.5767248, over the center's w^2 / (4 pi).
    kernel = kernels("sinc").render(9)[0]
    expected = (2 * 0.5767248 / (2 * math.pi)) / (4 / (4 * math.pi))
    torch.testing.assert_close((kernel[4, 5] / kernel[4, 4]).item(), expected, atol=1e-6, rtol=0)
    assert kernel.min() < 0


def test_identity_kernel():
    kernel = kernels("identity").render(5)[0]
    assert kernel[2, 2] == 1 and kernel.abs().sum() == 1


# The distribution: each field of 10,000 images against the settings.

NUM_DRAWS = 10_000


def within_4_errors(values: torch.Tensor, probability: float) -> bool:
    """Whether the frequency of true values is within 4 standard errors of a probability."""
    error = math.sqrt(probability * (1 - probability) / len(values))
    return abs(values.double().mean().item() - probability) <= 4 * error


def is_uniform(values: torch.Tensor, low: float, high: float) -> bool:
    """Whether values fill a range and have the mean and spread of a uniform distribution."""
    assert low <= values.min() and values.max() <= high
    width, n = high - low, len(values)
    mean_error, variance = width / math.sqrt(12 * n), width**2 / 12
    return (
        abs(values.mean() - (low + high) / 2) < 4 * mean_error
        # The fourth central moment of a uniform distribution is width^4 / 80.
        and abs(values.var() - variance) < 4 * math.sqrt((width**4 / 80 - variance**2) / n)
        and values.max() - values.min() > width * (1 - 20 / n)
    )


def assert_kinds(blur, probabilities, sinc, applied=1.0):
    for kind, probability in enumerate(probabilities):
        assert within_4_errors(blur.kind == kind, applied * (1 - sinc) * probability), KERNEL_KINDS[kind]
    assert within_4_errors(blur.kind == KERNEL_KINDS.index("sinc"), applied * sinc)
    assert within_4_errors(blur.kind == KERNEL_KINDS.index("identity"), 1 - applied)


def assert_sizes(size, largest):
    sizes = list(range(3, largest + 1, 2))
    assert set(size.tolist()) == set(sizes)
    for value in sizes:
        assert within_4_errors(size == value, 1 / len(sizes))


def assert_shapes(blur, sigma):
    assert is_uniform(blur.sigma_x, *sigma)
    isotropic = (blur.kind < 6) & (blur.kind % 2 == 0)
    anisotropic = (blur.kind < 6) & (blur.kind % 2 == 1)
    assert torch.equal(blur.sigma_y[isotropic], blur.sigma_x[isotropic]) and (blur.angle[isotropic] == 0).all()
    assert is_uniform(blur.sigma_y[anisotropic], *sigma)
    assert is_uniform(blur.angle[anisotropic], -math.pi, math.pi)
    assert torch.corrcoef(torch.stack([blur.sigma_x, blur.sigma_y])[:, anisotropic])[0, 1].abs() < 0.1
    assert (blur.beta[blur.kind < 2] == 1).all()
    for kinds, bounds in (((2, 3), (0.5, 4)), ((4, 5), (1, 2))):
        chosen = torch.isin(blur.kind, torch.tensor(kinds))
        assert not chosen.any() or is_uniform(blur.beta[chosen], *bounds)
    is_sinc = blur.kind == KERNEL_KINDS.index("sinc")
    assert is_uniform(blur.cutoff[is_sinc & (blur.size < 13)], math.pi / 3, math.pi)
    large = is_sinc & (blur.size >= 13)
    assert not large.any() or is_uniform(blur.cutoff[large], math.pi / 5, math.pi)


def assert_noise(noise, sigma, scale, gaussian=0.5, grey=0.4):
    assert within_4_errors(noise.gaussian, gaussian) and within_4_errors(noise.grey, grey)
    assert within_4_errors(noise.gaussian & noise.grey, gaussian * grey)
    assert is_uniform(noise.level[noise.gaussian], *sigma) and is_uniform(noise.level[~noise.gaussian], *scale)


def test_10000_draws_have_the_training_distribution():
    draw = Degradation().draw(NUM_DRAWS, seeded(1))
    mix = [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
    assert_kinds(draw.blur, mix, sinc=0.1)
    assert_sizes(draw.blur.size, 19)
    assert_shapes(draw.blur, (0.2, 3))
    assert_noise(draw.noise, (1, 30), (0.05, 3))
    assert is_uniform(draw.jpeg_quality, 30, 95)

    assert within_4_errors(draw.second_order, 0.5)
    assert_kinds(draw.second_blur, mix, sinc=0.1, applied=0.8)
    assert_sizes(draw.second_blur.size, 13)
    assert_shapes(draw.second_blur, (0.2, 1.5))
    assert_noise(draw.second_noise, (1, 25), (0.05, 2.5))

    assert_kinds(draw.final_sinc, [0] * 6, sinc=1, applied=0.8)
    assert_sizes(draw.final_sinc.size, 19)
    assert is_uniform(draw.final_sinc.cutoff, math.pi / 3, math.pi)
    assert is_uniform(draw.final_jpeg_quality, 30, 95)
    assert within_4_errors(draw.final_jpeg_first, 0.5)
    for one, other in ((draw.noise.gaussian, draw.second_noise.gaussian), (draw.second_order, draw.final_jpeg_first)):
        assert within_4_errors(one & other, 0.25)  # independent


def test_10000_draws_have_the_evaluation_distribution():
    draw = Degradation(EvaluationDegradationSettings()).draw(NUM_DRAWS, seeded(2))
    assert_kinds(draw.blur, [0.6, 0.4, 0, 0, 0, 0], sinc=0.1)
    assert_sizes(draw.blur.size, 11)
    assert_shapes(draw.blur, (0.2, 0.8))
    assert_noise(draw.noise, (1, 15), (0.05, 0.3))
    assert is_uniform(draw.jpeg_quality, 70, 95) and is_uniform(draw.final_jpeg_quality, 80, 100)
    assert not draw.second_order.any()
    assert_kinds(draw.final_sinc, [0] * 6, sinc=1, applied=0.2)


def test_1000_batches_have_the_distribution_of_resizes():
    degradation, generator = Degradation(), seeded(3)
    draws = [degradation.draw(1, generator) for _ in range(1000)]
    for name, probabilities, low, high in (
        ("resize", (0.2, 0.7, 0.1), 0.15, 1.5),
        ("second_resize", (0.3, 0.4, 0.3), 0.3, 1.2),
    ):
        resizes = [getattr(draw, name) for draw in draws]
        for direction, probability in zip(("up", "down", "keep"), probabilities):
            chosen = torch.tensor([resize.direction == direction for resize in resizes])
            assert within_4_errors(chosen, probability)
            factors = torch.tensor([resize.factor for resize in resizes if resize.direction == direction])
            bounds = {"up": (1, high), "down": (low, 1)}
            assert (factors == 1).all() if direction == "keep" else is_uniform(factors, *bounds[direction])
        for mode in ("area", "bilinear", "bicubic"):
            assert within_4_errors(torch.tensor([resize.mode == mode for resize in resizes]), 1 / 3)
            assert within_4_errors(torch.tensor([draw.final_resize_mode == mode for draw in draws]), 1 / 3)


@pytest.mark.parametrize("settings", [DegradationSettings(), EvaluationDegradationSettings()], ids=["train", "test"])
def test_same_generator_same_lr(photos, settings):
    degradation = Degradation(settings)
    results = [degradation(photos, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    # A draw can be applied again, as sets of test images need.
    draw = degradation.draw(2, seeded(0))
    assert torch.equal(degradation.apply(photos, draw, seeded(5)), degradation.apply(photos, draw, seeded(5)))


def test_later_draws_do_not_depend_on_the_images(photos):
    """Poisson noise takes as many numbers as an image demands; the next batch's settings must not notice."""
    degradation = Degradation(DegradationSettings(noise_gaussian_probability=0.0))
    states = []
    for images in (photos, torch.zeros_like(photos)):
        generator = seeded(0)
        degradation(images, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_without_generator_the_global_seed_decides(photos):
    degradation, results = Degradation(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(degradation(photos))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("batch, height, width", [(1, 128, 160), (5, 96, 72)])
def test_lr_is_on_the_8_bit_grid(batch, height, width, scale):
    degradation = Degradation(scale=scale)
    hr = torch.rand(batch, 3, height, width, generator=seeded(0))
    for seed in range(10):
        lr = degradation(hr, seeded(seed))
        assert lr.shape == (batch, 3, height // scale, width // scale)
        assert lr.dtype == torch.float32 and not lr.requires_grad
        assert torch.equal((255 * lr).round() / 255, lr) and lr.min() >= 0 and lr.max() <= 1


def test_float64_differs_where_values_are_rounded_alone(photos):
    settings = NOTHING | {"blur_sigma": [1.0, 1.0]}
    degradation = Degradation(DegradationSettings(**settings))
    draw = degradation.draw(len(photos), seeded(0))
    single, double = (degradation.apply(photos.to(dtype), draw) for dtype in (torch.float32, torch.float64))
    assert double.dtype == torch.float64 and torch.equal((255 * double).round() / 255, double)
    # Rounding goes another way where a value is all but in the middle of two levels, or of two steps of the JPEG.
    assert ((255 * (double - single)).abs() > 0.5).float().mean() < 1e-3


def test_the_smallest_size_will_do_for_the_strongest_resize():
    settings = DegradationSettings(resize_probabilities=[0.0, 1.0, 0.0], second_order_probability=1.0)
    degradation = Degradation(settings)
    assert degradation.min_size == 56
    hr = torch.rand(2, 3, 56, 56)
    draw = degradation.draw(2)
    draw.resize.factor = 0.15
    draw.second_resize.factor = 0.3
    assert degradation.apply(hr, draw).shape == (2, 3, 14, 14)
    assert Degradation(EvaluationDegradationSettings()).min_size == 28


def test_float32_under_autocast(photos):
    degradation = Degradation()
    expected = degradation(photos, seeded(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(degradation(photos, seeded(0)), expected)


def test_nothing_drawn_changes_nothing(photos):
    lr = Degradation(DegradationSettings(**NOTHING), scale=1)(photos)
    # JPEG halves the colours' resolution even at quality 100; brightness stays.
    brightness = torch.tensor([0.299, 0.587, 0.114])
    difference = torch.einsum("c,bchw->bhw", brightness, lr - photos).abs()
    assert difference.mean() < 1 / 255


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("jpeg_first", [False, True])
def test_steps_keep_a_grey_image_without_noise(mode, second_order, jpeg_first):
    """Kernels sum to 1, borders are reflected and resizes interpolate, so a flat image stays as it is."""
    settings = {name: [0.0, 0.0] for name in DegradationSettings.__dataclass_fields__ if "noise_sigma" in name}
    settings |= {name: [0.0, 0.0] for name in DegradationSettings.__dataclass_fields__ if "poisson" in name}
    degradation = Degradation(DegradationSettings(**settings, blur_sinc_probability=0.5))
    draw = degradation.draw(8, seeded(0))
    draw.resize.mode = draw.second_resize.mode = draw.final_resize_mode = mode
    draw.second_order[:] = second_order
    draw.final_jpeg_first[:] = jpeg_first
    lr = degradation.apply(torch.full((8, 3, 96, 96), 0.4), draw)
    assert (lr - 0.4).abs().max() < 7 / 255  # the steps of the JPEG average at quality 30 are 6 levels wide


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("jpeg_first", [False, True])
def test_the_order_of_the_steps(photos, second_order, jpeg_first):
    """Without blur and noise, the pipeline is resizes and JPEG."""
    degradation = Degradation(
        DegradationSettings(**NOTHING, second_noise_sigma=[0, 0], second_noise_poisson_scale=[0, 0])
    )
    draw = degradation.draw(2, seeded(0))
    draw.resize.factor, draw.resize.mode, draw.final_resize_mode = 0.6, "bilinear", "bicubic"
    draw.second_resize.factor, draw.second_resize.mode = 0.9, "area"
    draw.second_blur.kind[:] = KERNEL_KINDS.index("identity")
    draw.second_order[:], draw.final_jpeg_first[:] = second_order, jpeg_first
    draw.jpeg_quality[:] = torch.tensor([50.0, 60.0])
    draw.final_jpeg_quality[:] = torch.tensor([30.0, 40.0])

    interpolate = torch.nn.functional.interpolate
    expected = jpeg(interpolate(photos, size=(76, 76), mode="bilinear"), draw.jpeg_quality).clamp(0, 1)
    if second_order:
        expected = interpolate(expected, size=(28, 28), mode="area")
    if jpeg_first:
        expected = jpeg(expected, draw.final_jpeg_quality)
    expected = interpolate(expected, size=(32, 32), mode="bicubic")
    if not jpeg_first:
        expected = jpeg(expected, draw.final_jpeg_quality)
    torch.testing.assert_close(degradation.apply(photos, draw), expected.clamp(0, 1), atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize("second_order", [False, True])
def test_the_second_order_has_its_own_noise(second_order):
    degradation = Degradation(
        DegradationSettings(**NOTHING, second_noise_sigma=[20, 20], second_noise_grey_probability=1)
    )
    draw = degradation.draw(2, seeded(0))
    draw.second_order[:], draw.second_noise.gaussian[:], draw.second_resize.factor = second_order, True, 1.0
    draw.second_noise.level[:] = 20
    draw.second_blur.kind[:] = KERNEL_KINDS.index("identity")
    lr = degradation.apply(torch.full((2, 3, 256, 256), 0.5), draw, seeded(0))
    assert (255 * lr).std().item() == pytest.approx(20 if second_order else 0, abs=1)


def test_images_of_a_batch_are_degraded_differently():
    photo = torch.rand(1, 3, 64, 64, generator=seeded(0)).expand(6, -1, -1, -1)
    draw = Degradation().draw(6, seeded(0))
    rendered = draw.blur.render(21)
    lr = Degradation()(photo, seeded(0))
    for i in range(6):
        for j in range(i):
            assert not torch.equal(rendered[i], rendered[j]) and not torch.equal(lr[i], lr[j])


def test_images_keep_their_places(photos):
    """Whatever the sub-batches, an image's LR resembles it and none of the others."""
    hr = torch.cat([photos, photos.flip(-1), photos.flip(-2), 1 - photos])
    degradation = Degradation(EvaluationDegradationSettings(second_order_probability=0.5, second_noise_sigma=[1, 5]))
    draw = degradation.draw(8, seeded(0))
    assert 0 < draw.second_order.sum() < 8 and 0 < draw.final_jpeg_first.sum() < 8
    lr = degradation.apply(hr, draw, seeded(0))
    small = torch.nn.functional.interpolate(hr, scale_factor=0.25, mode="area")
    distances = torch.cdist(lr.flatten(1), small.flatten(1))
    assert distances.argmin(dim=1).tolist() == list(range(8))


@pytest.mark.parametrize("field", ["second_order", "final_jpeg_first", "jpeg_quality", "final_jpeg_quality"])
def test_each_choice_for_an_image_changes_that_image_alone(photos, field):
    degradation = Degradation(DegradationSettings(noise_sigma=[0, 0], noise_poisson_scale=[0, 0]))
    degradation.settings.second_noise_sigma = degradation.settings.second_noise_poisson_scale = [0, 0]
    draw = degradation.draw(2, seeded(4))
    before = degradation.apply(photos, draw)
    value = getattr(draw, field)
    value[1] = ~value[1] if value.dtype == torch.bool else 125 - value[1]
    after = degradation.apply(photos, draw)
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


@pytest.mark.parametrize("field, frame", [("blur", 21), ("second_blur", 15), ("final_sinc", 21)])
def test_each_kernel_changes_its_image_alone(photos, field, frame):
    settings = DegradationSettings(
        noise_sigma=[0, 0], noise_poisson_scale=[0, 0], second_noise_sigma=[0, 0], second_noise_poisson_scale=[0, 0]
    )
    degradation = Degradation(settings)
    draw = degradation.draw(2, seeded(5))
    draw.second_order[:] = True
    getattr(draw, field).kind[:] = KERNEL_KINDS.index("identity")
    before = degradation.apply(photos, draw)
    getattr(draw, field).kind[1] = KERNEL_KINDS.index("sinc")
    after = degradation.apply(photos, draw)
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def noise_of(gaussian: bool, level: float, grey: list[bool]) -> Noise:
    n = len(grey)
    return Noise(torch.full((n,), gaussian), torch.full((n,), level, dtype=torch.float64), torch.tensor(grey))


@pytest.mark.parametrize("gaussian, level", [(True, 10.0), (False, 0.5)])
def test_grey_noise_is_the_same_in_all_channels(gaussian, level):
    image = 0.4 + 0.2 * torch.rand(1, 1, 64, 64, generator=seeded(0)).expand(2, 3, -1, -1)
    noise = add_noise(image, noise_of(gaussian, level, [True, False]), seeded(0)) - image
    torch.testing.assert_close(noise[0, 0], noise[0, 1], atol=1e-6, rtol=0)
    torch.testing.assert_close(noise[0, 0], noise[0, 2], atol=1e-6, rtol=0)
    correlation = torch.corrcoef(noise[1].flatten(1))[0, 1]
    assert noise.std() > 0.005 and correlation.abs() < 0.1


def test_gaussian_noise_has_its_level_in_each_image():
    levels = torch.tensor([1.0, 10.0, 30.0], dtype=torch.float64)
    noise = Noise(torch.ones(3, dtype=torch.bool), levels, torch.tensor([False, True, False]))
    result = 255 * (add_noise(torch.full((3, 3, 96, 96), 0.5), noise, seeded(0)) - 0.5)
    assert torch.allclose(result.std(dim=(1, 2, 3)).double(), levels, rtol=0.03)
    assert (result.mean(dim=(1, 2, 3)).abs() < 0.05 * levels + 0.05).all()


@pytest.mark.parametrize("num_levels, photons", [(2, 2), (5, 8), (32, 32), (129, 256)])
@pytest.mark.parametrize("grey", [False, True])
def test_poisson_noise_has_the_spread_of_counted_photons(num_levels, photons, grey):
    # Most pixels are 128/255; a few others make up the levels. The variance of a count is its mean.
    image = torch.full((1, 3, 128, 128), 128 / 255)
    others = [level for level in range(256) if level != 128][: num_levels - 1]
    image.flatten(2)[:, :, : num_levels - 1] = torch.tensor(others) / 255
    flat = (image[0, 0] * 255).round() == 128
    scale = 0.1
    noise = (add_noise(image, noise_of(False, scale, [grey]), seeded(0)) - image)[0, :, flat]
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(scale * math.sqrt(128 / 255 / photons), rel=0.04)


def test_grey_poisson_noise_counts_photons_of_the_grey_image():
    # Red at 1 is 0.299 of grey: noise of the red channel alone would have a rate of 1.
    image = torch.zeros(1, 3, 96, 96)
    image[:, 0] = 1.0
    noise = add_noise(image, noise_of(False, 0.1, [True]), seeded(0)) - image
    # One level, one photon: the green channel sees 0 - 0.299 (clamped to 0) and 1 - 0.299, 2 - 0.299, ...
    first = noise[0, 1][noise[0, 1] > 0].min().item()
    assert first == pytest.approx(0.1 * (1 - 76 / 255), abs=1e-4)


def test_noise_is_clamped():
    noise = Noise(torch.tensor([True, False]), torch.tensor([200.0, 3.0]), torch.tensor([False, False]))
    result = add_noise(torch.rand(2, 3, 64, 64, generator=seeded(0)), noise, seeded(0))
    assert result.amin() == 0 and result.amax() == 1


def test_jpeg_compresses_each_image_with_its_quality(photos):
    photo = photos[:1].expand(4, -1, -1, -1)
    error = (jpeg(photo, torch.tensor([30.0, 60.0, 95.0, 10.0])) - photo).square().mean(dim=(1, 2, 3))
    assert error[3] > error[0] > error[1] > error[2] > 0
    masked = jpeg(photo, torch.tensor([30.0, 60.0, 95.0, 10.0]), torch.tensor([False, True, False, True]))
    changed = (masked != photo).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, False, True]


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("quality", [10, 30, 50, 75, 90])
def test_jpeg_is_that_of_libjpeg(photos, quality, grey):
    """As far from the image (but for what its 8 bits take at the best qualities), and close to it."""
    photo = (photos[1, :, :121, :117] * 255).byte().permute(1, 2, 0).numpy()
    photo = np.repeat(np.array(Image.fromarray(photo).convert("L"))[..., None], 3, axis=2) if grey else photo
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    expected = np.array(Image.open(file))
    result = jpeg(torch.from_numpy(photo).permute(2, 0, 1)[None].double() / 255, torch.tensor([float(quality)]))
    result = (255 * result[0]).round().byte().permute(1, 2, 0).numpy()
    assert psnr(result, photo) == pytest.approx(psnr(expected, photo), abs=0.25)
    assert psnr(result, expected) > (44 if grey else 36)


def test_draws_are_json(photos):
    degradation = Degradation()
    draw = degradation.draw(40, seeded(0))
    dicts = json.loads(json.dumps(draw.to_dicts()))
    assert len(dicts) == 40
    for index, entry in enumerate(dicts):
        assert (entry["second_order"] is not None) == draw.second_order[index].item()
        assert entry["blur"]["kind"] == KERNEL_KINDS[draw.blur.kind[index]]
        assert entry["jpeg_quality"] == draw.jpeg_quality[index].item()
        assert entry["noise"]["grey"] == draw.noise.grey[index].item()
        assert entry["resize"] == {"direction": draw.resize.direction} | vars(draw.resize)
        assert ("cutoff" in entry["blur"]) == (entry["blur"]["kind"] == "sinc")
        assert ("angle" in entry["blur"]) == entry["blur"]["kind"].endswith("aniso")


@pytest.mark.parametrize("settings", [DegradationSettings, EvaluationDegradationSettings])
def test_settings_are_command_line_options(settings):
    parser = HfArgumentParser(settings)
    assert "--noise_sigma" in parser.format_help()
    assert parser.parse_args_into_dataclasses([])[0] == settings()
    options = ["--noise-sigma", "2", "3.5", "--blur-kernel-size", "9", "--second-order-probability", "0.25"]
    (parsed,) = parser.parse_args_into_dataclasses(options)
    expected = {"noise_sigma": [2.0, 3.5], "blur_kernel_size": 9, "second_order_probability": 0.25}
    assert parsed == dataclasses.replace(settings(), **expected)
    assert all(f.metadata["help"] for f in dataclasses.fields(settings))


@pytest.mark.parametrize(
    "name, value",
    [
        ("blur_kernel_probabilities", [0.5, 0.25, 0.12, 0.03, 0.12, 0.03]),
        ("blur_kernel_probabilities", [0.5, 0.5]),
        ("blur_kernel_probabilities", [1.5, -0.5, 0.0, 0.0, 0.0, 0.0]),
        ("resize_probabilities", [0.2, 0.7, 0.2]),
        ("second_resize_probabilities", [0.5, 0.5, "0"]),
        ("blur_kernel_size", 20),
        ("blur_kernel_size", 3),
        ("second_blur_kernel_size", 15.0),
        ("blur_sigma", [3.0, 0.2]),
        ("blur_sigma", [0.0, 3.0]),
        ("second_blur_sigma", [0.2]),
        ("noise_sigma", [-1.0, 30.0]),
        ("noise_poisson_scale", [0.05, float("nan")]),
        ("blur_generalized_beta", 1.0),
        ("resize_factor", [1.1, 1.5]),
        ("resize_factor", [0.0, 1.5]),
        ("second_resize_factor", [0.3, 0.9]),
        ("jpeg_quality", [0.0, 95.0]),
        ("final_jpeg_quality", [30.0, 101.0]),
        ("blur_sinc_probability", 1.1),
        ("second_order_probability", -0.1),
        ("final_sinc_probability", None),
        ("noise_grey_probability", True),
    ],
)
def test_refuses_wrong_settings(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` must be .*, got .*\.$") as error:
        EvaluationDegradationSettings(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "hr, message",
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.float16), "torch.float16"),
        (np.zeros((1, 3, 64, 64), dtype=np.float32), "float32"),
        (torch.zeros(3, 64, 64), r"\(3, 64, 64\)"),
        (torch.zeros(1, 1, 64, 64), r"\(1, 1, 64, 64\)"),
        (torch.zeros(0, 3, 64, 64), r"\(0, 3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 66), "multiples of 4"),
        (torch.zeros(1, 3, 64, 52), "at least 56"),
        (torch.full((1, 3, 64, 64), -0.1), r"in \[0, 1\]"),
        (torch.full((1, 3, 64, 64), float("nan")), r"in \[0, 1\]"),
        (torch.full((1, 3, 64, 64), 255.0), r"in \[0, 1\]"),
    ],
)
def test_refuses_wrong_images(hr, message):
    with pytest.raises(ValueError, match=f"^`hr` .*{message}"):
        Degradation()(hr)


def test_refuses_other_arguments():
    with pytest.raises(ValueError, match="`settings`.*dict"):
        Degradation({"blur_sigma": [0, 1]})
    for scale in (0, 1.5, "4"):
        with pytest.raises(ValueError, match="`scale` must be a positive integer"):
            Degradation(scale=scale)
    for batch_size in (0, 2.0):
        with pytest.raises(ValueError, match="`batch_size` must be a positive integer"):
            Degradation().draw(batch_size)
    with pytest.raises(ValueError, match="`draw` must be for 2 images, got 3"):
        Degradation().apply(torch.zeros(2, 3, 64, 64), Degradation().draw(3))


def degraded(hr: torch.Tensor, **settings) -> torch.Tensor:
    return Degradation(DegradationSettings(**NOTHING | settings))(hr, seeded(0))


def test_color_noise_leaves_the_luma(photos):
    hr = torch.full_like(photos, 0.5)
    lr = degraded(hr, color_noise_probability=1.0, color_noise_sigma=[12.0, 12.0], final_jpeg_quality=[100.0, 100.0])
    difference = 255 * (lr - 0.5)
    luma = difference.mul(torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1)
    assert luma.std() < 1
    assert (difference.std(dim=(2, 3)) > 2).all()  # less than 12: interpolation and JPEG average it


def test_sharpening_leaves_halos():
    hr = torch.full((1, 3, 128, 128), 0.3)
    hr[..., 64:] = 0.7
    plain, sharp = degraded(hr), degraded(hr, sharpening_probability=1.0, sharpening_scale=[1.0, 1.0])
    assert sharp.max() > plain.max() + 0.03 and sharp.min() < plain.min() - 0.03
    torch.testing.assert_close(sharp[..., :8], plain[..., :8], atol=0.01, rtol=0)  # far from the edge


def test_recompression_costs_as_much_as_its_quality_says(photos):
    once = degraded(photos)
    errors = [
        (degraded(photos, recompression_probability=1.0, recompression_quality=[quality] * 2) - once).abs().mean()
        for quality in (30.0, 90.0)
    ]
    assert errors[0] > 2 * errors[1] > 0


@pytest.mark.parametrize("shift", [(0, 0), (3, 5)])
def test_recompression_has_blocks_at_other_places(shift):
    # Of a flat image with one bright row only the blocks that hold it change
    flat = torch.full((1, 3, 32, 32), 0.5)
    flat[:, :, 12] = 1.0
    changed = (jpeg_again(flat, torch.tensor([10.0]), shift) - flat).abs().amax(dim=(0, 1, 3)) > 0.02
    blocks = (torch.arange(32) + shift[0]) // 16  # the colours' blocks have 16 pixels
    assert set(blocks[changed].tolist()) == {(12 + shift[0]) // 16}


def test_without_probability_the_new_steps_draw_nothing():
    generator, other = seeded(0), seeded(0)
    Degradation().draw(3, generator)
    Degradation(DegradationSettings(sharpening_probability=0.5)).draw(3, other)
    draw = Degradation().draw(3, seeded(0))
    assert not (draw.color_noise.any() or draw.sharpening.any() or draw.recompression_quality.any())
    assert not torch.equal(generator.get_state(), other.get_state())
