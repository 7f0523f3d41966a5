"""Weights of other programs begin a training where names and shapes fit, and are refused with a sentence elsewhere."""

import pickle
import re
from collections import OrderedDict

import pytest
import torch
from running import same
from torch import nn

from models import build_model
from training.foreign import fitting, read_state_dict
from utils.errors import UsageError

STILL = "--epochs 1 --lr 1e-30 --momentum 0 --weight-decay 0 --precision fp32"  # weights stay as they began


@pytest.fixture(scope="module")
def model():
    """The network of DIGITS in tests/running.py."""
    torch.manual_seed(1)
    return build_model("resnet", 8, 10, 0.25, in_channels=1)


def prefixed(state, prefix):
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": prefixed(state, "module."), "optimizer": {"lr": 0.1}},
        lambda state: prefixed(state, "module._orig_mod."),
        lambda state: prefixed(state, "_orig_mod.module."),
        lambda state: prefixed(state, "model._orig_mod."),
        lambda state: {**state, "stem.1.num_batches_tracked": torch.tensor(7)},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_read_however_it_was_saved(tmp_path, model, wrap, zipped):
    path = tmp_path / "weights.pth"
    torch.save(wrap(model.state_dict()), path, _use_new_zipfile_serialization=zipped)
    same(fitting(model, read_state_dict(path), path), model.state_dict())


class Wrapped(nn.Module):
    """A network whose own names begin as those that a wrapper adds."""

    def __init__(self, network):
        super().__init__()
        self.model = network


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_names_of_the_network_itself_are_no_prefixes(tmp_path, model, prefix):
    path, own = tmp_path / "weights.pth", Wrapped(model)
    torch.save(prefixed(own.state_dict(), prefix), path)
    same(fitting(own, read_state_dict(path), path), own.state_dict())


def test_a_state_dict_begins_a_training(tmp_path, train, model):
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    run = train(f"{STILL} --pretrained {path}")
    assert run.code == 0, run.err
    trained, began = run.checkpoint()["state"]["model"], dict(model.named_parameters())
    for name, weight in began.items():
        torch.testing.assert_close(trained[name], weight.detach(), rtol=0, atol=1e-20)
    assert run.json("args.json")["args"]["pretrained"] == str(path)


def test_a_state_dict_in_a_safetensors_file_is_read(tmp_path, model):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.save(dict(model.state_dict())))
    same(fitting(model, read_state_dict(path), path), model.state_dict())


@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnet_of_torchvision_computes_here_what_it_computes_there(depth):
    """With the stem for small images, as here."""
    from torchvision.models import resnet18, resnet50

    torch.manual_seed(2)
    theirs = {18: resnet18, 50: resnet50}[depth](num_classes=10)
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    ours = build_model("resnet", depth, 10)
    ours.load_state_dict(fitting(ours, dict(theirs.state_dict()), "there"))
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


def test_a_resnet_with_the_names_of_its_usual_copies_is_read(model):
    theirs = {"stem.0": "conv1", "stem.1": "bn1", "classifier": "linear", "stage": "layer"}
    renamed = {re.sub(r"^(stem\.[01]|classifier|stage)", lambda found: theirs[found[1]], name): tensor
               for name, tensor in model.state_dict().items()}  # fmt: skip
    assert {"conv1.weight", "bn1.running_var", "layer2.0.shortcut.0.weight", "linear.bias"} <= renamed.keys()
    same(fitting(model, renamed, "there"), model.state_dict())


def test_weights_that_do_not_fit_are_refused_and_the_first_differences_named(tmp_path, train, model):
    from torchvision.models import resnet18

    cases = {
        "imagenet.pth": (
            dict(resnet18().state_dict()),
            "--depth 18 --width 1",
            "stem.0.weight is 64x3x7x7 there and 64x1x3x3 here; classifier.weight is 1000x512 there and 10x512 here; "
            "classifier.bias is 1000 there and 10 here: give their --arch",
        ),
        "named.pth": (
            prefixed(model.state_dict(), "backbone."), "",
            "stem.0.weight is not there; stem.1.weight is not there; stem.1.bias is not there and",
        ),
        "longer.pth": ({**model.state_dict(), "head.weight": torch.zeros(3)}, "", "network: head.weight is not in this"),
    }  # fmt: skip
    for name, (state, flags, words) in cases.items():
        torch.save(state, tmp_path / name)
        refused = train(f"--epochs 1 {flags} --pretrained {tmp_path / name}")
        assert (refused.code, refused.err.count("\n"), refused.out) == (2, 1, "")
        assert words in refused.err


def test_weights_for_a_folder_of_images_are_compared_once_its_classes_are_known(model):
    with pytest.raises(UsageError, match="classifier.weight is 10x16 there and 3x16 here"):
        fitting(build_model("resnet", 8, 3, 0.25, in_channels=1), dict(model.state_dict()), "there")


def test_masks_are_not_kept_of_weights_that_have_none(tmp_path, train, model):
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    refused = train(f"--epochs 1 --keep-masks --pretrained {tmp_path / 'weights.pth'}")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--keep-masks has no effect: the file of --pretrained has no masks" in refused.err


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        import os

        return (os.mkdir, (str(self.mark),))


def test_files_with_anything_except_tensors_are_refused_and_nothing_in_them_runs(tmp_path, train, model):
    mark = tmp_path / "it-ran"
    torch.save({"state_dict": model.state_dict(), "extra": Payload(mark)}, tmp_path / "zip.pth")
    torch.save(Payload(mark), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Payload(mark)))
    torch.save(model, tmp_path / "model.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    for path in sorted(tmp_path.glob("*.pth")):
        refused = train(f"--epochs 1 --pretrained {path}")
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "what torch.save(model.state_dict(), FILE) writes is read as well" in refused.err
    assert not mark.exists()
