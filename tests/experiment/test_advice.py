"""What an error says that mends it: a flag, a value, a file; and before data is touched."""

import os

import pytest
import torch

from experiment.flags import parse
from main_prune_train import main
from utils.errors import UsageError


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sparsity 0.9", "add --prune-method random, or leave it out"),
        ("--sparsity-distribution erk", "add --prune-method random --sparsity 0.9, or"),
        ("--drop-fraction 0.2", "add --prune-method set, rigl, mest, dsr, snfs or granet, or"),
        (
            "--prune-method snip --sparsity 0.5 --update-interval 5",
            "take --prune-method set, rigl, mest, dsr, snfs, gmp, granet or acdc, or",
        ),
        ("--prune-method set --sparsity 0.5 --lth-rounds 2", "take --prune-method lth or lamp, or"),
        ("--sam-v2", "add --optmzr sgd-sam, or leave it out"),
        ("--optmzr adam --adaptive", "add --optmzr adam-sam, or leave it out"),
        ("--optmzr adamw-sam --nesterov", "take --optmzr sgd-sam, or leave it out"),
        ("--optmzr sgd-sam --sam-v2 --sam-local", "leave --sam-v2 out, or leave it out"),
        ("--alpha 0.2", "add --mixup, or leave it out"),
        ("--data-dir x", "take --dataset folder, or leave it out"),
        (
            "--prune-method rigl --sparsity 0.9 --epochs 2 --update-interval 100",
            "take --update-interval 1, which gives 17 changes",
        ),
        ("--prune-method lth --sparsity 0.9 --lth-rewind 99", "take --lth-rewind 0, or another step below 12"),
        ("--prune-method random --sparsity 0.9 --sparsity-pattern 2:4", "leave out --sparsity 0.9"),
        ("--accumulate 129", "give at most --accumulate 128"),
        ("--nesterov --momentum 0", "as --momentum 0.9"),
        ("--no-cuda --device cuda", "leave one of them out"),
        ("--val-split 1442", "give a --val-split below that"),
    ],
)
def test_an_error_names_the_flag_that_mends_it(train, flags, words):
    bad = train(f"--dataset digits --depth 8 --width 0.5 --epochs 1 {flags}", short=False)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert words in bad.err


def test_the_interval_that_an_error_names_works(train):
    flags = "--epochs 2 --prune-method set --sparsity 0.5 --batch-size 128"
    assert "take --update-interval 1," in train(f"{flags} --update-interval 100").err
    assert train(f"{flags} --update-interval 1").code == 0


@pytest.mark.parametrize(
    ("flags", "meant"),
    [
        ("--arch resnet18", "--arch resnet --depth 18"),
        ("--arch ResNet-20", "--arch resnet --depth 20"),
        ("--arch wrn-28-10", "--arch wideresnet --depth 28 --width 10"),
        ("--arch vgg16_bn", "--arch vgg --depth 16"),
        ("--arch mobilenet_v1x", "--arch mobilenet"),
        ("--optmzr sgd-sam-v2", "--optmzr sgd-sam --sam-v2"),
        ("--optmzr sam", "--optmzr sgd-sam"),
        ("--optmzr AdamW-SAM", "--optmzr adamw-sam"),
        ("--optmzr asam", "--optmzr sgd-sam --adaptive"),
        ("--optmzr SGD", "--optmzr sgd"),
        ("--dataset cifar", "--dataset cifar10 or --dataset cifar100"),
        ("--prune-method rigle", "--prune-method rigl"),
        ("--lr-scheduler cos", "--lr-scheduler cosine"),
        ("--learning-rate 0.1", "--lr"),
        ("-lr 0.1", "--lr"),
        ("--rho 0.1", "--sam-rho"),
        ("--compiel on", "--compile"),
        ("--epoch 3", "--epochs"),
        ("--dataset imagenet", "--dataset imagefolder --data-dir DIR"),
        ("--sam_rho 0.1", "--sam-rho"),
    ],
)
def test_a_mistyped_flag_or_value_is_asked_about(flags, meant):
    with pytest.raises(UsageError) as error:
        parse(flags.split())
    assert f"(did you mean {meant}? see --help)" in str(error.value)


