"""Flags that contradict each other, have no effect, or ask for what cannot be built: one sentence, and nothing written."""

import pytest


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--depth 21", "depth 6n+2"),
        ("--sparsity 0.99999 --prune-method random", "at most 0.9998 is possible"),
        ("--sparsity 0.9998 --prune-method random --sparsity-distribution uniform", "leaves layer"),
        ("--sparsity 0.9", "--sparsity has no effect with --prune-method none"),
        ("--prune-method random", "--prune-method random needs --sparsity"),
        ("--prune-method random --sparsity 0.9 --sparsity-distribution global", "choose erk or uniform"),
        ("--prune-method random --sparsity 0.9 --dense-layers steam", "no prunable layer matches 'steam'"),
        ("--dense-layers stem", "--dense-layers has no effect with --prune-method none"),
        ("--dataset folder", "--data-dir"),
        ("--dataset imagefolder", "imagefolder needs --data-dir"),
        ("--dataset tinyimagenet", "tinyimagenet needs --data-dir"),
        ("--augment cutout", "invalid choice: 'cutout'"),
        ("--dataset folder --data-dir nowhere", "'nowhere/train' does not exist"),
        ("--data-dir x", "--data-dir has no effect with --dataset digits"),
        ("--image-size 8", "--image-size has no effect with --dataset digits"),
        ("--val-split 1442", "cannot hold out 1442 of 1,442 training images"),
        ("--sam-v2", "--sam-v2 has no effect with --optmzr sgd"),
        ("--optmzr sgd-cram --sam-v2", "--sam-v2 has no effect with --optmzr sgd-cram, whose step is its own"),
        ("--optmzr sgd-safe --sam-every 2", "--sam-every has no effect with --optmzr sgd-safe"),
        (
            "--optmzr sgd-safe --no-norm-decay",
            "--no-norm-decay has no effect with --optmzr sgd-safe, whose step is its own",
        ),
        ("--optmzr sgd-safe --cram-sparsities 0.5", "--cram-sparsities has no effect with --optmzr sgd-safe"),
        (
            "--optmzr sgd-sam --safe-lambda 0.1",
            "--safe-lambda has no effect with --optmzr sgd-sam: take --optmzr sgd-safe",
        ),
        ("--optmzr sgd-safe", "not one of --prune-method none: take --prune-method final"),
        (
            "--optmzr sgd-cram --prune-method rigl --sparsity 0.5",
            "not one of --prune-method rigl: take --prune-method final",
        ),
        ("--optmzr sgd-cram --sam-rho 0", "--sam-rho 0 leaves nothing of --optmzr sgd-cram"),
        ("--optmzr sgd-cram --precision fp16", "which --precision fp16 scales"),
        ("--optmzr sgd-cram --cram-sparsities 0.5 0.99999", "sparsity 0.99999 is too high"),
        ("--prune-method dsr --sparsity-pattern 2:4", "'dsr' moves weights one by one and cannot keep 2:4"),
        ("--prune-method lamp --sparsity 0.9 --sparsity-distribution erk", "has no erk distribution: choose global"),
        ("--adaptive --optmzr adam", "--adaptive has no effect with --optmzr adam"),
        ("--sam-rho 0.1", "--sam-rho has no effect with --optmzr sgd"),
        ("--optmzr adam --momentum 0.8", "--momentum has no effect with --optmzr adam"),
        ("--optmzr adamw-sam --nesterov", "--nesterov has no effect with --optmzr adamw-sam"),
        ("--dataset folder --image-size 3000000000", "at most 65535"),
        ("--nesterov --momentum 0", "--nesterov needs a --momentum above 0"),
        ("--alpha 0.2", "--alpha has no effect without --mixup"),
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
        ("--compact", "--compact has no effect with --prune-method none: add --prune-method random --sparsity 0.7"),
        (
            "--compact --prune-method random --sparsity 0.9",
            "--compact has no effect with --sparsity-pattern unstructured: take --sparsity-pattern channel",
        ),
        (
            "--compact --prune-method gmp --sparsity 0.7 --sparsity-pattern channel",
            "--compact trains a network whose channels are gone for good, and --prune-method gmp changes masks",
        ),
        (
            "--compact --prune-method lth --sparsity 0.7 --sparsity-pattern channel",
            "and --prune-method lth changes masks during training: leave it out",
        ),
        (
            "--compact --prune-method random --sparsity 0.7 --sparsity-pattern channel --optmzr sgd-sam --sam-unmasked",
            "--sam-unmasked has no effect with --sparsity-pattern channel",
        ),
        (
            "--prune-method random --sparsity 0.9 --sparsity-pattern channel --arch vit --depth 1",
            "is too high for channels: each group of them keeps one, and 6 of 8 layers all of theirs; at most 0.6",
        ),
        (
            "--prune-method dsr --sparsity 0.5 --sparsity-pattern channel",
            "'dsr' moves weights from layer to layer, and a channel is part of several",
        ),
        (
            "--prune-method random --sparsity 0.7 --sparsity-pattern channel --optmzr sgd-sam --sam-unmasked",
            "--sam-unmasked has no effect with --sparsity-pattern channel",
        ),
        ("--update-interval 99e --prune-method gmp --sparsity 0.9", "masks would never change before they stay"),
        (
            "--prune-method rigl --sparsity 0.9 --epochs 1 --update-interval 1e",
            "from step 9 of 12 on: their update interval is 12 steps; take --update-interval 1, which gives 8 changes",
        ),
        (
            "--prune-method mest --mest-soft --sparsity 0.8 --sparsity-pattern fan-in",
            "--mest-soft drops from a layer as a whole and cannot keep a constant fan-in",
        ),
        ("--pretrained missing.pt", "there is no checkpoint 'missing.pt'"),
        ("--arch torchvision:resnet18 --depth 20", "--depth has no effect with --arch torchvision:resnet18"),
        ("--arch torchvision:resnet1", "there is no torchvision:resnet1: did you mean resnet"),
        ("--arch torchvision:", "has to be torchvision:NAME, timm:NAME or FILE.py:FUNCTION, not 'torchvision:'"),
        ("--arch vgg --stem imagenet", "--stem has no effect with --arch vgg"),
        ("--pretrained-weights DEFAULT", "--pretrained-weights has no effect with --arch resnet"),
        ("--arch vgg --depth 20", "a VGG has depth 16 or 19, not 20"),
        ("--batch-size 1441 --arch vgg", "cannot be batch-normalised"),
        ("--warmup-epochs 2 --epochs 2", "--warmup-epochs 2 has to be less than --epochs 2"),
        ("--warmup-epochs 0.04", "--warmup-epochs 0.04 comes to 0 of the 12 steps: give more, or leave it out"),
        ("--warmup-epochs 0.99", "--warmup-epochs 0.99 comes to 12 of the 12 steps: give fewer"),
        ("--label-noise 0.0003", "--label-noise 0.0003 makes none of 1,442 labels wrong: give more, or leave it out"),
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
        (
            "--sam-unmasked --adaptive --optmzr sgd-sam --prune-method random --sparsity 0.9",
            "--sam-unmasked has no effect with --adaptive, which leaves weights of 0 where they are",
        ),
        ("--sam-unmasked --clip-grad 1 --optmzr sgd-sam --prune-method random --sparsity 0.9", "leave one of them out"),
        ("--sam-local --sync-bn --optmzr sgd-sam", "contradict each other"),
        ("--sam-direction ema", "--sam-direction has no effect with --optmzr sgd: add --optmzr sgd-sam"),
        ("--sam-direction random --optmzr sgd-sam", "--sam-direction has no effect on two-step SAM"),
        (
            "--sam-direction momentum --momentum 0 --optmzr sgd-sam --sam-v2",
            "--sam-direction momentum needs a --momentum above 0",
        ),
        (
            "--sam-direction momentum --sam-unmasked --prune-method random --sparsity 0.9 --optmzr sgd-sam --sam-v2",
            "--sam-unmasked has no effect with --sam-direction momentum",
        ),
        ("--sam-from 0.5", "--sam-from has no effect with --optmzr sgd"),
        ("--sam-until 0.5 --optmzr adam", "--sam-until has no effect with --optmzr adam"),
        (
            "--sam-from 0.5 --sam-until 0.5 --optmzr sgd-sam --sam-v2",
            "--sam-from 0.5 has to be less than --sam-until 0.5",
        ),
        (
            "--sam-from 0.99 --sam-until 0.991 --batch-size 500 --optmzr sgd-sam --sam-v2",
            "no step of 3 perturbs between --sam-from 0.99",
        ),
        ("--sam-every 5", "--sam-every has no effect with --optmzr sgd"),
        (
            "--sam-every 5 --optmzr sgd-sam --sam-v2",
            "--sam-every has no effect with --sam-v2, which has no second pass to save",
        ),
        ("--rho-schedule sqrt", "--rho-schedule has no effect with --optmzr sgd"),
        (
            "--rho-schedule lr --lr-scheduler constant --optmzr sgd-sam --sam-v2",
            "--rho-schedule has no effect with a constant learning rate",
        ),
        ("--optmzr sgd-sam --sam-unmasked --prune-method final --sparsity 0.9", "--sam-unmasked has no effect with"),
        (
            "--optmzr sgd-cram --cram-sparsities 0.9 --prune-method final --sparsity-pattern 2:4",
            "--cram-sparsities has no effect with --sparsity-pattern 2:4, which fixes the sparsity",
        ),
        (
            "--prune-method granet --sparsity 0.9 --granet-until 0.8",
            "comes after masks have stopped changing, at --stop-update 0.75",
        ),
        (
            "--prune-method granet --sparsity 0.9 --granet-start 0.95",
            "--granet-start 0.95 is sparser than --sparsity 0.9",
        ),
        ("--resume missing.pt", "there is no checkpoint 'missing.pt'"),
        ("--evaluate missing.pt", "there is no checkpoint 'missing.pt'"),
        ("--resume auto --evaluate missing.pt", "give one of them"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused_and_nothing_is_written(train, tmp_path, flags, words):
    bad = train(f"--dataset digits --epochs 1 {flags}", short=False)
    assert bad.code == 2
    assert bad.out == ""
    assert bad.err.startswith("error: ")
    assert bad.err.count("\n") == 1
    assert words in bad.err
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_is_not_there_is_reported_with_a_sentence(train, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    bad = train("--epochs 1 --compile on")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "--compile on needs a C++ compiler ('no-such-compiler' is not there)" in bad.err
    assert not bad.directory.exists()
