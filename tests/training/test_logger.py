"""What a run prints, and what it shows in TensorBoard."""

import contextlib
import fcntl
import os
import pty
import struct
import termios

import pytest
from processes import Child, forks
from running import DIGITS, SPARSE_SAM, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

COSINES = ("cos_e_gradient_at_w", "cos_e_gradient_at_perturbed")


def test_tensorboard_shows_accuracy_loss_and_perturbation(trained):
    logged = scalars(trained.directory)
    steps = list(range(2, 19, 2))
    assert [step for step, _ in logged["loss/train_batch_at_perturbed_weights"]] == steps
    for name in ("lr", "gradient_norm", "perturbation_norm", "ascent", *COSINES):
        assert [step for step, _ in logged[f"optimizer/{name}"]] == steps
    assert [value for _, value in logged["optimizer/perturbation_norm"]] == pytest.approx([0.05] * 9, rel=1e-3)
    assert all(-1 <= value <= 1 for name in COSINES for _, value in logged[f"optimizer/{name}"])
    assert [step for step, _ in logged["accuracy/test"]] == [6, 12, 18]
    assert logged["accuracy/test"][-1][1] == pytest.approx(trained.json("result.json")["test_top1"])


def test_tensorboard_has_a_table_of_the_hyper_parameters(trained):
    events = EventAccumulator(str(trained.directory)).Reload()
    assert "_hparams_/experiment" in events.summary_metadata
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    row = HParamsPluginData.FromString(content).session_start_info.hparams
    # What its table shows at once, as words where they are no quantities.
    assert sorted(row)[:5] == ["optimizer", "prune_method", "sam_rho", "seed", "sparsity"]
    assert (row["optimizer"].string_value, row["seed"].string_value) == ("sgd-sam one-step", "0")
    assert row["sparsity"].number_value == 0.9
    assert row["training/adaptive"].string_value == "no"
    assert row["training/lr"].number_value == 0.1


def test_tensorboard_draws_accuracy_first_and_the_masks_only_where_they_move(train, trained):
    moving = scalars(train("--epochs 1 --prune-method rigl --sparsity 0.9 --update-interval 2").directory)
    static = scalars(trained.directory)
    for logged in (static, moving):
        groups = sorted({tag.split("/")[0] for tag in logged})
        assert groups[:2] == ["accuracy", "loss"]
    layers = [values[-1][1] for tag, values in moving.items() if tag.startswith("sparsity_by_layer/")]
    assert len(layers) == 10
    assert min(layers) < 0.8 < max(layers)
    assert not [tag for tag in static if tag.startswith("sparsity_by_layer/")]


def test_the_last_step_of_an_epoch_is_logged_too(train):
    logged = scalars(train(f"{SPARSE_SAM} --epochs 2 --log-interval 4").directory)
    for name in (*COSINES, "ascent", "gradient_norm", "perturbation_norm"):
        assert [step for step, _ in logged[f"optimizer/{name}"]] == [4, 6, 8, 12]


def test_the_gradient_norm_is_logged_before_it_is_clipped(train):
    run = train("--epochs 1 --clip-grad 0.001 --lr 0.001")
    assert min(value for _, value in scalars(run.directory)["optimizer/gradient_norm"]) > 0.01


def test_a_file_or_pipe_gets_one_plain_line_per_epoch(trained):
    assert trained.err == ""
    assert [line[:9] for line in trained.out.splitlines() if line.startswith("epoch")] == [
        f"epoch {n}/3" for n in (1, 2, 3)
    ]
    assert "\r" not in trained.out
    assert "\x1b" not in trained.out


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
