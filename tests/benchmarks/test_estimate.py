"""The time that a dry run is said to take."""

import io
import re

import pytest

from benchmarks import estimate

PLAIN = "python main_prune_train.py --dataset digits --depth 8 --width 0.25 --epochs 10"


def run(lines, monkeypatch, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    return estimate.main(["--device", "cpu", *flags])


def test_it_is_the_epochs_of_all_runs_times_the_measured_step(monkeypatch, capsys):
    ticket = f"{PLAIN} --prune-method lth --sparsity 0.9 --lth-rounds 2 --optmzr sgd"
    lines = [f"{PLAIN} --optmzr sgd --seed {seed}" for seed in (0, 1)] + [ticket, f"{PLAIN} --optmzr sgd-sam", "4 runs"]
    assert run(lines, monkeypatch) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"resnet-8, width 0.25, (\S+) +([\d.]+) ms, (\d+) epochs", out)
    assert [(name, int(count)) for name, _, count in rows] == [("sgd", 20 + 3 * 10), ("sgd-sam", 10)]
    seconds = sum(1e-3 * float(step) * int(count) * 50_000 / 128 for _, step, count in rows)
    (hours,) = re.findall(r"about ([\d,]+) hours", out)
    assert float(hours.replace(",", "")) == pytest.approx(seconds / 3600, abs=1)


@pytest.mark.parametrize(
    ("lines", "flags"),
    [
        ([], ""),
        (["5 runs"], ""),
        ([f"{PLAIN} --no-such-flag"], ""),
        ([f"{PLAIN} --adaptive"], ""),
        ([PLAIN.replace("8", "9")], ""),
        ([f"{PLAIN} --batch-size 64"], ""),
        ([PLAIN], "--gpus 0"),
    ],
)
def test_bad_input_ends_in_a_sentence(lines, flags, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(lines, monkeypatch, *flags.split())
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
