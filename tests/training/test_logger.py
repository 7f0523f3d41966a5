"""What a run prints, and what it shows in TensorBoard."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from processes import Child, forks
from running import DIGITS, ROOT, rows, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData


def test_tensorboard_shows_the_loss_the_perturbation_and_the_densities(trained):
    logged = scalars(trained.directory)
    steps = list(range(2, 19, 2))
    for name in ("loss_at_perturbed_weights", "lr", "gradient_norm", "perturbation_norm", "alignment"):
        assert [step for step, _ in logged[f"train/{name}"]] == steps
    assert [value for _, value in logged["train/perturbation_norm"]] == pytest.approx([0.05] * 9, rel=1e-3)
    assert all(-1 <= value <= 1 for _, value in logged["train/alignment"])
    assert [step for step, _ in logged["epoch/test_top1"]] == [6, 12, 18]
    densities = [values[-1][1] for tag, values in logged.items() if tag.startswith("density/")]
    assert len(densities) == 10
    assert min(densities) < 0.2 < max(densities)
    assert logged["result/test_top1"][-1][1] == pytest.approx(trained.json("result.json")["test_top1"])


def test_tensorboard_has_a_table_of_the_hyper_parameters(trained):
    events = EventAccumulator(str(trained.directory)).Reload()
    assert "_hparams_/experiment" in events.summary_metadata
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    flags = sorted(HParamsPluginData.FromString(content).session_start_info.hparams)
    assert flags[:5] == ["adaptive", "optmzr", "prune_method", "sam_rho", "sam_v2"]  # what its table shows at once
    assert "training/lr" in flags


def test_the_gradient_norm_is_logged_before_it_is_clipped(train):
    run = train("--epochs 1 --clip-grad 0.001 --lr 0.001")
    assert min(value for _, value in scalars(run.directory)["train/gradient_norm"]) > 0.01


def test_a_pipe_gets_one_plain_line_per_epoch(tmp_path):
    command = [sys.executable, str(ROOT / "main_prune_train.py"), *DIGITS.split(), "--epochs", "2"]
    done = subprocess.run([*command, "--output-dir", str(tmp_path / "run")], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert [line[:9] for line in done.stdout.splitlines() if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout
    assert len(rows(tmp_path / "run")) == 2


@forks
def test_a_terminal_gets_a_bar(tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    @contextlib.contextmanager
    def on_terminal():
        for number in (1, 2):
            os.dup2(slave, number)
        yield

    child = Child(f"{DIGITS} --epochs 1", tmp_path / "run", around=on_terminal())
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
        while chunk := os.read(master, 65536):
            shown += chunk
    assert child.wait() == 0
    assert b"epoch 1/1:" in shown
    assert b"/6 [" in shown
