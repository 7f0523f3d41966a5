"""Runs that are told to end by a signal: they finish the step at hand, and go on to the same bits."""

import contextlib
import io
import os
import signal
import time
import zipfile
from pathlib import Path

import pytest
import sklearn.datasets
import torch
from processes import Child, forks
from running import DIGITS, FINISHED, before_step, same

import main_prune_train

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def sending(number, before, times=1):
    """A context in which this process gets a signal before a step of its run."""
    return before_step(before, lambda state: [signal.raise_signal(number) for _ in range(times)])


@pytest.mark.parametrize(
    ("number", "at", "flags"),
    [
        (signal.SIGTERM, 8, "--optmzr sgd-sam --sam-v2 --prune-method rigl --sparsity 0.8 --update-interval 3"),
        (signal.SIGINT, 1, "--optmzr sgd"),
        (signal.SIGUSR1, 9, "--optmzr adam-sam --accumulate 2 --mixup --prune-method gmp --sparsity 0.8 --update-interval 2"),
        (signal.SIGTERM, 15, "--optmzr sgd-sam --sam-v2 --prune-method lth --sparsity 0.8 --lth-rounds 2 --lth-rewind 4"),
        (signal.SIGTERM, 7, "--optmzr sgd-sam --sam-v2 --val-split 200"),
    ],
)  # fmt: skip
def test_a_signal_ends_a_run_within_an_epoch_and_it_resumes_bit_for_bit(train, number, at, flags):
    flags += " --epochs 2"
    whole = train(flags, "whole")
    assert whole.code == 0, whole.err
    handler = signal.getsignal(number)
    with sending(number, at):
        cut = train(flags, "cut")
    assert (cut.code, cut.err.count("\n")) == (75, 1)
    assert f"ended by {number.name} after step {at + 1}" in cut.err
    assert signal.getsignal(number) == handler
    assert not (cut.directory / "result.json").exists()
    assert cut.checkpoint()["state"]["global_step"] == at + 1
    resumed = train(f"{flags} --resume auto", "cut")
    assert (resumed.code, resumed.err) == (0, "")
    same(whole.checkpoint()["state"], resumed.checkpoint()["state"])
    results = [run.json("result.json") for run in (whole, resumed)]
    for result in results:
        result["args"].pop("output_dir"), result["args"].pop("resume")
    same(*results)
    if "--val-split" in flags:
        same(whole.checkpoint("best.pt")["state"], resumed.checkpoint("best.pt")["state"])


def test_a_second_signal_ends_a_run_at_once(train, monkeypatch):
    """It comes a second later, while the checkpoint for the first one is written."""
    save = torch.save

    def slow(value, file):
        time.sleep(1.01)
        signal.raise_signal(signal.SIGINT)
        save(value, file)

    monkeypatch.setattr(torch, "save", slow)
    with sending(signal.SIGINT, 2):
        assert train("--epochs 1").code == 130


def test_a_signal_that_comes_twice_at_once_is_one(train):
    """As where a scheduler sends it to all processes, and their launcher passes it on."""
    with sending(signal.SIGTERM, 2, times=2):
        ended = train("--epochs 2")
    assert ended.code == 75
    assert ended.checkpoint()["state"]["global_step"] == 3


class SignalAt(io.StringIO):
    """An output whose process gets SIGTERM when it prints certain words."""

    def __init__(self, words):
        super().__init__()
        self.words = words

    def write(self, text):
        if self.words in text:
            signal.raise_signal(signal.SIGTERM)
        return super().write(text)


def test_a_signal_after_an_epoch_has_its_checkpoint_after_the_next_step(train):
    with contextlib.redirect_stdout(SignalAt("epoch 3/8")):
        ended = train("--epochs 8 --checkpoint-every 5")
    assert ended.code == 75
    assert ended.checkpoint()["state"]["global_step"] == 19


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_step_leaves_no_directory(train, monkeypatch, number):
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: signal.raise_signal(number))
    ended = train("--epochs 2")
    assert (ended.code, ended.err) == (75, f"ended by {number.name}: go on by --resume auto\n")
    assert not ended.directory.exists()


def test_a_signal_while_a_checkpoint_is_read_is_not_taken_for_damage(train, unfinished, monkeypatch):
    before, test = unfinished.files(), zipfile.ZipFile.testzip

    def interrupted(self):
        signal.raise_signal(signal.SIGTERM)
        return test(self)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", interrupted)
    ended = train(f"{FINISHED} --resume auto")
    assert (ended.code, ended.err) == (75, "ended by SIGTERM: go on by --resume auto\n")
    assert unfinished.files() == before


def test_a_signal_in_the_last_epoch_leaves_measurements_to_another_process(train):
    flags = "--epochs 1 --recalibrate-bn"
    whole = train(flags, "whole")
    with sending(signal.SIGTERM, 5):
        cut = train(flags, "cut")
    assert (cut.code, cut.err.count("\n")) == (75, 1)
    assert "ended by a signal after the last step" in cut.err
    assert train(f"{flags} --resume auto", "cut").code == 0
    same(whole.checkpoint()["state"], cut.checkpoint()["state"])
    name = "test_top1_recalibrated_bn"
    assert whole.json("result.json")[name] == cut.json("result.json")[name]


def test_a_signal_in_the_last_epoch_changes_nothing_where_nothing_is_measured(train):
    with sending(signal.SIGTERM, 5):
        assert train("--epochs 1").code == 0


def test_a_signal_while_the_result_is_written_changes_nothing(train, monkeypatch):
    made = main_prune_train.compacted_size

    def size(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return made(*arguments)

    monkeypatch.setattr(main_prune_train, "compacted_size", size)
    ended = train("--epochs 1")
    assert (ended.code, ended.err) == (0, "")
    assert ended.json("result.json")["epochs"] == 1


@forks
@pytest.mark.parametrize("number", SIGNALS)
def test_workers_ignore_a_signal_to_all_processes_and_end_with_their_run(tmp_path, number):
    """As from a terminal, or from a scheduler that ends a whole job."""

    @contextlib.contextmanager
    def own_group():
        os.setsid()
        yield

    child = Child(f"{DIGITS} --epochs 500 --workers 2", tmp_path / "run", around=own_group())
    child.wait_for_checkpoint()
    workers = child.workers()
    os.killpg(child.pid, number)
    assert child.wait() == 75, child.err
    assert child.err.count("\n") == 1
    assert f"ended by {number.name}" in child.err
    assert len(workers) == 2
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
