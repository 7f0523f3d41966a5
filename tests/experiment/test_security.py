"""Nothing that comes from outside runs, or writes where it should not."""

import functools
import hashlib
import os
import tarfile

import pytest
import torch
import torchvision
from running import FINISHED


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--pretrained"])
@pytest.mark.parametrize("place", ["format", "args", "state"])
def test_a_malicious_checkpoint_is_refused_and_nothing_in_it_runs(trained, train, tmp_path, flag, place):
    mark, path = tmp_path / "it-ran", tmp_path / "evil" / "checkpoint.pt"
    path.parent.mkdir()
    torch.save(trained.checkpoint() | {place: Payload(mark)}, path)
    others = {"--pretrained": "--dataset digits --depth 8 --prune-method oneshot --sparsity 0.5"}
    bad = train(f"{others.get(flag, '')} {flag} {path}", None, short=False)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "not a whole checkpoint of this program" in bad.err
    assert not mark.exists()


def test_a_malicious_previous_checkpoint_is_refused_too(train, unfinished, tmp_path):
    mark = tmp_path / "it-ran"
    (unfinished.directory / "checkpoint.pt").write_bytes(b"damaged")
    torch.save({"format": Payload(mark)}, unfinished.directory / "previous.pt")
    assert train(f"{FINISHED} --resume auto").code == 2
    assert not mark.exists()


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python cannot filter: the checksum alone guards")
def test_an_archive_that_writes_outside_its_directory_is_refused(train, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("place", ["args", "data", "state", "state.model", "state.pruner", "state.optimizer"])
def test_a_checkpoint_without_one_of_its_parts_is_refused_with_a_sentence(trained, train, tmp_path, flag, place):
    path = tmp_path / "part" / "checkpoint.pt"
    path.parent.mkdir()
    checkpoint = trained.checkpoint()
    *outer, name = place.split(".")
    functools.reduce(dict.__getitem__, outer, checkpoint)[name] = {} if outer else []
    torch.save(checkpoint, path)
    refused = train(f"{flag} {path}", None, short=False)
    if (flag, place) == ("--evaluate", "state.optimizer"):  # which nobody looks at then
        assert refused.code == 0
        return
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "checkpoint" in refused.err


def test_a_deeply_nested_sparsity_file_is_refused_with_a_sentence(train, tmp_path):
    path = tmp_path / "deep.yaml"
    path.write_text("[" * 3000)
    bad = train(f"--prune-method random --sparsity-config {path} --epochs 1")
    assert (bad.code, bad.err.count("\n")) == (2, 1)


def test_code_in_a_sparsity_file_does_not_run(train, tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(f"prune_ratios: !!python/object/apply:os.mkdir ['{tmp_path / 'it-ran'}']\n")
    bad = train(f"--prune-method random --sparsity-config {path} --epochs 1")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert not (tmp_path / "it-ran").exists()
