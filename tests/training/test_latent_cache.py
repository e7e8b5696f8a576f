import warnings

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from diffusers_invsr.training.latent_cache import LatentCache, vae_fingerprint


KEYS = ["a.png|10|1|0,0,16|upright", "a.png|10|1|0,0,16|flipped", "b/ä.png|10|1|0,0,16|upright"]


def small_vae(seed=0, **config):
    torch.manual_seed(seed)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, **config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_put_is_got_in_its_dtype(tmp_path, dtype):
    tensors = torch.randn(3, 8, 2, 2).to(dtype)
    LatentCache(tmp_path, "f0").put(KEYS, tensors)
    found = LatentCache(tmp_path, "f0").get([KEYS[2], "other", KEYS[0]])
    assert found[1] is None
    assert found[0].dtype == dtype
    assert torch.equal(found[0], tensors[2]) and torch.equal(found[2], tensors[0])


def test_parameters_give_back_the_posterior(tmp_path):
    vae = small_vae()
    with torch.no_grad():
        posterior = vae.encode(torch.rand(2, 3, 16, 16)).latent_dist
    cache = LatentCache(tmp_path, vae_fingerprint(vae))
    cache.put(KEYS[:2], posterior.parameters)
    again = type(posterior)(torch.stack(cache.get(KEYS[:2])))
    assert torch.equal(again.mean, posterior.mean) and torch.equal(again.std, posterior.std)


def test_later_tensor_replaces_the_earlier_and_views_are_kept_whole(tmp_path):
    cache = LatentCache(tmp_path, "f0")
    cache.put(KEYS[:1], [torch.zeros(2)])
    strided = torch.arange(12.0).reshape(3, 4).t().requires_grad_()
    cache.put(KEYS[:1], [strided])
    assert torch.equal(cache.get(KEYS[:1])[0], strided)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_encoders_do_not_mix(tmp_path):
    first, second = LatentCache(tmp_path, "f0"), LatentCache(tmp_path, "f1")
    first.put(KEYS[:1], torch.zeros(1, 4))
    assert second.get(KEYS[:1]) == [None]
    second.put(KEYS[:1], torch.ones(1, 4))
    assert torch.equal(first.get(KEYS[:1])[0], torch.zeros(4))


def flip_last_byte(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [flip_last_byte, lambda data: data[:-4], lambda data: data[:5], lambda data: b"", lambda data: bytes(len(data))],
    ids=["changed", "cut", "header cut", "empty", "zeros"],
)
def test_damaged_file_counts_as_missing_with_one_warning(tmp_path, damage):
    cache = LatentCache(tmp_path, "f0")
    cache.put(KEYS[:2], torch.ones(2, 4))
    path = cache._path(KEYS[0])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="Ignored the damaged file"):
        found = cache.get(KEYS[:2])
    assert found[0] is None and torch.equal(found[1], torch.ones(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(KEYS[:1]) == [None]
        cache.put(KEYS[:1], torch.ones(1, 4))
        assert torch.equal(cache.get(KEYS[:1])[0], torch.ones(4))


def test_nothing_is_left_behind_by_a_write_that_fails(tmp_path):
    cache = LatentCache(tmp_path, "f0")
    path = cache._path(KEYS[0])
    path.mkdir(parents=True)  # no file can be renamed to a folder
    with pytest.raises(OSError):
        cache.put(KEYS[:1], torch.ones(1, 4))
    assert [found for found in path.parent.iterdir() if found != path] == []


def test_fingerprint_follows_what_the_encoder_computes(tmp_path):
    vae = small_vae()
    vae.save_pretrained(tmp_path / "vae")
    assert vae_fingerprint(AutoencoderKL.from_pretrained(tmp_path / "vae")) == vae_fingerprint(vae)
    other_decoder = small_vae()
    with torch.no_grad():
        next(other_decoder.decoder.parameters()).add_(1)
    assert vae_fingerprint(other_decoder) == vae_fingerprint(vae)
    compiled = [torch.compile(model) for model in (vae, small_vae(seed=1))]
    assert vae_fingerprint(compiled[0]) != vae_fingerprint(compiled[1])
    changed = small_vae()
    with torch.no_grad():
        next(changed.encoder.parameters()).view(-1)[0] += 1e-3
    others = [
        small_vae(seed=1),
        small_vae(scaling_factor=0.5),
        small_vae().half(),
        changed,
        AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
    ]
    assert len({vae_fingerprint(model) for model in [vae, *others]}) == 6


def test_as_many_tensors_as_keys(tmp_path):
    with pytest.raises(ValueError, match="`tensors` must have one tensor per key, got 2 for 3 keys"):
        LatentCache(tmp_path, "f0").put(KEYS, torch.zeros(2, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fingerprint", ["", "../up", "a/b", 3])
def test_nothing_is_written_outside_the_folder(tmp_path, fingerprint):
    with pytest.raises(ValueError, match="`fingerprint` must consist of letters and digits, got"):
        LatentCache(tmp_path, fingerprint)
