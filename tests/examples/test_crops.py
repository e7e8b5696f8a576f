import numpy as np
import pytest
from crops import Crops, decode
from PIL import Image


DATA = {"shares": {"photos": 0.5, "procedural": 0.5}, "patterns": {"photos": ["*.png"]}, "procedural_count": 2}


@pytest.fixture
def photos(tmp_path):
    """A wide photograph of reds, a small one of greens, and one that no pattern matches."""
    folder = tmp_path / "data" / "photos"
    folder.mkdir(parents=True)
    for name, side, channel in (("wide.png", (1024, 256), 0), ("small.png", (64, 80), 1), ("other.jpg", (64, 64), 2)):
        pixels = np.zeros((side[1], side[0], 3), dtype=np.uint8)
        pixels[..., channel] = np.arange(side[0]) % 200 + 50
        Image.fromarray(pixels).save(folder / name)
    return tmp_path / "data"


def test_pictures_are_decoded_once_and_large_ones_at_half_size_too(photos, tmp_path):
    cache = tmp_path / "cache"
    decode(photos, cache, DATA, seed=0)
    shapes = {file.name: np.load(file).shape for file in sorted(cache.rglob("*.npy"))}
    assert shapes.pop("0000.npy") == shapes.pop("0001.npy") == (256, 256, 3)
    assert shapes == {"small.npy": (80, 64, 3), "wide.npy": (256, 1024, 3), "wide@2.npy": (128, 512, 3)}
    times = {file: file.stat().st_mtime_ns for file in cache.rglob("*.npy")}
    decode(photos, cache, DATA, seed=0)
    assert times == {file: file.stat().st_mtime_ns for file in cache.rglob("*.npy")}


def test_crops_are_those_of_the_generator_and_leave_out_what_is_held_back(photos, tmp_path):
    decode(photos, tmp_path / "cache", DATA, seed=0)
    crops = Crops(tmp_path / "cache", {"photos": 1.0}, 32, ["photos/wide.png"])
    first, again = (crops.draw(6, np.random.default_rng(3)) for _ in range(2))
    assert first.shape == (6, 3, 32, 32) and (first == again).all()
    assert first[:, 1].min() > 0 and first[:, [0, 2]].max() == 0  # greens alone
    both = Crops(tmp_path / "cache", {"photos": 1.0}, 32, []).draw(100, np.random.default_rng(0))
    assert both[:, 0].amax() > 0 and both[:, 1].amax() > 0


def test_shares_of_groups(photos, tmp_path):
    decode(photos, tmp_path / "cache", DATA, seed=0)
    crops = Crops(tmp_path / "cache", {"photos": 3.0, "procedural": 1.0}, 32, []).draw(200, np.random.default_rng(0))
    of_photos = [crop[2].max() == 0 for crop in crops]  # no blue
    assert 0.65 < np.mean(of_photos) < 0.85


def test_a_group_without_pictures(tmp_path):
    with pytest.raises(SystemExit, match="The group 'photos' has no pictures"):
        Crops(tmp_path, {"photos": 1.0}, 32, [])
