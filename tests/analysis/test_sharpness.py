"""Sharpness of runs of main_prune_train.py, by the command and by the flag --sharpness."""

import json
import shutil
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from analysis.sharpness import Measured, main, over_seeds
from main_prune_train import main as train
from utils.errors import TrainingError

# Batch norm and few operations: what takes the time of a product with the Hessian is how many there are.
SMALL = """
from torch import nn


def build(num_classes, in_channels, image_size):
    body = nn.Sequential(nn.Conv2d(in_channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    return body.append(nn.Linear(72, num_classes))
"""
QUICK = "--images 100 --top 1 --trace-samples 2 --rhos 0.1 --adaptive-rhos --steps 2"


def result_of(directory):
    return json.loads((directory / "result.json").read_text())


@pytest.fixture(scope="module")
def looked_at(trained_runs, tmp_path_factory):
    """Two runs of other seeds, the first of which is measured at its end, and by a later command too; and its --arch."""
    root = tmp_path_factory.mktemp("looked-at")
    (root / "small.py").write_text(SMALL)
    arch = f"--arch {root / 'small.py'}:build"
    flags = trained_runs.flags.replace("--depth 8 --width 0.0625", arch)
    assert "--depth" not in flags
    for seed in (0, 1):
        assert train(f"{flags} --seed {seed} --output-dir {root / 'runs' / f'seed{seed}'}".split()) == 0
    at_once, later = root / "at-once", root / "later"
    assert train(f"{flags} --seed 0 --sharpness --output-dir {at_once}".split()) == 0
    shutil.copytree(root / "runs" / "seed0", later)
    resume = f"{flags} --seed 0 --output-dir {later} --resume auto"
    assert train(f"{resume} --sharpness".split()) == 0
    return SimpleNamespace(runs=root / "runs", at_once=at_once, later=later, resume=resume, arch=arch)


def test_the_flag_measures_the_same_at_a_runs_end_and_later(looked_at, capsys):
    at_once, later, resume = looked_at.at_once, looked_at.later, looked_at.resume
    plain = result_of(looked_at.runs / "seed0")
    first, second = result_of(at_once), result_of(later)
    assert "sharpness" not in plain
    assert first["sharpness"] == second["sharpness"]
    assert first["test_top1"] == second["test_top1"] == plain["test_top1"]
    assert train(f"{resume} --sharpness".split()) == 0
    assert "finished already" in capsys.readouterr().out
    assert train(f"{resume} --recalibrate-bn".split()) == 0  # adds its figures and keeps the others
    assert result_of(later)["sharpness"] == second["sharpness"]
    assert "test_top1_recalibrated_bn" in result_of(later)
    assert train(f"{resume} --recalibrate-bn --sharpness".split()) == 0  # sharpness so far was of other statistics
    assert result_of(later)["sharpness"]["recalibrated_bn"]
    assert result_of(later)["sharpness"] != second["sharpness"]


