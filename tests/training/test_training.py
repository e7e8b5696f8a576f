"""`examples/training/train_invsr.py` as a user runs it, with small real networks for the embedded model."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import EXAMPLES
from hub_server import serve
from PIL import Image
from runs import DISCRIMINATOR, SCRIPT, assert_same_end, environment, kill_after, run, start, train
from safetensors.torch import load_file
from subprocesses import run as run_function


pytest.importorskip("kornia")

import train_invsr as script  # noqa: E402

from diffusers_invsr import TINY, InvSRPipeline  # noqa: E402
from diffusers_invsr.files import file_digest  # noqa: E402
from diffusers_invsr.training import (  # noqa: E402
    Degradation,
    InvSRDiscriminator,
    batch_generator,
    degrade_batch,
    load_latent_lpips,
    make_dataset,
    make_loader,
    read_log,
    validation_table,
)
from diffusers_invsr.training.checkpoints import damage  # noqa: E402


pytestmark = pytest.mark.usefixtures("fresh_accelerator", "on_the_cpu")


def test_a_run_from_start_to_pipeline(settings, photos, tmp_path):
    output = tmp_path / "run"
    options = ["--validation_data", f"{photos}[:1]", "--validate_every", "3", "--report_to", "tensorboard"]
    train(settings, output, *options)

    records = read_log(output / "log.jsonl")
    losses = [record for record in records if "l2" in record]
    assert [record["iteration"] for record in losses] == [1, 2, 3, 4, 5, 6]
    # The adversarial term joins after two iterations, the discriminator learns from the first.
    assert ["adversarial" in record for record in losses] == [False, False, True, True, True, True]
    assert all(record["discriminator"] > 0 and record["discriminator_grad_norm"] > 0 for record in losses)
    for record in losses[2:]:
        total = record["l2"] + 2.0 * record["lpips"] + 0.1 * record["adversarial"]
        assert record["total"] == pytest.approx(total, rel=1e-5)
    starts = {key.split("/")[1] for record in losses for key in record if key.startswith("l2/")}
    assert len(starts) >= 3 and starts <= {"250", "200", "150", "100"}
    assert losses[1]["learning_rate"] == 1e-3  # after two iterations of warm-up

    validations = [record for record in records if "psnr_y/1_step" in record]
    assert [record["iteration"] for record in validations] == [0, 3, 6]
    assert len({record["psnr_y/bicubic"] for record in validations}) == 1
    assert len({record["psnr_y/1_step"] for record in validations}) == 3
    sheets = sorted((output / "validation").rglob("*.png"))
    assert len(sheets) == 3 and Image.open(sheets[0]).size == (5 * 64, 64 + 16)
    assert list((output / "logs").rglob("events.out.tfevents.*"))

    # What is frozen is what it was; what is trained is not.
    for part in ("vae", "unet"):
        before, after = (
            load_file(next(Path(folder, part).glob("*.safetensors"))) for folder in (TINY, output / "pipeline")
        )
        assert all(torch.equal(value.float(), after[name]) for name, value in before.items())
    first, last = (load_file(output / f"checkpoint-{i}/model.safetensors") for i in (2, 6))
    assert [name for name in first if torch.equal(first[name], last[name])] == []

    pipe = InvSRPipeline.from_pretrained(output / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    averaged = pipe.noise_predictor.state_dict()
    assert any(not torch.equal(averaged[name], value) for name, value in last.items())
    assert pipe(Image.new("RGB", (16, 16), "teal"), num_steps=2).images[0].size == (64, 64)
    card = (output / "pipeline" / "README.md").read_text()
    assert "| dis_init_iterations | `2` |" in card and "| 6 | " in card and str(photos) in card


def test_the_first_iteration_by_hand(settings, latent_lpips, tmp_path):
    """Losses, gradients and updates of both networks, with settings that are not the defaults."""
    torch.manual_seed(0)
    discriminator = InvSRDiscriminator(**DISCRIMINATOR)
    discriminator.save_pretrained(tmp_path / "discriminator")
    pipe = InvSRPipeline.from_pretrained(TINY)
    with torch.no_grad():
        pipe.noise_predictor.encoder.conv_out.bias[0] += 30  # for estimates that must be clamped
    pipe.noise_predictor.save_pretrained(tmp_path / "predictor")
    options = {
        "noise_predictor": tmp_path / "predictor",
        "discriminator": tmp_path / "discriminator",
        "output_dir": tmp_path / "run",
        "seed": 1,  # draws two starting steps
        "max_iterations": 1,
        "warmup_iterations": 0,
        "dis_init_iterations": 0,
        "lpips_weight": 3.0,
        "adversarial_weight": 0.7,
        "max_grad_norm": 1e-3,
        "discriminator_weight_decay": 1e-2,
    }
    argv = [settings, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
    script.main(argv)
    (record,) = read_log(tmp_path / "run" / "log.jsonl")

    _, data, run_settings, degradation = script.parse_args(argv)
    hr = next(iter(make_loader(make_dataset(data.train_data, 64, seed=1), 2)))["hr"].float() / 255
    generator = batch_generator(1, 0)
    lr = degrade_batch(Degradation(degradation), hr, generator)
    noise = torch.randn(3, 2, 16, 16, 16, generator=generator)[0]
    t = torch.tensor(run_settings.start_timesteps)[torch.randint(4, (2,), generator=generator)] - 1
    assert t[0] != t[1]
    enlarged = F.interpolate(lr, scale_factor=4, mode="bicubic", align_corners=False)
    with torch.no_grad():
        z_lr, z_hr = (pipe.vae.config.scaling_factor * pipe.vae.encode(2 * x - 1).latents for x in (enlarged, hr))
    alpha = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    predicted = pipe.noise_predictor(2 * lr - 1, t).latent_dist
    z = alpha.sqrt() * z_lr + (1 - alpha).sqrt() * (predicted.mean + predicted.std * noise)
    estimate = (z - (1 - alpha).sqrt() * pipe.unet(z, t, encoder_hidden_states=None).sample) / alpha.sqrt()
    assert estimate.abs().max() > 10
    fake = discriminator(estimate.clamp(-10, 10), t).logits
    losses = {
        "l2": (estimate - z_hr).square().mean(),
        "lpips": load_latent_lpips(latent_lpips)(estimate, z_hr).mean(),
        "adversarial": -sum(output.mean() for output in fake) / len(fake),
    }
    losses["total"] = losses["l2"] + 3.0 * losses["lpips"] + 0.7 * losses["adversarial"]
    gradients = torch.autograd.grad(losses["total"], list(pipe.noise_predictor.parameters()), retain_graph=True)
    real, fake = discriminator(z_hr, t).logits, discriminator(estimate.detach().clamp(-10, 10), t).logits
    hinge = [(torch.relu(1 - r).mean() + torch.relu(1 + f).mean()) / 2 for r, f in zip(real, fake)]
    losses["discriminator"] = sum(hinge) / len(hinge)
    for name, value in losses.items():
        assert record[name] == pytest.approx(value.item(), rel=1e-4), name

    checkpoint = tmp_path / "run" / "checkpoint-1"
    dis_gradients = torch.autograd.grad(losses["discriminator"], list(discriminator.parameters()))
    sides = [(pipe.noise_predictor, gradients, "", 0.0), (discriminator, dis_gradients, "_1", 1e-2)]
    for network, gradients, suffix, weight_decay in sides:
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert norm > 1e-3
        moments = torch.load(checkpoint / f"optimizer{suffix}.bin")["state"]
        trained = load_file(checkpoint / f"model{suffix}.safetensors")
        for number, (name, weight) in enumerate(network.named_parameters()):
            # Adam's first moment is a tenth of the gradient, and its first step is of the learning rate's size
            gradient = 10 * moments[number]["exp_avg"]
            expected = gradients[number] * 1e-3 / norm + weight_decay * weight
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-8)
            torch.testing.assert_close(
                trained[name], weight - 1e-3 * gradient / (gradient.abs() + 1e-8), rtol=0, atol=1e-6
            )


def test_the_pool_mixes_batches_as_soon_as_it_is_full(settings, uninterrupted, tmp_path):
    train(settings, tmp_path, "--pool_batches", "0", "--max_iterations", "3")
    mixed, own = (read_log(output / "log.jsonl") for output in (uninterrupted, tmp_path))
    assert [own[i]["l2"] == mixed[i]["l2"] for i in range(3)] == [True, True, False]


def test_killed_and_resumed_is_the_same_to_the_last_bit(settings, uninterrupted, tmp_path):
    output = tmp_path / "run"
    kill_after(output / "checkpoint-4", start(settings, output))
    assert not (output / "pipeline").exists()
    train(settings, output, "--resume", "latest")
    assert_same_end(uninterrupted, output)


def test_a_damaged_checkpoint_falls_back(settings, uninterrupted, tmp_path, caplog):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    shutil.rmtree(output / "pipeline")
    with open(output / "checkpoint-6" / "optimizer.bin", "r+b") as file:
        file.truncate(1000)
    caplog.set_level("INFO")
    train(settings, output, "--resume", "latest")
    assert "checkpoint-6: optimizer.bin has changed" in caplog.text and "Resuming from" in caplog.text
    assert damage(output / "checkpoint-6") is None
    assert_same_end(uninterrupted, output)


def test_a_resumed_run_takes_the_settings_it_is_given(settings, uninterrupted, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    resume = [settings, output, "--resume", "latest", "--mixed_precision", "bf16"]
    with pytest.raises(SystemExit, match="`max_iterations` must be at least 6, .*, got 5"):
        train(*resume, "--max_iterations", "5")
    with pytest.raises(SystemExit, match="`discriminator` must stay the same .*: it was True, got False"):
        train(*resume, "--adversarial_weight", "0")
    train(*resume, "--max_iterations", "7", "--learning_rate", "1e-9", "--ema_decay", "0")
    assert read_log(output / "log.jsonl")[-1]["learning_rate"] == 1e-9
    for name in ("model.safetensors", "model_1.safetensors"):
        before, after = (load_file(output / f"checkpoint-{iteration}" / name) for iteration in (6, 7))
        assert all((after[key] - value).abs().max() < 1e-7 for key, value in before.items())
    average = load_file(output / "pipeline" / "noise_predictor" / "diffusion_pytorch_model.safetensors")
    last = load_file(output / "checkpoint-7" / "model.safetensors")
    assert all(torch.allclose(value, last[key], rtol=0, atol=1e-6) for key, value in average.items())


def test_a_resumed_run_has_the_networks_and_the_pool_that_it_had(settings, uninterrupted, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    base = InvSRPipeline.from_pretrained(TINY)
    with torch.no_grad():
        base.unet.conv_out.bias += 1
    base.save_pretrained(tmp_path / "base")
    predictor = json.loads(Path(settings).read_text())["noise_predictor_config"]
    others = {
        "base_model": tmp_path / "base",
        "pool_batches": 3,
        "noise_predictor_config": json.dumps(predictor | {"layers_per_block": [2]}),
        "discriminator_config": json.dumps(DISCRIMINATOR | {"norm_num_groups": 16}),
    }
    resume = [settings, output, "--resume", "latest", "--max_iterations", "7"]
    for name, value in others.items():
        with pytest.raises(SystemExit, match=f"`{name}` must stay the same in a resumed run"):
            train(*resume, f"--{name}", str(value))

    # An earlier release did not store these settings
    checkpoint = output / "checkpoint-6"
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in ("run.json", "manifest.json"))
    state["fixed"] = {name: value for name, value in state["fixed"].items() if name not in others}
    (checkpoint / "run.json").write_text(json.dumps(state))
    manifest["run.json"] = file_digest(checkpoint / "run.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    train(*resume, "--base_model", str(tmp_path / "base"))
    assert read_log(output / "log.jsonl")[-1]["iteration"] == 7


def test_a_run_resumed_from_an_earlier_checkpoint_removes_the_later_ones(
    settings, uninterrupted, tmp_path, monkeypatch
):
    """Even if it is killed before it saves one: `latest` would continue with what it left."""

    def interrupt():
        raise KeyboardInterrupt

    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    monkeypatch.setattr(script, "StopRequest", interrupt)  # the loop's first step
    with pytest.raises(KeyboardInterrupt):
        train(settings, output, "--resume", str(output / "checkpoint-4"))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert read_log(output / "log.jsonl")[-1]["iteration"] == 4


def test_a_run_does_not_mix_with_another_one(settings, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "other")
    with pytest.raises(SystemExit, match="`output_dir=.*` has checkpoints of another run"):
        checkpoint = str(uninterrupted / "checkpoint-2")
        train(settings, tmp_path / "other", "--resume", checkpoint)


@pytest.mark.parametrize("last", [{"psnr_y/1_step": 24.0, "lpips/1_step": 0.3}, {"psnr_y/1_step": 24.0}])
def test_the_card_has_what_both_validations_measured(last):
    first = {"iteration": 0, "psnr_y/1_step": 23.0, "psnr_y/3_steps": None}
    text = validation_table([first, {"iteration": 3, "l2": 1.0}, {"iteration": 6, **last}])
    assert text.splitlines()[0] == "| iteration | psnr_y/1_step |" and text.splitlines()[-1] == "| 6 | 24.0000 |"


def test_ctrl_c_saves_and_the_run_is_resumed(settings, uninterrupted, tmp_path, monkeypatch, caplog):
    output, step, handler = tmp_path / "run", script.training_step, signal.getsignal(signal.SIGINT)

    def step_and_press(*args):
        monkeypatch.setattr(script, "training_step", step)
        os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(script, "training_step", step_and_press)
    caplog.set_level("INFO")
    train(settings, output, "--checkpoint_every", "100")
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert f"Resume with `--resume {output / 'checkpoint-1'}`" in caplog.text and not (output / "pipeline").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    train(settings, output, "--resume", str(output / "checkpoint-1"))
    assert_same_end(uninterrupted, output)


def test_two_processes_have_the_gradients_of_one_with_twice_the_images(settings, tmp_path):
    """A pool would mix each process's own batches; without it, two processes see what one sees in two batches."""
    options = ["--pool_batches", "0", "--checkpoint_every", "1", "--max_iterations", "3"]
    train(settings, tmp_path / "one", *options, "--gradient_accumulation_steps", "2")
    run(settings, tmp_path / "two", *options, processes=2)
    for name in ("optimizer.bin", "optimizer_1.bin"):
        # After one iteration Adam's first moment is the gradient times 0.1.
        one, two = (torch.load(tmp_path / output / "checkpoint-1" / name)["state"] for output in ("one", "two"))
        assert one[0]["exp_avg"].abs().max() > 0
        for key in one:
            torch.testing.assert_close(one[key]["exp_avg"], two[key]["exp_avg"], rtol=1e-4, atol=1e-8)
    for first, second in zip(*(read_log(tmp_path / output / "log.jsonl") for output in ("one", "two"))):
        assert {name: first[name] for name in ("l2", "total")} == pytest.approx(
            {name: second[name] for name in ("l2", "total")}, rel=1e-4
        )
    with pytest.raises(SystemExit, match="`num_processes` must stay the same in a resumed run: it was 2, got 1"):
        train(settings, tmp_path / "two", *options, "--resume", "latest")


