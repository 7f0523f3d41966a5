"""The time that a sweep is said to take."""

import re

import pytest

from benchmarks import estimate

TINY = "python main_prune_train.py --dataset cifar10 --depth 8 --width 0.25 --epochs 10"


def run(lines, *flags):
    return estimate.main(["--device", "cpu", "--seconds", "2", *flags], lines)


@pytest.mark.parametrize(("flags", "at_a_time"), [("", 1), ("--jobs 2 --gpus 1", 2)])
def test_it_is_the_epochs_of_all_runs_times_the_measured_step(capsys, flags, at_a_time):
    ticket = f"{TINY} --prune-method lth --sparsity 0.9 --lth-rounds 2 --optmzr sgd"
    lines = [f"{TINY} --optmzr sgd --seed {seed}" for seed in (0, 1)] + [ticket, f"{TINY} --optmzr sgd-sam", "4 runs"]
    assert run(lines, *flags.split()) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"resnet-8, width 0.25, (\S+) +([\d.]+) ms a step \(median of \d+\), (\d+) epochs", out)
    assert [(name, int(count)) for name, _, count in rows] == [("sgd", 20 + 3 * 10), ("sgd-sam", 10)]
    seconds = sum(1e-3 * float(step) * int(count) * 50_000 / 128 for _, step, count in rows)
    (hours,) = re.findall(r"about ([\d.,]+) hours", out)
    assert float(hours.replace(",", "")) == pytest.approx(seconds / 3600 / at_a_time, abs=0.06)


def test_steps_that_two_step_sam_leaves_alone_are_those_of_its_base_optimizer():
    late, few = "--optmzr sgd-sam --sam-from 0.75", "--optmzr sgd-sam --sam-every 4"
    one_step = "--optmzr sgd-sam --sam-v2 --sam-direction ema --sam-until 0.5"
    network = ("resnet", 8, 0.25)
    epochs = estimate.count_epochs(f"{TINY} {flags}" for flags in (late, few, one_step))
    assert epochs == {(network, "sgd-sam", False): 5, (network, "sgd", False): 15, (network, "sgd-sam", True): 10}


def test_an_epoch_of_fewer_training_images_counts_as_their_share():
    epochs = estimate.count_epochs(f"{TINY} {flags}" for flags in ("--train-images 500", "--val-split 5000", ""))
    assert epochs == {(("resnet", 8, 0.25), "sgd", False): pytest.approx(10 * (0.01 + 0.9 + 1))}


def test_it_says_what_it_measures_and_keeps_to_the_time_it_is_given(capsys):
    assert run([TINY], "--seconds", "0.001") == 0
    out = capsys.readouterr().out
    assert out.startswith("measuring training steps on cpu")
    assert "(median of 1)" in out  # the first step, without which there would be no figure


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["5 runs"],
        [f"{TINY} --no-such-flag"],
        [f"{TINY} --adaptive"],
        [TINY.replace("8", "9")],
        [f"{TINY} --batch-size 64"],
        [f"{TINY} --optmzr sgd-safe --prune-method final --sparsity 0.9"],
        [TINY.replace("cifar10", "digits")],
        [f"{TINY} --stem imagenet"],
    ],
)
def test_commands_that_cannot_be_estimated_end_in_a_sentence(lines, capsys):
    assert run(lines) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", ["--gpus 0", "--jobs x", "--seconds 0", "--device gpu"])
def test_bad_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(run([TINY], *flags.split()))
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
