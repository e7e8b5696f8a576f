import inspect
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from helpers import generator, photo
from PIL import Image

from diffusers_invsr import InvSRNoisePredictor, InvSRPipeline, InvSRPipelineOutput
from diffusers_invsr.tiling import TileBlender


@pytest.fixture
def deterministic_pipe(pipe):
    """No random number matters: both distributions are made as narrow as they can be."""
    for conv in (pipe.pipeline.noise_predictor.encoder.conv_out, pipe.pipeline.vae.quant_conv):
        torch.nn.init.zeros_(conv.weight[4:])
        torch.nn.init.constant_(conv.bias[4:], -30)
    return pipe


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("index", range(11))
def test_sampling_matches_reference(pipe, cases, tensors, index):
    case = cases["sampling"][index]
    result = pipe(
        tensors[f"sampling.{index}.image"],
        timesteps=case["timesteps"],
        guidance_scale=case["guidance_scale"],
        generator=generator(case["seed"]),
    )
    torch.testing.assert_close(result, tensors[f"sampling.{index}.output"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("tile_batch_size", [1, 2, 4])
@pytest.mark.parametrize("index", range(6))
def test_tiling_matches_reference(deterministic_pipe, cases, tensors, index, tile_batch_size):
    case = cases["tiled"][index]
    result = deterministic_pipe(
        tensors[f"tiled.{index}.image"],
        timesteps=case["timesteps"],
        tile_size=case["tile_size"],
        tile_overlap=case["tile_size"] - case["tile_stride"],
        tile_batch_size=tile_batch_size,
        color_fix=case["color_fix"],
    )
    torch.testing.assert_close(result, tensors[f"tiled.{index}.output"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("published", [{"tile_window": "gaussian"}, {"tile_overlap": 16}])
def test_published_tiling_is_one_argument_away(deterministic_pipe, cases, tensors, published):
    case = cases["tiled"][0]
    arguments = {"timesteps": case["timesteps"], "tile_size": case["tile_size"], "color_fix": case["color_fix"]}
    image, expected = tensors["tiled.0.image"], tensors["tiled.0.output"]
    result = deterministic_pipe(image, **arguments, **published)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    assert (deterministic_pipe(image, **arguments) - expected).abs().max() > 1e-3  # the default is another one


def test_signature_is_the_documented_one():
    parameters = list(inspect.signature(InvSRPipeline.__call__).parameters)
    assert parameters[1:] == [
        "image", "num_steps", "start_timestep", "timesteps", "scale", "target_size", "prompt", "negative_prompt",
        "guidance_scale", "eta", "tile_size", "tile_overlap", "tile_window", "tile_batch_size", "color_fix",
        "generator", "prompt_embeds", "negative_prompt_embeds", "output_type", "return_dict", "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
    ]  # fmt: skip


@pytest.mark.parametrize("num_steps, start, steps", [(1, None, [200]), (3, 250, [250, 150, 50]), (1, 100, [100])])
def test_steps_and_start_choose_the_schedule(pipe, num_steps, start, steps):
    result = pipe(photo(), num_steps=num_steps, start_timestep=start)
    assert torch.equal(result, pipe(photo(), timesteps=steps))


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("tile_size", [None, 16])
def test_result_depends_on_the_seed_alone(pipe, eta, tile_size):
    arguments = {"num_steps": 3, "eta": eta, "tile_size": tile_size}
    result = pipe(photo(), **arguments)
    assert torch.equal(result, pipe(photo(), **arguments))
    assert not torch.equal(result, pipe(photo(), **arguments, generator=generator(1)))
    for tile_batch_size in (3, 100):
        batched = pipe(photo(), **arguments, tile_batch_size=tile_batch_size)
        torch.testing.assert_close(batched, result, atol=1e-4, rtol=0)


def test_without_guidance_no_negative_prompt_is_needed(pipe):
    assert torch.equal(pipe(photo(), negative_prompt_embeds=None), pipe(photo()))


def test_eta_matters_only_between_steps(pipe):
    assert torch.equal(pipe(photo(), eta=1.0), pipe(photo(), eta=0.0))
    assert not torch.allclose(pipe(photo(), num_steps=2, eta=1.0), pipe(photo(), num_steps=2))


def test_a_generator_for_each_image(pipe):
    images = photo(batch=2)
    together = pipe(images, generator=[generator(5), generator(6)], tile_size=16)
    alone = [pipe(images[i : i + 1], generator=generator(5 + i), tile_size=16) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_images_of_several_sizes(pipe):
    images = [photo(16, 24)[0], photo(16, 24, seed=1)[0], photo(24, 16)[0]]
    results = pipe(images, generator=[generator(i) for i in range(3)])
    assert [tuple(result.shape) for result in results] == [(3, 64, 96), (3, 64, 96), (3, 96, 64)]
    torch.testing.assert_close(results[2][None], pipe(images[2], generator=generator(2)), atol=1e-4, rtol=0)


def test_images_of_several_number_types(pipe):
    images = [(photo(16, 24)[0] * 255).byte(), photo(16, 24, seed=1)[0], (photo(16, 24)[0] * 255).byte()]
    results = pipe(images, generator=[generator(i) for i in range(3)])
    for i, result in enumerate(results):
        torch.testing.assert_close(result[None], pipe(images[i], generator=generator(i)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pytorchs_default_number_type_changes_nothing(pipe, scale, dtype):
    arguments = {"scale": scale, "tile_size": 16, "generator": None, "output_type": "np", "color_fix": "wavelet"}
    image, results = photo(20, 24), []
    for default in (torch.float32, dtype):
        torch.manual_seed(0)
        torch.set_default_dtype(default)
        try:
            results.append(pipe(image, **arguments))
        finally:
            torch.set_default_dtype(torch.float32)
    assert results[1].dtype == np.float32
    np.testing.assert_allclose(*results, atol=1e-5)


@pytest.mark.parametrize("tile_size", [None, 16])
@pytest.mark.parametrize("size", [(5, 5), (3, 40), (15, 17), (16, 64), (33, 31)])
def test_any_size(pipe, size, tile_size):
    result = pipe(photo(*size), tile_size=tile_size)
    assert result.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("scale", [1, 1.37, 2, 2.5, 3, 4, 8])
@pytest.mark.parametrize("tile_size", [None, 16])
def test_any_scale(pipe, scale, tile_size):
    result = pipe(photo(21, 26), scale=scale, tile_size=tile_size)
    assert result.shape == (1, 3, int(21 * scale + 0.5), int(26 * scale + 0.5))
    target = pipe(photo(21, 26), target_size=result.shape[-2:], tile_size=tile_size)
    assert torch.equal(result, target)


@pytest.mark.parametrize("scale", [2, 2.5, 4])
def test_vae_sees_the_enlargement_and_the_predictor_a_quarter_of_it(pipe, scale):
    """With the images that the networks get recorded on their way in."""
    seen = {}
    image = photo(32, 32)
    predictor, vae = pipe.pipeline.noise_predictor, pipe.pipeline.vae
    hooks = [
        predictor.register_forward_pre_hook(lambda module, args: seen.update(lr=args[0])),
        vae.encoder.register_forward_pre_hook(lambda module, args: seen.update(enlarged=args[0])),
    ]
    pipe(image, scale=scale)
    for hook in hooks:
        hook.remove()
    size = int(32 * scale)
    enlarged = F.interpolate(image, size=(size, size), mode="bicubic", align_corners=False)
    torch.testing.assert_close(seen["enlarged"], 2 * enlarged - 1, atol=1e-5, rtol=0)
    lr = image if scale == 4 else F.interpolate(image, size=(size // 4, size // 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen["lr"][..., 2:-2, 2:-2], 2 * lr[..., 2:-2, 2:-2] - 1, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_pil_in_pil_out(pipe, mode):
    image = Image.fromarray((photo(16, 24)[0] * 255).byte().permute(1, 2, 0).numpy()).convert(mode)
    (result,) = pipe(image, output_type="pil")
    assert result.mode == mode and result.size == (96, 64)
    as_array = pipe(image, output_type="np")
    assert as_array.shape == (1, 64, 96, 4 if "A" in mode else 3)
    if mode == "RGB":
        assert np.array_equal((as_array[0] * 255).round().astype(np.uint8), np.array(result))


@pytest.mark.parametrize("tile_size", [None, 16])
def test_latent_output_decodes_to_the_image(pipe, tile_size):
    latents = pipe(photo(32, 48), tile_size=tile_size, output_type="latent")
    assert latents.shape == (1, 4, 16, 24)
    if tile_size is None:
        result = pipe.pipeline.decode_image(latents)
        torch.testing.assert_close(result, pipe(photo(32, 48)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", ["gaussian", "raised_cosine"])
def test_blended_tiles_stay_in_the_range(pipe, window):
    bias = pipe.pipeline.vae.decoder.conv_out.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias.add_(100)  # white everywhere
        result = pipe(photo(16, 40), tile_size=16, tile_window=window)
        bias.copy_(before)
    assert result.max() == 1 and result.min() > 1 - 1e-6
    assert pipe(result[..., :24, :24], tile_size=16).shape == (1, 3, 96, 96)  # an input like any other


def test_return_dict(reference_pipe, prompt_embeds):
    arguments = {"tile_size": None, "output_type": "pt", **prompt_embeds}
    assert isinstance(reference_pipe(photo(), **arguments), InvSRPipelineOutput)
    assert isinstance(reference_pipe(photo(), **arguments, return_dict=False), tuple)


def test_autoencoder_tiny_serves_as_the_vae(pipe):
    torch.manual_seed(0)
    levels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    pipe.pipeline.register_modules(vae=AutoencoderTiny(**levels, **blocks).eval())
    result = pipe(photo(20, 28), num_steps=2, tile_size=16)
    assert result.shape == (1, 3, 80, 112) and result.std() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(pipe, dtype):
    expected = pipe(photo(), num_steps=2)
    pipe.pipeline.to(dtype=dtype)
    result = pipe(photo(), num_steps=2)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=0.1, rtol=0)


def test_callback_sees_every_step_of_every_tile_batch_and_may_change_latents(pipe):
    calls = []

    def callback(pipeline, step, timestep, kwargs):
        calls.append((step, timestep, sorted(kwargs)))
        return {"latents": torch.zeros_like(kwargs["latents"])}

    tensors = ["latents", "prompt_embeds"]
    result = pipe(
        photo(), num_steps=2, tile_size=16, tile_overlap=0, tile_batch_size=3, callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=tensors,
    )  # fmt: skip
    assert calls == [(0, 199, tensors), (1, 99, tensors)] * 2  # 4 tiles in 2 batches
    black = pipe.pipeline.decode_image(torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(result[..., :64, :64], black, atol=1e-3, rtol=0)


def test_interrupt_stops_after_the_step(pipe):
    calls = []

    def callback(pipeline, step, timestep, kwargs):
        calls.append(step)
        pipeline._interrupt = True
        return {}

    result = pipe(photo(), num_steps=3, tile_size=16, tile_overlap=0, callback_on_step_end=callback)
    assert calls == [0] and result.shape == (1, 3, 128, 128) and result[..., 64:, 64:].abs().max() == 0
    assert torch.equal(pipe(photo()), pipe(photo()))  # and the next call is not interrupted


@pytest.mark.parametrize("color_fix", [None, "adain"])
def test_interrupted_images_come_all_and_in_order(pipe, color_fix):
    """The first one whole, of the second half of the tiles, of the third none."""
    images = [photo(16, size, seed=seed)[0] for seed, size in enumerate([16, 32, 16])]
    options = {"tile_size": 16, "tile_overlap": 0, "color_fix": color_fix}
    whole = [pipe(image, generator=generator(0), **options)[0] for image in images]

    def callback(pipeline, step, timestep, kwargs):
        calls.append(step)
        pipeline._interrupt = len(calls) == 2
        return {}

    calls, generators = [], [generator(0) for _ in images]
    first, second, third = pipe(images, generator=generators, callback_on_step_end=callback, **options)
    torch.testing.assert_close(first, whole[0], atol=1e-4, rtol=0)
    assert second.shape == whole[1].shape and third.shape == whole[2].shape
    if color_fix is None:
        torch.testing.assert_close(second[..., :64], whole[1][..., :64], atol=1e-4, rtol=0)
        assert second[..., 64:].abs().max() == 0 and third.abs().max() == 0


def test_an_interruption_from_elsewhere_ends_all_running_calls(pipe):
    """As by a button of a user interface, in a thread of its own."""
    calls = []

    def callback(pipeline, step, timestep, kwargs):
        calls.append(step)
        thread = Thread(target=setattr, args=(pipeline, "_interrupt", True))
        thread.start()
        thread.join()
        return {}

    pipe(photo(), num_steps=3, tile_size=16, callback_on_step_end=callback)
    assert calls == [0] and pipe.pipeline.interrupt
    assert torch.equal(pipe(photo()), pipe(photo())) and not pipe.pipeline.interrupt


def test_what_a_step_called_alone_needs(pipe, prompt_embeds):
    pipeline, latents = pipe.pipeline, torch.zeros(2, 4, 8, 8)
    pipeline.scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="`noise` is required with an `eta` greater than 0"):
        pipeline.denoise(latents, prompt_embeds["prompt_embeds"], eta=0.5)
    with pytest.raises(ValueError, match="`negative_prompt_embeds` is required with a `guidance_scale` greater"):
        pipeline.denoise(latents, prompt_embeds["prompt_embeds"], guidance_scale=2.0)
    one_for_all = pipeline.denoise(latents, *prompt_embeds.values(), guidance_scale=2.0)
    each = [embeds.expand(2, -1, -1) for embeds in prompt_embeds.values()]
    assert torch.equal(pipeline.denoise(latents, *each, guidance_scale=2.0), one_for_all)


def test_a_step_called_alone_can_be_interrupted(pipe, prompt_embeds):
    pipeline, steps = pipe.pipeline, []
    pipeline.scheduler.set_timesteps(3)

    def callback(pipeline, step, timestep, kwargs):
        steps.append(step)
        pipeline._interrupt = True
        return {}

    for _ in range(2):  # and a step after it starts as if nothing had been
        pipeline.denoise(torch.zeros(1, 4, 8, 8), prompt_embeds["prompt_embeds"], callback_on_step_end=callback)
    assert steps == [0, 0] and pipeline.interrupt


def test_after_a_call_the_pipeline_says_how_it_ran(pipe):
    pipe(photo(), num_steps=3, guidance_scale=2.0)
    assert pipe.pipeline.num_timesteps == 3 and pipe.pipeline.guidance_scale == 2 and not pipe.pipeline.interrupt


def test_calls_in_threads_do_not_disturb_one_another(pipe):
    """Each has the schedule, the guidance and the interruption that it asked for."""

    def interrupt(pipeline, step, timestep, kwargs):
        pipe.pipeline._interrupt = True
        return {}

    cases = [
        {"num_steps": 3, "tile_size": 16},
        {"num_steps": 2, "guidance_scale": 2.5},
        {"start_timestep": 100, "callback_on_step_end": interrupt, "tile_size": 16},
        {"num_steps": 5, "eta": 1.0, "callback_on_step_end": SDCFGCutoffCallback(0.2), "guidance_scale": 3.0},
    ]
    expected = [pipe(photo(), **case) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        results = list(pool.map(lambda case: pipe(photo(), **case), cases * 4))
    for result, alone in zip(results, expected * 4, strict=True):
        assert torch.equal(result, alone)


def test_progress_bar_counts_steps_times_tiles(pipe, capsys):
    pipe.pipeline.set_progress_bar_config(disable=False)
    pipe(photo(), num_steps=2, tile_size=16, tile_overlap=0, tile_batch_size=3)
    assert "8/8" in capsys.readouterr().err


def test_no_component_is_changed_by_a_call(pipe):
    before = {name: {k: v.clone() for k, v in getattr(pipe.pipeline, name).state_dict().items()}
              for name in ("vae", "unet", "noise_predictor")}  # fmt: skip
    dtypes = {name: getattr(pipe.pipeline, name).dtype for name in before}
    pipe(photo(), num_steps=2, tile_size=16)
    for name, state in before.items():
        assert getattr(pipe.pipeline, name).dtype == dtypes[name]
        assert all(torch.equal(value, state[key]) for key, value in getattr(pipe.pipeline, name).state_dict().items())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_steps": 0}, "`num_steps` must be a positive integer, got 0"),
        ({"num_steps": 2.5}, "`num_steps` must be a positive integer, got 2.5"),
        ({"num_steps": True}, "`num_steps` must be a positive integer, got True"),
        ({"num_steps": 300}, "from 1 to 250, got 300"),
        ({"num_steps": 3, "timesteps": [200, 100]}, "contradicts"),
        ({"timesteps": [100, 200]}, "descend"),
        ({"timesteps": 200}, "`timesteps` must be a list of one or more integers, got 200"),
        ({"timesteps": "200"}, "`timesteps` must be a list of one or more integers, got '200'"),
        ({"timesteps": [float("nan")]}, "`timesteps` must be a list of one or more integers"),
        ({"start_timestep": "200"}, "`start_timestep` must be one of .* got '200'"),
        ({"start_timestep": 300}, "`start_timestep` must be one of"),
        ({"scale": 0.5}, "`scale` must be between 1 and 8, got 0.5"),
        ({"scale": 9}, "`scale` must be between 1 and 8, got 9"),
        ({"scale": "2"}, "`scale` must be between 1 and 8, got '2'"),
        ({"target_size": 64}, r"`target_size` must be \(height, width\) in pixels, got 64"),
        ({"target_size": (float("inf"), 64)}, r"`target_size` must be \(height, width\)"),
        ({"scale": float("nan")}, "`scale` must be between 1 and 8, got nan"),
        ({"scale": 2, "target_size": (64, 64)}, "either `scale` or `target_size`, got 2 and"),
        ({"target_size": (16, 64)}, "1 to 8 times"),
        ({"target_size": (64, 300)}, "1 to 8 times"),
        ({"target_size": (64,)}, r"\(height, width\)"),
        ({"eta": None}, "`eta` must be between 0 and 1, got None"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number, got nan"),
        ({"eta": 1.5}, "`eta` must be between 0 and 1, got 1.5"),
        ({"tile_size": 30}, "positive multiple of 4, 'auto' or None, got 30"),
        ({"tile_size": 0}, "positive multiple of 4, 'auto' or None, got 0"),
        ({"tile_size": "foo"}, "positive multiple of 4, 'auto' or None, got 'foo'"),
        ({"tile_size": 32, "tile_overlap": 32}, "`tile_overlap` must be at least 0 and less than"),
        (
            {"tile_window": "hann"},
            r"`tile_window` must be None or one of \('gaussian', 'raised_cosine'\), got 'hann'",
        ),
        ({"tile_batch_size": 0}, "`tile_batch_size` must be a positive integer"),
        ({"color_fix": "lab"}, "`color_fix` must be None or one of"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
        ({"color_fix": "wavelet", "output_type": "latent"}, "cannot be used with `output_type='latent'`"),
        ({"generator": 5}, "`generator` must be a torch.Generator or one per image, got 5"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end` must be callable, got 3"),
        ({"generator": [generator()] * 2}, "one per image, 1, got 2"),
        ({"prompt": "sharp"}, "either `prompt` or `prompt_embeds`"),
        ({"prompt": "sharp", "prompt_embeds": None}, "needs a text encoder"),
        ({"prompt_embeds": None}, "`prompt_embeds` is required"),
        ({"negative_prompt_embeds": None, "guidance_scale": 2.0}, "`negative_prompt_embeds` is required"),
        ({"prompt_embeds": torch.zeros(3, 77, 32)}, r"shape \(1 or 1, tokens, 32\), got \(3, 77, 32\)"),
        ({"prompt_embeds": torch.zeros(1, 77, 16)}, r"got \(1, 77, 16\)"),
        ({"negative_prompt_embeds": torch.zeros(1, 76, 32), "guidance_scale": 2.0}, "must have 77 tokens"),
        ({"start_timestep": 250.0}, "`start_timestep` must be one of"),
        (
            {"tile_size": 16, "tile_overlap": 3, "output_type": "latent"},
            "`tile_overlap` must be a multiple of 2 with `output_type='latent'`, got 3",
        ),
        (
            {"tile_size": 72, "output_type": "latent"},  # by default tiles overlap by an eighth
            "`tile_overlap` must be a multiple of 2 with `output_type='latent'`, got 9",
        ),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs` must be a list"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "`callback_on_step_end_tensor_inputs` must be a list"),
        ({"color_fix": np.array(["adain"])}, "`color_fix` must be None or one of"),
    ],
)
def test_wrong_arguments_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(photo(), **arguments)


def test_integers_and_lists_of_numpy_and_torch(pipe):
    expected = pipe(photo(), timesteps=[200, 100], tile_size=16)
    for timesteps in (np.array([200, 100]), torch.tensor([200, 100]), (200, 100)):
        assert torch.equal(pipe(photo(), timesteps=timesteps, tile_size=np.int64(16)), expected)


def test_guidance_changed_by_a_callback_holds_for_the_batch_alone(pipe):
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    arguments = {"num_steps": 2, "guidance_scale": 2.5, "tile_size": 32, "tile_overlap": 0}
    arguments["callback_on_step_end"] = callback
    calls, results = [], []
    pipe.pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for tile_batch_size in (1, 2):
        results.append(pipe(torch.cat([photo()] * 2, dim=-1), **arguments, tile_batch_size=tile_batch_size))
    assert calls == [2, 1, 2, 1] + [4, 2]  # with guidance in the first step of each batch
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)


def test_guidance_cut_off_leaves_each_image_its_prompt(pipe, prompt_embeds):
    arguments = {
        "num_steps": 3,
        "guidance_scale": 2.5,
        "prompt_embeds": torch.cat([prompt_embeds["prompt_embeds"], prompt_embeds["negative_prompt_embeds"]]),
        "callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0),
    }
    results = [
        pipe(photo(batch=2), **arguments, tile_batch_size=size, generator=[generator(0), generator(1)])
        for size in (1, 2)
    ]
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)


def test_embeddings_that_a_callback_changes_in_place_are_its_own(pipe, prompt_embeds):
    def callback(pipeline, step, timestep, kwargs):
        kwargs["prompt_embeds"].zero_()
        return kwargs

    embeds, arguments = prompt_embeds["prompt_embeds"].clone(), {"num_steps": 2, "tile_size": 16}
    expected = pipe(photo(), **arguments)
    changed = pipe(
        photo(),
        **arguments,
        prompt_embeds=embeds,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert not torch.allclose(changed, expected)
    assert torch.equal(embeds, prompt_embeds["prompt_embeds"])


def test_embeddings_that_a_callback_returns_count(pipe):
    """Also where they begin in memory where those before do."""
    arguments = {
        "num_steps": 2,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        "callback_on_step_end": lambda pipeline, step, timestep, kwargs: {
            "prompt_embeds": kwargs["prompt_embeds"][:, :3]
        },
    }
    assert not torch.allclose(pipe(photo(), **arguments), pipe(photo(), num_steps=2))


def test_scheduler_of_another_kind_is_refused(pipe):
    pipe.pipeline.register_modules(scheduler=DDIMScheduler.from_config(pipe.pipeline.scheduler.config))
    with pytest.raises(ValueError, match="`scheduler` must be an InvSRScheduler, got DDIMScheduler"):
        pipe(photo())


def test_untrained_start_is_allowed_with_a_warning(pipe, caplog):
    from diffusers.utils import logging

    logging.enable_propagation()
    pipe(photo(), timesteps=[220])
    logging.disable_propagation()
    assert "not at 220" in caplog.text


def test_mismatched_noise_predictor_is_refused(pipe):
    pipe.pipeline.register_to_config(scale=2)
    with pytest.raises(ValueError, match="must reduce its input by 4 .* got 2"):
        pipe(photo())


def test_noise_predictor_for_other_latents_is_refused(pipe, cases):
    predictor = InvSRNoisePredictor(**{**cases["noise_predictor"], "latent_channels": 16})
    pipe.pipeline.register_modules(noise_predictor=predictor)
    with pytest.raises(ValueError, match="noise of 4 channels, .* got 16"):
        pipe(photo())


@pytest.mark.parametrize("shared", [False, True])
def test_images_of_one_size_come_one_after_another(pipe, monkeypatch, shared):
    """So that memory holds the sum of one at a time; unless one generator draws for all."""
    order, add = [], TileBlender.add
    monkeypatch.setattr(
        TileBlender, "add", lambda self, *args, **at: [order.append(id(self)), add(self, *args, **at)][1]
    )
    pipe(photo(16, 40, batch=3), tile_size=16, tile_overlap=4, generator=generator(0) if shared else None)
    changes = sum(before != after for before, after in zip(order, order[1:]))
    assert len(order) == 9 and changes == (8 if shared else 2)


def test_steps_can_be_called_alone(pipe, prompt_embeds):
    """With plain tensors, and together they are a call."""
    pipeline, image = pipe.pipeline, photo(16, 16)
    pipeline.scheduler.set_timesteps(3)
    prompt_embeds, negative_prompt_embeds = prompt_embeds.values()
    noise = pipeline.prepare_noise(1, 16, 16, 4, generator(), torch.device("cpu"))
    enlarged = F.interpolate(image, scale_factor=4, mode="bicubic")
    latents = pipeline.prepare_latents(image, enlarged, pipeline.scheduler.timesteps[:1], noise)
    latents = pipeline.denoise(latents, prompt_embeds, negative_prompt_embeds, noise[2:], guidance_scale=2.0, eta=0.5)
    expected = pipe(image, num_steps=3, guidance_scale=2.0, eta=0.5)
    torch.testing.assert_close(pipeline.decode_image(latents), expected, atol=1e-4, rtol=0)


def test_tiles_of_different_images_are_pooled(pipe):
    """Full batches whichever image the tiles are of, and the same results as one by one."""
    sizes = [(12, 20), (40, 16), (16, 16), (24, 40)]
    images = [photo(*size, seed=seed)[0] for seed, size in enumerate(sizes)]
    alone = [pipe(image, tile_size=16, generator=generator(seed))[0] for seed, image in enumerate(images)]
    batches = []
    pipe.pipeline.unet.register_forward_pre_hook(lambda module, arguments: batches.append(len(arguments[0])))
    generators = [generator(seed) for seed in range(len(images))]
    together = pipe(images, tile_size=16, generator=generators, tile_batch_size=4)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert set(batches[:-1]) == {4} and 1 <= batches[-1] <= 4


@pytest.mark.parametrize("color_fix", [None, "wavelet", "ycbcr", "adain"])
def test_images_are_finished_one_by_one(pipe, monkeypatch, color_fix):
    """Each while the device computes the batch after the image's last tile; of three tiles, of one and of one here."""
    images = [photo(*size, seed=seed)[0] for seed, size in enumerate([(16, 40), (16, 16), (16, 16)])]
    options = {"tile_size": 16, "tile_overlap": 4, "color_fix": color_fix}
    alone = [pipe(image, generator=generator(0), **options)[0] for image in images]
    events, postprocess = [], pipe.pipeline.image_processor.postprocess
    pipe.pipeline.unet.register_forward_pre_hook(lambda *_: events.append("compute"))
    monkeypatch.setattr(
        pipe.pipeline.image_processor, "postprocess", lambda *args: [events.append("finish"), postprocess(*args)][1]
    )
    together = pipe(images, generator=[generator(0) for _ in images], **options)
    assert events == ["compute"] * 4 + ["finish", "compute", "finish", "finish"]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_embeddings_of_each_image_stay_with_it(pipe, prompt_embeds):
    images = [photo(16, 24)[0], photo(24, 16, seed=1)[0]]
    embeds = torch.cat([prompt_embeds["prompt_embeds"], prompt_embeds["negative_prompt_embeds"]])
    results = pipe(
        images, prompt_embeds=embeds, generator=[generator(0), generator(1)], tile_size=16, tile_batch_size=3
    )
    for i, result in enumerate(results):
        alone = pipe(images[i], prompt_embeds=embeds[i : i + 1], generator=generator(i), tile_size=16)
        torch.testing.assert_close(result[None], alone, atol=1e-4, rtol=0)


def test_automatic_tiles_fit_the_image(pipe):
    """36 pixels are one tile of 36 rather than two of 32, 60 are two of 32 either way."""
    pipe.pipeline.register_to_config(tile_size=32)
    shapes = []
    pipe.pipeline.unet.register_forward_pre_hook(lambda module, arguments: shapes.append(arguments[0].shape[-2:]))
    result = pipe(photo(36, 60), tile_size="auto", tile_overlap=4)
    assert shapes == [(18, 16), (18, 16)]
    fixed = [pipe(photo(36, 60), tile_size=size, tile_overlap=4) for size in (32, 36)]
    assert [result.shape] * 2 == [other.shape for other in fixed]
    assert set(shapes[2:-2]) == {(16, 16)} and set(shapes[-2:]) == {(18, 18)}
    published = [{"tile_window": "gaussian"}, {"tile_overlap": 16}]
    for arguments in published:
        expected = pipe(photo(36, 60), tile_size=32, **arguments)
        assert torch.equal(pipe(photo(36, 60), tile_size="auto", **arguments), expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_without_breaks_and_once_for_all_images(pipe, in_place):
    """With another image size, another number of steps and another start nothing is compiled anew."""
    calls = [((20, 30), 1), ((36, 17), 3)]
    pipe.pipeline.register_to_config(tile_size=32)

    def enlarge_all(tile_size):
        return [pipe(photo(*size), num_steps=steps, tile_size=tile_size, tile_overlap=4) for size, steps in calls]

    expected = enlarge_all(32)
    torch._dynamo.reset()
    arguments = {"fullgraph": True, "backend": "eager"}
    if in_place:
        pipe.pipeline.compile(**arguments)
    else:
        pipe.pipeline.unet = torch.compile(pipe.pipeline.unet, **arguments)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(enlarge_all("auto"), expected, atol=1e-4, rtol=0)
    torch._dynamo.reset()


def test_options_of_the_compiler_reach_each_network_whole(pipe):
    """PyTorch takes some out of the dict that it gets."""
    options, seen = {"guard_filter_fn": lambda guards: [True] * len(guards)}, []
    for network in (pipe.pipeline.noise_predictor, pipe.pipeline.unet, pipe.pipeline.vae.encoder):
        network.compile = lambda options, backend: seen.append(dict(options)) or options.clear()
    pipe.pipeline.vae.decoder.compile = lambda options, backend: seen.append(dict(options))
    pipe.pipeline.compile(backend="eager", options=options)
    assert seen == [options] * 4 and len(options) == 1


def test_attention_runs_in_flash_kernels(pipe):
    """Of the noise predictor, whose tokens are all pixels of the LR tile, and of the UNet."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    expected = pipe(photo())
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.testing.assert_close(pipe(photo()), expected, atol=1e-4, rtol=0)
