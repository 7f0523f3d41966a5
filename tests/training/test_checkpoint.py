"""Checkpoints are whole or refused with a sentence, and come as often as asked."""

import os
import pickle

import pytest
import torch
from running import FINISHED, same
from torch import nn

from models import build_model
from prune import Pruner
from prune.masks import Masks
from training.checkpoint import CheckpointSchedule, load_checkpoint, load_network, save_checkpoint
from training.state import TrainState
from utils.errors import UsageError

DATA = {"classes": ["a", "b"], "mean": [125.3], "deviation": [63.0], "fingerprint": "f00d"}


@pytest.fixture
def saved(tmp_path):
    model = nn.Linear(3, 2)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), Pruner(model), schedule_step=3)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state, {"arch": "resnet"}, DATA)
    return path, state


def test_a_checkpoint_holds_what_was_saved(saved):
    path, state = saved
    checkpoint = load_checkpoint(path)
    assert checkpoint["args"] == {"arch": "resnet"}
    assert checkpoint["data"] == DATA
    assert torch.equal(checkpoint["state"]["model"]["weight"], state.model.weight)
    assert checkpoint["state"]["schedule_step"] == 3


def test_a_checkpoint_of_the_older_format_is_read(saved):
    path, state = saved
    checkpoint = load_checkpoint(path)
    names = {"schedule_step": "step", "global_step": "progress", "pruner": "sparsity"}
    older = {names.get(name, name): value for name, value in checkpoint["state"].items()} | {"partial": {}}
    torch.save(checkpoint | {"format": "sam-sparse-training/2", "state": older}, path)
    model = nn.Linear(3, 2)
    loaded = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), Pruner(model))
    loaded.load_state_dict(load_checkpoint(path)["state"])
    assert (loaded.schedule_step, loaded.partial) == (3, None)
    assert torch.equal(model.weight, state.model.weight)


def test_counters_of_batch_norm_in_earlier_checkpoints_are_left_out():
    model, other = (build_model("resnet", 8, 10, 0.25) for _ in range(2))
    state = model.state_dict()
    state |= {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(7) for name in state if "running_mean" in name
    }
    other.load_state_dict(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    load_network(other, Masks.of(other), {"state": {"model": state, "pruner": {"masks": {}}}, "args": {}})
    state["stem.other"] = torch.ones(1)
    with pytest.raises(UsageError, match="does not fit the network"):
        load_network(other, Masks.of(other), {"state": {"model": state, "pruner": {"masks": {}}}, "args": {}})


def test_a_truncated_checkpoint_is_refused(saved):
    path, _ = saved
    content = path.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 150)):
        path.write_bytes(content[:length])
        with pytest.raises(UsageError, match="not a whole checkpoint") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "other.pt", "list.pt"):
        with pytest.raises(UsageError, match=f"{name}' is not a"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(UsageError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UsageError, match="is a directory"):
        load_checkpoint(tmp_path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    mark = tmp_path / "it-ran"
    torch.save({"format": Payload(mark)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload(mark)))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(UsageError):
            load_checkpoint(tmp_path / name)
    assert not mark.exists()


@pytest.fixture
def saves(monkeypatch):
    """The global step of each checkpoint that is written."""
    written, original = [], torch.save

    def save(value, file):
        written.append(value["state"]["global_step"])
        original(value, file)

    monkeypatch.setattr(torch, "save", save)
    return written


def test_checkpoints_come_after_every_second_epoch_and_the_last(train, saves):
    train(f"{FINISHED} --checkpoint-every 2")
    assert saves == [12, 18]


def test_checkpoints_come_within_epochs_when_minutes_are_given(train, trained, saves):
    run = train(f"{FINISHED} --checkpoint-every 0.00000001m")
    assert saves == list(range(1, 19))
    same(trained.checkpoint()["state"], run.checkpoint()["state"])


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "m", "0m", "infm", "nanm", "soon"])
def test_an_impossible_checkpoint_interval_is_refused(text):
    with pytest.raises(UsageError, match="--checkpoint-every takes epochs, as 5, or minutes, as 10m"):
        CheckpointSchedule(text)