@pytest.mark.parametrize(
    "flags",
    ["--nope", "--xyzzy 1", "--size 3", "--arch alexnet", "--arch lenet5", "--optmzr lion", "--dataset places"],
)
def test_nothing_far_fetched_is_asked_about(flags):
    with pytest.raises(UsageError) as error:
        parse(flags.split())
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--pretrained missing.pt", "there is no checkpoint 'missing.pt'"),
        ("--arch vit --prune-method synflow --sparsity 0.5", "synflow has no meaning"),
        ("--prune-method random --sparsity 0.9998 --sparsity-distribution uniform", "without a weight"),
        ("--compile on", "--compile on needs a C++ compiler"),
    ],
)
def test_what_needs_no_data_is_refused_before_data_is_touched(train, tmp_path, monkeypatch, flags, words):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (tmp_path / "data").write_text("a file, where a download would go")
    bad = train(f"--dataset cifar10 --data-dir {tmp_path}/data {flags}", short=False)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert words in bad.err


def test_pretrained_weights_of_another_network_are_refused_before_data_is_touched(train, tmp_path, trained):
    (tmp_path / "data").write_text("")
    flags = f"--dataset cifar10 --data-dir {tmp_path}/data --pretrained {trained.directory}/checkpoint.pt"
    assert "the checkpoint is of another network: its --depth is 8, not 20" in train(flags, short=False).err


def test_a_checkpoint_is_evaluated_from_any_directory(train, tmp_path, monkeypatch, capsys):
    from PIL import Image

    for number, name in enumerate(f"{split}/{kind}" for split in ("train", "test") for kind in "ab"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8), 60 * number + index).save(tmp_path / "images" / name / f"{index}.png")
    flags = "--dataset folder --data-dir images --depth 8 --width 0.25 --epochs 1 --precision fp32"
    assert train(flags, short=False).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["--evaluate", "../run/checkpoint.pt"]) == 0, capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["args"]["data_dir"] == os.path.join(tmp_path, "images")


def test_a_run_with_a_sparsity_file_resumes_from_any_directory(train, tmp_path, monkeypatch, capsys):
    (tmp_path / "layers.yaml").write_text("prune_ratios: {classifier: 0.5}")
    flags = "--prune-method gmp --sparsity-config layers.yaml --lr-scheduler cosine --epochs 2 --update-interval 2"
    run = train(flags)
    (run.directory / "result.json").unlink()
    monkeypatch.chdir(tmp_path.parent)
    resume = ["--resume", str(run.directory / "checkpoint.pt")]
    assert main(resume) == 0, capsys.readouterr().err
    assert "test accuracy" in capsys.readouterr().out
    (tmp_path / "layers.yaml").write_text("# as it was\nprune_ratios: {classifier.weight: 0.50}")
    assert main([*resume, "--epochs", "2"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    (tmp_path / "layers.yaml").write_text("prune_ratios: {classifier: 0.9}")
    result = (run.directory / "result.json").rename(run.directory / "flags.json")  # which has the flags alone
    again = ["--output-dir", str(tmp_path / "again")]
    for flags in (resume, ["--config", str(run.directory), *again], ["--config", str(result), *again]):
        assert main(flags) == 2
        told = capsys.readouterr().err
        assert "layers.yaml' has other sparsities than when the run" in told
        assert told.count("\n") == 1
    assert not (tmp_path / "again").exists()
    (tmp_path / "layers.yaml").rename(tmp_path / "moved.yaml")
    assert main([*resume, "--sparsity-config", str(tmp_path / "moved.yaml")]) == 2
    assert "its files have to be where they were: put them back" in capsys.readouterr().err


def test_a_directory_that_is_not_utf_8_is_refused(train):
    bad = train("--epochs 1 --output-dir caf\udce9", None)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "argument --output-dir/--save-model: has to be a name in UTF-8" in bad.err