def finish_and_push(folder, settings, output):
    """Resume a run that is over, so that only its end is left: to a repository of somebody else, then to one's own."""
    import sys

    sys.path.append(folder)
    import train_invsr

    argv = [settings, "--output_dir", output, "--resume", "latest", "--license", "cc0-1.0", "--push_to_hub"]
    try:
        train_invsr.main([*argv, "--hub_model_id", "other/trained"])
    except SystemExit as error:
        message = str(error)
    train_invsr.main([*argv, "--hub_model_id", "user/trained"])
    return message


def test_the_finished_pipeline_is_published(settings, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    with serve() as hub:
        hub.commit("other/trained", {})
        hub.read_only.add("other/trained")
        arguments = [str(SCRIPT.parent), settings, str(tmp_path / "run")]
        message = run_function(finish_and_push, *arguments, home=tmp_path / "home", hub=hub.url)
        files = hub.files("user/trained")
        assert hub.files("other/trained") == {}
    assert message.startswith("`push_to_hub` requires write access to the Hub repository 'other/trained'")
    assert {"model_index.json", "pipeline.py", "noise_predictor/diffusion_pytorch_model.safetensors"} <= set(files)
    card = files["README.md"].decode()
    assert "license: cc0-1.0" in card and "| dis_init_iterations | `2` |" in card


def test_what_cannot_be_published_is_not_trained(settings, tmp_path):
    message = "`push_to_hub` requires write access to the Hub repository 'me/run'.*`hf auth login`"
    with pytest.raises(SystemExit, match=message):
        train(settings, tmp_path / "run", "--push_to_hub", "--hub_model_id", "me/run")
    assert not (tmp_path / "run").exists()


SHARDED = """
import os, torch
from torch.distributed.fsdp import fully_shard
from diffusers_invsr import InvSRNoisePredictor

torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model = InvSRNoisePredictor(block_out_channels=(32, 32), layers_per_block=1, temb_channels=32, attention_head_dim=32)
images = torch.rand(2, 3, 16, 16)
model(images, 199).latent_dist.mean.square().mean().backward()
expected = [parameter.grad.clone() for parameter in model.parameters()]
model.zero_grad()
fully_shard(model)
rank = torch.distributed.get_rank()
model(images[rank : rank + 1], 199).latent_dist.mean.square().mean().backward()
for gradient, parameter in zip(expected, model.parameters()):
    torch.testing.assert_close(parameter.grad.full_tensor(), gradient, rtol=1e-4, atol=1e-7)
torch.distributed.barrier()
os._exit(0)  # Gloo's threads may hold tensors still, and dropping one while Python shuts down aborts the process
"""


def test_a_sharded_predictor_has_the_gradients_of_the_whole_batch(tmp_path):
    """FSDP must find the tensors of the predictor's output."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "sharded.py")], env=environment(), text=True, capture_output=True
    )
    assert process.returncode == 0, process.stderr


def test_gradients_that_are_not_finite_stop_the_run(settings, tmp_path):
    output = tmp_path / "run"
    options = ["--learning_rate", "1e30", "--warmup_iterations", "0", "--max_skipped_steps", "2"]
    with pytest.raises(SystemExit, match="2 consecutive iterations were not finite.*lower `learning_rate`"):
        train(settings, output, "--max_iterations", "50", *options)
    last = read_log(output / "log.jsonl")[-1]
    assert last["skipped_steps"] == 2 and last["grad_norm"] is None
    weights = load_file(output / f"checkpoint-{last['iteration']}" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_damaged_images_are_left_out_and_reported(settings, photos, tmp_path, caplog):
    folder = tmp_path / "damaged"
    shutil.copytree(photos, folder)
    photo = Image.open(next(photos.iterdir())).convert("RGB")
    photo.save(folder / "truncated.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "truncated.jpg").read_bytes()[:3000])
    photo.resize((1, 1)).save(folder / "one.png")
    (folder / "text.png").write_text("no image")
    photo.convert("L").save(folder / "grey.png")
    photo.convert("RGBA").save(folder / "alpha.png")
    photo.convert("I;16").save(folder / "deep.png")
    train(settings, tmp_path / "run", "--train_data", str(folder), "--batch_size", "3")
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["skipped_images"] == 3
    report = next(record.getMessage() for record in caplog.records if "Skipped 3" in record.getMessage())
    assert all(name in report for name in ("truncated.jpg", "one.png", "text.png"))


def test_fine_tuning_without_a_discriminator_file(settings, tmp_path):
    predictor = f"{TINY}/noise_predictor"
    train(settings, tmp_path, "--noise_predictor", predictor, "--max_iterations", "3")
    records = read_log(tmp_path / "log.jsonl")
    assert ["adversarial" in record for record in records] == [False, False, True]
    before, after = (
        load_file(next(Path(folder).glob("*.safetensors")))
        for folder in (predictor, tmp_path / "pipeline" / "noise_predictor")
    )
    assert before.keys() == after.keys()
    assert 0 < max((before[name].float() - after[name]).abs().max() for name in before) < 0.1


def test_other_starting_steps(settings, tmp_path):
    train(settings, tmp_path, "--start_timesteps", "400", "50")
    starts = {key.split("/")[1] for record in read_log(tmp_path / "log.jsonl") for key in record if key[:3] == "l2/"}
    assert starts == {"400", "50"}


def test_a_loss_of_weight_zero_is_not_computed(settings, tmp_path):
    options = ["--adversarial_weight", "0", "--lpips_weight", "0", "--latent_lpips", "nowhere"]
    train(settings, tmp_path, *options)
    records = read_log(tmp_path / "log.jsonl")
    assert all(record["total"] == record["l2"] for record in records)
    assert not any(key.startswith(("lpips", "adversarial", "discriminator")) for key in records[-1])
    assert not (tmp_path / "discriminator").exists()


@pytest.mark.parametrize(
    "options",
    [["--gradient_checkpointing"], ["--channels_last"], ["--mixed_precision", "bf16"]],
    ids=lambda options: options[0],
)
def test_options_of_speed_and_memory_train_nearly_the_same(settings, uninterrupted, tmp_path, options, monkeypatch):
    """And what they ask for is seen in the networks that the script's steps get."""
    networks = {}

    def watch(step):
        def watched(*args, **kwargs):
            networks.update((type(part).__name__, part) for part in args if isinstance(part, torch.nn.Module))
            return step(*args, **kwargs)

        return watched

    for name in ("encode_posterior", "one_step_estimate", "clipped_step"):
        monkeypatch.setattr(script, name, watch(getattr(script, name)))
    train(settings, tmp_path, *options)
    expected = read_log(uninterrupted / "log.jsonl")
    tolerance = 0.05 if "bf16" in options else 1e-3
    records = read_log(tmp_path / "log.jsonl")
    for record, reference in zip(records, expected, strict=True):
        assert record["l2"] == pytest.approx(reference["l2"], rel=tolerance)
        assert record["lpips"] == pytest.approx(reference["lpips"], rel=tolerance)

    trained = {"InvSRNoisePredictor", "InvSRDiscriminator"}
    assert networks.keys() == trained | {"UNet2DConditionModel", "AutoencoderTiny"}
    for name, network in networks.items():
        convolutions = [weight for weight in network.parameters() if weight.ndim == 4]
        channels_last = all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
        assert channels_last == ("--channels_last" in options)
        if name != "AutoencoderTiny":
            assert network.is_gradient_checkpointing == ("--gradient_checkpointing" in options)
        assert network.dtype == (torch.bfloat16 if "bf16" in options and name not in trained else torch.float32)
    assert ("bf16" in options) <= (records[0]["l2"] != expected[0]["l2"])


def test_cached_latents_train_the_same(settings, tmp_path):
    options = ["--crops_per_image", "1", "--max_iterations", "4"]
    train(settings, tmp_path / "without", *options)
    for number in (1, 2):  # writing it and reading it
        cache = ["--latent_cache", str(tmp_path / "cache")]
        train(settings, tmp_path / f"with{number}", *options, *cache)
        logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("without", f"with{number}")]
        assert logs[0] == logs[1]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3  # one crop of each photograph


