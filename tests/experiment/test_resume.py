"""Runs go on from their checkpoints to the same end, or are refused."""

import os
import shutil
import signal

import pytest
import torch
from PIL import Image
from processes import Child, forks
from running import DIGITS, FINISHED, before_step, interrupt, rows, same, scalars


@pytest.mark.parametrize(
    ("flags", "step", "epochs"),  # a step after that epoch, and the steps between are lost
    [
        ("--optmzr sgd --nesterov --clip-grad 1 --mixup --smooth-eps 0.1", 9, 1),
        ("--optmzr sgd-sam --sam-v2 --prune-method random --sparsity 0.9 --accumulate 2 --val-split 200", 8, 1),
        ("--optmzr adamw-sam --adaptive --prune-method magnitude --sparsity 0.8 --lr-scheduler step --warmup-epochs 1", 9, 1),
        ("--optmzr sgd-sam --sam-v2 --prune-method rigl --sparsity 0.9 --update-interval 2", 9, 1),
        ("--optmzr sgd-sam --sam-v2 --prune-method mest --mest-soft --sparsity 0.9 --update-interval 2", 9, 1),
        ("--optmzr sgd --prune-method snfs --sparsity 0.5 --update-interval 3", 9, 1),
        ("--optmzr sgd-sam --sam-v2 --prune-method dsr --sparsity 0.5 --update-interval 2", 9, 1),
        ("--optmzr sgd-cram --prune-method final --sparsity 0.9", 9, 1),
        ("--optmzr sgd-safe --prune-method final --sparsity 0.9 --safe-interval 4", 9, 1),
        ("--optmzr sgd-sam --prune-method lth --lth-rounds 1 --lth-rewind 8 --sparsity 0.9", 14, 2),
    ],
)  # fmt: skip
def test_a_resumed_run_ends_bit_for_bit_like_one_without_interruption(train, flags, step, epochs):
    flags += " --epochs 2"
    whole = train(flags, "whole")
    assert whole.code == 0, whole.err
    with before_step(step, interrupt):
        cut = train(flags, "cut")
    assert (cut.code, len(rows(cut.directory))) == (130, epochs)
    for path in cut.directory.glob("events*"):  # TensorBoard orders these files by the second they were begun in
        *name, began, rest = path.name.split(".", 4)
        path.rename(path.with_name(".".join([*name, str(int(began) - 1), rest])))
    resumed = train(f"{flags} --resume auto", "cut")
    assert resumed.code == 0, resumed.err
    assert "resumed after step " in resumed.out
    same(whole.checkpoint()["state"], resumed.checkpoint()["state"])
    same(rows(whole.directory), rows(resumed.directory))
    expected, found = (scalars(run.directory) for run in (whole, resumed))
    for logged in (expected, found):
        del logged["work/images_per_second"]
    same(expected, found)


@pytest.mark.parametrize(
    "flags",
    [
        "--sam-v2 --sam-direction momentum --sam-rho -1 --rho-schedule lr --sam-until 0.9",
        "--sam-v2 --sam-direction ema --rho-schedule sqrt --eval-every 2",
        "--sam-v2 --sam-direction random --sam-from 0.6",
        "--sam-every 3 --sam-from 0.25 --rho-schedule sqrt",
    ],
)
def test_a_run_ended_in_the_middle_of_an_epoch_goes_on_bit_for_bit(train, flags):
    """With the direction, the radius and the passes that it would have had."""
    flags = f"--optmzr sgd-sam {flags} --prune-method rigl --sparsity 0.9 --update-interval 4 --epochs 2"
    whole = train(flags, "whole")
    assert whole.code == 0, whole.err
    for step in (1, 8):
        with before_step(step, lambda state: signal.raise_signal(signal.SIGTERM)):
            assert train(f"{flags} --resume auto --log-interval 1", "cut").code == 75
    resumed = train(f"{flags} --resume auto", "cut")
    assert resumed.code == 0, resumed.err
    assert "resumed after step 9" in resumed.out
    same(whole.checkpoint()["state"], resumed.checkpoint()["state"])
    same(rows(whole.directory), rows(resumed.directory))
    results = [run.json("result.json") for run in (whole, resumed)]
    passes = (12 + 3) / 12 if "--sam-every" in flags else 1  # of steps 3 to 11 the multiples of 3
    assert [result["passes_per_step"] for result in results] == [passes] * 2
    assert results[0]["training_flops"] == results[1]["training_flops"]


@forks
def test_a_killed_run_resumes_to_the_same_end(train, trained, tmp_path):
    child = Child(
        f"{DIGITS} {FINISHED}",
        tmp_path / "cut",
        around=before_step(14, lambda state: os.kill(os.getpid(), signal.SIGKILL)),
    )
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut" / "result.json").exists()
    finished = train(f"--resume {tmp_path}/cut/checkpoint.pt", None, short=False)
    assert finished.code == 0, finished.err
    cut = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    same(trained.checkpoint()["state"], cut["state"])
    assert trained.json("result.json")["test_top1"] == pytest.approx(float(rows(tmp_path / "cut")[-1]["test_top1"]))


