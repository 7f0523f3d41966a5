"""What becomes of flags before the data is known, and where the machine is too small."""

import pytest
import torch

from experiment import build
from experiment.flags import parse, resolve
from models import build_model
from utils.errors import TrainingError, UsageError


class FullGpu:
    def sample(self, per_class):
        raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--prune-method grasp", "try --score-images 5 "),
        ("--prune-method snip --score-images 3", "try --score-images 1 "),
        ("--prune-method snip --score-images 1", "try a smaller --width "),
        ("--prune-method synflow", "try a smaller --width "),
    ],
)
def test_too_little_memory_for_the_scores_advises_what_they_take(flags, words):
    args = resolve(parse(f"--depth 8 --width 0.25 --sparsity 0.5 {flags}".split())[0])
    pruner = build.pruner(args, build_model("resnet", 8, 10, 0.25), [], total_steps=1000)
    with pytest.raises(TrainingError, match="out of GPU memory: ") as error:
        build.choose_masks(args, pruner, FullGpu())
    assert words in str(error.value)


def test_masks_of_a_pretrained_network_are_kept_where_asked_and_their_loss_is_said(train, trained):
    zeros = {name: mask == 0 for name, mask in trained.checkpoint()["state"]["pruner"]["masks"].items()}
    pretrained = f"--epochs 1 --pretrained {trained.directory / 'checkpoint.pt'}"
    kept = train(f"{pretrained} --keep-masks")
    assert kept.code == 0, kept.err
    assert "warning" not in kept.err
    assert kept.json("result.json")["sparsity"] == pytest.approx(0.9, abs=1e-3)
    weights = kept.checkpoint()["state"]["model"]
    assert all((weights[f"{name}.weight"] == 0)[zero].all() for name, zero in zeros.items())

    lost = train(pretrained, "lost")
    assert lost.code == 0, lost.err
    assert "warning: the checkpoint's masks, of sparsity 0.9001, are not kept" in lost.err
    assert lost.json("result.json")["sparsity"] == 0

    dense = train(f"--epochs 1 --keep-masks --pretrained {lost.directory / 'checkpoint.pt'}", "dense")
    assert (dense.code, dense.err.count("\n")) == (2, 1)
    assert "--keep-masks has no effect: the file of --pretrained has no masks" in dense.err


@pytest.mark.parametrize(
    ("flags", "lr"),
    [("", 0.1), ("--prune-method oneshot", 0.01), ("--prune-method oneshot --optmzr adamw-sam", 0.0001)],
)
def test_oneshot_fine_tunes_at_a_tenth_of_the_usual_learning_rate(flags, lr):
    assert resolve(parse(flags.split())[0]).lr == pytest.approx(lr)
    assert resolve(parse([*flags.split(), "--lr", "0.3"])[0]).lr == 0.3


def test_a_sparsity_is_not_refused_before_the_classes_of_a_folder_are_known():
    flags = "--depth 8 --prune-method random --sparsity 0.7 --dense-layers classifier --dataset"
    for data in ("folder --data-dir nowhere", "imagefolder --data-dir nowhere", "cifar10"):
        build.check_on_meta(resolve(parse(f"{flags} {data}".split())[0]))
    pattern = (
        "--depth 8 --prune-method magnitude --sparsity-pattern 2:4 --sparsity 0.6 --dataset folder --data-dir nowhere"
    )
    with pytest.raises(UsageError, match=r"fixes the sparsity at 0\.5"):  # of any number of classes
        build.check_on_meta(resolve(parse(pattern.split())[0]))


def test_a_sparsity_too_high_for_the_classes_of_a_data_set_is_refused():
    """With a dense classifier of 6,400 weights 0.9228 is the highest for 100 classes, out of 82,880."""
    args = {
        (data, sparsity): resolve(
            parse(
                f"--depth 8 --prune-method random --sparsity {sparsity} --dense-layers classifier --dataset {data}".split()
            )[0]
        )
        for data in ("cifar10", "cifar100")
        for sparsity in (0.9228, 0.93)
    }
    refused = args.pop(("cifar100", 0.93))
    for allowed in args.values():
        build.check_on_meta(allowed)
    with pytest.raises(UsageError, match=r"at most 0\.9228 is possible"):
        build.check_on_meta(refused)
