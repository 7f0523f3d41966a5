"""Rounding in software against autocast, and paired runs."""

import copy
import json
import re
import statistics
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from benchmarks.bf16_accuracy import Rounding, interval, main
from models import build_model


def test_rounding_in_software_strays_from_float64_as_autocast_does():
    """As far and in the same direction: not bit for bit, as sums are taken in another order."""
    torch.manual_seed(0)
    model = build_model("resnet", 8, 10, 0.5).to(memory_format=torch.channels_last)
    inputs = torch.randn(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (64,))

    def gradient(rounding: AbstractContextManager, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        network = copy.deepcopy(model).to(dtype)
        with rounding:
            logits = network(inputs.to(dtype))
        torch.nn.functional.cross_entropy(logits.to(dtype), labels).backward()
        return torch.cat([p.grad.flatten().double() for p in network.parameters()])

    exact = gradient(nullcontext(), torch.float64)
    software, autocast = (gradient(how) - exact for how in (Rounding(), torch.autocast("cpu", torch.bfloat16)))
    assert software.norm() > 1e-3 * exact.norm()
    assert autocast.norm().item() == pytest.approx(software.norm().item(), rel=0.1)
    assert torch.cosine_similarity(autocast, software, dim=0) > 0.9


def test_the_interval_is_students():
    centre, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert centre == 3
    assert half == pytest.approx(2.776445 * statistics.stdev([1, 2, 3, 4, 5]) / 5**0.5, rel=1e-6)


def test_pairs_of_runs_differ_in_precision_alone(tmp_path, capsys):
    command = f"--seeds 3 4 --device cpu --output-dir {tmp_path} --dataset digits --depth 8 --width 0.5 --epochs 2"
    assert main(command.split()) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    results = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("*/result.json")}
    assert results.keys() == {"fp32-seed3", "bf16-seed3", "fp32-seed4", "bf16-seed4"}
    differing = {
        name for name, value in results["fp32-seed3"]["args"].items() if results["bf16-seed3"]["args"][name] != value
    }
    assert differing == {"precision", "output_dir"}
    expected = statistics.mean(
        results[f"bf16-seed{s}"]["test_top1"] - results[f"fp32-seed{s}"]["test_top1"] for s in (3, 4)
    )
    assert float(re.search(r"fp32: ([+-][\d.]+) points", last)[1]) == pytest.approx(expected, abs=0.006)
    assert results["bf16-seed3"]["test_loss"] != results["fp32-seed3"]["test_loss"]
    assert main(command.split()) == 0  # finished runs are not run again
    assert capsys.readouterr().out.count("finished already") == 4


def test_bad_input_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main(["--seeds", "1"])
    assert exit_.value.code == 2
    assert main(["--depth", "21", "--output-dir", str(tmp_path / "none")]) == 2
    assert "depth 6n+2" in capsys.readouterr().err
