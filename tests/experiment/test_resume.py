"""What a run leaves to go on from, and that it goes on to the same end."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import DIGITS, ROOT, SPARSE_SAM, child, rows, same, scalars, wait_for

import main_prune_train
from training import loop as engine


@pytest.fixture
def saves(monkeypatch):
    """The file and global step of each checkpoint that is written."""
    written, original = [], torch.save

    def save(value, file):
        if isinstance(value, dict) and "state" in value:
            written.append(value["state"]["global_step"])
        original(value, file)

    monkeypatch.setattr(torch, "save", save)
    return written


def test_checkpoints_come_as_often_as_asked(train, saves):
    """Every second epoch, and after the last; by minutes in the middle of epochs too."""
    train("--epochs 5 --checkpoint-every 2")
    assert saves == [12, 24, 30]
    saves.clear()
    whole = train("--epochs 2 --checkpoint-every 0.00000001m", "minutes")
    assert saves == list(range(1, 13))
    same(train("--epochs 2", "epochs").checkpoint()["state"], whole.checkpoint()["state"])
    for wrong in ("0", "-1", "1.5", "m", "0m", "infm", "nanm", "soon"):
        bad = train(f"--epochs 1 --checkpoint-every {wrong}", "bad")
        assert (bad.code, bad.err.count("\n")) == (2, 1)
        assert "--checkpoint-every takes epochs, as 5, or minutes, as 10m" in bad.err
        assert not bad.directory.exists()


def test_the_best_epoch_is_kept_however_seldom_checkpoints_come(train):
    flags = "--epochs 6 --val-split 200 --optmzr sgd --lr 0.5"
    often, seldom = train(flags, "often"), train(f"{flags} --checkpoint-every 4", "seldom")
    same(often.checkpoint("best.pt")["state"]["rows"], seldom.checkpoint("best.pt")["state"]["rows"])
    assert len(seldom.checkpoint("best.pt")["state"]["rows"]) == seldom.json("result.json")["best_epoch"]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(train):
    whole = train("--epochs 3", "whole")
    run = train("--epochs 3", "run")
    (run.directory / "result.json").unlink()
    newest = run.directory / "checkpoint.pt"
    assert torch.load(run.directory / "previous.pt", weights_only=True)["state"]["global_step"] == 12
    content = bytearray(newest.read_bytes())
    place = content.index(run.checkpoint()["state"]["model"]["classifier.weight"].numpy().tobytes())
    content[place + 5] ^= 4  # one bit
    newest.write_bytes(content)
    resumed = train("--epochs 3 --resume auto", "run")
    assert resumed.code == 0
    assert resumed.err.startswith("warning: ")
    assert "going on from" in resumed.err
    assert resumed.err.count("\n") == 1
    same(whole.checkpoint()["state"], resumed.checkpoint()["state"])
    assert (run.directory / "damaged.pt").read_bytes() == content  # out of the way of the next save
    assert torch.load(run.directory / "checkpoint.pt", weights_only=True)["state"]["global_step"] == 18
    for name in ("checkpoint.pt", "previous.pt"):
        (run.directory / name).write_bytes(b"no checkpoint")
    bad = train("--epochs 3 --resume auto", "run")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "not a whole checkpoint" in bad.err


def test_a_good_checkpoint_is_never_exchanged_for_a_damaged_one(train, monkeypatch):
    """Killed between the two renames of the first save after a fallback, a run still has what it went on from."""
    run = train("--epochs 3")
    (run.directory / "result.json").unlink()
    good = (run.directory / "previous.pt").read_bytes()
    (run.directory / "checkpoint.pt").write_bytes(b"damaged")

    def dies(source, target):
        if str(target).endswith("checkpoint.pt"):
            raise OSError(28, "killed")
        return replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", dies)
    assert train("--epochs 3 --resume auto").code == 1
    assert (run.directory / "previous.pt").read_bytes() == good
    monkeypatch.undo()
    assert train("--epochs 3 --resume auto", str(run.directory)).code == 0


def test_nor_where_the_good_one_is_named(train, monkeypatch):
    run = train("--epochs 3")
    (run.directory / "result.json").unlink()
    good = (run.directory / "previous.pt").read_bytes()
    (run.directory / "checkpoint.pt").write_bytes(b"damaged")
    monkeypatch.setattr(main_prune_train, "fit", lambda *args: None)
    train(f"--resume {run.directory / 'previous.pt'}", None, short=False)
    assert (run.directory / "previous.pt").read_bytes() == good
    assert (run.directory / "damaged.pt").read_bytes() == b"damaged"
    assert not (run.directory / "checkpoint.pt").exists()


def test_what_killed_saves_have_left_is_removed(train):
    run = train("--epochs 1 --lr-scheduler constant")
    (run.directory / ".checkpoint.pt.x.tmp").touch()
    assert train("--epochs 2 --lr-scheduler constant --resume auto").code == 0
    assert not list(run.directory.glob(".*.tmp"))


def test_workers_of_a_killed_run_do_not_hold_its_directory(tmp_path):
    process = child(f"{DIGITS} --epochs 500 --workers 2", tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        with pytest.raises(OSError, match="unavailable|denied"):
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.kill()
        process.wait()
        assert [worker for worker in workers if Path(f"/proc/{worker}").exists()]
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.communicate()


def test_a_checkpoint_from_before_a_flag_existed_is_gone_on_with(train):
    run = train("--epochs 2")
    (run.directory / "result.json").unlink()
    checkpoint = run.checkpoint()
    for name in ("sam_local", "sync_bn"):
        del checkpoint["args"][name]
    torch.save(checkpoint, run.directory / "checkpoint.pt")
    resumed = train("--epochs 2 --resume auto")
    assert (resumed.code, resumed.err) == (0, "")


@pytest.mark.parametrize(
    "flags",
    [
        "--optmzr sgd --nesterov --clip-grad 1 --mixup --smooth-eps 0.1",
        "--optmzr sgd-sam --sam-v2 --prune-method random --sparsity 0.9 --accumulate 2 --val-split 200",
        "--optmzr adamw-sam --adaptive --prune-method magnitude --sparsity 0.8 --lr-scheduler step --warmup-epochs 1",
        "--optmzr sgd-sam --sam-v2 --prune-method rigl --sparsity 0.9 --update-interval 2",
        "--optmzr sgd-sam --sam-v2 --prune-method mest --mest-soft --sparsity 0.9 --update-interval 2",
        "--optmzr sgd-sam --prune-method lth --lth-rounds 1 --lth-rewind 8 --sparsity 0.9",
    ],
)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_interrupted(train, flags):
    whole = train(f"{flags} --epochs 4", "whole")
    assert whole.code == 0, whole.err
    # The same run as it was after its second epoch, with what it had written of the third.

    original, calls = engine.evaluate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 2 * (2 if "--val-split" in flags else 1):
            raise KeyboardInterrupt
        return original(*args)

    engine.evaluate = interrupted
    try:
        assert train(f"{flags} --epochs 4", "cut").code == 130
    finally:
        engine.evaluate = original
    assert len(rows(whole.directory.parent / "cut")) == 2
    time.sleep(1.1)  # event files are ordered by the second they were begun in; two processes are never that close
    resumed = train(f"{flags} --epochs 4 --resume auto", "cut")
    assert resumed.code == 0, resumed.err
    assert "resumed after step " in resumed.out
    same(whole.checkpoint()["state"], resumed.checkpoint()["state"])
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows(run.directory)]
        for run in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    expected, found = scalars(whole.directory), scalars(resumed.directory)
    assert expected.keys() == found.keys()
    for tag in expected:
        if tag != "work/images_per_second":
            assert expected[tag] == found[tag], tag


def test_a_killed_run_resumes_to_the_same_end(train, tmp_path):
    flags = f"--dataset digits --depth 8 --width 0.5 --batch-size 256 {SPARSE_SAM} --epochs 6"
    whole = train(flags, "whole", short=False)
    command = [sys.executable, str(ROOT / "main_prune_train.py"), *flags.split(), "--output-dir", str(tmp_path / "cut")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2/6"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut" / "result.json").exists()
    finished = train(f"--resume {tmp_path}/cut/checkpoint.pt", None, short=False)
    assert finished.code == 0, finished.err
    cut = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    same(whole.checkpoint()["state"], cut["state"])
    assert whole.json("result.json")["test_top1"] == pytest.approx(float(rows(tmp_path / "cut")[-1]["test_top1"]))


def test_a_second_process_on_the_same_run_is_refused(train, tmp_path):
    flags = "--dataset digits --depth 8 --width 0.5 --batch-size 256 --epochs 1000"
    command = [sys.executable, str(ROOT / "main_prune_train.py"), *flags.split(), "--output-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        next(line for line in process.stdout if " 2/1000 " in line)
        second = train(f"{flags} --resume auto", "run", short=False)
    finally:
        process.kill()
        process.wait()
    assert second.code == 2
    assert "another process trains in" in second.err
    after = train(f"{flags} --lr 0.2 --resume auto", "run", short=False)  # refused too, but for its flag
    assert after.code == 2
    assert "another process" not in after.err


def test_a_finished_run_is_left_alone_and_a_constant_schedule_may_grow(train):
    run = train("--epochs 1 --lr-scheduler constant --lr 0.01")
    before = {path: path.read_bytes() for path in run.directory.iterdir()}
    assert train("--epochs 1 --lr-scheduler constant --lr 0.01 --resume auto").code == 0
    assert {path: path.read_bytes() for path in run.directory.iterdir()} == before
    longer = train("--epochs 2 --lr-scheduler constant --lr 0.01 --resume auto")
    assert longer.code == 0
    whole = train("--epochs 2 --lr-scheduler constant --lr 0.01", "whole")
    same(whole.checkpoint()["state"], longer.checkpoint()["state"])
    assert longer.json("result.json")["epochs"] == 2


def test_resume_auto_starts_where_there_is_nothing_to_resume(train):
    run = train("--epochs 1 --resume auto")
    assert run.code == 0
    assert len(rows(run.directory)) == 1


def test_a_run_does_not_go_on_with_other_images_or_other_flags(train, tmp_path):
    from PIL import Image

    for name, level in (("a", 10), ("b", 200)):
        for index in range(24):
            path = tmp_path / name / "img" / ("test" if index < 6 else "train") / f"c{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (level + index, level, index)).save(path)
    flags = "--dataset folder --batch-size 6 --depth 8 --lr-scheduler constant"
    run = train(f"{flags} --data-dir a/img --epochs 1", short=False)
    assert run.code == 0, run.err
    before = (run.directory / "checkpoint.pt").read_bytes()
    for command, words in (
        (f"--resume {run.directory}/checkpoint.pt --data-dir b/img --epochs 2", "not those that the run began with"),
        (f"{flags} --data-dir b/img --epochs 2 --resume auto", "not those that the run began with"),
        (f"{flags} --data-dir a/img --epochs 1 --resume auto --lr 0.2", "--lr was 0.1 and is 0.2"),
        # What a command leaves out counts too.
        (
            f"{flags.replace('--lr-scheduler constant', '')} --data-dir a/img --epochs 1 --resume auto",
            "--lr-scheduler was",
        ),
    ):
        bad = train(command, None if command.startswith("--resume") else "run", short=False)
        assert bad.code == 2
        assert words in bad.err
    assert (run.directory / "checkpoint.pt").read_bytes() == before
