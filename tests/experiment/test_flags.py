"""Bad input: one sentence on stderr, exit code 2, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--depth 21", "depth 6n+2"),
        ("--depth twenty", "argument --depth"),
        ("--width 0", "argument --width: has to be a number above 0 and at most 100, not '0'"),
        ("--arch alexnet", "argument --arch: invalid choice"),
        (
            "--sparsity 1 --prune-method random",
            "argument --sparsity: has to be a number at least 0 and below 1, not '1'",
        ),
        ("--sparsity -0.1 --prune-method random", "argument --sparsity"),
        ("--sparsity nan --prune-method random", "argument --sparsity"),
        ("--sparsity 0.99999 --prune-method random", "at most 0.9999 is possible"),
        ("--sparsity 0.9998 --prune-method random --sparsity-distribution uniform", "leaves layer"),
        ("--sparsity 0.9", "--sparsity has no effect with --prune-method none"),
        ("--prune-method random", "--prune-method random needs --sparsity"),
        ("--prune-method random --sparsity 0.9 --sparsity-distribution global", "choose erk or uniform"),
        ("--prune-method random --sparsity 0.9 --dense-layers steam", "no prunable layer matches 'steam'"),
        ("--dense-layers stem", "--dense-layers has no effect with --prune-method none"),
        ("--dataset imagenet", "argument --dataset: invalid choice"),
        ("--dataset folder", "--data-dir"),
        ("--dataset folder --data-dir nowhere", "'nowhere/train' does not exist"),
        ("--data-dir x", "--data-dir has no effect with --dataset digits"),
        ("--image-size 8", "--image-size has no effect with --dataset digits"),
        ("--val-split 1442", "cannot hold out 1442 of 1,442 training images"),
        ("--val-split -1", "argument --val-split"),
        ("--sam-v2", "--sam-v2 has no effect with --optmzr sgd"),
        ("--adaptive --optmzr adam", "--adaptive has no effect with --optmzr adam"),
        ("--sam-rho 0.1", "--sam-rho has no effect with --optmzr sgd"),
        ("--optmzr sgd-sam --sam-rho -1", "argument --sam-rho: has to be a number at least 0, not '-1'"),
        (
            "--optmzr sgd-sam --sam-rho 1e30",
            "argument --sam-rho: has to be a number at least 0 and below 2^63, not '1e30'",
        ),
        ("--optmzr sgd-sam --sam-rho inf", "argument --sam-rho"),
        ("--optmzr adam --momentum 0.8", "--momentum has no effect with --optmzr adam"),
        ("--optmzr adamw-sam --nesterov", "--nesterov has no effect with --optmzr adamw-sam"),
        ("--nesterov --momentum 0", "--nesterov needs a --momentum above 0"),
        ("--alpha 0.2", "--alpha has no effect without --mixup"),
        ("--lr 0", "argument --lr"),
        (f"--epochs 1{'0' * 400}", "argument --epochs"),
        ("--seed 99999999999999999999999", "argument --seed"),
        ("--width 1000000", "argument --width"),
        ("--dataset cifar10 --depth 21", "depth 6n+2"),
        ("--dataset cifar10 --prune-method random --sparsity 0.9 --dense-layers steam", "no prunable layer matches"),
        ("--sparsity-pattern 2:4 --prune-method rigl", "take 2:4 with gmp"),
        ("--sparsity-pattern 2:4 --prune-method random --sparsity 0.9", "fixes the sparsity at 0.5"),
        ("--sparsity-config missing.yaml --prune-method random", "cannot read 'missing.yaml'"),
        (
            "--drop-fraction 0.2 --prune-method gmp --sparsity 0.9",
            "--drop-fraction has no effect with --prune-method gmp",
        ),
        ("--mest-soft --prune-method rigl --sparsity 0.9", "--mest-soft has no effect with --prune-method rigl"),
        ("--lth-rounds 2 --prune-method set --sparsity 0.9", "--lth-rounds has no effect with --prune-method set"),
        ("--update-interval 5 --prune-method snip --sparsity 0.9", "--update-interval has no effect"),
        ("--lth-rewind 999 --prune-method lth --sparsity 0.9", "cannot rewind to step 999"),
        ("--prune-method oneshot --sparsity 0.9", "give them by --pretrained"),
        ("--keep-masks", "--keep-masks has no effect without --pretrained"),
        (
            "--keep-masks --pretrained x.pt --prune-method snip --sparsity 0.9",
            "--keep-masks has no effect with --prune-m",
        ),
        (
            "--update-interval 0 --prune-method set --sparsity 0.9",
            "has to be a whole number of steps above 0, or epochs",
        ),
        ("--update-interval 99e --prune-method gmp --sparsity 0.9", "masks would never change before they stay"),
        ("--pretrained missing.pt", "there is no checkpoint 'missing.pt'"),
        ("--arch vgg --depth 20", "a VGG has depth 16 or 19, not 20"),
        ("--batch-size 1441 --arch vgg", "cannot be batch-normalised"),
        ("--epochs 0", "argument --epochs: has to be a whole number above 0, not '0'"),
        ("--epochs 1.5", "argument --epochs: has to be a whole number"),
        ("--warmup-epochs 2 --epochs 2", "--warmup-epochs 2 has to be less than --epochs 2"),
        ("--batch-size 4 --accumulate 5", "--accumulate 5"),
        ("--no-cuda --device cuda", "contradict"),
        ("--sync-bn", "--sync-bn has no effect in one process"),
        ("--sync-bn --compile on", "--sync-bn cannot be compiled"),
        ("--sync-bn --arch vit", "--sync-bn has no effect"),
        ("--sam-local", "--sam-local has no effect with --optmzr sgd"),
        ("--sam-local --optmzr sgd-sam --sam-v2", "--sam-local has no effect with --sam-v2"),
        ("--sam-local --optmzr sgd-sam", "--sam-local has no effect in one process"),
        ("--sam-unmasked --optmzr sgd-sam", "--sam-unmasked has no effect with --prune-method none"),
        ("--sam-unmasked --prune-method random --sparsity 0.9", "--sam-unmasked has no effect with --optmzr sgd"),
        ("--sam-unmasked --clip-grad 1 --optmzr sgd-sam --prune-method random --sparsity 0.9", "leave one of them out"),
        ("--sam-local --sync-bn --optmzr sgd-sam", "contradict each other"),
        ("--checkpoint-every 0", "--checkpoint-every takes epochs"),
        ("--nonfinite ignore", "argument --nonfinite"),
        ("--device tpu", "--device has to be auto, cpu, cuda or cuda:N, not 'tpu'"),
        ("--device cuda:99", "CUDA devices here"),
        ("--resume missing.pt", "there is no checkpoint 'missing.pt'"),
        ("--evaluate missing.pt", "there is no checkpoint 'missing.pt'"),
        ("--resume auto --evaluate missing.pt", "give one of them"),
        (
            "--lr-schedule cosine",
            "unrecognized arguments: --lr-schedule cosine (did you mean --lr-scheduler? see --help)",
        ),
        ("--learning-rate 1", "unrecognized arguments"),
        ("--xyzzy 1", "unrecognized arguments: --xyzzy 1 (see --help)"),
        ("--epochs", "expected one argument"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(train, tmp_path, flags, words):
    bad = train(f"--dataset digits --epochs 1 {flags}", short=False)
    assert bad.code == 2
    assert bad.out == ""
    assert bad.err.startswith("error: ")
    assert bad.err.count("\n") == 1
    assert words in bad.err
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_directory_is_refused(train, tmp_path):
    (tmp_path / "file").write_text("")
    bad = train("--epochs 1", "file/run")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "cannot write to" in bad.err
    for place in ("/proc/run", "x" * 300):
        bad = train(f"--epochs 1 --output-dir {place}", None)
        assert (bad.code, bad.err.count("\n")) == (2, 1)


def test_a_directory_with_a_run_is_not_overwritten(train):
    run = train("--epochs 1")
    before = {path: path.read_bytes() for path in run.directory.iterdir()}
    again = train("--epochs 1")
    assert again.code == 2
    assert "holds a finished run: go on with it by --resume auto" in again.err
    (run.directory / "result.json").unlink()
    assert "holds a started run" in train("--epochs 1").err
    before.pop(run.directory / "result.json")
    assert {path: path.read_bytes() for path in run.directory.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 3", "--epochs was 2 and is 3 (--epochs may grow with --lr-scheduler constant and masks that stay)"),
        ("--lr 0.2 --wd 0.1", "--lr was 0.1 and is 0.2, --weight-decay was 0.0005 and is 0.1"),
        ("--optmzr sgd-sam", "--optmzr was sgd and is sgd-sam"),
        ("--depth 14", "--depth was 8 and is 14"),
        ("--seed 1", "--seed was 0 and is 1"),
        ("--prune-method random --sparsity 0.5", "--prune-method was none and is random"),
        ("--output-dir elsewhere", "leave --output-dir out"),
    ],
)
def test_a_resumed_run_cannot_change_its_mathematics(train, flags, words):
    run = train("--epochs 2")
    (run.directory / "result.json").unlink()
    before = {path: path.read_bytes() for path in run.directory.iterdir()}
    bad = train(f"--resume {run.directory}/checkpoint.pt {flags}", None, short=False)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert words in bad.err
    assert {path: path.read_bytes() for path in run.directory.iterdir()} == before


def test_what_does_not_touch_the_mathematics_may_change_on_resume(train):
    run = train("--epochs 2")
    (run.directory / "result.json").unlink()
    flags = "--test-batch-size 7 --log-interval 1 --device cpu --remark again"
    good = train(f"--resume {run.directory}/checkpoint.pt {flags}", None, short=False)
    assert good.code == 0, good.err
    assert run.json("result.json")["args"]["test_batch_size"] == 7


def test_foreign_checkpoints_are_refused(train, tmp_path):
    run = train("--epochs 1")
    path = run.directory / "checkpoint.pt"
    for flags, words in (
        ("--depth 14", "its --depth is 8, not 14"),
        ("--width 2", "its --width is 0.5, not 2.0"),
        ("--epochs 3", "--epochs has no effect with --evaluate"),
        ("--image-size 9", "--image-size has no effect with --dataset digits"),
        ("--data-dir nowhere", "--data-dir has no effect with --dataset digits"),
    ):
        bad = train(f"--evaluate {path} {flags}", None, short=False)
        assert (bad.code, bad.err.count("\n"), bad.out) == (2, 1, "")
        assert words in bad.err
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"data": saved["data"] | {"classes": ["a", "b"]}}, tmp_path / "classes.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    (tmp_path / "truncated.pt").write_bytes(path.read_bytes()[:-1000])
    torch.save({key: saved[key] for key in ("format", "args", "data")}, tmp_path / "stateless.pt")
    torch.save(saved | {"args": saved["args"] | {"depth": 14}}, tmp_path / "other.pt")
    for name, words in (
        ("classes", "does not fit"),
        ("foreign", "not a checkpoint"),
        ("truncated", "truncated"),
        ("stateless", "not a checkpoint"),
        ("other", "does not fit the network"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.pt").rename(tmp_path / name / "checkpoint.pt")
        for flag in ("--evaluate", "--resume"):
            bad = train(f"{flag} {tmp_path}/{name}/checkpoint.pt", None, short=False)
            assert (bad.code, bad.err.count("\n"), bad.out) == (2, 1, "")
            assert words in bad.err
    path.rename(run.directory / "mine.pt")
    assert "checkpoint.pt, previous.pt or best.pt" in train(f"--resume {run.directory}/mine.pt", None, short=False).err
    assert "no checkpoint.pt to go on from" in train("--epochs 1 --resume auto").err
    (run.directory / "mine.pt").rename(path)
    (run.directory / "result.json").unlink()
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated" in train("--epochs 1 --resume auto").err


def test_help_has_groups(capsys):
    from main_prune_train import main

    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for group in ("network:", "data:", "optimizer:", "sharpness-aware", "sparsity:", "run:"):
        assert group in text


def test_help_does_not_wait_for_what_only_a_run_needs():
    """Seconds of imports, before whoever has mistyped a flag learns of it."""
    script = "import sys, main_prune_train; print(*sys.modules.keys() & {'torchvision', 'torch._dynamo'})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("compiler", "code", "words"),
    [
        ("no-such-compiler", 2, "--compile on needs a C++ compiler ('no-such-compiler' is not there)"),
        ("/bin/false", 1, "the network could not be compiled"),
    ],
    ids=["none", "broken"],
)
def test_a_compiler_that_is_not_there_or_broken_is_one_sentence(tmp_path, compiler, code, words):
    environment = os.environ | {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [
        sys.executable,
        ROOT / "main_prune_train.py",
        *"--dataset digits --depth 8 --epochs 1 --width 0.25".split(),
    ]
    done = subprocess.run(
        [*command, "--compile", "on", "--output-dir", tmp_path / "run"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
