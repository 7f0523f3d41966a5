"""Surfaces against a network that the test moves itself."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from analysis.landscape import FixedImagesLoss, living_weights
from analysis.loss_surface import filter_normalized, main
from models import build_model
from prune import Pruner


def test_directions_have_the_norms_of_the_filters_and_stay_off_what_is_pruned():
    torch.manual_seed(0)
    model = build_model("resnet", 8, 10, 0.25)
    pruner = Pruner(model, "random", 0.7)
    pruner.choose_masks()
    stem = next(iter(pruner.masks.weights))
    pruner.masks.set({stem: torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 3, 3) > 0})  # the first filter is dead
    loss = FixedImagesLoss(model, torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))
    alive = living_weights(model, pruner.masks)
    direction = filter_normalized(loss, alive, torch.Generator().manual_seed(5))
    noise = torch.randn(len(alive), generator=torch.Generator().manual_seed(5))
    assert direction[~alive].eq(0).all()
    directions, noises = loss.parameters_of(direction).values(), loss.parameters_of(noise * alive).values()
    for d, n, p in zip(directions, noises, model.parameters(), strict=True):
        if p.ndim == 1:
            assert d.eq(0).all()
            continue
        for filter_d, filter_n, filter_w in zip(d, n, p.detach(), strict=True):
            assert filter_d.norm().item() == pytest.approx(filter_w.norm().item(), rel=1e-5)
            if filter_n.norm():
                assert nn.functional.cosine_similarity(filter_d.flatten(), filter_n.flatten(), 0) > 0.9999


def moved_loss(checkpoint, images, seed, steps):
    """The mean test loss of a run's network at w + steps[0] * d0 + steps[1] * d1, from files and formulas alone."""
    saved = torch.load(checkpoint, weights_only=True)
    model = build_model("resnet", 8, 3, 0.0625)
    model.load_state_dict(saved["state"]["model"])
    model.eval()
    masks = saved["state"]["pruner"]["masks"]
    generator = torch.Generator().manual_seed(seed)
    count = sum(p.numel() for p in model.parameters())
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in steps:
        noise, start = torch.randn(count, generator=generator), 0
        for name, p in model.named_parameters():
            part = noise[start : start + p.numel()].view(p.shape)
            start += p.numel()
            if p.ndim == 1:
                continue
            part = part * masks.get(name.removesuffix(".weight"), 1)
            for row, weights in zip(part, original[name], strict=True):
                row *= weights.norm() / row.norm() if row.norm() else 0.0
            with torch.no_grad():
                p += step * part
    files = sorted((images / "test").rglob("*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).float()
    pixels = (pixels - torch.tensor(saved["data"]["mean"])) / torch.tensor(saved["data"]["deviation"])
    labels = torch.tensor([int(file.parent.name) for file in files])
    with torch.no_grad():
        return nn.functional.cross_entropy(model(pixels.permute(0, 3, 1, 2)), labels).item()


def test_a_surface_has_the_loss_at_moved_weights(trained_runs, tmp_path, capsys):
    runs = shutil.copytree(trained_runs.root, tmp_path / "runs")
    before = (runs / "seed1" / "checkpoint.pt").read_bytes()
    assert main([str(runs), *"--resolution 4 --split test --seed 3 --labels one two".split()]) == 0
    assert (runs / "seed1" / "checkpoint.pt").read_bytes() == before
    output = runs / "seed0" / "loss_surface"  # beside the first checkpoint
    numbers = np.load(output / "surface.npz")
    assert numbers["axis"].tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    assert numbers["labels"].tolist() == ["one", "two"]
    assert numbers["line"].shape == (2, 5)
    np.testing.assert_allclose(numbers["plane"][:, 2, :], numbers["line"], rtol=1e-5)  # direction 1 along the columns
    expected = moved_loss(runs / "seed1" / "checkpoint.pt", trained_runs.images, 3, (0.25, -0.5))
    assert numbers["plane"][1, 0, 3] == pytest.approx(expected, rel=1e-4)
    printed = capsys.readouterr()
    for name in ("line", "contour", "surface"):
        for kind in ("png", "pdf"):
            assert (output / f"{name}.{kind}").stat().st_size > 5_000
            assert str(output / f"{name}.{kind}") in printed.out
    assert printed.err.splitlines()[0].startswith("0 of 60 points")
    assert printed.err.splitlines()[-1].startswith("60 of 60 points")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("missing.pt", "there is no checkpoint 'missing.pt'"),
        ("missing.pt --labels a b", "2 --labels for 1 checkpoints"),
        ("CKPT --output /proc/x/y", "cannot write to"),
    ],
)
def test_bad_input_is_one_sentence(flags, words, trained_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(flags.replace("CKPT", str(trained_runs.checkpoint(0))).split()) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_resolution_without_points_beside_the_network_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main("missing.pt --resolution 2".split())
    assert ended.value.code == 2
    assert "argument --resolution" in capsys.readouterr().err
