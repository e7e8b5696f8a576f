import json

import pytest
import torch
from accelerate import Accelerator
from helpers import reset_accelerate

from diffusers_invsr.files import write_atomically
from diffusers_invsr.training.checkpoints import Checkpoints
from diffusers_invsr.training.errors import TrainingError
from diffusers_invsr.training.logs import RunLog, StepwiseMeter, read_log


@pytest.fixture(scope="module")
def accelerator():
    yield Accelerator(cpu=True)
    reset_accelerate()


def save(checkpoints, iteration, content=b"new"):
    with checkpoints.save(iteration) as folder:
        (folder / "state.bin").write_bytes(content)


@pytest.fixture
def checkpoints(tmp_path, accelerator):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=3)
    for iteration in (5, 10, 100):
        save(checkpoints, iteration, b"state" * 100)
    return checkpoints


def names(paths):
    return [path.name for path in paths]


def test_last_ones_are_kept_in_numerical_order(checkpoints):
    assert names(checkpoints.list()) == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]
    save(checkpoints, 101)
    assert names(checkpoints.list()) == ["checkpoint-10", "checkpoint-100", "checkpoint-101"]
    assert checkpoints.find("latest").name == "checkpoint-101"


def truncate(checkpoint):
    (checkpoint / "state.bin").write_bytes(b"sta")


def flip(checkpoint):
    (checkpoint / "state.bin").write_bytes(b"State" * 100)


def delete(checkpoint):
    (checkpoint / "state.bin").unlink()


def cut_manifest(checkpoint):
    text = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize("harm", [truncate, flip, delete, cut_manifest])
def test_a_damaged_one_falls_back_to_the_one_before(checkpoints, caplog, harm):
    harm(checkpoints.list()[-1])
    assert checkpoints.find("latest").name == "checkpoint-10"
    assert "Skipping the checkpoint" in caplog.text and "checkpoint-100: " in caplog.text
    with pytest.raises(TrainingError, match="has no undamaged checkpoint .*checkpoint-100: "):
        checkpoints.find(str(checkpoints.folder / "checkpoint-100"))


def test_all_damaged_is_an_error_and_none_is_a_fresh_start(checkpoints, accelerator, tmp_path):
    for checkpoint in checkpoints.list():
        truncate(checkpoint)
    with pytest.raises(TrainingError, match="`resume='latest'` has no undamaged checkpoint"):
        checkpoints.find("latest")
    assert Checkpoints(tmp_path / "empty", accelerator).find("latest") is None
    with pytest.raises(TrainingError, match="there is no such folder"):
        checkpoints.find(str(tmp_path / "nowhere"))


def test_a_checkpoint_that_was_interrupted_does_not_count(checkpoints):
    with pytest.raises(KeyboardInterrupt), checkpoints.save(200) as folder:
        (folder / "state.bin").write_bytes(b"half")
        raise KeyboardInterrupt
    assert checkpoints.find("latest").name == "checkpoint-100"
    save(checkpoints, 201)
    assert [path.name for path in checkpoints.folder.glob(".*")] == []


def test_a_damaged_one_is_replaced_when_its_iteration_comes_again(checkpoints):
    truncate(checkpoints.list()[-1])
    save(checkpoints, 100)
    assert (checkpoints.find("latest") / "state.bin").read_bytes() == b"new"


@pytest.mark.parametrize("keep", [1, 3])
def test_resuming_from_an_earlier_one_removes_the_later_ones(tmp_path, accelerator, keep):
    """Otherwise the new one would count as the oldest and be removed, and `latest` would be what the run has left."""
    checkpoints = Checkpoints(tmp_path, accelerator, keep)
    for iteration in (80, 90, 100):
        save(Checkpoints(tmp_path, accelerator), iteration, b"old")
    save(checkpoints, 85)
    assert checkpoints.find("latest") == checkpoints.path(85) and checkpoints.path(85).name == "checkpoint-85"
    assert names(checkpoints.list()) == ["checkpoint-80", "checkpoint-85"][-keep:]


def test_later_ones_are_removed(checkpoints):
    checkpoints.remove_later(10)
    assert names(checkpoints.list()) == ["checkpoint-5", "checkpoint-10"]


def test_atomic_text(tmp_path):
    write_atomically(tmp_path / "a.txt", "old")
    write_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_meter_splits_by_starting_step(accelerator):
    meter = StepwiseMeter()
    meter.add("l2", torch.tensor([1.0, 3.0, 5.0]), torch.tensor([249, 99, 249]))
    meter.add("l2", torch.tensor([7.0, float("nan")]), torch.tensor([199, 199]))
    state = meter.state_dict()
    expected = {"l2": 4.0, "l2/250": 3.0, "l2/200": 7.0, "l2/100": 3.0}
    assert meter.compute(accelerator) == expected
    assert meter.compute(accelerator) == {}
    meter.load_state_dict(state)
    assert meter.compute(accelerator) == expected


def test_meter_takes_other_starting_steps(accelerator):
    meter = StepwiseMeter([400, 50])
    meter.add("l2", torch.tensor([1.0, 3.0]), torch.tensor([399, 49]))
    assert meter.compute(accelerator) == {"l2": 2.0, "l2/400": 1.0, "l2/50": 3.0}


def test_log_is_cut_where_the_run_resumes(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"iteration": 0, "left": "by a run that never saved"}\n')
    log = RunLog(file)
    for iteration in (1, 2, 3):
        log.append(iteration, {"l2": iteration / 3, "bad": float("nan")})
    with file.open("a") as stream:
        stream.write('{"iteration": 4, "l')
    RunLog(file, 2).append(3, {"l2": 9.0})
    assert read_log(file) == [
        {"iteration": 1, "l2": 1 / 3, "bad": None},
        {"iteration": 2, "l2": 2 / 3, "bad": None},
        {"iteration": 3, "l2": 9.0},
    ]
    assert all(json.loads(line) for line in file.read_text().splitlines())
