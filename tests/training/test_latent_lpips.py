"""Latent LPIPS, and the scripts that make its data and train it."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from helpers import FIXTURES
from PIL import Image
from safetensors.torch import save_file


try:
    import lpips
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside another build of torch
    pytest.skip(f"lpips cannot be imported ({error})", allow_module_level=True)
pytest.importorskip("scipy")

from diffusers_invsr.training.latent_lpips import LatentLPIPS, _unit, load_latent_lpips


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SMALL = {"in_channels": 16, "block_out_channels": (4, 6, 8, 8, 10)}
VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


@pytest.fixture
def model() -> LatentLPIPS:
    torch.manual_seed(0)
    model = LatentLPIPS(**SMALL)
    for layer in model.lins:
        torch.nn.init.uniform_(layer.model[-1].weight)
    return model.eval()


@pytest.fixture
def pair() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 16, 8, 10, generator=generator) for _ in range(2)]


def assert_same(model: LatentLPIPS, state_dict: dict[str, torch.Tensor]):
    assert model.state_dict().keys() == state_dict.keys()
    assert all(torch.equal(tensor, state_dict[key]) for key, tensor in model.state_dict().items())


def distance_of_features(model: LatentLPIPS, *features: list[torch.Tensor]) -> torch.Tensor:
    """What LPIPS makes of the features of two batches, in float32 and by the parts of its package."""
    distance = torch.zeros(len(features[0][0]))
    for layer, x, y in zip(copy.deepcopy(model.lins).float(), *features):
        difference = (lpips.normalize_tensor(x.float()) - lpips.normalize_tensor(y.float())) ** 2
        distance += lpips.spatial_average(layer(difference)).flatten()
    return distance


def test_default_configuration_is_the_published_network():
    published = json.loads((FIXTURES / "latent_lpips_full_keys.json").read_text())
    with torch.device("meta"):
        model = LatentLPIPS()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published["state_dict"]
    assert model.num_parameters() == published["parameters"] == 14_716_736


def test_distance_is_lpips_of_a_vgg16_without_its_first_pools(model, pair):
    """Against the `lpips` package's own parts, on the convolutions taken out of the keys one by one."""
    state_dict = model.state_dict()

    def features(x):
        index, result = 0, []
        for layer in VGG16[:-1]:  # torchvision's list; the last pool comes after relu5_3
            if layer == "M":
                result.append(x)
                x = F.max_pool2d(x, 2) if len(result) == 4 else x
                index += 1
                continue
            key = f"net.slice{len(result) + 1}.{index}"
            x = F.conv2d(x, state_dict[f"{key}.weight"], state_dict[f"{key}.bias"], padding=1).relu()
            index += 2
        return [*result, x]

    with torch.no_grad():
        expected = distance_of_features(model, *map(features, pair))
        torch.testing.assert_close(model(*pair), expected, atol=1e-5, rtol=1e-5)


def test_distance_is_zero_of_equals_symmetric_and_positive(model, pair):
    with torch.no_grad():
        x, y = pair
        assert model(x, x).tolist() == [0, 0, 0]
        torch.testing.assert_close(model(x, y), model(y, x))
        assert (model(x, y) > 0.01).all()
        # image by image
        torch.testing.assert_close(model(x[1:2], y[1:2])[0], model(x, y)[1])


def test_gradient_reaches_x_through_a_frozen_network(model, pair):
    model.requires_grad_(False)
    x = pair[0].requires_grad_()
    model(*pair).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_gradient_is_finite_where_features_vanish(model):
    x = torch.zeros(1, 16, 4, 4, requires_grad=True)  # biases are zero: all features are
    model(x, torch.randn(1, 16, 4, 4)).sum().backward()
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    assert all(gradient.isfinite().all() for gradient in gradients)
    # ReLU's own gradient would hide what is not finite here
    features = torch.zeros(1, 3, 2, 2, requires_grad=True)
    _unit(features).sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["model", "latents", "autocast"])
def test_lower_precision_of_the_features_only(model, pair, kind):
    if kind == "model":
        model.to(torch.bfloat16)
    elif kind == "latents":
        pair = [x.to(torch.bfloat16) for x in pair]
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            distance = model(*pair)
            features = [model.net(x.to(model.dtype)) for x in pair]
        torch.testing.assert_close(distance, distance_of_features(model, *features), rtol=1e-5, atol=0)


def test_dropout_in_training_only(model, pair):
    with torch.no_grad():
        assert torch.equal(model(*pair), model(*pair))
        model.train()
        assert not torch.equal(model(*pair), model(*pair))


