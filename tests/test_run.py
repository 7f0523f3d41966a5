"""`run` trains as the command line does, for a caller in the same process: figures come back, errors are exceptions."""

import json
import signal
import threading

import pytest
import torch
from running import DIGITS, FINISHED, before_step, interrupt, same

from main_prune_train import run
from utils.errors import Preempted, TrainingError, UsageError

FLAGS = {
    "dataset": "digits", "train_images": 570, "batch_size": 96, "log_interval": 2, "depth": 8, "width": 0.25,
    "optmzr": "sgd-sam", "sam_v2": True, "prune-method": "random", "sparsity": 0.9, "epochs": 3,
}  # fmt: skip  # those of DIGITS and FINISHED


def test_run_returns_what_result_json_holds(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(FLAGS)
    (directory,) = (tmp_path / "runs").iterdir()
    assert result == json.loads((directory / "result.json").read_text())
    same(torch.load(directory / "checkpoint.pt")["state"], trained.checkpoint()["state"])
    command = json.loads((directory / "args.json").read_text())["command"]
    assert command[:2] == ["main_prune_train.py", "--dataset=digits"]
    words = [*DIGITS.split(), *FINISHED.split(), "--resume", "auto"]
    assert run(words) == result  # it had finished


def test_run_evaluates(trained):
    found = run({"evaluate": trained.directory})
    assert found["test_top1"] == pytest.approx(trained.json("result.json")["test_top1"])
    assert found.keys() == {"test_loss", "test_top1"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"epochs": 0}, "argument --epochs: has to be a whole number above 0, not '0'"),
        ({"epoch": 3}, "did you mean --epochs"),
        ({"dataset": "digits", "sam_v2": True}, "--sam-v2 has no effect"),
        ({"config": "absent.json"}, "cannot read 'absent.json'"),
        ("--epochs 3", "not one text"),
        (["--help"], "--help is for the command line"),
    ],
)
def test_bad_input_is_a_usage_error_and_nothing_is_written(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        run(flags)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_wrong_is_a_training_error(tmp_path):
    with pytest.raises(TrainingError, match=r"the loss is|the weights are no longer finite"):  # by how a CPU rounds
        run(FLAGS | {"lr": 1e18, "output_dir": tmp_path / "diverged"})
    tickets = {
        "prune-method": "lth",
        "sparsity": 0.998,
        "sparsity_distribution": "global",
        "lth_rounds": 1,
        "epochs": 1,
    }
    with pytest.raises(TrainingError, match="no path leads from the input to the output.*--sparsity"):
        run(FLAGS | tickets | {"output_dir": tmp_path / "empty"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_run_with_a_checkpoint_and_then_does_what_it_does_without(tmp_path, trained, number):
    class Ended(Exception):
        pass

    def end(*_):
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        with (
            before_step(8, lambda state: signal.raise_signal(number)),
            pytest.raises((Ended, KeyboardInterrupt)) as error,
        ):
            run(FLAGS | {"output_dir": tmp_path / "cut"})
        assert error.type is (KeyboardInterrupt if number == signal.SIGINT else Ended)
        assert "go on by --resume auto" in str(error.value.__context__)
        assert signal.getsignal(signal.SIGTERM) == end
    finally:
        signal.signal(signal.SIGTERM, before)
    assert torch.load(tmp_path / "cut" / "checkpoint.pt")["state"]["global_step"] == 9
    run(FLAGS | {"output_dir": tmp_path / "cut", "resume": "auto"})
    same(torch.load(tmp_path / "cut" / "checkpoint.pt")["state"], trained.checkpoint()["state"])


def test_a_signal_that_is_ignored_without_run_leaves_it_preempted(tmp_path):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with before_step(1, lambda state: signal.raise_signal(signal.SIGUSR1)), pytest.raises(Preempted):
            run(FLAGS | {"output_dir": tmp_path / "cut"})
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_run_works_in_another_thread_and_leaves_signals_alone_there(tmp_path, trained):
    handlers, seen, results = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], [], []

    def look(state):
        seen.append([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)])

    with before_step(3, look):
        thread = threading.Thread(target=lambda: results.append(run(FLAGS | {"output_dir": tmp_path / "thread"})))
        thread.start()
        thread.join(60)
    assert seen == [handlers]
    assert results[0]["test_top1"] == trained.json("result.json")["test_top1"]


@pytest.mark.parametrize(("wanted", "warns"), [(False, False), (True, True)])
def test_run_leaves_the_choice_of_kernels_as_it_was(tmp_path, wanted, warns):
    torch.use_deterministic_algorithms(wanted, warn_only=warns)
    try:
        with before_step(2, interrupt), pytest.raises(KeyboardInterrupt):
            run(FLAGS | {"deterministic": True, "output_dir": tmp_path / "cut"})
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    finally:
        torch.use_deterministic_algorithms(False)