def test_a_run_that_goes_on_at_another_commit_names_both(train, monkeypatch):
    for number, commit in enumerate(("a" * 40, "a" * 40, "b" * 40, "c" * 40)):
        monkeypatch.setattr("training.logger.git_revision", lambda commit=commit: commit)
        run = train(f"--epochs {number + 1} --lr-scheduler constant --resume auto")
        assert run.code == 0
    assert run.json("args.json")["git"] == "c" * 40
    assert run.json("args.json")["earlier_git"] == ["a" * 40, "b" * 40]


def test_resume_auto_begins_a_run_where_there_is_none(train):
    run = train("--epochs 1 --resume auto")
    assert run.code == 0
    assert len(rows(run.directory)) == 1


def test_a_run_goes_on_by_the_name_of_its_directory(train, unfinished):
    resumed = train(f"--resume {unfinished.directory}", None, short=False)
    assert (resumed.code, resumed.err) == (0, "")
    assert len(rows(unfinished.directory)) == 3


def test_a_finished_run_is_left_as_it_is(train, finished):
    before = finished.files()
    assert "finished already" in train(f"{FINISHED} --resume auto").out
    assert finished.files() == before


def test_a_finished_ticket_goes_on_from_the_end_of_an_earlier_round(train):
    flags = "--epochs 1 --prune-method lth --sparsity 0.5 --lth-rounds 1 --lth-rewind 2"
    whole = train(flags)
    before = whole.checkpoint()["state"]
    resumed = train(f"{flags} --resume {whole.directory / 'previous.pt'}", None)
    assert (resumed.code, resumed.err) == (0, "")
    assert "finished already" not in resumed.out
    same(before, whole.checkpoint()["state"])


def test_a_constant_schedule_may_go_on_for_more_epochs(train):
    flags = "--lr-scheduler constant --lr 0.01"
    train(f"{flags} --epochs 1")
    longer, whole = train(f"{flags} --epochs 2 --resume auto"), train(f"{flags} --epochs 2", "whole")
    assert longer.code == 0
    same(whole.checkpoint()["state"], longer.checkpoint()["state"])
    assert longer.json("result.json")["epochs"] == 2


def test_a_share_of_the_training_keeps_its_number_of_epochs(train):
    flags = "--lr-scheduler constant --lr 0.01 --optmzr sgd-sam --sam-from 0.5"
    assert train(f"{flags} --epochs 1").code == 0
    bad = train(f"{flags} --epochs 2 --resume auto")
    assert (bad.code, "--epochs was 1 and is 2" in bad.err) == (2, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--epochs 4",
            "--epochs was 3 and is 4 (--epochs may grow with --lr-scheduler constant, masks that stay, and no --sam-from or "
            "--sam-until)",
        ),
        ("--lr 0.2 --wd 0.1", "--lr was 0.1 and is 0.2, --weight-decay was 0.0005 and is 0.1"),
        ("--optmzr sgd", "--optmzr was sgd-sam and is sgd"),
        ("--sam-direction ema", "--sam-direction was previous and is ema"),
        (
            "--sam-from 0.5 --rho-schedule sqrt",
            "--rho-schedule was constant and is sqrt, --sam-from was 0.0 and is 0.5",
        ),
        ("--depth 14", "--depth was 8 and is 14"),
        ("--seed 1", "--seed was 0 and is 1"),
        ("--prune-method rigl --sparsity 0.5", "--prune-method was random and is rigl"),
        ("--output-dir elsewhere", "leave --output-dir out"),
    ],
)
def test_a_resumed_run_cannot_change_its_mathematics(train, unfinished, flags, words):
    before = unfinished.files()
    bad = train(f"--resume {unfinished.directory}/checkpoint.pt {flags}", None, short=False)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert words in bad.err
    assert unfinished.files() == before


def test_a_flag_left_out_of_a_resumed_command_means_its_default(train):
    assert train("--epochs 1 --lr-scheduler constant").code == 0
    bad = train("--epochs 1 --resume auto")
    assert (bad.code, "--lr-scheduler was constant and is cosine" in bad.err) == (2, True)


def test_flags_without_effect_on_the_mathematics_may_change_on_resume(train, unfinished):
    flags = "--test-batch-size 7 --log-interval 1 --device cpu --remark again"
    good = train(f"--resume {unfinished.directory}/checkpoint.pt {flags}", None, short=False)
    assert good.code == 0, good.err
    assert unfinished.json("result.json")["args"]["test_batch_size"] == 7


def test_a_run_does_not_go_on_with_other_images(train, tmp_path):
    for name, level in (("a", 10), ("b", 200)):
        for index in range(24):
            path = tmp_path / name / ("test" if index < 6 else "train") / f"c{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (level + index, level, index)).save(path)
    flags = "--dataset folder --batch-size 6 --depth 8 --lr-scheduler constant"
    run = train(f"{flags} --data-dir a --epochs 1", short=False)
    assert run.code == 0, run.err
    before = run.files()
    for bad in (
        train(f"--resume {run.directory}/checkpoint.pt --data-dir b --epochs 2", None, short=False),
        train(f"{flags} --data-dir b --epochs 2 --resume auto", short=False),
    ):
        assert bad.code == 2
        assert "not those that the run began with" in bad.err
    assert run.files() == before


