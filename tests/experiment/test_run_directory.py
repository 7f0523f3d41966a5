"""The directory of a run: what may be written there, and by which process."""

import errno
import fcntl
from pathlib import Path

import pytest
from processes import Child, forks
from running import DIGITS, FINISHED


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "x" * 300])
def test_a_directory_that_cannot_be_written_to_is_refused(train, tmp_path, place):
    (tmp_path / "file").write_text("")
    bad = train(f"--epochs 1 --output-dir {place}", None)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "cannot write to" in bad.err


def test_a_directory_with_a_finished_run_is_not_overwritten(train, finished):
    before = finished.files()
    again = train(FINISHED)
    assert again.code == 2
    assert "holds a finished run: go on with it by --resume auto" in again.err
    assert finished.files() == before


def test_a_directory_with_a_started_run_is_not_overwritten(train, unfinished):
    before = unfinished.files()
    again = train(FINISHED)
    assert again.code == 2
    assert "holds a started run" in again.err
    assert unfinished.files() == before


def test_a_directory_without_its_checkpoint_cannot_be_resumed(train, finished):
    for name in ("checkpoint.pt", "previous.pt"):
        (finished.directory / name).unlink()
    bad = train(f"{FINISHED} --resume auto")
    assert (bad.code, "no checkpoint.pt to go on from" in bad.err) == (2, True)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(train, unfinished, finished):
    for path in unfinished.directory.glob("*.pt"):
        path.unlink()
    (unfinished.directory / "best.pt").touch()  # which is written before it
    assert not (unfinished.directory / "result.json").exists()
    assert "holds a started run" in train(FINISHED).err
    again = train(f"{FINISHED} --resume auto")
    assert again.code == 0, again.err
    expected = (finished.directory / "metrics.csv").read_text().splitlines()
    assert len((unfinished.directory / "metrics.csv").read_text().splitlines()) == len(expected)


def test_files_that_a_killed_save_left_are_removed(train, unfinished):
    (unfinished.directory / ".checkpoint.pt.x.tmp").touch()
    assert train(f"{FINISHED} --resume auto").code == 0
    assert not list(unfinished.directory.glob(".*.tmp"))


def test_a_file_system_without_locks_is_not_taken_for_another_process(train, monkeypatch):
    def without(file, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", without)
    bad = train("--epochs 1")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "cannot lock" in bad.err
    assert "Function not implemented" in bad.err


def test_a_rank_that_another_program_left_is_no_other_process(train, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert train("--epochs 1").code == 0


@forks
def test_a_second_process_on_the_same_run_is_refused(train, tmp_path):
    child = Child(f"{DIGITS} --epochs 1000", tmp_path / "run")
    child.wait_for_checkpoint()
    second = train("--epochs 1000 --resume auto")
    child.kill()
    child.wait()
    assert second.code == 2
    assert "another process trains in" in second.err
    after = train("--epochs 1000 --lr 0.2 --resume auto")  # refused too, but for its flag
    assert after.code == 2
    assert "another process" not in after.err


@forks
def test_workers_of_a_killed_run_do_not_hold_its_directory(tmp_path):
    child = Child(f"{DIGITS} --epochs 500 --workers 2", tmp_path / "run")
    child.wait_for_checkpoint()
    workers = child.workers()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        with pytest.raises(OSError, match="unavailable|denied"):
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.kill()
        child.wait()
        assert [worker for worker in workers if Path(f"/proc/{worker}").exists()]
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
