"""The benchmark, with SD-Turbo's modules at a sixteenth of their width."""

import inspect
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from random_sd_turbo import WIDTHS, build_pipeline, scaled_configs
from torch import nn

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline


pytest.importorskip("matplotlib")

import benchmark  # noqa: E402
import measure_memory  # noqa: E402
import measure_startup  # noqa: E402
from benchmark_variants import (  # noqa: E402
    Calls,
    Runner,
    Settings,
    Variant,
    copy_sharing_weights,
    count_flops,
    fix_tile_size,
    make_variants,
    parse_variant,
)


CPU = torch.device("cpu")


def test_the_configurations_are_those_of_sd_turbo():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = scaled_configs()
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(**configs["unet"]),
            "vae": AutoencoderKL(**configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
            "noise_predictor": InvSRNoisePredictor(**configs["noise_predictor"]),
        }
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert sizes == {
        "unet": 865_910_724,
        "vae": 83_653_863,
        "text_encoder": 340_387_840,
        "noise_predictor": 33_837_576,
    }
    config = models["noise_predictor"].config
    defaults = {key: item.default for key, item in inspect.signature(InvSRNoisePredictor).parameters.items()}
    assert {key: config[key] for key in defaults} == defaults


@pytest.mark.parametrize("width", WIDTHS)
def test_scaled_channels_fit_heads_and_groups(width):
    configs = scaled_configs(width)
    unet = configs["unet"]
    heads = zip(unet["block_out_channels"], unet["attention_head_dim"])
    assert all(channels % count == 0 and (count == 1 or channels // count >= 64) for channels, count in heads)
    for name in ("unet", "vae", "noise_predictor"):
        groups = configs[name]["norm_num_groups"]
        assert all(channels % groups == 0 for channels in configs[name]["block_out_channels"])


@pytest.mark.parametrize("width", (0, 0.3, 2, None))
def test_other_widths_are_refused(width):
    with pytest.raises(ValueError, match="`width` must be one of 1, 0.5, 0.25, 0.125, 0.0625, got"):
        build_pipeline(width)


@pytest.fixture(scope="module")
def small() -> InvSRPipeline:
    return build_pipeline(1 / 16)


def test_a_pipeline_without_text_encoder_works():
    state = torch.get_rng_state()
    pipe = build_pipeline(1 / 16, seed=1, text=False)
    assert torch.equal(torch.get_rng_state(), state)
    pipe.set_progress_bar_config(disable=True)
    result = pipe(torch.rand(1, 3, 32, 32), tile_size=None, output_type="pt").images
    assert result.isfinite().all() and result.std() > 0.05
    assert pipe.text_encoder is None and pipe.tokenizer is None


def test_weights_follow_from_the_seed(small):
    same, other = (build_pipeline(1 / 16, seed=seed, text=False).unet.conv_in.weight for seed in (0, 1))
    assert torch.equal(small.unet.conv_in.weight, same) and not torch.equal(same, other)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """Results of one benchmark, and the tables."""
    output = tmp_path_factory.mktemp("benchmark") / "results"
    options = ["--output", output, "--device", "cpu", "--width", 1 / 16, "--sizes", "64x32", "--tile-size", 32]
    options += ["--baseline", "published", "--repeats", 2, "--warmup", 1]
    options += ["--keep-memory"] if sys.platform == "linux" else []
    options += ["--variant", "half:tile-window=gaussian,tile_batch_size=2"]
    benchmark.main([str(option) for option in options])
    assert sorted(file.name for file in output.iterdir()) == ["benchmark.json", "benchmark.md", "benchmark.png"]
    assert [file.name for file in output.parent.iterdir()] == ["results"]
    assert Image.open(output / "benchmark.png").size[0] > 400
    data = json.loads((output / "benchmark.json").read_text())
    return {**data, "markdown": (output / "benchmark.md").read_text()}


def test_the_published_procedure_is_the_reference(report):
    (workload,) = report["workloads"]
    rows = {row["name"]: row for row in workload["variants"]}
    assert list(rows) == ["published", "base", "half"]
    assert workload["reference"] == "published" and workload["workload"] == "64x32, 1 step, 1 image"
    assert rows["published"]["speed_up"] == {"of_medians": 1, "lowest": 1, "highest": 1}
    median = [np.median(rows[name]["seconds"]) for name in ("published", "half")]
    assert rows["half"]["speed_up"]["of_medians"] == pytest.approx(median[0] / median[1])
    # Batches and the layout do not change the result, other tiles do.
    assert rows["half"]["equal_to_reference"] or rows["half"]["psnr"] > 70
    assert not rows["base"]["equal_to_reference"] and rows["base"]["psnr"] < 60


def test_a_vae_that_needs_float32_is_measured_so(tmp_path):
    options = {"device": "cpu", "width": 1 / 16, "sizes": "32x32", "tile-size": 32, "dtype": "float16"}
    options |= {"repeats": 1, "warmup": 1, "baseline": "published"}
    arguments = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    benchmark.main([*arguments, "--output", str(tmp_path / "results")])
    report = json.loads((tmp_path / "results" / "benchmark.json").read_text())
    assert not report["environment"]["memory kept"]
    (workload,) = report["workloads"]
    for row in workload["variants"]:
        assert all(len(part["seconds_per_call"]) == 1 for part in row["components"].values())
        assert {"VAE encoder", "VAE decoder"} <= set(row["components"])


def test_calls_and_operations(report):
    rows = {row["name"]: row for row in report["workloads"][0]["variants"]}
    assert {row["tiles"] for row in rows.values()} == {3}
    calls = {name: {part: item["calls"] for part, item in row["components"].items()} for name, row in rows.items()}
    networks = ("noise predictor", "VAE encoder", "UNet", "VAE decoder")
    expected = {"published": 3, "base": 3, "half": 2}
    assert calls == {name: {"text encoder": 1, **dict.fromkeys(networks, count)} for name, count in expected.items()}
    published, half = (rows[name]["components"] for name in ("published", "half"))
    for name in networks:
        assert half[name]["batch"] == 2 and half[name]["flops_per_call"] == 2 * published[name]["flops_per_call"] > 0
        assert len(half[name]["seconds_per_call"]) == 2 and min(half[name]["seconds_per_call"]) > 0
    assert rows["published"]["flops"] == pytest.approx(rows["half"]["flops"])
    assert rows["published"]["flops"] == sum(item["calls"] * item["flops_per_call"] for item in published.values())
    assert report["matmul_peak_flops"]["float32"] > 1e8


def test_tables_have_one_row_per_variant(report):
    text = report["markdown"]
    row = next(line for line in text.splitlines() if line.startswith("| published |"))
    assert "| 3 |" in row and "| 1.00 (1.00–1.00) |" in row and row.endswith("| reference |")
    assert text.count("\n| half |") == 1 + 5
    assert report["environment"]["memory kept"] == (sys.platform == "linux")
    assert report["environment"]["threads"] == torch.get_num_threads() and report["environment"]["device"] in text


def test_runners_share_weights_and_nothing_else(small):
    weights = {}
    variants = [Variant(layout, Settings(layout=layout)) for layout in ("auto", "nchw")]
    first, second = (Runner(variant, small, weights, CPU) for variant in variants)
    other = Runner(Variant("half", Settings(dtype="bfloat16", vae="tiny", tile_size=32)), small, weights, CPU)
    pointers = [runner.pipe.unet.conv_in.weight.data_ptr() for runner in (first, second)]
    assert pointers[0] == pointers[1] == small.unet.conv_in.weight.data_ptr()
    assert len(second.pipe.unet._forward_pre_hooks) == 1 and not first.pipe.unet._forward_pre_hooks
    assert first.pipe.unet is not second.pipe.unet
    assert {p.dtype for part in (other.pipe.unet, other.pipe.vae) for p in part.parameters()} == {torch.bfloat16}
    assert small.unet.dtype == torch.float32 and type(other.pipe.vae).__name__ == "AutoencoderTiny"
    (result,) = other.run([Image.new("RGB", (32, 32))], 1)
    assert result.size == (128, 128)


def test_operations_are_counted_from_shapes():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    calls = Calls((torch.rand(2, 3, 10, 12),), {}, batch=2)
    assert count_flops(conv, calls) == 2 * 2 * 10 * 12 * 8 * 3 * 9
    assert conv.weight.device == CPU
    shared = copy_sharing_weights(conv, lambda tensor: tensor, {})
    assert shared is not conv and shared.weight.data_ptr() == conv.weight.data_ptr()


def test_variants_change_one_thing_each():
    options = {"dtype": ["bfloat16", "float32"], "compile": ["no"], "tile_batch_size": [1, 4, 8]}
    combinations = [parse_variant("both:tile-batch-size=4,compile=full")]
    variants = {variant.name: variant.settings for variant in make_variants(options, combinations, published=True)}
    base = Settings(dtype="bfloat16")
    assert variants == {
        "published": Settings(dtype="bfloat16", layout="nchw", tile_window="gaussian", pool="no"),
        "base": base,
        "dtype=float32": Settings(dtype="float32"),
        "tile_batch_size=4": Settings(dtype="bfloat16", tile_batch_size=4),
        "tile_batch_size=8": Settings(dtype="bfloat16", tile_batch_size=8),
        "both": Settings(dtype="bfloat16", tile_batch_size=4, compile="full"),
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--tile-size", "0"], "tile_size must be an integer of at least 1 or auto or none, got '0'"),
        (["--tile-overlap", "none"], "tile_overlap must be an integer of at least 0 or auto, got 'none'"),
        (["--sizes", "128"], "must be WIDTHxHEIGHT in LR pixels, at least 2x2, got '128'"),
        (["--steps", "0"], "must be a positive integer, got '0'"),
        (["--variant", "fast"], "must be NAME:key=value,key=value, got 'fast'"),
        (["--variant", "fast:speed=9"], "must name each of dtype, compile, layout"),
        (["--variant", "fast:compile=plain"], "compile must be one of no, full, graphs, regional, got 'plain'"),
        (["--tile-batch-size", "2", "4", "4"], "the variant 'tile_batch_size=4' occurs 2 times"),
        (["--variant", "base:vae=tiny"], "the variant 'base' occurs 2 times"),
        (["--device", "nowhere"], "`--device nowhere` cannot be used"),
        (["--device", "meta"], "`--device` must be cpu or cuda, got meta"),
        (["--model", "tiny", "--width", "0.5"], "`--width 0.5` is for the random model, not for `--model tiny`"),
        (["--width", "0.3"], "`width` must be one of 1, 0.5, 0.25, 0.125, 0.0625, got 0.3"),
        (["--model", "nothing"], "`--model` must be random, tiny or the folder of a saved pipeline, got 'nothing'"),
        (["--model", "tiny", "--tile-size", "33"], "the variant 'base' cannot run: `tile_size`"),
        (
            ["--model", "tiny", "--tile-size", "32", "--compile", "regional"],
            "the variant 'base' cannot run: Regional compilation failed",
        ),
    ],
)
def test_refusals(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        benchmark.main(["--output", str(tmp_path / "out"), "--sizes", "16x16", *options])
    assert message in f"{capsys.readouterr().err} {error.value}"
    assert not list(tmp_path.iterdir())


def test_results_are_not_replaced(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--output", str(tmp_path)])
    assert f"`--output` must be a new folder, but {tmp_path} exists" in capsys.readouterr().err


@pytest.mark.long
def test_startup(capsys):
    measure_startup.main(["--repeats", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    times = {row[0].strip("| "): float(row[1]) for row in rows}
    assert len(times) == 5 and min(times.values()) >= 0 and times["diffusers"] > 0


def test_beside_a_compiled_pipeline_tiles_are_not_fitted():
    variants = make_variants({"compile": ["no", "full"], "tile_size": ["auto", 64, None]}, [], published=True)
    fixed = {variant.name: fix_tile_size(variant, 128).settings.tile_size for variant in variants}
    assert fixed == {"published": 128, "base": 128, "compile=full": 128, "tile_size=64": 64, "tile_size=None": None}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_memory_and_time_of_both_ways_to_free_memory(capsys):
    measure_memory.main(["--sizes", "24", "--tile-size", "16", "--repeats", "1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["24", "returned"], ["24", "kept"]]
    for row in rows:
        seconds, growth, buffers = float(row[2]), float(row[4]), float(row[5])
        assert seconds > 0 and growth > buffers == round((4 * 24) ** 2 * 19 / 2**20)


@pytest.mark.parametrize("freed", ("returned", "kept"))
def test_memory_of_models_that_do_not_exist(freed):
    with pytest.raises(SystemExit, match="`--model` must be random, tiny or the folder of a saved pipeline"):
        measure_memory.main(["--model", "nowhere", "--freed", freed])