def test_wrong_options_are_refused(settings, capsys, tmp_path):
    """Before models are loaded, with the usage; after that, with one sentence."""
    wrong = {
        "--batch_size 0": "`--batch_size` must be at least 1, got 0.",
        "--num_workers -1": "`--num_workers` must be at least 0, got -1.",
        "--max_grad_norm 0": "`--max_grad_norm` must be greater than 0, got 0.0.",
        "--max_grad_norm nan": "`--max_grad_norm` must be greater than 0, got nan.",
        "--start_timesteps 200 200": "`--start_timesteps` must be different from each other, got [200, 200].",
        "--start_timesteps 1001": "`--start_timesteps` must be integers from 1 to 1000, got [1001].",
        "--latent_cache x": "`--latent_cache` requires `--crops_per_image`",
        "--lpips_weight 1 --latent_lpips=": "`--latent_lpips` is required unless `--lpips_weight 0`",
        "--no-such-setting 1": "unknown setting: --no-such-setting 1.",
        "--resize_factor 0.5 0.1": "`resize_factor`",
        "--mixed_precision half": "Unknown mixed_precision mode: half",
        "--resume nowhere": "`resume='nowhere'` has no undamaged checkpoint (nowhere: there is no such folder).",
        "--crop_size 32": "`crop_size` must be a multiple of 4 and at least 56, got 32.",
        "--discriminator nowhere": "`discriminator` must be an existing folder, got 'nowhere'.",
        "--latent_lpips nowhere": "`source` must be a folder or a .pth, .pt, .safetensors file, got 'nowhere'.",
        "--train_data nowhere": "There is no folder or list 'nowhere'.",
        "--noise_predictor nowhere.pth": "'nowhere.pth'",
        "--base_model nowhere": "'nowhere'",
    }
    for options, message in wrong.items():
        with pytest.raises(SystemExit) as error:
            train(settings, tmp_path, *options.split())
        sentence = capsys.readouterr().err if error.value.code == 2 else str(error.value)
        assert message in sentence, options
        assert error.value.code == 2 or "\n" not in sentence


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_eight_bits_require_bitsandbytes(settings, tmp_path):
    with pytest.raises(SystemExit, match="`use_8bit_adam` requires bitsandbytes: `pip install bitsandbytes`"):
        train(settings, tmp_path, "--use_8bit_adam")


