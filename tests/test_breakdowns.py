"""Disks, directories, files, workers, memory and outputs that fail under a run: it ends with a sentence, and nothing is lost."""

import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from running import DIGITS, before_step, child, wait_for

import main_prune_train
from analysis import hessian, trained
from training import loop
from training.step import TrainingStep


def test_output_that_nobody_reads_ends_a_run_with_a_sentence(tmp_path):
    process = child(f"{DIGITS} --epochs 50", tmp_path / "run")
    process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err == "error: nobody reads the output any more: a training goes on by --resume auto\n"


def test_a_disk_that_is_full_from_the_start_is_a_sentence(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # noqa: E731
    full = child(f"{DIGITS} --epochs 3", tmp_path / "run", preexec_fn=limit)
    _, err = full.communicate(timeout=120)
    assert (full.returncode, err.count("\n")) == (1, 1), err
    assert "File too large" in err


def test_a_disk_that_fills_up_ends_a_run_with_a_sentence_and_keeps_what_was_written(train, tmp_path):
    """A limit on the size of files stands for the disk: a real process meets it when its second checkpoint grows."""
    small = train("--epochs 1 --optmzr sgd --lr-scheduler constant", "run")
    size = (small.directory / "checkpoint.pt").stat().st_size
    kept = (small.directory / "checkpoint.pt").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    flags = f"{DIGITS} --log-interval 2 --epochs 3 --optmzr sgd --lr-scheduler constant --resume auto"
    full = child(flags, small.directory, preexec_fn=limit)
    _, err = full.communicate(timeout=120)
    assert full.returncode == 1, err
    assert "cannot read or write" in err
    assert "File too large" in err
    assert "Traceback" not in err
    assert (small.directory / "checkpoint.pt").read_bytes() == kept
    assert not list(small.directory.glob(".*.tmp"))
    assert train("--epochs 3 --optmzr sgd --lr-scheduler constant --resume auto").code == 0


def test_a_directory_that_is_removed_ends_a_run_with_a_sentence(train, monkeypatch, tmp_path):
    original = loop.evaluate

    def removed(*args):
        shutil.rmtree(tmp_path / "run")
        return original(*args)

    monkeypatch.setattr(loop, "evaluate", removed)
    gone = train("--epochs 2")
    assert (gone.code, gone.err.count("\n")) == (1, 1)
    assert "cannot read or write" in gone.err
    assert "go on by --resume auto" in gone.err


def test_a_file_that_vanishes_while_images_are_read_is_named(train, tmp_path, monkeypatch):
    from PIL import Image

    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8), (number, 1, 2)).save(tmp_path / "data" / split / label / f"{number}.png")
    from imagedata import sources as datasets

    original = datasets._decode_all

    def vanish(*args):
        (tmp_path / "data" / "train" / "b" / "1.png").unlink(missing_ok=True)
        return original(*args)

    monkeypatch.setattr(datasets, "_decode_all", vanish)
    bad = train(f"--dataset folder --data-dir {tmp_path}/data --depth 8 --epochs 1", short=False)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "1.png" in bad.err


def test_a_worker_that_dies_ends_a_run_with_a_sentence(tmp_path):
    process = child(f"{DIGITS} --epochs 500 --workers 2", tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "a data worker died" in err
    assert "Traceback" not in err


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(train, monkeypatch):
    run = train("--epochs 2 --lr-scheduler constant")
    before = {path.name: path.read_bytes() for path in run.directory.glob("*.pt")}

    def fail(self):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    bad = train("--epochs 3 --lr-scheduler constant --resume auto")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "cannot read" in bad.err
    assert {path.name: path.read_bytes() for path in run.directory.glob("*.pt")} == before


def test_output_may_be_caught(tmp_path, monkeypatch):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main_prune_train.main([*DIGITS.split(), "--epochs", "1", "--output-dir", str(tmp_path / "run")])
    assert code == 0
    assert "final test accuracy" in out.getvalue()


def test_a_worker_that_dies_in_a_measurement_is_a_sentence(train, monkeypatch):
    def die(*args):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(trained, "recalibrated", die)
    failed = train("--epochs 1 --recalibrate-bn --workers 1")
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    assert "a data worker died" in failed.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--accumulate 2", "try --accumulate 4, where"),
        ("", "or --batch-size 128\n"),
        ("--accumulate 256", "try --batch-size 128\n"),
        ("--arch vit --depth 1 --width 0.34 --batch-size 1", "try a smaller --width\n"),
    ],
)
def test_out_of_memory_on_a_gpu_names_what_to_try(train, monkeypatch, flags, words):
    def full(state):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(TrainingStep, "__call__", before_step(0, full))
    failed = train(f"--epochs 1 {flags}")
    assert (failed.code, failed.err.count("\n")) == (1, 1), failed.err
    assert words in failed.err


def test_out_of_memory_in_a_measurement_names_what_to_try(train, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(hessian, "measure", full)
    failed = train("--epochs 1 --sharpness")
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    assert f"try python -m analysis.sharpness {failed.directory / 'checkpoint.pt'} with a --batch-size" in failed.err
    assert failed.checkpoint()["state"]["global_step"] == 6
