"""Robustness of runs of main_prune_train.py, by the command and by the flag --robustness."""

import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from analysis.corrupted import BINS, CorruptedImages, Network, Scores, Settings, measure, relative_corruption_errors
from analysis.robustness import main
from imagedata.corruptions import CORRUPTIONS, corrupt
from imagedata.images import Images
from imagedata.sources import load_dataset
from main_prune_train import main as train
from utils.errors import UsageError

QUICK = "--corruptions contrast shot_noise --severities 5 1 --workers 0"
NEEDS_PACKAGE = pytest.mark.skipif(
    importlib.util.find_spec("imagecorruptions") is None, reason="imagecorruptions is not installed"
)


def random_logits(images=500, classes=7):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(images, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (images,), generator=generator)


def figures_of(logits, labels, parts=(100, 1, 399)):
    scores = Scores(torch.device("cpu"))
    for part in zip(logits.split(parts), labels.split(parts), strict=True):
        scores.add(*part)
    return scores.figures()


def test_error_loss_and_calibration_are_those_of_their_formulas():
    logits, labels = random_logits()
    chances = (logits.exp() / logits.exp().sum(1, keepdim=True)).numpy()
    confidence, right = chances.max(1), chances.argmax(1) == labels.numpy()
    distance = 0.0
    for place in range(BINS):
        held = (confidence > place / BINS) & (confidence <= (place + 1) / BINS)
        if held.any():
            distance += held.mean() * abs(right[held].mean() - confidence[held].mean())
    figures = figures_of(logits, labels)
    assert figures["error"] == pytest.approx(100 * (1 - right.mean()), rel=1e-12)
    assert figures["loss"] == pytest.approx(-np.log(chances[np.arange(500), labels]).mean(), rel=1e-12)
    assert figures["ece"] == pytest.approx(100 * distance, rel=1e-9)


def test_calibration_is_that_of_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = random_logits()
    theirs = classification.multiclass_calibration_error(logits, labels, num_classes=7, n_bins=BINS, norm="l1")
    assert figures_of(logits, labels)["ece"] == pytest.approx(100 * float(theirs), rel=1e-5)


def test_a_network_that_is_sure_and_right_has_no_calibration_error_and_nan_has_no_figures():
    logits, labels = 1000 * torch.eye(500), torch.arange(500)
    assert figures_of(logits, labels) == {"error": 0, "loss": 0, "ece": 0}
    figures = figures_of(logits.new_full((500, 500), torch.nan), labels)
    assert figures["loss"] is figures["ece"] is None


