"""The benchmark measures what it says it measures."""

import json
import multiprocessing
import time
from dataclasses import replace

import pytest
import torch
from processes import forks
from torch import nn

from benchmarks.baseline import PerTensorSAM
from benchmarks.benchmark import STEP_FLOPS, STEPS, Setting, alternatives, main, usual_loop
from benchmarks.report import Report, interval_of_median, measure
from sam import SAM
from utils.precision import resolve_execution


@pytest.fixture
def forked(monkeypatch):
    """What is measured in a process of its own is forked: that spares it the imports."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)


def test_the_usual_sam_of_the_baseline_trains_like_ours():
    """Or the comparison would be with something else; and it keeps the 4 numbers a parameter that it is known for."""
    models = []
    for kind in ("ours", "usual"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        params = list(model.parameters())
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "rho": 0.3}
        optimizer = SAM(params, torch.optim.SGD, **options) if kind == "ours" else PerTensorSAM(params, **options)
        for _ in range(5):
            optimizer.zero_grad()
            optimizer.first_step()
            inputs, labels = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.second_step()
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert optimizer.floats() == 4 * sum(p.numel() for p in params)


def test_tasks_are_measured_in_turns_after_one_that_does_not_count():
    called = []
    tasks = {"quick": lambda: called.append("q"), "slow": lambda: (called.append("s"), time.sleep(0.02))}
    seconds = measure(3, tasks, torch.device("cpu"))
    assert called == ["q", "s", "s", "q"] * 2  # none always after the same one
    assert [len(samples) for samples in seconds.values()] == [3, 3]
    assert min(seconds["slow"]) >= 0.02 > max(seconds["quick"])


def test_a_report_has_medians_quartiles_and_whether_targets_are_met(capsys):
    report = Report()
    assert report.add("a", [4.0, 1.0, 2.0, 3.0, 100.0], "ms") == 3.0
    assert report.figures["a"]["quartiles"] == [2.0, 4.0]
    report.add("b", [3.1, 3.2, 3.3], "")
    report.add("c", 1.5, "")
    report.target("small", "a", most=1.02)
    report.target("large", "b", least=3.0)
    report.target("one", "c", most=2.0)
    report.show_targets()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "small: 3 (1 to 100, which leaves it open), not met", "large: 3.2 (3.1 to 3.3), met", "one: 1.5, met"
    ]  # fmt: skip


def test_the_interval_of_a_median_is_that_of_order_statistics():
    """From tables of the sign test: 95% between the 6th and the 15th of 20."""
    assert interval_of_median([float(n) for n in range(20, 0, -1)]) == (6.0, 15.0)
    assert interval_of_median([2.0, 1.0]) == (1.0, 2.0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("named", ["fp32", "bf16"])
def test_the_chosen_execution_is_compared_with_every_other_one(tmp_path, machine, device, named):
    machine()
    device = torch.device(device)
    chosen = resolve_execution(named, "auto", device, STEP_FLOPS, STEPS)
    compared = alternatives(Setting(device, chosen, 1, 1, tmp_path))
    assert chosen in compared
    assert chosen.graphed == (device.type == "cuda")
    assert replace(chosen, graphed=False) in compared
    assert any(execution.precision == "fp16" for execution in compared) == (device.type == "cuda")
    alike = {(e.compiled, e.graphed) for e in compared if e.precision == named}
    assert alike >= {(False, chosen.graphed), (True, chosen.graphed)}
    assert len(set(map(str, compared))) == len(compared)  # figures go by name


def test_a_directory_to_write_to_is_refused_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", "--output", str(tmp_path)])
    assert (ended.value.code, "is a directory: name a file" in capsys.readouterr().err) == (2, True)


@forks
def test_the_end_of_the_usual_loop_is_noticed(forked):
    others = set(multiprocessing.active_children())
    with usual_loop(torch.device("cpu"), 128) as run:
        (process,) = set(multiprocessing.active_children()) - others
        process.kill()
        with pytest.raises((EOFError, OSError)):
            run(False, 1)


@forks
def test_the_benchmark_measures_steps_and_writes_what_it_prints(tmp_path, capsys, monkeypatch, forked):
    for module in ("benchmark", "loop"):
        monkeypatch.setattr(f"benchmarks.{module}.BATCH", 16)
    file, others = tmp_path / "out.json", set(multiprocessing.active_children())
    flags = "--device cpu --compile off --turns 1 --steps 1 --depth 8 --parts optimizer steps usual"
    assert main([*flags.split(), "--output", str(file)]) == 0
    assert set(multiprocessing.active_children()) <= others  # the usual loop has ended with whoever asked it
    printed, result = capsys.readouterr().out, json.loads(file.read_text())
    for name in (
        "SAM.v2's own cost / a default SGD step",
        "SAM.v2, this project / the usual loop",
        "a mask update of rigl",
    ):
        assert name in printed
        assert result["figures"][name]["median"] > 0
    assert result["figures"]["numbers a parameter that SAM.v2 with SGD keeps"]["median"] == 2
    for target in result["targets"]:
        assert f"{target['target']}: " in printed
    assert result["versions"]["torch"] == torch.__version__


@forks
def test_the_memory_of_one_step_sam_is_one_buffer_of_parameters(tmp_path, monkeypatch, forked):
    monkeypatch.setattr("benchmarks.benchmark.MEMORY_BATCH", 2)
    assert main(["--device", "cpu", "--output", str(tmp_path / "out.json"), "--parts", "memory"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["figures"]["SAM.v2 over sgd, in buffers of parameters"]["median"] == pytest.approx(1, abs=0.01)
