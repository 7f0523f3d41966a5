"""Nothing that comes from outside runs, or writes where it should not."""

import functools
import hashlib
import os
import tarfile

import pytest
import torch
import torchvision


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--pretrained"])
@pytest.mark.parametrize("place", ["format", "args", "state"])
def test_a_malicious_checkpoint_is_refused_in_a_sentence_and_nothing_in_it_runs(train, tmp_path, flag, place):
    run = train("--epochs 1")
    mark, path = tmp_path / "it-ran", tmp_path / "evil" / "checkpoint.pt"
    path.parent.mkdir()
    torch.save(run.checkpoint() | {place: Payload(mark)}, path)
    others = {"--pretrained": "--dataset digits --depth 8 --prune-method oneshot --sparsity 0.5"}
    bad = train(f"{others.get(flag, '')} {flag} {path}", None, short=False)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "not a whole checkpoint of this program" in bad.err
    assert not mark.exists()


def test_the_checkpoint_before_is_no_way_in(train, tmp_path):
    run = train("--epochs 2")
    mark = tmp_path / "it-ran"
    (run.directory / "checkpoint.pt").write_bytes(b"damaged")
    torch.save({"format": Payload(mark)}, run.directory / "previous.pt")
    assert train("--epochs 2 --resume auto").code == 2
    assert not mark.exists()


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python cannot filter: the checksum alone guards")
def test_an_archive_writes_nowhere_but_under_its_directory(train, tmp_path, monkeypatch):
    """Even one with the checksum that is wanted."""
    archive = tmp_path / "data" / torchvision.datasets.CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../escaped"))
    checksum = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", checksum)
    bad = train(f"--dataset cifar10 --data-dir {archive.parent} --epochs 1", short=False)
    assert bad.code == 2
    assert "outside the destination" in bad.err
    assert not (tmp_path / "escaped").exists()


PART = {
    "sums": torch.zeros(3, 2), "images": 768, "counted": 768, "seconds": 1.0, "meter": {"counted": [], "current": False}
}  # fmt: skip
CRAFTED = [
    ("args", []), ("args.arch", "x"), ("args.arch", 3), ("args.depth", "8"), ("args.epochs", "2"), ("args.epochs", -1),
    ("args.accumulate", 0), ("args.log_interval", 0), ("args.lr_scheduler", "x"), ("args.precision", "fp8"),
    ("args.compile", "maybe"), ("args.sam_v2", "yes"), ("args.dense_layers", 7), ("args.batch_size", None),
    ("args.optmzr", []), ("args.seed", 2.5), ("data", {}), ("data.classes", 3), ("data.mean", ["x"]), ("data.mean", [1.0] * 7),
    ("data.fingerprint", None), ("state.schedule_step", "x"), ("state.schedule_step", -3), ("state.global_step", None), ("state.rows", [{}]),
    ("state.rows", 3), ("state.partial", 7), ("state.partial", {"sums": 1}),
    ("state.partial", PART | {"meter": {}}), ("state.partial", PART | {"seconds": float("nan")}),
    ("state.partial", PART | {"images": -5}), ("state.partial", PART | {"sums": torch.zeros(500, 2)}),
    ("state.global_step", 10**30), ("state.schedule_step", 10**9), ("state.pruner.round", "x"), ("state.guard.skipped_steps", "x"), ("state.images", "x"), ("state.training_flops", None),
    ("state.model", {}), ("state.model", 3), ("state.optimizer", []), ("state.optimizer", {}), ("state.pruner", None),
    ("state.pruner", {}), ("state.guard", 3), ("state.guard", {}),
]  # fmt: skip


@pytest.mark.parametrize("command", ["--resume", "--evaluate"])
def test_a_checkpoint_with_crafted_values_is_refused_in_a_sentence(train, tmp_path, command):
    run = train("--epochs 2 --optmzr sgd-sam --sam-v2 --prune-method random --sparsity 0.5")
    path = tmp_path / "crafted" / "checkpoint.pt"
    path.parent.mkdir()
    outcomes = {}
    for place, value in CRAFTED:
        checkpoint = run.checkpoint()
        *outer, name = place.split(".")
        holder = functools.reduce(dict.__getitem__, outer, checkpoint)
        assert name in holder, place
        holder[name] = value
        torch.save(checkpoint, path)
        found = train(f"{command} {path}", None, short=False)
        outcomes[place, str(value)] = (found.code, found.err.count("\n"))
    of_training = ("state.optimizer", "state.guard", "state.partial")
    late = {place for place, _ in CRAFTED if place.startswith(of_training)} | {
        "state.schedule_step"
    }  # not looked at to evaluate
    harmless = {case for case in outcomes if command == "--evaluate" and case[0] in late and outcomes[case] == (0, 0)}
    assert {case: outcomes[case] for case in outcomes.keys() - harmless if outcomes[case] != (2, 1)} == {}


def test_a_sparsity_file_of_brackets_is_a_sentence(train, tmp_path):
    path = tmp_path / "deep.yaml"
    path.write_text("[" * 3000)
    bad = train(f"--prune-method random --sparsity-config {path} --epochs 1")
    assert (bad.code, bad.err.count("\n")) == (2, 1)


def test_a_sparsity_file_is_read_as_plain_values(train, tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(f"prune_ratios: !!python/object/apply:os.mkdir ['{tmp_path / 'it-ran'}']\n")
    bad = train(f"--prune-method random --sparsity-config {path} --epochs 1")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    "remark", ["../../../outside", "/absolute", "$(touch it-ran)", "a;touch it-ran", "é\u202e/..", "x" * 500]
)
def test_a_remark_names_a_directory_and_no_more(tmp_path, monkeypatch, capsys, remark):
    from main_prune_train import main

    monkeypatch.chdir(tmp_path)
    assert main(["--dataset", "digits", "--depth", "8", "--width", "0.25", "--epochs", "1", "--remark", remark]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (run,) = (tmp_path / "runs").iterdir()
    assert run.resolve().parent == tmp_path / "runs"
    assert run.name.isascii()
    assert len(run.name) <= 255
    assert not set(run.name) & set("/;$() ")