def test_eight_bits_are_for_both_optimizers(settings, tmp_path, monkeypatch):
    made = {"AdamW8bit": [], "Adam8bit": []}

    def stand_in(name: str, kind: type):
        def make(parameters, **arguments):
            made[name].append(arguments)
            return kind(parameters, **arguments)

        return make

    optim = SimpleNamespace(
        AdamW8bit=stand_in("AdamW8bit", torch.optim.AdamW), Adam8bit=stand_in("Adam8bit", torch.optim.Adam)
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    train(settings, tmp_path, "--use_8bit_adam", "--max_iterations", "1")
    assert made == {
        "AdamW8bit": [{"lr": 1e-3, "weight_decay": 0.0}],
        "Adam8bit": [{"lr": 1e-3, "weight_decay": 1e-3}],
    }


def test_a_wrong_file_of_settings_is_refused(tmp_path, capsys):
    wrong = {
        "learning_rat: 1.0e-4": "has unknown settings: learning_rat.",
        "": "must hold settings, `name: value`.",
        "{train_data: x, start_timesteps: [a]}": "`--start_timesteps` must be integers from 1 to 1000, got ['a'].",
        "{": "could not be read as a YAML file of settings",
        "{train_data: photos, noise_predictor_config: '{'}": "`--noise_predictor_config` must be JSON, got '{'.",
    }
    for text, message in wrong.items():
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(SystemExit):
            script.main([str(tmp_path / "a.yaml")])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["missing.yaml"])
    assert "there is no settings file 'missing.yaml'." in capsys.readouterr().err


