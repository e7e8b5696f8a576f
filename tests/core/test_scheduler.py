import json

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from diffusers_invsr import InvSRScheduler


PUBLISHED = {
    1: [200],
    2: [200, 100],
    3: [200, 100, 50],
    4: [200, 150, 100, 50],
    5: [250, 200, 150, 100, 50],
    6: [250, 208, 166, 125, 83, 41],
}


def steps(**arguments) -> list[int]:
    scheduler = InvSRScheduler()
    scheduler.set_timesteps(**arguments)
    return (scheduler.timesteps + 1).tolist()


@pytest.mark.parametrize("num_steps", PUBLISHED)
def test_published_schedules(num_steps):
    assert steps(num_inference_steps=num_steps) == PUBLISHED[num_steps]


def test_250_steps_are_all_of_them():
    assert steps(num_inference_steps=250) == list(range(250, 0, -1))


@pytest.mark.parametrize(
    "num_steps, start, expected",
    [
        (None, 150, [150]),
        (1, 250, [250]),
        (1, 100, [100]),
        (2, 200, [200, 100]),
        (3, 200, [200, 100, 50]),
        (3, 250, [250, 150, 50]),
        (3, 150, [150, 100, 50]),
        (2, 100, [100, 50]),
        (5, 250, [250, 200, 150, 100, 50]),
        (6, 250, [250, 208, 166, 125, 83, 41]),
        (3, 100, [100, 75, 50]),
        (51, 100, list(range(100, 49, -1))),
    ],
)
def test_start_timestep(num_steps, start, expected):
    assert steps(num_inference_steps=num_steps, start_timestep=start) == expected


@pytest.mark.parametrize("start", [250, 200, 150, 100])
def test_any_start_descends_strictly(start):
    for num_steps in range(1, 52):
        schedule = steps(num_inference_steps=num_steps, start_timestep=start)
        assert schedule[0] == start and len(schedule) == num_steps
        assert all(later < earlier for earlier, later in zip(schedule, schedule[1:])) and schedule[-1] >= 1


def test_timesteps_by_hand():
    assert steps(timesteps=[250, 150, 50]) == [250, 150, 50]
    assert steps(timesteps=[250, 1], num_inference_steps=2, start_timestep=250) == [250, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 0}, "from 1 to 250, got 0"),
        ({"num_inference_steps": 0, "start_timestep": 200}, "from 1 to 250, got 0"),
        ({"num_inference_steps": "3"}, "from 1 to 250, got '3'"),
        ({"num_inference_steps": 251}, "from 1 to 250, got 251"),
        ({"num_inference_steps": 1, "start_timestep": 300}, "one of .250, 200, 150, 100., got 300"),
        ({"num_inference_steps": 1, "start_timestep": 220}, "one of .250, 200, 150, 100., got 220"),
        ({"num_inference_steps": 52, "start_timestep": 100}, "at most 51"),
        ({"timesteps": []}, "list of one or more integers"),
        ({"timesteps": [150.5]}, "list of one or more integers"),
        ({"timesteps": [251]}, "from 1 to 250"),
        ({"timesteps": [100, 0]}, "from 1 to 250"),
        ({"timesteps": [100, 100]}, "descend"),
        ({"timesteps": [100, 200]}, "descend"),
        ({"timesteps": [200, 100], "num_inference_steps": 3}, "contradicts"),
        ({"timesteps": [200, 100], "start_timestep": 250}, "contradicts"),
    ],
)
def test_wrong_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InvSRScheduler().set_timesteps(**arguments)


