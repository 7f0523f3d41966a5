"""Pairs of runs in fp32 and bf16, and how they are launched."""

import json
import re
import signal
import statistics
import sys

import pytest

import main_prune_train
from benchmarks.bf16_accuracy import main, run_passing_signals


def test_pairs_of_runs_differ_in_precision_alone_and_finished_ones_are_kept(tmp_path, capsys):
    flags = f"--seeds 3 4 --device cpu --output-dir {tmp_path} --dataset digits --depth 8 --width 0.25 --epochs 2"
    assert main(flags.split(), run=main_prune_train.main) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    results = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("*/result.json")}
    assert results.keys() == {"fp32-seed3", "bf16-seed3", "fp32-seed4", "bf16-seed4"}
    fp32, bf16 = results["fp32-seed3"], results["bf16-seed3"]
    assert {name for name in fp32["args"] if fp32["args"][name] != bf16["args"][name]} == {"precision", "output_dir"}
    assert fp32["test_loss"] != bf16["test_loss"]
    differences = [results[f"bf16-seed{s}"]["test_top1"] - results[f"fp32-seed{s}"]["test_top1"] for s in (3, 4)]
    assert float(re.search(r"fp32: ([+-][\d.]+) points", last)[1]) == pytest.approx(
        statistics.mean(differences), abs=0.006
    )
    assert main(flags.split(), run=main_prune_train.main) == 0
    assert capsys.readouterr().out.count("finished already") == 4


def test_a_training_that_fails_ends_the_command_with_its_code(tmp_path, capfd):
    assert main(["--depth", "21", "--device", "cpu", "--output-dir", str(tmp_path / "none")]) == 2
    assert "depth 6n+2" in capfd.readouterr().err


@pytest.mark.parametrize("flags", ["--seed 7", "--precision fp16", "--resume auto", "--seeed 7"])
def test_flags_that_the_command_sets_and_ones_that_do_not_exist_are_refused(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*flags.split(), "--device", "cpu", "--output-dir", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_signal_reaches_the_training_and_its_exit_code_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    training = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    assert run_passing_signals([sys.executable, "-c", training]) == 75
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("flags", "words"), [("--seeds 1", "--seeds has to name two or more"), ("--device tpu", "--device has to be")]
)
def test_bad_input_is_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(flags.split())
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
