"""Sharpness and loss surfaces of runs of main_prune_train.py, by their commands."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from analysis import loss_surface, sharpness
from analysis.landscape import FixedImagesLoss, living
from analysis.loss_surface import filter_normalized
from models import build_model
from prune import Pruner

FOLDER = "--dataset folder --depth 8 --width 0.25 --batch-size 8 --epochs 1"
QUICK = "--images 100 --top 1 --trace-samples 2 --rhos 0.1 --adaptive-rhos --steps 2"


@pytest.fixture
def folder(tmp_path):
    """folder("name", seed) makes 3 x 10 training and 3 x 5 test images of 8 x 8."""

    def make(name, seed=0):
        random = np.random.default_rng(seed)
        for split, count in (("train", 10), ("test", 5)):
            for label in range(3):
                directory = tmp_path / name / split / str(label)
                directory.mkdir(parents=True)
                for number in range(count):
                    pixels = random.integers(60 * label, 60 * label + 100, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(directory / f"{number}.png")
        return f"--data-dir {tmp_path / name}"

    return make


def sharpness_of(tmp_path, capsys, flags):
    output = tmp_path / "sharpness.json"
    assert sharpness.main([*flags.split(), "--output", str(output)]) == 0
    return json.loads(output.read_text()), capsys.readouterr().out


def test_the_flag_and_the_command_measure_the_same_and_seeds_are_averaged(train, folder, tmp_path, capsys):
    settings = f"{FOLDER} {folder('data')} --prune-method random --sparsity 0.8 --optmzr sgd-sam --sam-v2"
    run = train(f"{settings} --sharpness", "run0", short=False)
    assert (run.code, run.err) == (0, "")
    kept = run.json("result.json")["sharpness"]
    other = train(f"{settings} --seed 1", "run1", short=False)
    assert "sharpness" not in other.json("result.json")
    other_accuracy = other.json("result.json")["test_top1"]
    checkpoints = f"{run.directory}/checkpoint.pt {other.directory}/checkpoint.pt"
    before = (run.directory / "checkpoint.pt").read_bytes()
    (first, second), out = sharpness_of(tmp_path, capsys, checkpoints)
    assert (run.directory / "checkpoint.pt").read_bytes() == before
    assert first["train"] == kept["train"]
    assert first["test"] == kept["test"]
    assert kept["test"]["images"] == 15  # all there are
    late = train(f"{settings} --seed 1 --resume auto --sharpness", "run1", short=False)  # finished already, without it
    assert late.json("result.json")["sharpness"]["train"] == second["train"]
    assert late.json("result.json")["test_top1"] == other_accuracy
    assert "finished already" in train(f"{settings} --seed 1 --resume auto --sharpness", "run1", short=False).out
    both = train(f"{settings} --seed 1 --resume auto --recalibrate-bn", "run1", short=False)  # the one beside the other
    assert both.json("result.json")["sharpness"]["train"] == second["train"]
    assert "test_top1_recalibrated_bn" in both.json("result.json")
    for space in ("living", "all"):
        values = kept["train"][space]["eigenvalues"]
        assert len(values) == 5
        assert values[0]["value"] > 0
        assert all(value["residual"] < 0.01 for value in values)
    assert kept["train"]["living"]["weights"] < kept["train"]["all"]["weights"]
    # The Hessian over living weights is a part of the whole: its largest eigenvalue cannot be larger (Cauchy).
    for figures in (kept["train"], kept["test"]):
        assert figures["living"]["eigenvalues"][0]["value"] <= figures["all"]["eigenvalues"][0]["value"] * 1.001
        for rise in figures["living"]["sam"] + figures["all"]["sam"]:
            assert rise["one_step"] <= rise["lower_bound"]
    one, two = (results["train"]["living"]["eigenvalues"][0]["value"] for results in (first, second))
    spread = f"{(one + two) / 2:.4g} ± {abs(one - two) / 2**0.5:.2g}"
    assert spread in out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.directory)).Reload()
    (scalar,) = events.Scalars("sharpness/train/living/eigenvalue_1")
    assert scalar.value == pytest.approx(one, rel=1e-6)
    assert events.Scalars("sharpness/test/all/sam_adaptive_rho0.5_lower_bound")


def test_a_mean_over_seeds_takes_each_seed_once_and_runs_that_came_equally_far():
    row = {
        "split": "train",
        "weights": "all",
        "run": "sgd",
        "epochs": 3,
        "settings": "{}",
        "checkpoint": "x",
        "loss": 1.0,
    }
    rows = [row | {"seed": 0}, row | {"seed": 1, "loss": 2.0}, row | {"seed": 2, "epochs": 2}]
    (line,) = sharpness.over_seeds(pd.DataFrame(rows)).to_dict("records")
    assert (line["seeds"], line["epochs"], line["loss"]) == (2, 3, "1.5 ± 0.71")
    assert sharpness.over_seeds(pd.DataFrame([row | {"seed": 0}, row | {"seed": 0}])).empty


def test_recalibrated_statistics_with_and_without(train):
    """The same from training and from --evaluate; training itself goes on as if nothing had been asked."""
    run = train("--epochs 2 --optmzr sgd-sam --sam-v2 --sam-rho 0.5 --recalibrate-bn --precision fp32")
    plain = train("--epochs 2 --optmzr sgd-sam --sam-v2 --sam-rho 0.5 --precision fp32", "plain")
    result = run.json("result.json")
    assert result["test_top1"] == plain.json("result.json")["test_top1"]
    assert result["test_loss"] != result["test_loss_recalibrated_bn"]
    evaluated = train(f"--evaluate {run.directory}/checkpoint.pt --recalibrate-bn", None, short=False)
    assert f"test loss {result['test_loss_recalibrated_bn']:.4f}" in evaluated.out
    assert f"test loss {result['test_loss']:.4f}" in evaluated.out
    refused = train("--arch vit --depth 1 --width 0.34 --recalibrate-bn --dataset digits", "vit", short=False)
    assert refused.code == 2
    assert "no effect on a network without batch norm" in refused.err


def test_directions_have_the_norms_of_the_filters_and_stay_off_what_is_pruned():
    torch.manual_seed(0)
    model = build_model("resnet", 8, 10, 0.25)
    pruner = Pruner(model, "random", 0.7)
    pruner.before_training()
    stem = next(iter(pruner.masks.weights))
    pruner.masks.set({stem: torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 3, 3) > 0})  # the first filter is dead
    landscape = FixedImagesLoss(model, torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))
    alive = living(model, pruner.masks)
    direction = filter_normalized(landscape, alive, torch.Generator().manual_seed(5))
    noise = torch.randn(len(alive), generator=torch.Generator().manual_seed(5))
    assert direction[~alive].eq(0).all()
    for d, n, (_, p) in zip(
        landscape.parameters_of(direction).values(),
        landscape.parameters_of(noise * alive).values(),
        model.named_parameters(),
        strict=True,
    ):
        if p.ndim == 1:
            assert d.eq(0).all()
            continue
        for filter_d, filter_n, filter_w in zip(d, n, p.detach(), strict=True):
            assert filter_d.norm().item() == pytest.approx(filter_w.norm().item(), rel=1e-5)
            if filter_n.norm():
                assert nn.functional.cosine_similarity(filter_d.flatten(), filter_n.flatten(), 0) > 0.9999


def test_a_surface_has_the_loss_at_moved_weights(train, tmp_path, capsys):
    runs = [
        train(f"--epochs 1 --prune-method random --sparsity 0.5 --width 0.25 --seed {s}", f"run{s}") for s in (0, 1)
    ]
    files = [run.directory / "checkpoint.pt" for run in runs]
    before = [file.read_bytes() for file in files]
    out = tmp_path / "surface"
    flags = "--resolution 4 --range 0.5 --split test --images 355 --seed 3 --labels one two"
    assert loss_surface.main([*map(str, files), *flags.split(), "--output", str(out)]) == 0
    assert [file.read_bytes() for file in files] == before
    numbers = np.load(out / "surface.npz")
    assert numbers["axis"].tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    assert (numbers["line"].shape, numbers["plane"].shape) == ((2, 5), (2, 5, 5))
    assert numbers["labels"].tolist() == ["one", "two"]
    np.testing.assert_allclose(
        numbers["plane"][:, 2, :], numbers["line"], rtol=1e-5
    )  # the first direction, along the columns
    for name in ("line", "contour", "surface"):
        assert (out / f"{name}.png").stat().st_size > 10_000

    checkpoint = runs[1].checkpoint()
    model = build_model("resnet", 8, 10, 0.25, in_channels=1)
    model.load_state_dict(checkpoint["state"]["model"])
    model.eval()
    masks = checkpoint["state"]["pruner"]["masks"]
    generator = torch.Generator().manual_seed(3)
    count = sum(p.numel() for p in model.parameters())
    directions = []
    for _ in range(2):
        noise, start, parts = torch.randn(count, generator=generator), 0, {}
        for name, p in model.named_parameters():
            part = noise[start : start + p.numel()].view(p.shape)
            start += p.numel()
            if p.ndim > 1:
                part = part * masks[name.removesuffix(".weight")]
                for row, weights in zip(part, p.detach(), strict=True):
                    row *= weights.norm() / row.norm() if row.norm() else 0.0
                parts[name] = part
        directions.append(parts)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p += 0.25 * directions[0][name] - 0.5 * directions[1][name]
    data = load_digits()
    rank = np.array([np.sum(data.target[:i] == label) for i, label in enumerate(data.target)])
    images = torch.from_numpy(np.rint(data.images * (255 / 16))[rank % 5 == 4]).float()[:, None]
    images = (images - checkpoint["data"]["mean"][0]) / checkpoint["data"]["deviation"][0]
    labels = torch.from_numpy(data.target[rank % 5 == 4])
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(images), labels).item()
    assert numbers["plane"][1, 0, 3] == pytest.approx(expected, rel=1e-4)  # row: second direction, column: first


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        (sharpness, "missing.pt", "there is no checkpoint 'missing.pt'"),
        (sharpness, "missing.pt --images 1", "--images: has to be a whole number at least 2"),
        (sharpness, "missing.pt --trace-samples 1", "one sample has no standard error"),
        (sharpness, "missing.pt --rhos -1", "argument --rhos"),
        (sharpness, "missing.pt --output /proc/x/y", "cannot write to"),
        (sharpness, "missing.pt --device tpu", "--device has to be"),
        (loss_surface, "missing.pt", "there is no checkpoint 'missing.pt'"),
        (loss_surface, "missing.pt --resolution 2", "argument --resolution"),
        (loss_surface, "missing.pt --labels a b", "2 --labels for 1 checkpoints"),
        (loss_surface, "missing.pt --output /proc/x/y", "cannot write to"),
    ],
)
def test_bad_input_is_one_sentence(command, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main(flags.split())
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_other_images_than_the_run_had_are_refused(train, folder, tmp_path, capsys):
    a, b = folder("a"), folder("b", seed=1)
    run = train(f"{FOLDER} {a} --prune-method random --sparsity 0.8", short=False)
    assert run.code == 0
    with pytest.raises(SystemExit) as ended:
        sharpness.main([f"{run.directory}/checkpoint.pt", *b.split(), *QUICK.split()])
    assert ended.value.code == 2
    assert "not those that" in capsys.readouterr().err
    moved = f"{run.directory}/checkpoint.pt {a} --recalibrate-bn {QUICK}"
    results, _ = sharpness_of(tmp_path, capsys, moved)
    assert results[0]["recalibrated_bn"]
    assert results[0]["train"]["images"] == 30
    dead = sum(int((~mask).sum()) for mask in run.checkpoint()["state"]["pruner"]["masks"].values())
    figures = results[0]["train"]
    assert dead > 0
    assert figures["all"]["weights"] - figures["living"]["weights"] == dead
    before = (tmp_path / "sharpness.json").read_bytes()
    with pytest.raises(SystemExit):
        sharpness.main(["missing.pt", "--output", str(tmp_path / "sharpness.json")])
    assert (tmp_path / "sharpness.json").read_bytes() == before