def test_one_source_in_the_file_needs_no_list(tmp_path):
    (tmp_path / "a.yaml").write_text("{train_data: photos, start_timesteps: 200, lpips_weight: 0}")
    _, data, run, _ = script.parse_args([str(tmp_path / "a.yaml")])
    assert data.train_data == ["photos"] and run.start_timesteps == [200]


def test_values_of_the_file_are_read_as_on_the_command_line(tmp_path, capsys):
    text = "{train_data: x, validation_data: None, mixed_precision: no, lpips_weight: 0, learning_rate: 5e-5, CHANGE}"
    (tmp_path / "a.yaml").write_text(text.replace("CHANGE", "compile: yes, batch_size: 2"))
    _, data, run, _ = script.parse_args([str(tmp_path / "a.yaml")])
    assert data.validation_data is None and run.mixed_precision == "no"
    assert (run.learning_rate, run.compile, run.batch_size) == (5e-5, True, 2)
    (tmp_path / "a.yaml").write_text(text.replace("CHANGE", "batch_size: 2.5"))
    with pytest.raises(SystemExit):
        script.parse_args([str(tmp_path / "a.yaml")])
    assert "--batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--discriminator nowhere", "`discriminator` must be an existing folder, got 'nowhere'."),
        ("--train_data {} --num_workers 1", "`sources` has no usable image: 1 not an image."),
    ],
    ids=["setting", "images in a worker"],
)
def test_a_process_ends_in_one_sentence(settings, tmp_path, options, sentence):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    process = start(settings, tmp_path / "run", *options.format(tmp_path / "images").split())
    text, _ = process.communicate()
    assert process.returncode == 1 and "Traceback" not in text
    assert text.splitlines()[-1] == sentence


