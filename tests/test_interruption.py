"""Runs that are told to end in the middle of an epoch, and what is left of them when they are killed."""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main_prune_train
from utils import engine, interruption, sharpness
from utils.checkpoint import TrainState
from utils.record import Record

ROOT = Path(__file__).parent.parent
TIMES = ("seconds", "images_per_second")


def same(left, right):
    """Equal to the last bit, but for what a clock says."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - set(TIMES):
            same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right or left != left


@pytest.fixture
def send(monkeypatch):
    """send(signal, step): this process gets it while that step of the next run is computed."""

    def arrange(number, at):
        original = engine.train_step

        def step(state, *rest):
            if state.progress == at:
                os.kill(os.getpid(), number)
            return original(state, *rest)

        monkeypatch.setattr(engine, "train_step", step)
        return lambda: monkeypatch.setattr(engine, "train_step", original)

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
    assert cut.checkpoint()["state"]["progress"] == at + 1
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
    monkeypatch.setattr(interruption, "REPEATED", 0)
    save = TrainState.state_dict

    def slow(self):
        if self.progress:
            os.kill(os.getpid(), signal.SIGINT)
        return save(self)

    monkeypatch.setattr(TrainState, "state_dict", slow)
    assert train("--epochs 2").code == 130


def test_a_signal_that_comes_twice_at_once_is_one(train, monkeypatch):
    """As where a scheduler sends it to all processes, and their launcher passes it on."""
    original = engine.train_step

    def step(state, *rest):
        if state.progress == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(state, *rest)

    monkeypatch.setattr(engine, "train_step", step)
    ended = train("--epochs 2")
    assert ended.code == 75
    assert ended.checkpoint()["state"]["progress"] == 3


def test_a_signal_just_after_an_epoch_has_its_checkpoint_too(train, monkeypatch):
    original = Record.row

    def row(self, state):
        original(self, state)
        if len(state.rows) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Record, "row", row)
    ended = train("--epochs 8 --checkpoint-every 5")
    assert ended.code == 75
    assert ended.checkpoint()["state"]["progress"] == 19  # a step later


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_a_run_with_a_sentence(train, monkeypatch, number):
    def load(*args):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(main_prune_train, "load_dataset", load)
    ended = train("--epochs 2")
    assert (ended.code, ended.err) == (75, f"ended by {number.name}: go on by --resume auto\n")
    assert not ended.directory.exists()


def test_a_signal_in_the_last_epoch_leaves_the_closer_look_to_another_process(train, send):
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


def test_output_that_nobody_reads_ends_a_run_with_a_sentence(tmp_path):
    process = child(f"{DIGITS} --epochs 50", tmp_path / "run")
    process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err == "error: nobody reads the output any more: a training goes on by --resume auto\n"


def test_checkpoints_come_as_often_as_asked(train, monkeypatch):
    """Every second epoch, and after the last; by minutes in the middle of epochs too."""
    written = []
    original = main_prune_train.save_checkpoint

    def note(path, state, **rest):
        written.append((path.name, state.progress))
        original(path, state=state, **rest)

    monkeypatch.setattr(main_prune_train, "save_checkpoint", note)
    train("--epochs 5 --checkpoint-every 2")
    assert written == [("checkpoint.pt", 12), ("checkpoint.pt", 24), ("checkpoint.pt", 30)]
    written.clear()
    whole = train("--epochs 2 --checkpoint-every 0.00000001m", "minutes")
    assert [step for _, step in written] == list(range(1, 13))
    same(train("--epochs 2", "epochs").checkpoint()["state"], whole.checkpoint()["state"])
    for wrong in ("0", "-1", "1.5", "m", "0m", "infm", "nanm", "soon"):
        bad = train(f"--epochs 1 --checkpoint-every {wrong}", "bad")
        assert (bad.code, bad.err.count("\n")) == (2, 1)
        assert "--checkpoint-every takes epochs, as 5, or minutes, as 10m" in bad.err
        assert not bad.directory.exists()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(train):
    whole = train("--epochs 3", "whole")
    run = train("--epochs 3", "run")
    (run.directory / "result.json").unlink()
    newest = run.directory / "checkpoint.pt"
    assert torch.load(run.directory / "previous.pt", weights_only=True)["state"]["progress"] == 12
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
    assert torch.load(run.directory / "checkpoint.pt", weights_only=True)["state"]["progress"] == 18
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


def test_what_changed_while_a_run_began_is_not_overwritten(train, monkeypatch):
    """Another process ended with a newer checkpoint, or finished, while this one loaded its data."""
    original = main_prune_train.load_dataset
    for flags in ("--epochs 2", "--epochs 3 --lr-scheduler constant --resume auto"):

        def load(*args, flags=flags):
            monkeypatch.setattr(main_prune_train, "load_dataset", original)
            data = original(*args)
            main_prune_train.main([*f"{DIGITS} --log-interval 2 --lr-scheduler constant".split(), *flags.split(),
                                   "--output-dir", "run"])  # fmt: skip
            return data

        monkeypatch.setattr(main_prune_train, "load_dataset", load)
        late = train(f"{flags} --lr 0.2" if "resume" not in flags else flags)
        assert late.code == 2
        assert "another process has written to" in late.err
        assert late.json("args.json")["args"]["lr"] == 0.1


def test_workers_of_a_killed_run_do_not_hold_its_directory(tmp_path):
    process = child(f"{DIGITS} --epochs 500 --workers 2", tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        with pytest.raises(OSError, match="unavailable|denied"):
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.kill()
        process.wait()
        assert [worker for worker in workers if Path(f"/proc/{worker}").exists()]
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.communicate()


def test_what_killed_saves_have_left_is_removed(train):
    run = train("--epochs 1 --lr-scheduler constant")
    (run.directory / ".checkpoint.pt.x.tmp").touch()
    assert train("--epochs 2 --lr-scheduler constant --resume auto").code == 0
    assert not list(run.directory.glob(".*.tmp"))


def test_a_disk_that_is_full_from_the_start_is_a_sentence(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # noqa: E731
    full = child(f"{DIGITS} --epochs 3", tmp_path / "run", preexec_fn=limit)
    _, err = full.communicate(timeout=120)
    assert (full.returncode, err.count("\n")) == (1, 1), err
    assert "File too large" in err


def test_a_run_needs_neither_an_output_nor_its_alphabet(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for name, options in (("\xe9", {}), ("closed", {"preexec_fn": lambda: os.close(1)})):
        process = child(f"{DIGITS} --epochs 1", tmp_path / name, env=environment, **options)
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        assert (tmp_path / name / "result.json").exists()


def test_a_worker_that_dies_in_a_closer_look_is_a_sentence(train, monkeypatch):
    def die(*args):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(main_prune_train, "recalibrated", die)
    failed = train("--epochs 1 --recalibrate-bn --workers 1")
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    assert "a process that cuts batches died" in failed.err


def test_a_directory_that_is_removed_ends_a_run_with_a_sentence(train, monkeypatch, tmp_path):
    original = engine.evaluate

    def removed(*args):
        shutil.rmtree(tmp_path / "run")
        return original(*args)

    monkeypatch.setattr(engine, "evaluate", removed)
    gone = train("--epochs 2")
    assert (gone.code, gone.err.count("\n")) == (1, 1)
    assert "cannot read or write" in gone.err
    assert "go on by --resume auto" in gone.err


def child(flags, directory, **options):
    command = [sys.executable, "main_prune_train.py", *flags.split(), "--output-dir", str(directory)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


DIGITS = "--dataset digits --depth 8 --width 0.5 --batch-size 256"


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


def test_the_best_epoch_is_kept_however_seldom_checkpoints_come(train):
    flags = "--epochs 6 --val-split 200 --optmzr sgd --lr 0.5"
    often, seldom = train(flags, "often"), train(f"{flags} --checkpoint-every 4", "seldom")
    same(often.checkpoint("best.pt")["state"]["rows"], seldom.checkpoint("best.pt")["state"]["rows"])
    assert len(seldom.checkpoint("best.pt")["state"]["rows"]) == seldom.json("result.json")["best_epoch"]


def test_a_checkpoint_from_before_a_flag_existed_is_gone_on_with(train):
    run = train("--epochs 2")
    (run.directory / "result.json").unlink()
    checkpoint = run.checkpoint()
    for name in ("sam_local", "sync_bn"):
        del checkpoint["args"][name]
    torch.save(checkpoint, run.directory / "checkpoint.pt")
    resumed = train("--epochs 2 --resume auto")
    assert (resumed.code, resumed.err) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_is_the_parents(tmp_path, number):
    """As from a terminal, or a scheduler that ends a whole job: workers leave it to the parent, and are gone with it."""
    process = child(f"{DIGITS} --epochs 500 --workers 2", tmp_path / "run", start_new_session=True)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.count("\n") == 1
    assert f"ended by {number.name}" in err
    assert len(workers) == 2
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def test_a_worker_that_dies_ends_a_run_with_a_sentence(tmp_path):
    process = child(f"{DIGITS} --epochs 500 --workers 2", tmp_path / "run")
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "a process that cuts batches died" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--accumulate 2", "try --accumulate 4, which"),
        ("", "or --batch-size 128\n"),
        ("--accumulate 256", "try --batch-size 128\n"),
        ("--arch vit --depth 1 --width 0.34 --batch-size 1", "try a smaller --width\n"),
    ],
)
def test_out_of_memory_on_a_gpu_names_what_to_try(train, monkeypatch, flags, words):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(engine, "train_step", full)
    failed = train(f"--epochs 1 {flags}")
    assert (failed.code, failed.err.count("\n")) == (1, 1), failed.err
    assert words in failed.err


def test_out_of_memory_in_a_closer_look_names_what_to_try(train, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sharpness, "measure", full)
    failed = train("--epochs 1 --sharpness")
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    assert f"try python -m analysis.sharpness {failed.directory / 'checkpoint.pt'} with a --batch-size" in failed.err
    assert failed.checkpoint()["state"]["progress"] == 6


def test_a_file_that_vanishes_while_images_are_read_is_named(train, tmp_path, monkeypatch):
    from PIL import Image

    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8), (number, 1, 2)).save(tmp_path / "data" / split / label / f"{number}.png")
    from utils import datasets

    original = datasets._decode_all

    def vanish(*args):
        (tmp_path / "data" / "train" / "b" / "1.png").unlink(missing_ok=True)
        return original(*args)

    monkeypatch.setattr(datasets, "_decode_all", vanish)
    bad = train(f"--dataset folder --data-dir {tmp_path}/data --depth 8 --epochs 1", short=False)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "1.png" in bad.err