def test_schedules_beyond_the_training_steps_are_refused():
    with pytest.raises(ValueError, match="cannot start beyond `num_train_timesteps=200`"):
        InvSRScheduler(num_train_timesteps=200).set_timesteps(5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_steps_of_equal_stride_are_those_of_ddim(prediction_type, eta):
    """On a schedule with DDIM's own stride both schedulers have to agree."""
    torch.manual_seed(0)
    ours = InvSRScheduler(prediction_type=prediction_type)
    ours.set_timesteps(timesteps=[250, 200, 150, 100, 50])
    ddim = DDIMScheduler.from_config(ours.config)
    ddim.set_timesteps(20)
    sample = torch.randn(1, 4, 8, 8)
    for index in ours.timesteps:
        model_output, noise = torch.randn(2, 1, 4, 8, 8)
        result = ours.step(model_output, index, sample, eta=eta, variance_noise=noise)
        expected = ddim.step(model_output, index, sample, eta=eta, variance_noise=noise)
        torch.testing.assert_close(result.prev_sample, expected.prev_sample)
        torch.testing.assert_close(result.pred_original_sample, expected.pred_original_sample)
        sample = result.prev_sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_true_prediction_recovers_the_clean_sample(prediction_type):
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    scheduler = InvSRScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(3)
    sample = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    for index in scheduler.timesteps:
        velocity = scheduler.get_velocity(clean, noise, index[None])
        output = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction_type]
        sample = scheduler.step(output, index, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, clean, atol=1e-5, rtol=1e-5)


def test_clipping_and_thresholding():
    sample, output = torch.full((1, 1, 2, 2), 3.0), torch.zeros(1, 1, 2, 2)
    clipping = InvSRScheduler(clip_sample=True, clip_sample_range=0.5)
    clipping.set_timesteps(1)
    assert clipping.step(output, 199, sample).prev_sample.max() == 0.5
    thresholding = InvSRScheduler(thresholding=True)
    thresholding.set_timesteps(1)
    assert thresholding.step(output, 199, sample).prev_sample.max() == 1


def test_same_generator_same_noise():
    scheduler = InvSRScheduler()
    scheduler.set_timesteps(2)
    sample = torch.ones(1, 4, 8, 8)
    first, second = (
        scheduler.step(sample, 199, sample, eta=1.0, generator=torch.Generator().manual_seed(3)).prev_sample
        for _ in range(2)
    )
    assert torch.equal(first, second) and not torch.equal(first, scheduler.step(sample, 199, sample).prev_sample)


def test_step_needs_a_schedule_that_holds_the_timestep():
    scheduler = InvSRScheduler()
    sample = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        scheduler.step(sample, 199, sample)
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match=r"index of the schedule \[199\], got 200"):
        scheduler.step(sample, 200, sample)


def test_from_euler_and_back(tmp_path):
    euler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        steps_offset=1,
        interpolation_type="linear",
    )
    euler.save_pretrained(tmp_path / "euler")
    scheduler = InvSRScheduler.from_pretrained(tmp_path / "euler")
    assert not scheduler.config.clip_sample and scheduler.config.set_alpha_to_one
    torch.testing.assert_close(scheduler.alphas_cumprod, euler.alphas_cumprod)
    scheduler.save_pretrained(tmp_path / "invsr")
    back = EulerDiscreteScheduler.from_pretrained(tmp_path / "invsr")
    assert all(back.config[key] == value for key, value in euler.config.items() if not key.startswith("_"))
    # Whatever another scheduler has left in the file, the last step is to the clean sample: SD-Turbo's has this
    leftover = json.loads((tmp_path / "euler" / "scheduler_config.json").read_text()) | {"set_alpha_to_one": False}
    (tmp_path / "euler" / "scheduler_config.json").write_text(json.dumps(leftover))
    loaded = InvSRScheduler.from_pretrained(tmp_path / "euler")
    for scheduler in (loaded, InvSRScheduler.from_config(loaded.config)):
        assert scheduler.config.set_alpha_to_one is False
        scheduler.set_timesteps(2)
        output = scheduler.step(torch.randn(1, 4, 8, 8), 99, torch.randn(1, 4, 8, 8))
        assert torch.equal(output.prev_sample, output.pred_original_sample)
    # Every other value that the configuration shows is in force.
    assert InvSRScheduler.from_config(InvSRScheduler(clip_sample=True).config).config.clip_sample