class Brightest(torch.nn.Module):
    """Takes an image of one channel for class 1 where its mean is above a level."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, pixels):
        bright = pixels.mean((1, 2, 3)) - self.level
        return torch.stack([-bright, bright], 1)


def test_workers_corrupt_as_this_process_and_a_part_is_the_same_as_among_all():
    pixels = torch.randint(256, (23, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    test = Images(pixels, torch.arange(23) % 2)
    corruptions, networks = (
        ("impulse_noise", "fog"),
        [Network(Brightest(128.0), lambda x: x.permute(0, 3, 1, 2).float())],
    )

    def measured(**settings):
        images = CorruptedImages(test, Settings(None, corruptions, (2, 4), batch_size=5, **settings))
        return measure(networks, images, torch.device("cpu"))[0]

    assert measured(workers=2) == measured(workers=0)
    part = CorruptedImages(test, Settings(9, corruptions, (2, 4), batch_size=4, workers=0))
    for batch in part.batches():
        if batch.shift == ("fog", 4):
            places = [int((test.pixels == image).flatten(1).all(1).nonzero()) for image in test.pixels[part.numbers]]
            assert places == part.numbers.tolist()
    fog = torch.cat([batch.pixels for batch in part.batches() if batch.shift == ("fog", 4)])
    assert torch.equal(fog, corrupt("fog", 4, pixels, range(23))[part.numbers])


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_stay_in_files_are_corrupted_and_a_broken_one_is_named(workers, image_folder, tmp_path):
    test = load_dataset("imagefolder", image_folder(tmp_path, seed=0), 8).test
    images = CorruptedImages(test, Settings(None, ("contrast",), (5,), batch_size=4, workers=workers))
    pixels = torch.cat([batch.pixels for batch in images.batches()])
    assert torch.equal(pixels, torch.cat([test.load(), corrupt("contrast", 5, test.load(), range(15))]))
    (tmp_path / "test" / "2" / "4.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"2/4\.png"):
        list(images.batches())


def test_relative_corruption_error_is_the_papers_and_missing_where_the_baseline_makes_none():
    def results(**errors):
        return {"corrupted": {name: {"1": {"error": a}, "2": {"error": b}} for name, (a, b) in errors.items()}}

    # CE of f is the sum over severities of E(f), divided by the sum of the baseline's (Hendrycks and Dietterich, section 4).
    own, baseline = results(fog=(10, 50), snow=(20, 40)), results(fog=(30, 50), snow=(0, 0))
    assert relative_corruption_errors(own, baseline) == {"fog": pytest.approx(100 * 60 / 80), "snow": None}


@pytest.fixture
def runs(trained_runs, tmp_path):
    return shutil.copytree(trained_runs.root, tmp_path / "runs")


def test_the_command_measures_all_networks_on_the_same_images_and_pairs_seeds(runs, trained_runs, capsys):
    before = (runs / "seed0" / "checkpoint.pt").read_bytes()
    assert main([str(runs), *QUICK.split(), "--baseline", str(runs / "seed0")]) == 0
    assert (runs / "seed0" / "checkpoint.pt").read_bytes() == before
    first, second = json.loads((runs / "seed0" / "robustness.json").read_text())
    for name in ("robustness.png", "robustness.pdf"):
        assert (runs / "seed0" / name).stat().st_size > 1000
    result = json.loads((trained_runs.checkpoint(0).parent / "result.json").read_text())
    assert first["images"] == 15
    assert first["clean"]["error"] == pytest.approx(100 - result["test_top1"])
    assert first["clean"]["loss"] == pytest.approx(result["test_loss"], rel=1e-5)
    assert list(first["corrupted"]) == ["contrast", "shot_noise"]
    assert list(first["corrupted"]["contrast"]) == ["1", "5"]
    errors = [severity["error"] for name in first["corrupted"].values() for severity in name.values()]
    assert first["mean"]["error"] == pytest.approx(sum(errors) / 4)
    assert first["baseline"]["mce"] == 100
    ratios = second["baseline"]["ce"]
    for name, errors in second["corrupted"].items():
        other = first["corrupted"][name]
        assert ratios[name] == pytest.approx(
            100 * sum(e["error"] for e in errors.values()) / sum(e["error"] for e in other.values())
        )
    out = capsys.readouterr().out
    assert out.splitlines()[1].endswith(f"seed 1, epoch 1: {runs / 'seed1' / 'checkpoint.pt'}")
    _, table = out.split("difference to the baseline, 95% interval over seeds, without the spread of the one baseline")
    shown = re.search(r"  ([+-]\S+)", table)[1]  # of seed 1 alone: the baseline is not compared with itself
    assert float(shown) == pytest.approx(second["clean"]["error"] - first["clean"]["error"], rel=1e-3)
    assert re.search(r"^contrast +\S+ ± \S+ +[\d,]+$", out, re.MULTILINE)
    assert max(map(len, out.splitlines()[3:-3])) <= 100
    # Alone, and in other batches, a network gets the same figures.
    alone = [str(runs / "seed1"), *QUICK.split(), "--batch-size", "4"]
    assert main(alone) == 0
    (again,) = json.loads((runs / "seed1" / "robustness.json").read_text())
    for name, errors in second["corrupted"].items():
        assert [e["error"] for e in again["corrupted"][name].values()] == [e["error"] for e in errors.values()]


def test_seeds_that_hold_out_images_of_their_own_are_averaged(trained_runs, tmp_path, capsys):
    for seed in (0, 1):
        directory = tmp_path / f"seed{seed}"
        assert train(f"{trained_runs.flags} --val-split 3 --seed {seed} --output-dir {directory}".split()) == 0
    capsys.readouterr()
    assert main([str(tmp_path), *QUICK.split(), "--output", str(tmp_path / "rho0.05")]) == 0
    assert re.search(r"^contrast +\S+ ± ", capsys.readouterr().out, re.MULTILINE)
    assert {path.name for path in tmp_path.glob("rho*")} == {"rho0.05", "rho0.05.png", "rho0.05.pdf"}


@pytest.fixture(scope="session")
def official(trained_runs, tmp_path_factory):
    """Files such as those of CIFAR-10-C, of the test images of the trained runs."""
    directory = tmp_path_factory.mktemp("official")
    test = load_dataset("folder", trained_runs.images).test
    images = np.concatenate([corrupt("contrast", severity, test.pixels, range(15)) for severity in range(1, 6)])
    np.save(directory / "contrast.npy", images)
    np.save(directory / "labels.npy", np.tile(test.labels.numpy(), 5).astype(np.uint8))
    return directory


def test_official_files_are_read_instead_of_corrupting(runs, official, capsys):
    checkpoint, results = str(runs / "seed0"), {}
    for source, flags in {"official": ["--official", str(official)], "generated": []}.items():
        output = runs / f"{source}.json"
        assert main([checkpoint, *"--corruptions contrast --images 11".split(), *flags, "--output", str(output)]) == 0
        ((results[source],)) = json.loads(output.read_text())
        assert results[source]["source"] == source
        assert f"11 test images, {source} corruptions" in capsys.readouterr().out
    assert results["official"]["corrupted"] == results["generated"]["corrupted"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "contrast.npy").unlink(), "cannot read"),
        (lambda root: (root / "labels.npy").write_bytes(b"no array"), "not an array of numpy"),
        (lambda root: np.save(root / "contrast.npy", np.zeros((5, 8, 8, 3), np.uint8)), "is not of the test images"),
        (lambda root: np.save(root / "labels.npy", np.zeros(75, np.uint8)), "does not have the labels"),
    ],
)
def test_official_files_that_do_not_fit_are_refused(change, words, runs, official, tmp_path, capsys):
    root = shutil.copytree(official, tmp_path / "official")
    change(root)
    assert main([str(runs / "seed0"), "--corruptions", "contrast", "--official", str(root)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (runs / "seed0" / "robustness.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("missing.pt", "there is no checkpoint 'missing.pt'"),
        ("RUNS --output robustness.png", "the picture would replace it"),
        ("RUNS --output /proc/x/y.json", "cannot write to"),
        (
            "RUNS --output copy/checkpoint.pt",
            "does not end in .json, as what is written there should: name another by --output",
        ),
        ("RUNS --output .", "cannot write to '.', which is a directory"),
        ("RUNS/seed0 --baseline missing.pt", "there is no checkpoint 'missing.pt'"),
        ("RUNS --baseline RUNS copy", "two of --baseline have the same seed"),
        ("RUNS --data-dir other", "the images are not those"),
    ],
)
def test_bad_input_is_one_sentence(flags, words, runs, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "seed0", tmp_path / "copy")
    image_folder(tmp_path / "other", seed=1)
    before = sorted(tmp_path.rglob("*"))
    assert main([*flags.replace("RUNS", str(runs)).split(), *QUICK.split()]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert [path for path in sorted(tmp_path.rglob("*")) if ".decoded" not in path.parts] == [
        path for path in before if ".decoded" not in path.parts
    ]


def test_a_seed_without_a_baseline_is_refused(runs, trained_runs, capsys):
    third = trained_runs.flags + f" --seed 2 --output-dir {runs / 'seed2'}"
    assert train(third.split()) == 0
    capsys.readouterr()
    assert main([str(runs / "seed2"), "--baseline", str(runs / "seed0"), str(runs / "seed1"), *QUICK.split()]) == 2
    assert "no --baseline has seed 2" in capsys.readouterr().err


@NEEDS_PACKAGE
def test_the_flag_measures_at_a_runs_end_what_the_command_measures_later(runs, trained_runs, tmp_path, capsys):
    at_once, later = tmp_path / "at-once", runs / "seed0"
    assert train(f"{trained_runs.flags} --seed 0 --robustness --output-dir {at_once}".split()) == 0
    resumed = f"{trained_runs.flags} --seed 0 --robustness --output-dir {later} --resume auto"
    assert train(resumed.split()) == 0
    results = [json.loads((directory / "result.json").read_text()) for directory in (at_once, later)]
    assert results[0]["robustness"] == results[1]["robustness"]
    capsys.readouterr()
    assert train(resumed.split()) == 0
    assert "finished already" in capsys.readouterr().out
    assert main([str(later)]) == 0
    (measured,) = json.loads((later / "robustness.json").read_text())
    assert {name: measured[name] for name in results[0]["robustness"]} == results[0]["robustness"]
    assert list(measured["corrupted"]) == list(CORRUPTIONS)
    (scalar,) = EventAccumulator(str(at_once)).Reload().Scalars("robustness/mean/error")
    assert scalar.value == pytest.approx(measured["mean"]["error"], rel=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("imagecorruptions") is not None, reason="imagecorruptions is installed")
def test_the_flag_is_refused_before_training_without_the_package(trained_runs, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(f"{trained_runs.flags} --robustness --output-dir {output}".split()) == 2
    assert "pip install -r requirements-analysis.txt" in capsys.readouterr().err
    assert not output.exists()