def test_a_measurement_that_fails_keeps_the_result_of_the_training(looked_at, monkeypatch, tmp_path, capsys):
    def fail(*args, **kwargs):
        raise TrainingError("out of memory")

    shutil.copytree(looked_at.runs / "seed1", tmp_path / "run")
    before = result_of(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.setattr("analysis.hessian.measure", fail)
    flags = looked_at.resume.replace("--seed 0", "--seed 1").replace(str(looked_at.later), str(tmp_path / "run"))
    assert train(f"{flags} --sharpness".split()) == 1
    assert "out of memory" in capsys.readouterr().err
    after = result_of(tmp_path / "run")
    assert after.pop("error") == "out of memory"
    assert {n: v for n, v in after.items() if n != "args"} == {n: v for n, v in before.items() if n != "args"}
    assert train(f"{flags} --sharpness --recalibrate-bn".split()) == 1  # what was measured before the failure stays
    assert "test_top1_recalibrated_bn" in result_of(tmp_path / "run")
    assert train(f"{flags} --sharpness".split()) == 1  # and so does what an earlier command measured
    assert "test_top1_recalibrated_bn" in result_of(tmp_path / "run")
    assert train(flags.split()) == 0  # nothing is asked for that is not there
    assert "error" not in result_of(tmp_path / "run")


def test_what_is_measured_is_not_measured_again_because_another_measurement_failed(looked_at, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise TrainingError("out of memory")

    shutil.copytree(looked_at.runs / "seed1", tmp_path / "run")
    flags = looked_at.resume.replace("--seed 0", "--seed 1").replace(str(looked_at.later), str(tmp_path / "run"))
    monkeypatch.setattr("analysis.corrupted.measure", fail)
    assert train(f"{flags} --sharpness --robustness".split()) == 1
    measured = result_of(tmp_path / "run")["sharpness"]
    monkeypatch.setattr("analysis.hessian.measure", fail)
    monkeypatch.setattr("analysis.corrupted.measure", lambda *args, **kwargs: ([{"mean": 0.5}], None))
    monkeypatch.setattr("analysis.corrupted.scalars", lambda found: {})
    assert train(f"{flags} --sharpness --robustness".split()) == 0
    assert result_of(tmp_path / "run")["sharpness"] == measured


def test_the_flags_figures_hold_what_mathematics_demands(looked_at):
    figures = result_of(looked_at.at_once)["sharpness"]
    assert (figures["train"]["images"], figures["test"]["images"]) == (30, 15)  # all there are
    for split in ("train", "test"):
        living, everything = figures[split]["living"], figures[split]["all"]
        assert living["weights"] < everything["weights"]
        # The Hessian over living weights is a part of the whole: its largest eigenvalue cannot be larger (Cauchy).
        assert 0 < living["eigenvalues"][0]["value"] <= everything["eigenvalues"][0]["value"] * 1.001
        for space in (living, everything):
            assert len(space["eigenvalues"]) == 5
            assert all(value["residual"] < 0.01 for value in space["eigenvalues"])
            assert all(rise["one_step"] <= rise["lower_bound"] for rise in space["sam"])
    events = EventAccumulator(str(looked_at.at_once)).Reload()
    (scalar,) = events.Scalars("sharpness/train/living/eigenvalue_1")
    assert scalar.value == pytest.approx(figures["train"]["living"]["eigenvalues"][0]["value"], rel=1e-6)
    assert events.Scalars("sharpness/test/all/sam_adaptive_rho0.5_lower_bound")


def test_the_command_measures_as_the_flag_and_averages_seeds(looked_at, tmp_path, capsys):
    runs = shutil.copytree(looked_at.runs, tmp_path / "runs")
    before = (runs / "seed0" / "checkpoint.pt").read_bytes()
    assert main([str(runs), *f"--splits train --spaces living {looked_at.arch}".split()]) == 0
    assert (runs / "seed0" / "checkpoint.pt").read_bytes() == before
    first, second = json.loads((runs / "seed0" / "sharpness.json").read_text())  # beside the first checkpoint
    kept = result_of(looked_at.at_once)["sharpness"]["train"]
    assert first["train"] == {name: figure for name, figure in kept.items() if name != "all"}
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith(f"seed 0, epoch 1: {runs / 'seed0' / 'checkpoint.pt'}")
    table = out[2:-1]
    assert max(map(len, table)) <= 100
    residuals = [e["residual"] for f in (first, second) for e in f["train"]["living"]["eigenvalues"]]
    assert table[2] == f"largest residual of an eigenvalue: {max(residuals):.1e}"
    one, two = (figures["train"]["loss"] for figures in (first, second))
    (means,) = [line.split() for line in table if line.startswith("1, 2") and "±" in line][:1]
    assert float(means[2]) == pytest.approx((one + two) / 2, rel=0.01)
    assert float(means[4]) == pytest.approx(abs(one - two) / 2**0.5, rel=0.1)


def test_a_mean_over_seeds_has_each_seed_once_and_runs_of_one_study():
    runs = [Measured(1, 0, "a", {}), Measured(2, 1, "a", {}), Measured(3, 2, "other settings", {})]
    assert over_seeds(runs) == [runs[:2]]
    assert over_seeds([*runs, Measured(4, 0, "a", {})]) == []


def test_other_images_than_the_runs_are_refused_and_moved_ones_are_found(trained_runs, image_folder, tmp_path, capsys):
    checkpoint, output = trained_runs.checkpoint(0), tmp_path / "sharpness.json"
    command = [str(checkpoint), *QUICK.split(), "--output", str(output), "--data-dir"]
    assert main([*command, str(image_folder(tmp_path / "others", seed=1))]) == 2
    assert "not those that" in capsys.readouterr().err
    moved = shutil.copytree(trained_runs.images, tmp_path / "moved")
    assert main([*command, str(moved), "--recalibrate-bn"]) == 0
    (results,) = json.loads(output.read_text())
    assert results["recalibrated_bn"]
    assert results["train"]["images"] == 30
    assert main([str(tmp_path / "missing.pt"), "--output", str(output)]) == 2
    assert json.loads(output.read_text()) == [results]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("missing.pt", "there is no checkpoint 'missing.pt'"),
        ("empty", "no checkpoint.pt in or below 'empty'"),
        ("missing.pt --trace-samples 1", "one sample has no standard error"),
        ("missing.pt --top 0 --tolerance 0.1", "--tolerance is that of eigenvalues, and --top 0 asks for none"),
        ("missing.pt --rhos --adaptive-rhos --steps 3", "--steps are those within a radius, and there is none"),
        ("missing.pt --device tpu", "--device has to be"),
        ("CKPT --output /proc/x/y", "cannot write to"),
        ("CKPT --output CKPT", "does not end in .json, as what is written there should: name another by --output"),
        ("CKPT --output /proc", "cannot write to '/proc', which is a directory"),
    ],
)
def test_bad_input_is_one_sentence(flags, words, trained_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(flags.replace("CKPT", str(trained_runs.checkpoint(0))).split()) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("flags", ["--images 1", "--rhos -1"])
def test_a_number_out_of_bounds_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["missing.pt", *flags.split()])
    assert ended.value.code == 2
    assert f"argument {flags.split()[0]}" in capsys.readouterr().err