def test_a_checkpoint_from_before_a_flag_existed_is_resumed(train, unfinished):
    checkpoint = unfinished.checkpoint()
    for name in ("sam_local", "sync_bn", "sam_direction", "sam_from", "sam_until", "sam_every", "rho_schedule"):
        del checkpoint["args"][name]
    del checkpoint["state"]["passes"]
    torch.save(checkpoint, unfinished.directory / "checkpoint.pt")
    resumed = train(f"{FINISHED} --resume auto")
    assert (resumed.code, resumed.err) == (0, "")
    assert resumed.json("result.json")["passes_per_step"] == 1


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(train, trained, unfinished):
    newest = unfinished.directory / "checkpoint.pt"
    assert unfinished.checkpoint("previous.pt")["state"]["global_step"] == 12
    content = bytearray(newest.read_bytes())
    place = content.index(unfinished.checkpoint()["state"]["model"]["classifier.weight"].numpy().tobytes())
    content[place + 5] ^= 4  # one bit
    newest.write_bytes(content)
    resumed = train(f"{FINISHED} --resume auto")
    assert resumed.code == 0
    assert resumed.err.startswith("warning: ")
    assert "going on from" in resumed.err
    assert resumed.err.count("\n") == 1
    same(trained.checkpoint()["state"], resumed.checkpoint()["state"])
    assert (resumed.directory / "damaged.pt").read_bytes() == content  # out of the way of the next save


def test_a_run_with_two_damaged_checkpoints_is_refused(train, unfinished):
    for name in ("checkpoint.pt", "previous.pt"):
        (unfinished.directory / name).write_bytes(b"no checkpoint")
    bad = train(f"{FINISHED} --resume auto")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "not a whole checkpoint" in bad.err


def test_a_good_checkpoint_is_never_replaced_by_a_damaged_one(train, unfinished, monkeypatch):
    """A run killed between the two renames of its first save after a fallback still has what it went on from."""
    good = (unfinished.directory / "previous.pt").read_bytes()
    (unfinished.directory / "checkpoint.pt").write_bytes(b"damaged")
    replace = os.replace

    def dies(source, target):
        if str(target).endswith("checkpoint.pt"):
            raise OSError(28, "killed")
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        assert train(f"{FINISHED} --resume auto").code == 1
    assert (unfinished.directory / "previous.pt").read_bytes() == good
    assert train(f"{FINISHED} --resume auto").code == 0


def test_resuming_from_previous_pt_moves_a_damaged_checkpoint_aside(train, unfinished):
    good = (unfinished.directory / "previous.pt").read_bytes()
    (unfinished.directory / "checkpoint.pt").write_bytes(b"damaged")
    with before_step(12, interrupt):
        assert train(f"--resume {unfinished.directory / 'previous.pt'}", None, short=False).code == 130
    assert (unfinished.directory / "previous.pt").read_bytes() == good
    assert (unfinished.directory / "damaged.pt").read_bytes() == b"damaged"
    assert not (unfinished.directory / "checkpoint.pt").exists()


def test_a_checkpoint_of_another_network_or_program_is_refused(train, trained, tmp_path):
    saved = trained.checkpoint()
    other = {
        "classes": (saved | {"data": saved["data"] | {"classes": ["a", "b"]}}, "does not fit"),
        "foreign": ({"model": {}}, "not a checkpoint"),
        "stateless": ({key: saved[key] for key in ("format", "args", "data")}, "not a checkpoint"),
        "depth": (saved | {"args": saved["args"] | {"depth": 14}}, "does not fit the network"),
    }
    for name, (content, words) in other.items():
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "checkpoint.pt")
        for flag in ("--evaluate", "--resume"):
            bad = train(f"{flag} {tmp_path}/{name}/checkpoint.pt", None, short=False)
            assert (bad.code, bad.err.count("\n"), bad.out) == (2, 1, "")
            assert words in bad.err


def test_resume_names_the_checkpoint_of_a_run_directory(train, finished):
    path = finished.directory / "checkpoint.pt"
    shutil.move(path, finished.directory / "mine.pt")
    bad = train(f"--resume {finished.directory}/mine.pt", None, short=False)
    assert (bad.code, "checkpoint.pt, previous.pt or best.pt" in bad.err) == (2, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--depth 14", "its --depth is 8, not 14"),
        ("--width 2", "its --width is 0.25, not 2.0"),
        ("--epochs 3", "--epochs has no effect with --evaluate"),
        ("--image-size 9", "--image-size has no effect with --dataset digits"),
        ("--data-dir nowhere", "--data-dir has no effect with --dataset digits"),
        ("--workers 1", "--workers has no effect with --evaluate on images in memory"),
    ],
)
def test_evaluation_refuses_flags_that_its_checkpoint_fixes(train, trained, flags, words):
    bad = train(f"--evaluate {trained.directory}/checkpoint.pt {flags}", None, short=False)
    assert (bad.code, bad.err.count("\n"), bad.out) == (2, 1, "")
    assert words in bad.err
