"""Runs that are told to end by a signal: they finish the step at hand, and go on to the same bits."""

import os
import signal
import zipfile
from pathlib import Path

import pytest
from running import DIGITS, before_step, child, same, wait_for

from experiment import build
from training.logger import Logger
from training.state import TrainState
from training.step import TrainingStep
from utils import signals


@pytest.fixture
def send(monkeypatch):
    """send(signal, step, times): this process gets it before that step of the next run."""

    def arrange(number, at, times=1):
        original = TrainingStep.__call__
        action = lambda state: [signal.raise_signal(number) for _ in range(times)]  # noqa: E731
        monkeypatch.setattr(TrainingStep, "__call__", before_step(at, action))
        return lambda: monkeypatch.setattr(TrainingStep, "__call__", original)

    return arrange


@pytest.mark.parametrize(
    ("number", "at", "flags"),
    [
        (signal.SIGTERM, 8, "--optmzr sgd-sam --sam-v2 --prune-method rigl --sparsity 0.8 --update-interval 3"),
        (signal.SIGINT, 1, "--optmzr sgd"),
        (signal.SIGUSR1, 9, "--optmzr adam-sam --accumulate 2 --mixup --prune-method gmp --sparsity 0.8 --update-interval 2"),
        (signal.SIGTERM, 16, "--optmzr sgd-sam --sam-v2 --prune-method lth --sparsity 0.8 --lth-rounds 2 --lth-rewind 4"),
        (signal.SIGTERM, 11, "--optmzr sgd-sam --sam-v2 --val-split 200"),
    ],
)  # fmt: skip
def test_a_signal_ends_a_run_in_the_middle_of_an_epoch_and_it_goes_on_bit_for_bit(train, send, number, at, flags):
    flags += " --epochs 3"
    whole = train(flags, "whole")
    assert whole.code == 0, whole.err
    undo = send(number, at)
    handler = signal.getsignal(number)
    cut = train(flags, "cut")
    assert (cut.code, cut.err.count("\n")) == (75, 1)
    assert f"ended by {number.name} after step {at + 1}" in cut.err
    assert signal.getsignal(number) == handler
    assert not (cut.directory / "result.json").exists()
    assert cut.checkpoint()["state"]["global_step"] == at + 1
    undo()
    resumed = train(f"{flags} --resume auto", "cut")
    assert (resumed.code, resumed.err) == (0, "")
    same(whole.checkpoint()["state"], resumed.checkpoint()["state"])
    results = [run.json("result.json") for run in (whole, resumed)]
    for result in results:
        result["args"].pop("output_dir"), result["args"].pop("resume")
    same(*results)
    if "--val-split" in flags:
        same(whole.checkpoint("best.pt")["state"], resumed.checkpoint("best.pt")["state"])


def test_a_second_signal_ends_it_at_once(train, send, monkeypatch):
    send(signal.SIGINT, 2)
    monkeypatch.setattr(signals, "REPEATED", 0)
    save = TrainState.state_dict

    def slow(self):
        if self.global_step:
            signal.raise_signal(signal.SIGINT)
        return save(self)

    monkeypatch.setattr(TrainState, "state_dict", slow)
    assert train("--epochs 2").code == 130


def test_a_signal_that_comes_twice_at_once_is_one(train, send):
    """As where a scheduler sends it to all processes, and their launcher passes it on."""
    send(signal.SIGTERM, 2, times=2)
    ended = train("--epochs 2")
    assert ended.code == 75
    assert ended.checkpoint()["state"]["global_step"] == 3


def test_a_signal_just_after_an_epoch_has_its_checkpoint_too(train, monkeypatch):
    original = Logger.write_row

    def row(self, state):
        original(self, state)
        if len(state.rows) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Logger, "write_row", row)
    ended = train("--epochs 8 --checkpoint-every 5")
    assert ended.code == 75
    assert ended.checkpoint()["state"]["global_step"] == 19  # a step later


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_a_run_with_a_sentence(train, monkeypatch, number):
    def load(*args):
        signal.raise_signal(number)

    monkeypatch.setattr(build, "load_dataset", load)
    ended = train("--epochs 2")
    assert (ended.code, ended.err) == (75, f"ended by {number.name}: go on by --resume auto\n")
    assert not ended.directory.exists()


def test_a_signal_while_a_checkpoint_is_read_is_no_damage(train, monkeypatch):
    run = train("--epochs 3")
    (run.directory / "result.json").unlink()
    before = {path.name: path.read_bytes() for path in run.directory.glob("*.pt")}
    original = zipfile.ZipFile.testzip

    def test(self):
        signal.raise_signal(signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", test)
    ended = train("--epochs 3 --resume auto")
    assert (ended.code, ended.err) == (75, "ended by SIGTERM: go on by --resume auto\n")
    assert {path.name: path.read_bytes() for path in run.directory.glob("*.pt")} == before


def test_a_signal_in_the_last_epoch_leaves_the_measurements_to_another_process(train, send):
    flags = "--epochs 2 --recalibrate-bn"
    whole = train(flags, "whole")
    undo = send(signal.SIGTERM, 11)
    cut = train(flags, "cut")
    assert (cut.code, cut.err.count("\n")) == (75, 1)
    assert "ended by a signal after the last step" in cut.err
    undo()
    assert train(f"{flags} --resume auto", "cut").code == 0
    same(whole.checkpoint()["state"], cut.checkpoint()["state"])
    name = "test_top1_recalibrated_bn"
    assert whole.json("result.json")[name] == cut.json("result.json")[name]


def test_a_signal_in_the_last_epoch_of_a_run_without_one_changes_nothing(train, send):
    send(signal.SIGTERM, 11)
    assert train("--epochs 2").code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_is_the_parents(tmp_path, number):
    """As from a terminal, or a scheduler that ends a whole job: workers leave it to the parent, and are gone with it."""
    process = child(f"{DIGITS} --epochs 500 --workers 2", tmp_path / "run", start_new_session=True)
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.count("\n") == 1
    assert f"ended by {number.name}" in err
    assert len(workers) == 2
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
