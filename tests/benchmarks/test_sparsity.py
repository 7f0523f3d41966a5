"""The benchmark of sparse networks measures each form of a network, and writes what it found where it is told to."""

import json
import multiprocessing
import re

import pytest
import torch

from benchmarks.sparsity import BEGIN, END, Setting, forms, main, peak_memory
from utils.precision import Execution

SMALL = "--depth 8 --width 0.25 --device cpu --precision fp32 --compile off --batch 4 --turns 2"


@pytest.fixture(scope="module")
def networks():
    setting = Setting(("resnet", 8, 1), torch.device("cpu"), Execution(), Execution(), 1, 2)
    return {form.name: form for form in forms(setting, ["unstructured", "channel", "2:4"], [0.5, 0.9])}


def test_each_pattern_is_there_masked_and_compacted_at_each_sparsity(networks):
    sparse = [f"{pattern}, {kind}" for pattern in ("unstructured 50%", "unstructured 90%", "channel 50%", "channel 90%", "2:4")
              for kind in ("masked", "compacted")]  # fmt: skip
    assert list(networks) == ["dense", *sparse]
    assert networks["unstructured 90%, masked"].sparsity == pytest.approx(0.9, abs=1e-3)
    assert networks["2:4, masked"].sparsity == pytest.approx(0.5, abs=0.01)
    for share in (50, 90):  # of channels: 0.9 of 16 is 14
        assert networks[f"channel {share}%, compacted"].gone == pytest.approx(share / 100, abs=0.03)


def test_bytes_are_those_of_living_weights_and_bits_or_of_the_small_network(networks):
    size = {name: form.bytes / networks["dense"].bytes for name, form in networks.items()}
    assert size["unstructured 90%, masked"] == pytest.approx(0.1 + 1 / 32, abs=0.02)  # batch norm is the rest
    small = networks["channel 50%, compacted"].model
    assert networks["channel 50%, compacted"].bytes == sum(t.nbytes for t in small.state_dict().values())
    assert size["channel 50%, compacted"] < 0.3


def test_a_run_writes_table_picture_and_samples(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"above\n\n{BEGIN}old\n{END}below\n")
    files = f"--output {tmp_path}/all.json --picture {tmp_path}/all.png --page {page}"
    flags = f"{SMALL} --patterns unstructured channel --sparsities 0.7 --parts training inference {files}"
    assert main(flags.split()) == 0
    out = capsys.readouterr().out
    text = page.read_text()
    assert text.startswith(f"above\n\n{BEGIN}resnet-8, width 0.25, cpu")
    assert text.endswith(f"{END}below\n")
    rows = re.findall(r"^\| (\S[^|]*?) \| \d", text, re.M)
    torch_rows = [row for row in rows if "ONNX" not in row]
    assert torch_rows == [
        "dense",
        *(f"{p} 70%, {k}" for p in ("unstructured", "channel") for k in ("masked", "compacted")),
    ]
    found = json.loads((tmp_path / "all.json").read_text())
    assert len(found["figures"]["channel 70%, compacted: training step"]["samples"]) == 2
    assert len(found["targets"]) == 3
    assert out.count("at least 2.0 times as fast: ") == 1
    assert (tmp_path / "all.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sparsities 1.5", "--sparsities lie between 0 and 1"),
        ("--turns 0", "--turns has to be a whole number above 0"),
        ("--picture times.txt --output x.json", "--picture: 'times.txt' is no name of a PNG or PDF file"),
        ("--output absent/x.json", "--output: there is no directory 'absent'"),
        ("--arch resnet --depth 9", "depth"),
        ("--page README.md", "has no lines '<!-- written by benchmarks.sparsity -->' and"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(capsys, tmp_path, flags, words):
    with pytest.raises(SystemExit) as ended:
        main(flags.split())
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_peak_memory_is_measured_and_smaller_without_channels(networks, tmp_path):
    setting = Setting(("resnet", 8, 1), torch.device("cpu"), Execution(), Execution(), 1, 8)
    peak = {}
    for name in ("dense", "channel 90%, masked", "channel 90%, compacted"):
        here, there = multiprocessing.Pipe()
        form = networks[name]
        peak_memory(setting, form.model, form.pruner.masks.state_dict(), tmp_path / "trace.json", there)
        peak[name] = here.recv()
    maps = 4 * 8 * 16 * 32 * 32  # bytes of one layer's maps
    assert peak["channel 90%, masked"] >= peak["dense"] > 10 * maps
    assert peak["channel 90%, compacted"] < 0.7 * peak["dense"]
