"""Flags: which values they take, what refuses others, and the help."""

import subprocess
import sys

import pytest
from running import ROOT

from experiment.flags import parse
from main_prune_train import main


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--depth twenty", "argument --depth"),
        ("--width 0", "argument --width: has to be a number above 0 and at most 100, not '0'"),
        ("--arch alexnet", "argument --arch: invalid choice"),
        (
            "--sparsity 1 --prune-method random",
            "argument --sparsity: has to be a number at least 0 and below 1, not '1'",
        ),
        ("--sparsity -0.1 --prune-method random", "argument --sparsity"),
        ("--sparsity nan --prune-method random", "argument --sparsity"),
        ("--dataset imagenet", "argument --dataset: invalid choice"),
        ("--val-split -1", "argument --val-split"),
        ("--optmzr sgd-sam --sam-rho one", "argument --sam-rho: has to be a number, not 'one'"),
        ("--optmzr sgd-sam --sam-rho 1e30", "argument --sam-rho: has to be a number below 2^63, not '1e30'"),
        ("--optmzr sgd-sam --sam-from 1", "argument --sam-from: has to be a number at least 0 and below 1, not '1'"),
        ("--optmzr sgd-sam --sam-until 0", "argument --sam-until: has to be a number above 0 and at most 1, not '0'"),
        ("--optmzr sgd-sam --sam-every 0", "argument --sam-every"),
        ("--optmzr sgd-sam --sam-v2 --sam-direction prev", "did you mean --sam-direction previous?"),
        ("--optmzr sgd-sam --rho-schedule cosine", "argument --rho-schedule: invalid choice"),
        ("--eval-every 0", "argument --eval-every: has to be a whole number above 0, not '0'"),
        ("--optmzr sgd-sam --sam-rho inf", "argument --sam-rho"),
        ("--lr 0", "argument --lr"),
        (f"--epochs 1{'0' * 400}", "argument --epochs"),
        ("--seed 99999999999999999999999", "argument --seed"),
        ("--width 1000000", "argument --width"),
        ("--epochs 0", "argument --epochs: has to be a whole number above 0, not '0'"),
        ("--epochs 1.5", "argument --epochs: has to be a whole number"),
        (
            "--update-interval 0 --prune-method set --sparsity 0.9",
            "has to be a whole number of steps above 0, or epochs",
        ),
        ("--checkpoint-every 0", "--checkpoint-every takes epochs"),
        ("--nonfinite ignore", "argument --nonfinite"),
        ("--device tpu", "--device has to be auto, cpu, cuda or cuda:N, not 'tpu'"),
        ("--device cpu:0", "--device has to be auto, cpu, cuda or cuda:N, not 'cpu:0'"),
        ("--device cuda:99", "CUDA devices here"),
        (
            "--lr-schedule cosine",
            "unrecognized arguments: --lr-schedule cosine (did you mean --lr-scheduler? see --help)",
        ),
        ("--learning-rate 1", "unrecognized arguments"),
        ("--xyzzy 1", "unrecognized arguments: --xyzzy 1 (see --help)"),
        ("--epochs", "expected one argument"),
    ],
)
def test_values_that_a_flag_cannot_have_are_refused_and_nothing_is_written(train, tmp_path, flags, words):
    bad = train(f"--dataset digits --epochs 1 {flags}", short=False)
    assert bad.code == 2
    assert bad.out == ""
    assert bad.err.startswith("error: ")
    assert bad.err.count("\n") == 1
    assert words in bad.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["-3", "-0.5", "-.5", "-1e-3", "1e-3"])
def test_a_radius_has_a_sign(text):
    assert parse(["--optmzr", "sgd-sam", "--sam-rho", text])[0].sam_rho == float(text)


def test_help_shows_flags_in_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for group in ("network:", "data:", "optimizer:", "sharpness-aware", "sparsity:", "run:"):
        assert group in text


def test_help_imports_nothing_that_only_a_run_needs():
    """Seconds of imports, before whoever has mistyped a flag learns of it."""
    script = "import sys, main_prune_train; print(*sys.modules.keys() & {'torchvision', 'torch._dynamo'})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
