"""`examples/training/finetune_in_pixels.py` as a user runs it, on the embedded model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import EXAMPLES, FIXTURES
from random_sd_turbo import build_pipeline
from safetensors.torch import load_file

from diffusers_invsr import TINY, InvSRNoisePredictor, InvSRPipeline


pytest.importorskip("kornia")

import finetune_in_pixels  # noqa: E402
import train_invsr  # noqa: E402

from diffusers_invsr.training import (  # noqa: E402
    Degradation,
    ValidationSet,
    batch_generator,
    deepen,
    degrade_batch,
    list_files,
    make_dataset,
    make_loader,
    read_log,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerator", "on_the_cpu")
SETTINGS = [str(EXAMPLES / "training" / "configs" / "tiny_degradation.yaml"), "--train_data", str(FIXTURES / "photos")]
SIMPLE = EXAMPLES / "training" / "configs" / "simple_degradation.yaml"
OPTIONS = {
    "model": "tiny",
    "crop_size": 64,
    "batch_size": 2,
    "num_workers": 0,
    "max_iterations": 4,
    "checkpoint_every": 2,
    "log_every": 1,
}
VALIDATION = {"validation_data": FIXTURES / "photos[:1]", "validation_size": 64}


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    pipe = InvSRPipeline.from_pretrained(folder, dtype=torch.float32)
    networks = {"noise_predictor": pipe.noise_predictor, "unet": pipe.unet, "vae": pipe.vae}
    return {f"{name}.{key}": value for name, part in networks.items() for key, value in part.state_dict().items()}


def command(**options) -> list[str]:
    return [*SETTINGS, *(text for name, value in (OPTIONS | options).items() for text in (f"--{name}", str(value)))]


def test_the_decoder_and_the_predictor_learn_and_a_resumed_run_is_the_same(tmp_path):
    """The latter with the last checkpoint lost, as if the run had been killed at iteration 3."""
    one_degradation = command(output_dir=tmp_path, learning_rate=1e-3, warmup_iterations=1, **VALIDATION)
    run = [*one_degradation, "--also_degraded_by", str(SIMPLE)]
    finetune_in_pixels.main(run)
    trained, log = weights(tmp_path / "pipeline"), read_log(tmp_path / "log.jsonl")
    changed = {name for name, value in weights(TINY).items() if not torch.equal(value, trained[name])}
    assert {name.partition(".")[0] for name in changed} == {"noise_predictor", "vae"}
    assert changed and all(name.startswith(("noise_predictor", "vae.decoder")) for name in changed)
    assert [record["iteration"] for record in log if "mse" in record] == [1, 2, 3, 4]
    assert [record["iteration"] for record in log if "psnr_y/1_step" in record] == [0, 4]
    # The averaged weights are validated and saved, which are not the last ones
    pipe = InvSRPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    metrics, _ = ValidationSet(list_files(str(FIXTURES / "photos[:1]")), 64).measure(pipe)
    assert log[-1]["psnr_y/1_step"] == pytest.approx(metrics["psnr_y/1_step"], abs=0.01)
    last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert max((value - trained[name]).abs().max() for name, value in last.items()) > 1e-4

    (tmp_path / "checkpoint-4").rename(tmp_path / "lost")
    with pytest.raises(SystemExit, match="has checkpoints of another run: resume it with `--resume`"):
        finetune_in_pixels.main(run)
    for name, argv in {
        "learning_rate": [*run, "--learning_rate", "1"],
        "extra_layers": [*run, "--extra_layers", "1"],
        "blur_sigma": [*run, "--blur_sigma", "1", "2"],
        "also_degraded_by": one_degradation,
    }.items():
        with pytest.raises(SystemExit, match=f"`{name}` must stay the same in a resumed run: it was"):
            finetune_in_pixels.main([*argv, "--resume"])
    finetune_in_pixels.main([*run, "--resume"])
    assert read_log(tmp_path / "log.jsonl") == log
    for name, value in weights(tmp_path / "pipeline").items():
        assert torch.equal(value, trained[name]), name


def test_the_first_gradient_is_that_of_both_errors(tmp_path):
    argv = command(output_dir=tmp_path, max_iterations=1, max_grad_norm=1e-3, mixed_precision="no")
    finetune_in_pixels.main(argv)
    _, (degradation,) = finetune_in_pixels.parse_args(argv)
    pipe = InvSRPipeline.from_pretrained(TINY)
    finetune_in_pixels.freeze(pipe)
    hr = next(iter(make_loader(make_dataset([str(FIXTURES / "photos")], 64), 2)))["hr"].float() / 255
    generator = batch_generator(0, 0)
    lr = degrade_batch(Degradation(degradation), hr, generator)
    model = finetune_in_pixels.DecodedEstimate(pipe, None)
    estimates, clean = model(*finetune_in_pixels.make_inputs(pipe, hr, lr, generator))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = (estimates - hr).square().mean() + (clean - hr[:1]).square().mean()
    expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])
    state = torch.load(tmp_path / "checkpoint-1" / "optimizer.bin")["state"]
    moments = torch.cat([state[number]["exp_avg"].flatten() for number in range(len(parameters))])
    # Adam's first moment is a tenth of the gradient, which is as long as it may be
    difference = 10 * moments - expected * 1e-3 / expected.norm()
    assert difference.norm() < 1e-3 * 1e-3


def test_it_ends_where_gradients_are_no_longer_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_in_pixels, "MAX_SKIPPED_STEPS", 2)
    with pytest.raises(SystemExit, match="The gradients of 2 consecutive iterations were not finite: lower"):
        finetune_in_pixels.main(command(output_dir=tmp_path, learning_rate=1e30, warmup_iterations=0))
    assert not (tmp_path / "pipeline").exists()


def test_two_degradations_take_turns(tmp_path):
    """The first batch is the same without the second degradation, the second is not."""
    losses = []
    for name, options in (("one", {}), ("two", {"also_degraded_by": SIMPLE})):
        finetune_in_pixels.main(command(output_dir=tmp_path / name, max_iterations=2, **options))
        log = read_log(tmp_path / name / "log.jsonl")
        losses.append([record["mse"] for record in log if "mse" in record])
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


def test_a_pipeline_of_sd_turbos_kind(tmp_path, capsys):
    """With a text encoder and a posterior; the card tells of this run, and of the image that was left out."""
    pipe = build_pipeline(1 / 16)
    pipe.register_to_config(model_card={"license": "mit", "training": "another run"})
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "images").mkdir()
    for file in (FIXTURES / "photos").glob("*_hr.png"):
        (tmp_path / "images" / file.name).symlink_to(file)
    (tmp_path / "images" / "cut.png").write_bytes(b"no image")
    options = {"model": tmp_path / "base", "train_data": tmp_path / "images", "output_dir": tmp_path / "run"}
    finetune_in_pixels.main(command(**options, max_iterations=2))
    assert "Skipped 1 files: 1 " in capsys.readouterr().err
    trained, before = weights(tmp_path / "run" / "pipeline"), weights(tmp_path / "base")
    changed = {name for name, value in trained.items() if not torch.equal(value, before[name].half().float())}
    assert changed and all(name.startswith(("noise_predictor", "vae.decoder", "vae.post_quant")) for name in changed)
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "license: mit" in card and "| max_iterations | `2` |" in card and "another run" not in card


def make_predictor(name: str) -> InvSRNoisePredictor:
    if name == "tiny":
        return InvSRPipeline.from_pretrained(TINY).noise_predictor
    if name == "random":
        return build_pipeline(1 / 16, text=False).noise_predictor
    return InvSRNoisePredictor(block_out_channels=(32, 32), layers_per_block=2, temb_channels=64, attention_head_dim=8)


@pytest.mark.parametrize("name, layers", [("tiny", [26]), ("random", [3, 5]), ("one number for all", [2, 4])])
def test_further_layers_change_nothing_before_they_learn(name, layers):
    before = make_predictor(name).eval()
    deeper = deepen(before, 2)
    assert list(deeper.config.layers_per_block) == layers
    assert deeper.num_parameters() > before.num_parameters() and not deeper.training
    image = 2 * torch.rand(1, 3, 32, 32) - 1
    with torch.no_grad():
        assert torch.equal(deeper(image, 199).moments, before(image, 199).moments)
    deeper(image, 199).moments.square().sum().backward()
    new = deeper.encoder.down_blocks[-1].resnets[-1]
    assert new.conv2.weight.grad.abs().max() > 0


def test_a_deeper_predictor_is_saved_with_its_depth(tmp_path):
    finetune_in_pixels.main(command(output_dir=tmp_path, max_iterations=1, extra_layers=1))
    predictor = InvSRPipeline.from_pretrained(tmp_path / "pipeline").noise_predictor
    assert predictor.config.layers_per_block[0] == len(predictor.encoder.down_blocks[0].resnets)
    shipped = InvSRPipeline.from_pretrained(TINY).noise_predictor
    assert predictor.config.layers_per_block[0] == shipped.config.layers_per_block[0] + 1


def test_wrong_settings_are_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("learning_rat: 1.0e-4\nbase_model: tiny")
    for arguments, message in (
        (["missing.yaml"], "there is no settings file 'missing.yaml'"),
        ([SETTINGS[0], "--model", "tiny"], "`--train_data` must name at least one source"),
        (SETTINGS, "`--model` must name the pipeline"),
        (command(extra_layers=-1), "`--extra_layers` must be at least 0, got -1"),
        (command(batch_size=0), "`--batch_size` must be at least 1, got 0"),
        (command(max_grad_norm=-1), "`--max_grad_norm` must be greater than 0, got -1.0"),
        (command(also_degraded_by="missing.yaml"), "there is no settings file 'missing.yaml'"),
        (command(also_degraded_by=SETTINGS[0]), "tiny_degradation.yaml has unknown settings: "),
        (command(train_data="nowhere"), "There is no folder or list 'nowhere'"),
        (command(model="nowhere"), "'nowhere' could not be fetched from the Hub"),
        (command(crop_size=30), "`crop_size` must be a multiple of 4"),
        ([*SETTINGS, "--speed", "9"], "unknown setting: --speed 9"),
        (["typo.yaml"], "typo.yaml has unknown settings: learning_rat."),
    ):
        with pytest.raises(SystemExit) as error:
            finetune_in_pixels.main(arguments)
        assert message in f"{capsys.readouterr().err} {error.value}"


def test_settings_of_another_script_are_ignored_and_named(caplog):
    settings, (degradation,) = finetune_in_pixels.parse_args([*SETTINGS, "--model", "tiny"])
    assert settings.batch_size == 16 and degradation.blur_sigma == [0.2, 2.5]
    assert "tiny_degradation.yaml: ignored settings of another script: adversarial_weight, base_model" in caplog.text
    scripts = (train_invsr.ModelSettings, train_invsr.DataSettings, train_invsr.RunSettings), (type(settings),)
    others, own = ({field.name for cls in classes for field in dataclasses.fields(cls)} for classes in scripts)
    assert set(finetune_in_pixels.OTHER_SETTINGS) == others - own
