"""Disks, directories, files, workers, memory and outputs that fail under a run: it ends with a sentence, and nothing is lost."""

import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from PIL import Image
from processes import Child, forks
from running import DIGITS, FINISHED, ROOT, before_step

import main_prune_train


@contextlib.contextmanager
def largest_file(size):
    """Make this process fail to write larger files, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_output_that_nobody_reads_ends_a_run_with_a_sentence(tmp_path):
    """In a real process: Python itself flushes its output at the end."""
    command = [
        sys.executable,
        "main_prune_train.py",
        *DIGITS.split(),
        "--epochs",
        "50",
        "--output-dir",
        tmp_path / "run",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err == "error: nobody reads the output any more: a training goes on by --resume auto\n"


def test_a_disk_that_is_full_from_the_start_ends_a_run_with_a_sentence(train):
    with largest_file(300):
        full = train("--epochs 3")
    assert (full.code, full.err.count("\n")) == (1, 1), full.err
    assert "File too large" in full.err


def test_a_disk_that_fills_up_ends_a_run_with_a_sentence_and_spoils_nothing(train, tmp_path):
    """It is full when the second checkpoint is written. In a real process, which ends with threads that cannot write."""
    flags = "--optmzr sgd --lr-scheduler constant"
    small = train(f"{flags} --epochs 1")
    kept = (small.directory / "checkpoint.pt").read_bytes()
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(kept) // 2},) * 2)"
    script += "; import sys, main_prune_train; sys.exit(main_prune_train.main())"
    command = [sys.executable, "-c", script, *DIGITS.split(), *flags.split(), "--epochs", "3", "--resume", "auto"]
    full = subprocess.run([*command, "--output-dir", small.directory], cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 1, full.stderr
    assert "cannot read or write" in full.stderr
    assert "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert (small.directory / "checkpoint.pt").read_bytes() == kept
    assert not list(small.directory.glob(".*.tmp"))
    assert train(f"{flags} --epochs 3 --resume auto").code == 0


def test_a_directory_that_is_removed_ends_a_run_with_a_sentence(train, tmp_path):
    with before_step(5, lambda state: shutil.rmtree(tmp_path / "run")):
        gone = train("--epochs 2")
    assert (gone.code, gone.err.count("\n")) == (1, 1)
    assert "cannot read or write" in gone.err
    assert "go on by --resume auto" in gone.err


def test_a_file_that_vanishes_while_images_are_read_is_named(train, tmp_path, monkeypatch):
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8), (number, 1, 2)).save(tmp_path / "data" / split / label / f"{number}.png")
    read = Image.open

    def read_and_remove(path):
        (tmp_path / "data" / "train" / "b" / "1.png").unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(Image, "open", read_and_remove)
    bad = train(f"--dataset folder --data-dir {tmp_path}/data --depth 8 --epochs 1", short=False)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "1.png" in bad.err


@forks
def test_a_worker_that_dies_ends_a_run_with_a_sentence(tmp_path):
    child = Child(f"{DIGITS} --epochs 500 --workers 2", tmp_path / "run")
    child.wait_for_checkpoint()
    os.kill(int(child.workers()[-1]), signal.SIGKILL)
    assert child.wait() == 1, child.err
    assert "a data worker died" in child.err
    assert "Traceback" not in child.err


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(train, unfinished, monkeypatch):
    before = unfinished.files()

    def fail(self):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    bad = train(f"{FINISHED} --resume auto")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "cannot read" in bad.err
    assert unfinished.files() == before


def test_output_may_be_redirected_in_python(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main_prune_train.main([*DIGITS.split(), "--epochs", "1", "--output-dir", str(tmp_path / "run")])
    assert code == 0
    assert "final test accuracy" in out.getvalue()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--accumulate 2", "try --accumulate 4, where"),
        ("", "or --batch-size 48\n"),
        ("--accumulate 96", "try --batch-size 48\n"),
        ("--arch vit --depth 1 --width 0.34 --batch-size 1", "try a smaller --width\n"),
    ],
)
def test_out_of_gpu_memory_names_what_to_try(train, flags, words):
    def full(state):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with before_step(0, full):
        failed = train(f"--epochs 1 {flags}")
    assert (failed.code, failed.err.count("\n")) == (1, 1), failed.err
    assert words in failed.err


def test_out_of_gpu_memory_in_a_measurement_names_what_to_try(train, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("scipy.sparse.linalg.eigsh", full)
    failed = train("--epochs 1 --sharpness")
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    assert f"try python -m analysis.sharpness {failed.directory / 'checkpoint.pt'} with a --batch-size" in failed.err
    assert failed.checkpoint()["state"]["global_step"] == 6