def test_clamp_weights(model):
    with torch.no_grad():
        model.lin2.model[-1].weight[0, :4] = torch.tensor([-1.0, 2.0, -0.5, 0.0])[:, None, None]
    model.clamp_weights()
    assert model.lins[2].model[-1].weight[0, :4].flatten().tolist() == [0, 2, 0, 0]


def test_save_pretrained_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    for loaded in (LatentLPIPS.from_pretrained(tmp_path), load_latent_lpips(tmp_path)):
        assert_same(loaded, model.state_dict())
        assert loaded.config["block_out_channels"] == list(SMALL["block_out_channels"])
        assert loaded.num_parameters() == model.num_parameters()  # the linear layers are still the same ones


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
@pytest.mark.parametrize("names", ["lin", "lins.", ""])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_published_file(model, pair, tmp_path, suffix, names, prefix):
    state_dict = model.state_dict()
    dropped = {"lin": "lins.", "lins.": tuple(f"lin{level}" for level in range(5)), "": "nothing"}[names]
    tensors = {f"{prefix}{key}": value for key, value in state_dict.items() if not key.startswith(dropped)}
    file = tmp_path / f"lpips.{suffix}"
    if suffix == "safetensors":
        save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors} if suffix == "pt" else tensors, file)
    loaded = load_latent_lpips(file, SMALL)
    assert_same(loaded, state_dict)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(*pair), model(*pair))