def test_an_output_folder_with_checkpoints_is_not_overwritten(settings, uninterrupted):
    with pytest.raises(SystemExit, match="`output_dir=.*` has checkpoints of another run.*`--resume latest`"):
        train(settings, uninterrupted)


@pytest.mark.parametrize("function", ["freeze", "EMAModel", "Degradation", "make_loader", "training_step"])
def test_a_bug_keeps_its_traceback(function, settings, tmp_path, monkeypatch):
    """Only where it comes from what a setting names is a ValueError the user's."""

    def fail(*args, **arguments):
        raise ValueError("a bug")

    monkeypatch.setattr(script, function, fail)
    with pytest.raises(ValueError, match="a bug"):
        train(settings, tmp_path)


def test_out_of_memory_says_what_to_lower(settings, monkeypatch):
    monkeypatch.setattr(script, "train", lambda settings: torch.empty(2**60))
    with pytest.raises(SystemExit, match="Out of memory with `batch_size=2` and `crop_size=64`: set `gradient_check"):
        script.main([settings])


@pytest.mark.parametrize("name", ["sd_turbo", "tiny"])
def test_published_configurations_parse(name):
    file = str(EXAMPLES / "training" / "configs" / f"{name}.yaml")
    model, data, run, degradation = script.parse_args([file, "--train_data", "photos", "--learning_rate", "1e-4"])
    assert data.train_data == ["photos"] and run.learning_rate == 1e-4
    assert isinstance(run.discriminator_weight_decay, float)
