"""An exported file holds the network: it computes the same, with and without this program, and its size is told.

Tests are skipped without the packages of requirements-export.txt that they need.
"""

import json
import re
import shutil
import subprocess
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import FINISHED, same

from analysis import export
from experiment.flags import parse, plain, resolve
from experiment.load import load
from imagedata.sources import load_dataset
from models import build_model
from prune import Pruner
from training.checkpoint import save_checkpoint
from training.state import TrainState
from utils.errors import TrainingError

# It has no torch and nothing of this program, only ONNX Runtime and what that needs.
CLASSIFY = """
import json, sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
test = np.load(sys.argv[2])
logits = [session.run(None, {"images": part})[0] for part in (test["images"][:1], test["images"][1:])]
classes = json.loads(session.get_modelmeta().custom_metadata_map["data"])["classes"]
right = [classes[label] for label in np.concatenate(logits).argmax(1)] == np.array(classes)[test["labels"]]
assert "torch" not in sys.modules
print(100 * right.mean())
"""


@pytest.fixture(scope="module")
def run(run_once):
    """A finished run in float32, as exported networks compute."""
    return run_once(f"{FINISHED} --precision fp32")


@pytest.fixture
def command(tmp_path, capsys):
    """command(path, "--flag value ...") exports a network into tmp_path; returns exit code, output, errors and the file."""

    def call(path, flags="", name="network"):
        output = tmp_path / name
        code = export.main([str(path), *flags.split(), "--output", str(output)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err, output

    return call


def need(*packages):
    for package in packages:
        pytest.importorskip(package)


def test_a_safetensors_file_loads_as_the_checkpoint_it_was_made_of(run, command, train):
    need("safetensors", "zstandard")
    code, out, err, file = command(run.directory, name="network.safetensors")
    assert (code, err) == (0, "")
    whole, loaded = load(run.directory), load(file)
    same(dict(loaded.model.state_dict()), dict(whole.model.state_dict()))
    same(loaded.masks.state_dict(), whole.masks.state_dict())
    for name in ("classes", "args", "metrics", "data"):
        assert getattr(loaded, name) == getattr(whole, name)
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(loaded.model(loaded.normalize(images)), whole.model(whole.normalize(images)))
    bytes_of = {
        row: int(n.replace(",", "")) for row, n in re.findall(r"^(\S.*?)  +([\d,]+) +[\d.]+%$", out, re.MULTILINE)
    }
    dense = sum(tensor.nbytes for tensor in whole.model.state_dict().values())
    assert bytes_of["network.safetensors"] == file.stat().st_size
    assert bytes_of["all weights as float32"] == dense
    assert dense > bytes_of["the same, gzip -6"] >= bytes_of["the same, zstd -12"] > dense / 10
    evaluated = train(f"--evaluate {file}", None, short=False)
    assert f"test top-1 {run.json('result.json')['test_top1']:.2f}%" in evaluated.out
    again = train(f"--epochs 1 --lr 1e-30 --pretrained {file} --keep-masks")
    assert (again.code, again.json("result.json")["sparsity"]) == (0, run.json("result.json")["sparsity"])
    assert command(file, name="again.safetensors")[3].stat().st_size == file.stat().st_size


def test_an_onnx_file_classifies_with_onnx_runtime_alone_as_the_run_did(run, command, tmp_path):
    need("onnx", "onnxscript", "onnxruntime")
    code, out, err, file = command(run.directory / "checkpoint.pt", "--format onnx")
    assert (code, err) == (0, "")
    difference = re.search(
        r"compared on 355 test images of digits: the same top-1 for all, logits within (\S+)$", out, re.M
    )
    assert float(difference[1]) <= 1e-4
    assert str(export.__file__).encode().rsplit(b"/", 2)[0] not in file.read_bytes()
    test = load_dataset("digits").test
    np.savez(tmp_path / "test.npz", images=test.pixels.permute(0, 3, 1, 2).numpy(), labels=test.labels.numpy())
    venv.create(tmp_path / "empty")
    (packages,) = (tmp_path / "empty").glob("lib/python*/site-packages")
    for name in ("numpy", "numpy.libs", "onnxruntime"):  # as pip would install them, without a network
        source = Path(np.__file__).parents[1] / name
        if source.exists():
            (packages / name).symlink_to(source)
    python = tmp_path / "empty" / "bin" / "python"
    done = subprocess.run([python, "-I", "-c", CLASSIFY, file, tmp_path / "test.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(run.json("result.json")["test_top1"])


@pytest.mark.parametrize(
    ("format", "arch", "depth", "width", "channels"),
    [
        ("onnx", "resnet", 8, 0.25, 3),
        ("onnx", "vgg", 16, 0.0625, 3),
        ("onnx", "wideresnet", 10, 0.25, 3),
        ("onnx", "mobilenet", 28, 0.0625, 1),
        ("onnx", "vit", 1, 0.34, 3),
        ("pt2", "wideresnet", 10, 0.25, 1),
        ("pt2", "vit", 1, 0.34, 3),
    ],
)
def test_every_family_is_exported_and_compared_on_random_images(
    command, tmp_path, arch, depth, width, channels, format
):
    need(*(("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()))
    torch.manual_seed(0)
    model = build_model(arch, depth, 7, width, channels)
    flags = f"--arch {arch} --depth {depth} --width {width} --dataset cifar10 --data-dir {tmp_path}/none"
    args = plain(resolve(parse(flags.split())[0]))
    data = {"classes": list("abcdefg"), "mean": [120.0] * channels, "deviation": [60.0] * channels, "fingerprint": ""}
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), Pruner(model))
    save_checkpoint(tmp_path / "checkpoint.pt", state, args, data | {"image_shape": [channels, 13, 16]})
    code, out, err, file = command(tmp_path, f"--format {format}")
    assert (code, err) == (0, "")
    assert "compared on 250 random images, since those of the run are not at hand: the same top-1 for all" in out
    assert file.stat().st_size > 4 * sum(p.numel() for p in model.parameters())


def test_a_file_that_the_runtime_cannot_open_is_one_sentence(trained, tmp_path, monkeypatch, capsys):
    def broken(content):
        raise RuntimeError("no kernel for this node\nand more")

    monkeypatch.setitem(export.FORMATS, "pt2", replace(export.FORMATS["pt2"], open=broken))
    assert export.main([str(trained.directory), "--output", str(tmp_path / "a.pt2")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: torch ")
    assert "as pt2 (RuntimeError: no kernel for this node): take another --format\n" in err
    assert list(tmp_path.glob("*.pt2")) == []


def test_a_file_of_torch_export_computes_the_same_and_tells_its_classes(run, command):
    code, _, err, file = command(run.directory, "--format pt2")
    assert (code, err) == (0, "")
    about = {"data.json": ""}
    program = torch.export.load(file, extra_files=about)
    assert json.loads(about["data.json"])["classes"] == list("0123456789")
    trained, images = load(run.directory), torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    for part in (images, images[:1]):
        torch.testing.assert_close(program.module()(part), trained.model(trained.normalize(part)), rtol=0, atol=1e-4)


CHANNELS = "--prune-method random --sparsity 0.7 --sparsity-pattern channel --epochs 1"


@pytest.fixture(scope="module", params=["", "--compact"])
def channels(request, run_once):
    """A finished run in which whole channels are dead, trained masked and compacted."""
    return run_once(f"{CHANNELS} {request.param}")


def test_masks_of_channels_are_exported_and_loaded(channels, command):
    need("safetensors", "zstandard")
    code, _, err, file = command(channels.directory, "--format safetensors")
    assert (code, err) == (0, "")
    saved, loaded = load(channels.directory), load(file)
    same(loaded.masks.state_dict(), saved.masks.state_dict())
    same(dict(loaded.model.state_dict()), dict(saved.model.state_dict()))
    assert loaded.masks.other_masks


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_compacted_file_is_smaller_and_computes_what_the_masked_network_does(channels, command, format):
    need(*(("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()))
    whole = command(channels.directory, f"--format {format}", "whole")[3]
    code, out, err, file = command(channels.directory, f"--format {format} --compact")
    assert (code, err) == (0, "")
    assert "compared on 355 test images of digits: the same top-1 for all" in out
    gone = 4 * (channels.json("result.json")["parameters"] - channels.json("result.json")["parameters_compacted"])
    assert whole.stat().st_size - file.stat().st_size > 0.98 * gone > 0
    trained, images = load(channels.directory), torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    with torch.inference_mode():
        logits = trained.model(trained.normalize(images)).numpy()
        written = export.FORMATS[format].open(file.read_bytes())(images.numpy())
    np.testing.assert_allclose(written, logits, rtol=0, atol=1e-4)


def test_compact_is_refused_where_it_has_no_effect(trained_runs, command):
    code, _, err, file = command(trained_runs.checkpoint(0), "--format pt2 --compact")
    assert (code, err.count("\n")) == (2, 1)
    assert "--compact has no effect: the masks of this network leave no channel dead" in err
    assert "--compact has no effect on safetensors" in command(trained_runs.checkpoint(0), "--compact")[2]
    assert not file.exists()


def test_flags_that_would_have_no_effect_are_refused(trained_runs, command, tmp_path):
    code, _, err, _ = command(trained_runs.checkpoint(0), f"--data-dir {tmp_path}")
    assert (code, err.count("\n")) == (2, 1)
    assert "--data-dir has no effect on safetensors" in err
    for arch in ("resnet", "vgg", "own.py:network"):
        code, _, err, _ = command(trained_runs.checkpoint(0), f"--format pt2 --arch {arch}")
        assert (code, err.count("\n")) == (2, 1)
        assert "is of --arch resnet" in err


def test_test_images_are_those_of_the_run_where_they_are_at_hand(trained_runs, command, tmp_path):
    network = trained_runs.checkpoint(0)
    moved = shutil.copytree(trained_runs.images, tmp_path / "images")
    assert "compared on 15 test images of folder" in command(network, f"--format pt2 --data-dir {moved}")[1]
    checkpoint = torch.load(network)
    checkpoint["args"]["data_dir"] = str(tmp_path / "gone")
    torch.save(checkpoint, tmp_path / "gone.pt")
    assert "compared on 250 random images" in command(tmp_path / "gone.pt", "--format pt2")[1]
    del checkpoint["data"]["image_shape"]  # as in older ones
    torch.save(checkpoint, tmp_path / "older.pt")
    code, out, err, _ = command(tmp_path / "older.pt", "--format pt2", "older.pt2")
    assert (code, out) == (2, "")
    assert err == "error: the checkpoint does not tell how large its images are: give their directory by --data-dir\n"
    assert not (tmp_path / "older.pt2").exists()
    assert "compared on 15 test images" in command(tmp_path / "older.pt", f"--format pt2 --data-dir {moved}")[1]


@pytest.mark.parametrize(
    ("flags", "name", "words"),
    [
        ("--format onnx", "x.pt2", "--format onnx and --output '.*x.pt2' contradict each other"),
        ("--format pt2 --data-dir absent", "x", "'absent/train' does not exist"),
        ("--format pt2", "checkpoint.pt/x", "cannot write to '.*checkpoint.pt'"),
        ("--format pt2", "another.pt", r"another.pt' does not end in .pt2, as what"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_a_sentence(trained_runs, command, tmp_path, flags, name, words):
    for copy in ("checkpoint.pt", "another.pt"):
        shutil.copy(trained_runs.checkpoint(0), tmp_path / copy)
    before = sorted(tmp_path.iterdir())
    code, out, err, _ = command(tmp_path, flags, name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(words, err)
    assert sorted(tmp_path.iterdir()) == before


def test_a_directory_of_images_is_refused_for_a_data_set_that_has_none(trained, command, tmp_path):
    code, _, err, _ = command(trained.directory, f"--format pt2 --data-dir {tmp_path}")
    assert code == 2
    assert err == "error: --data-dir has no effect on a network of digits, which has no directory: leave it out\n"


def test_a_network_is_not_written_over_itself(trained_runs, command, tmp_path):
    shutil.copy(trained_runs.checkpoint(0), tmp_path / "network")
    code, _, err, _ = command(tmp_path / "network", "--format pt2")
    assert (code, err) == (2, f"error: '{tmp_path}/network' is the network itself: name another file by --output\n")


def test_a_file_that_computes_something_else_is_not_written():
    network, images = torch.nn.Flatten(), torch.arange(12, dtype=torch.uint8).view(3, 4, 1, 1)
    right = images.flatten(1).float().numpy()

    def answers(logits):
        position = iter((slice(0, 1), slice(1, 3)))
        return lambda part: logits[next(position)]

    assert export.compare(network, answers(right), images) == 0
    assert export.compare(network, answers(right + 5e-4), images) == pytest.approx(5e-4, rel=0.01)  # beside 11
    for wrong in (right + 5e-3, right[:, ::-1].copy(), right * np.nan):
        with pytest.raises(TrainingError, match="the file would compute something else: logits differ by up to"):
            export.compare(network, answers(wrong), images)