@pytest.mark.parametrize(
    "source, config, error, message",
    [
        ("missing.pth", None, FileNotFoundError, "is neither a file nor one on the Hub"),
        ("empty", None, ValueError, "must be a folder with a config.json"),
        ("saved", SMALL, ValueError, "`config` must be None for the folder .*, which has its own configuration"),
        (
            "notes.txt",
            None,
            ValueError,
            "must be a folder or a .pth, .pt, .safetensors file, got .*notes.txt",
        ),
        ("small.pth", None, ValueError, r"does not fit the model's configuration of 38 tensors: \d+ of another shape"),
        ("partial.pth", SMALL, ValueError, r"2 missing \(lin3.model.1.weight, lins.3.model.1.weight\)\.$"),
    ],
)
def test_what_cannot_be_loaded(model, tmp_path, source, config, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("lpips")
    model.save_pretrained(tmp_path / "saved")
    state_dict = model.state_dict()
    torch.save(state_dict, tmp_path / "small.pth")
    torch.save({k: v for k, v in state_dict.items() if not k.startswith(("lin3", "lins.3"))}, tmp_path / "partial.pth")
    with pytest.raises(error, match=message) as raised:
        load_latent_lpips(tmp_path / source, config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shapes", [((1, 3, 8, 8),) * 2, ((1, 16, 8, 8), (1, 16, 8, 9)), ((1, 16, 1, 8),) * 2])
def test_wrong_shapes_are_refused(model, shapes):
    with pytest.raises(ValueError, match=r"`x` and `y` must .* same shape `\(batch, 16, height, width\)`, .*, got"):
        model(*map(torch.zeros, shapes))


def test_wrong_number_of_levels_is_refused():
    with pytest.raises(ValueError, match=r"`block_out_channels` must have an entry .* VGG16's 5 levels, got \(4, 8\)"):
        LatentLPIPS(block_out_channels=(4, 8))


def test_start_from_vgg16(tmp_path):
    torch.manual_seed(0)
    vgg16, channels, index = {}, 3, 0
    for layer in VGG16:
        if layer != "M":
            vgg16[f"features.{index}.weight"] = torch.randn(layer, channels, 3, 3)
            vgg16[f"features.{index}.bias"] = torch.randn(layer)
            channels = layer
            index += 1
        index += 1
    torch.save({**vgg16, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "vgg16.pth")

    model = LatentLPIPS.from_vgg16(tmp_path / "vgg16.pth", in_channels=16)
    first = model.net.slice1[0].weight
    assert first.shape == (64, 16, 3, 3)
    torch.testing.assert_close(first.sum(dim=1), vgg16["features.0.weight"].sum(dim=1), atol=1e-5, rtol=1e-5)
    for key, value in model.net.state_dict().items():
        if key != "slice1.0.weight":
            assert torch.equal(value, vgg16[f"features.{key.split('.', 1)[1]}"]), key
    # the linear layers that come with `lpips`
    own = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    for level in range(5):
        assert torch.equal(model.lins[level].model[1].weight, own[f"lin{level}.model.1.weight"])

    del vgg16["features.28.bias"]
    torch.save(vgg16, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth' does not fit .* 1 missing \(slice5.28.bias\)"):
        LatentLPIPS.from_vgg16(tmp_path / "other.pth")


# The scripts


@pytest.fixture
def scripts():
    import make_triplets
    import train_latent_lpips

    yield make_triplets, train_latent_lpips
    for name in ("make_triplets", "train_latent_lpips"):
        sys.modules.pop(name, None)


@pytest.fixture
def triplets(scripts, tmp_path) -> Path:
    make_triplets, _ = scripts
    photos = ["--photos", str(FIXTURES / "photos"), "--patterns", "*_hr.png", "--val-photos", "1"]
    make_triplets.main([*photos, "--output", str(tmp_path / "triplets"), "--patches", "2", "--size", "32"])
    return tmp_path / "triplets"


def train(scripts, triplets: Path, output: Path, *arguments: str) -> dict:
    _, train_latent_lpips = scripts
    settings = ["--block_out_channels", "4", "4", "4", "4", "4", "--resolution", "32", "--batch_size", "8"]
    data = ["--data", str(triplets), "--vae", "tiny", "--output_dir", str(output)]
    train_latent_lpips.main([*data, *settings, *arguments])
    return json.loads((output / "metrics.json").read_text())


def test_triplets_are_judged_by_construction(scripts, triplets):
    make_triplets, train_latent_lpips = scripts
    judges = []
    for split, photos in (("train", 2), ("val", 1)):
        found, faults = train_latent_lpips.find_triplets(triplets / split)
        assert faults == []
        assert {kind: len(entries) for kind, entries in found.items()} == dict.fromkeys(
            make_triplets.KINDS, 2 * photos
        )
        for folder, name, judge in [entry for entries in found.values() for entry in entries]:
            ref, p0, p1 = (
                np.asarray(Image.open(folder / part / f"{name}.png"), float) for part in ("ref", "p0", "p1")
            )
            assert ref.shape == (32, 32, 3)
            # of one kind, the weaker one is also the nearer one
            assert (np.square(p0 - ref).mean() > np.square(p1 - ref).mean()) == judge, (folder, name)
            judges.append(judge)
    assert set(judges) == {0, 1}
    train_photos, val_photos = (
        {int(file.stem) // 2 for file in (triplets / split / "blur" / "ref").iterdir()} for split in ("train", "val")
    )
    assert not train_photos & val_photos and len(train_photos | val_photos) == 3


def test_latents_are_the_scaled_mean_of_the_posterior(scripts, cases):
    _, train_latent_lpips = scripts
    torch.manual_seed(0)
    vae = AutoencoderKL(**{**cases["vae"], "scaling_factor": 0.5}).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = 0.5 * vae.encode(2 * images - 1).latent_dist.mean
    torch.testing.assert_close(train_latent_lpips.encode(vae, images), expected)


def test_agreement(scripts):
    """By hand: a metric that is right, wrong and undecided, where people are of two minds."""
    _, train_latent_lpips = scripts

    class Difference(torch.nn.Module):
        def forward(self, x, y):
            return (x - y).abs().mean(dim=(1, 2, 3))

    vae = train_latent_lpips.load_vae("tiny")
    ref, near, far = torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), 0.6), torch.full((3, 8, 8), 0.9)
    choices = [(near, far, 0.2), (near, far, 1.0), (far, near, 1.0), (near, near, 1.0)]
    samples = [{"ref": ref, "p0": p0, "p1": p1, "judge": torch.tensor(judge)} for p0, p1, judge in choices]
    loaders = {
        "some": torch.utils.data.DataLoader(samples, batch_size=3),
        "one": torch.utils.data.DataLoader(samples[:1]),
    }
    agreement = train_latent_lpips.validate(Difference(), vae, loaders, train_latent_lpips.Accelerator(cpu=True))
    assert agreement == pytest.approx({"some": (0.8 + 0 + 1 + 0.5) / 4, "one": 0.8, "mean": (2.3 / 4 + 0.8) / 2})


def test_training_learns_what_the_judges_care_about(scripts, tmp_path):
    """Judges who see blur and no colours, of patches that differ in both: the network must learn the same."""
    rng = np.random.default_rng(0)
    photo = np.asarray(Image.open(FIXTURES / "photos" / "kodim20_hr.png").convert("RGB"))
    make_triplets, _ = scripts
    for split, count in (("train", 128), ("val", 64)):
        folder = tmp_path / "triplets" / split / "made"
        for part in ("ref", "p0", "p1", "judge"):
            (folder / part).mkdir(parents=True)
        for i in range(count):
            ref = make_triplets.draw_patch(photo, 32, rng)
            strengths = (0.6, 1.2) if i % 2 else (1.2, 0.6)
            versions = [
                make_triplets.color_shift(make_triplets.blur(ref, strength, rng), rng.uniform(0, 80), rng)
                for strength in strengths
            ]
            for part, patch in zip(("ref", "p0", "p1"), (ref, *versions)):
                make_triplets.to_image(patch).save(folder / part / f"{i}.png")
            np.save(folder / "judge" / f"{i}.npy", np.array([1.0 - i % 2]))
    schedule = ["--epochs", "5", "--decay_epochs", "5", "--learning_rate", "0.01"]
    metrics = train(scripts, tmp_path / "triplets", tmp_path / "out", *schedule)
    assert metrics["before"]["mean"] < 0.75
    assert metrics["after"]["mean"] > 0.8
    assert metrics["history"][-1]["loss"] < 0.6 * metrics["history"][1]["loss"]
    model = load_latent_lpips(tmp_path / "out")
    assert all((layer.model[1].weight >= 0).all() for layer in model.lins)


def test_linear_layers_alone(scripts, triplets, tmp_path):
    schedule = ["--epochs", "1", "--decay_epochs", "0", "--learning_rate", "0.5"]
    train(scripts, triplets, tmp_path / "out", *schedule, "--train_trunk", "False")
    trained = load_latent_lpips(tmp_path / "out")
    torch.manual_seed(0)
    start = LatentLPIPS(16, (4,) * 5)
    assert all(torch.equal(a, b) for a, b in zip(trained.net.parameters(), start.net.parameters()))
    weights = torch.cat([layer.model[1].weight.flatten() for layer in trained.lins])
    assert (weights >= 0).all() and not torch.equal(weights, torch.full_like(weights, 0.1))


def test_a_resumed_run_is_an_uninterrupted_one(scripts, triplets, tmp_path, monkeypatch):
    schedule = ["--epochs", "2", "--decay_epochs", "2"]
    train(scripts, triplets, tmp_path / "whole", *schedule)

    _, train_latent_lpips = scripts
    save, saved = train_latent_lpips.save_atomically, []

    def save_and_stop(obj, file):
        save(obj, file)
        saved.append(file)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_latent_lpips, "save_atomically", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(scripts, triplets, tmp_path / "parts", *schedule)
    monkeypatch.setattr(train_latent_lpips, "save_atomically", save)
    with pytest.raises(SystemExit, match="`output_dir=.*parts'` has a checkpoint of another run: resume it with"):
        train(scripts, triplets, tmp_path / "parts", *schedule)
    with pytest.raises(SystemExit, match="`epochs` must stay the same in a resumed run: it was 2, got 3"):
        train(scripts, triplets, tmp_path / "parts", "--epochs", "3", "--decay_epochs", "2", "--resume")
    (tmp_path / "earlier").mkdir()
    state = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    state["course"] = state.pop("fixed")
    torch.save(state, tmp_path / "earlier" / "checkpoint.pt")
    with pytest.raises(SystemExit, match="checkpoint.pt was written by an earlier release: choose another `output_d"):
        train(scripts, triplets, tmp_path / "earlier", *schedule, "--resume")
    metrics = train(scripts, triplets, tmp_path / "parts", *schedule, "--resume")
    assert [record["epoch"] for record in metrics["history"]] == [0, 1, 2, 3, 4]
    assert_same(load_latent_lpips(tmp_path / "parts"), load_latent_lpips(tmp_path / "whole").state_dict())


def test_bad_triplets_are_left_out_and_named(scripts, triplets, tmp_path, capsys):
    blur = triplets / "train" / "blur"
    names = sorted(file.stem for file in (blur / "ref").iterdir())
    (blur / "p1" / f"{names[0]}.png").unlink()
    damaged = blur / "p0" / f"{names[1]}.png"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    np.save(blur / "judge" / f"{names[2]}.npy", np.array([1.5]))
    metrics = train(scripts, triplets, tmp_path / "out", "--epochs", "1", "--decay_epochs", "0")
    assert metrics["triplets"]["train"]["blur"] == len(names) - 3
    assert "Skipped 3 bad triplets: " in capsys.readouterr().out
    for fault, expected in zip(metrics["left_out"], ["is missing", "is unreadable", "is not in [0, 1]"]):
        assert expected in fault
    with pytest.raises(SystemExit, match=r"empty/train must have triplets in BAPPS' layout .*, but has none\."):
        train(scripts, tmp_path / "empty", tmp_path / "other")
