import numpy as np
import pytest
import torch
from helpers import FIXTURES
from PIL import Image

from diffusers_invsr.training.lattice import lattice_energy, lattice_loss, lattice_prominence


pytest.importorskip("scipy")
from scipy.ndimage import gaussian_filter  # noqa: E402


@pytest.fixture(scope="module")
def hr() -> np.ndarray:
    return np.asarray(Image.open(FIXTURES / "photos" / "kodim20_hr.png").convert("RGB"))


def weave(shape: tuple[int, ...], period: int, amplitude: float) -> np.ndarray:
    """A pattern that repeats, `(H, W, 1)`, of mean 0."""
    tile = np.random.default_rng(0).normal(size=(period, period))
    tile = amplitude * (tile - tile.mean()) / tile.std()
    return np.tile(tile, (shape[0] // period + 1, shape[1] // period + 1))[: shape[0], : shape[1], None]


def to_8_bits(image: np.ndarray) -> np.ndarray:
    return image.round().clip(0, 255).astype(np.uint8)


def test_a_weave_of_the_latents_period_shows_and_nothing_else(hr):
    smooth = gaussian_filter(hr.astype(float), (1, 1, 0))
    assert lattice_energy(hr, hr) == lattice_prominence(hr, hr) == 1
    assert lattice_energy(to_8_bits(smooth), hr) < 0.8
    assert 0.8 < lattice_prominence(to_8_bits(smooth), hr) < 1.3
    woven = to_8_bits(smooth + weave(hr.shape, 4, 2.0))
    assert lattice_prominence(woven, hr) > 10
    assert lattice_energy(woven, hr) > 1.5 * lattice_energy(to_8_bits(smooth), hr)
    other = to_8_bits(hr + weave(hr.shape, 5, 2.0))
    assert 0.8 < lattice_prominence(other, hr) < 1.2


def test_lattice_loss_sees_what_repeats_and_hardly_what_does_not():
    target = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pattern = torch.from_numpy(weave((64, 64), 4, 0.1)).permute(2, 0, 1).float()
    noise = 0.1 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1))
    loss = lattice_loss(target + torch.stack([pattern.expand(3, 64, 64), noise]), target)
    assert loss[0].item() == pytest.approx(0.1, rel=0.05)  # its whole amplitude
    assert loss[1] < 0.15 * 0.1  # an eighth of it is left by the mean over a window of 64
    assert lattice_loss(target + 0.3, target).max() < 1e-9  # another brightness is no pattern
