"""Precision and compilation: what `auto` comes to, and that neither changes what is computed."""

import pytest
import torch
from torch import nn

from models import build_model
from utils import precision
from utils.engine import build_objective
from utils.errors import UsageError
from utils.precision import Execution, choose, strides_over_points

CPU = torch.device("cpu")


@pytest.fixture
def able(monkeypatch):
    """able(bf16, compiler): what the device can do."""

    def set_to(bf16: bool, missing: str | None) -> None:
        monkeypatch.setattr(precision, "has_bf16", lambda device: bf16)
        monkeypatch.setattr(precision, "what_compilation_lacks", lambda device: missing)

    return set_to


@pytest.mark.parametrize("bf16", [True, False])
def test_auto_takes_bf16_only_on_a_gpu_that_computes_in_it(able, bf16):
    able(bf16, None)
    assert choose("auto", "off", CPU).precision == "fp32"
    assert choose("auto", "off", torch.device("cuda")).precision == ("bf16" if bf16 else "fp32")
    assert choose("fp32", "off", CPU).precision == "fp32"
    assert choose("bf16", "off", CPU).precision == "bf16"


def test_auto_compiles_only_what_earns_it_back(able):
    able(True, None)
    resnet20 = 128 * 244e6  # FLOPs of a step
    assert not choose("bf16", "auto", CPU, resnet20, steps=391).compiled
    assert choose("auto", "auto", CPU, resnet20, steps=160 * 391).compiled
    assert not choose("auto", "auto", CPU, resnet20, steps=160 * 391, deterministic=True).compiled
    assert choose("auto", "on", CPU, resnet20, steps=1, deterministic=True).compiled
    assert not choose("auto", "off", CPU, resnet20, steps=160 * 391).compiled
    assert not choose("fp32", "auto", CPU, resnet20, steps=10 * 391).compiled  # it saves a hundredth of a step


def test_without_a_compiler_auto_does_not_compile_and_on_is_refused(able):
    able(False, "a C++ compiler")
    assert not choose("auto", "auto", CPU, 1e12, steps=10**6).compiled
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        choose("auto", "on", CPU)


def test_bf16_reads_the_features_of_the_processor(monkeypatch, tmp_path):
    for flags, expected in (("fpu avx2", False), ("avx512f avx512_bf16", True), ("amx_tile amx_bf16", True)):
        (tmp_path / "cpuinfo").write_text(f"flags\t: {flags}\n")
        monkeypatch.setattr(precision, "Path", lambda _: tmp_path / "cpuinfo")
        assert precision.has_bf16(CPU) is expected


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def gradients(execution: Execution, rows: int, smooth_eps: float = 0.1) -> tuple:
    model = network()
    objective = build_objective(model, execution, micro_batch=6, smooth_eps=smooth_eps)
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 3, 8, 8, generator=g)
    targets = torch.rand(rows, 5, generator=g).softmax(1)
    loss, sums = objective(inputs, targets, 12)
    loss.backward()
    return loss, sums, [p.grad for p in model.parameters()], model[1].running_var


@pytest.mark.parametrize("rows", [6, 4], ids=["whole", "rest"])
def test_a_compiled_objective_is_the_same_function(rows):
    plain, compiled = gradients(Execution(), rows), gradients(Execution(compiled=True), rows)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    assert plain[0].item() == pytest.approx(plain[1][0].item() / 12)


def test_bf16_rounds_the_forward_pass_and_nothing_else():
    exact, rounded = gradients(Execution(), 6), gradients(Execution("bf16"), 6)
    assert not torch.equal(exact[0], rounded[0])
    torch.testing.assert_close(rounded[0], exact[0], rtol=0.02, atol=0)
    assert all(g.dtype == torch.float32 for g in rounded[2])
    assert rounded[3].dtype == torch.float32
    for e, r in zip(exact[2], rounded[2], strict=True):
        if e.ndim > 1:  # a bias before batch norm has no gradient but rounding
            assert torch.cosine_similarity(e.flatten(), r.flatten(), dim=0) > 0.99


def test_bf16_on_a_cpu_is_left_alone_where_its_gradients_are_wrong(able):
    able(True, None)
    model = build_model("mobilenet", 28, 10, 0.25)
    assert strides_over_points(model, (3, 8, 8))
    assert not strides_over_points(model, (3, 32, 32))
    assert choose("auto", "off", CPU, strided_points=True).precision == "fp32"
    assert choose("bf16", "off", CPU, strided_points=False).precision == "bf16"
    with pytest.raises(UsageError, match="larger images"):
        choose("bf16", "off", CPU, strided_points=True)
