"""Precision and compilation: what `auto` comes to, and that neither changes what is computed."""

import copy
from collections.abc import Callable

import pytest
import torch
from running import NEEDS_COMPILER, SMALL
from torch import Tensor, nn

from models import build_model
from training.step import build_objective
from utils.errors import TrainingError, UsageError
from utils.precision import Execution, bf16_on_cpu, gains_from_bf16, has_bf16, resolve_execution

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("faster", [True, False])
def test_auto_takes_bf16_only_where_it_is_faster(machine, faster):
    machine("AuthenticAMD avx512_bf16" if faster else "AuthenticAMD avx2", capability=(8, 0) if faster else (7, 0))
    for device in (CPU, CUDA):
        assert resolve_execution("auto", "off", device).precision == ("bf16" if faster else "fp32")
    assert resolve_execution("fp32", "off", CPU).precision == "fp32"
    assert resolve_execution("bf16", "off", CPU).precision == "bf16"


def test_auto_compiles_only_what_saves_more_time_than_it_takes(machine):
    machine("AuthenticAMD avx512_bf16")
    resnet20 = 128 * 244e6  # FLOPs of a step
    assert resolve_execution("auto", "auto", CUDA, resnet20, steps=160 * 391).compiled
    assert not resolve_execution("auto", "auto", CUDA, resnet20, steps=391).compiled
    assert not resolve_execution("auto", "auto", CUDA, resnet20, steps=160 * 391, deterministic=True).compiled
    assert not resolve_execution("auto", "off", CUDA, resnet20, steps=160 * 391).compiled
    assert resolve_execution("auto", "on", CUDA, resnet20, steps=1, deterministic=True).compiled
    assert not resolve_execution("auto", "auto", CPU, resnet20, steps=160 * 391).compiled
    assert resolve_execution("auto", "on", CPU, resnet20, steps=1).compiled
    assert resolve_execution("auto", "auto", CPU, resnet20, steps=160 * 391, compacted=True).compiled
    assert not resolve_execution("auto", "auto", CPU, resnet20, steps=391, compacted=True).compiled
    machine("GenuineIntel amx_bf16")
    assert resolve_execution("auto", "auto", CPU, resnet20, steps=30 * 391).compiled
    assert not resolve_execution("auto", "auto", CPU, resnet20, steps=3 * 391).compiled
    assert resolve_execution("fp32", "auto", CPU, resnet20, steps=30 * 391).compiled
    assert not resolve_execution("auto", "auto", CPU, resnet20, steps=30 * 391, cpu_kernels=lambda: "slow").compiled
    assert not resolve_execution("auto", "auto", CUDA, resnet20, steps=30 * 391).compiled


def test_without_a_compiler_auto_does_not_compile_and_on_is_refused(machine):
    machine(compiler="no-such-compiler")
    assert not resolve_execution("auto", "auto", CUDA, 1e12, steps=10**6).compiled
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        resolve_execution("auto", "on", CPU)


@pytest.mark.parametrize(
    ("vendor", "flags", "has", "gains"),
    [
        ("AuthenticAMD", "fpu avx2", False, False),
        ("AuthenticAMD", "avx512f avx512_bf16", True, True),
        ("GenuineIntel", "avx512f avx512_bf16", True, False),
        ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", True, True),
    ],
)
def test_bf16_on_a_cpu_depends_on_its_maker_and_its_features(machine, vendor, flags, has, gains):
    machine(f"vendor_id\t: {vendor}\nflags\t\t: {flags}\n")
    assert (has_bf16(CPU), gains_from_bf16(CPU)) == (has, gains)


def gradients(model: nn.Module, execution: Execution, micro_batch: int, inputs: Tensor) -> tuple:
    """Return loss and sums of the objective, and the gradients and buffers that it leaves in a copy of the model."""
    model = copy.deepcopy(model)
    objective = build_objective(model, execution, micro_batch)
    targets = torch.rand(len(inputs), 10, generator=torch.Generator().manual_seed(1)).softmax(1)
    loss, sums = objective(inputs, targets, micro_batch)
    loss.backward()
    return loss, sums, [p.grad for p in model.parameters()], list(model.buffers())


@NEEDS_COMPILER
@pytest.mark.parametrize("rows", [96, 90], ids=["whole", "rest"])
def test_a_compiled_objective_is_the_same_function(rows, tmp_path):
    """The network and batches are those of the compiled run of test_main_prune_train.py: both are compiled once."""
    torch.manual_seed(0)
    (tmp_path / "small.py").write_text(SMALL)
    model = build_model(f"{tmp_path}/small.py:build", None, 10, in_channels=1, image_size=(8, 8))
    model.to(memory_format=torch.channels_last)
    inputs = torch.randn(rows, 1, 8, 8).to(memory_format=torch.channels_last)
    plain, compiled = (gradients(model, Execution(compiled=c), 96, inputs) for c in (False, True))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    assert plain[0].item() == pytest.approx(plain[1][0].item() / 96)


@NEEDS_COMPILER
def test_every_function_is_compiled_however_many_there_are():
    """Torch by itself stops after eight of the same code."""

    def build() -> Callable:
        return Execution(compiled=True).compile(lambda x: x + torch.compiler.is_compiling(), 3)

    assert [build()(torch.zeros(3)).tolist() for _ in range(10)] == [[1.0] * 3] * 10


@NEEDS_COMPILER
def test_a_broken_compiler_is_reported_with_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    broken = Execution(compiled=True).compile(lambda x: x.sin() + 1, 3)
    with torch._inductor.config.patch({"cpp.cxx": (None, "/bin/false")}), pytest.raises(TrainingError) as error:
        broken(torch.zeros(3))
    assert "the network could not be compiled" in str(error.value)
    assert "\n" not in str(error.value)


def test_bf16_rounds_the_forward_pass_and_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    inputs = torch.randn(6, 3, 8, 8)
    exact, rounded = (gradients(model, Execution(precision), 6, inputs) for precision in ("fp32", "bf16"))
    assert not torch.equal(exact[0], rounded[0])
    torch.testing.assert_close(rounded[0], exact[0], rtol=0.02, atol=0)
    assert all(g.dtype == torch.float32 for g in rounded[2])
    assert all(buffer.dtype == torch.float32 for buffer in rounded[3] if buffer.is_floating_point())
    for e, r in zip(exact[2], rounded[2], strict=True):
        if e.ndim > 1:  # a bias before batch norm has no gradient but rounding
            assert torch.cosine_similarity(e.flatten(), r.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("arch", "size", "kernels"), [("mobilenet", 8, "wrong"), ("mobilenet", 32, "slow"), ("resnet", 32, "fast")]
)
def test_auto_avoids_bf16_where_its_cpu_kernels_are_wrong_or_slow(machine, arch, size, kernels):
    machine("AuthenticAMD avx512_bf16")
    assert bf16_on_cpu(build_model(arch, {"mobilenet": 28, "resnet": 8}[arch], 10, 0.25), (3, size, size)) == kernels
    expected = "bf16" if kernels == "fast" else "fp32"
    assert resolve_execution("auto", "off", CPU, cpu_kernels=lambda: kernels).precision == expected
    assert resolve_execution("auto", "off", CUDA, cpu_kernels=lambda: kernels).precision == "bf16"
    if kernels != "wrong":
        assert resolve_execution("bf16", "off", CPU, cpu_kernels=lambda: kernels).precision == "bf16"
        return
    with pytest.raises(UsageError, match="larger images"):
        resolve_execution("bf16", "off", CPU, cpu_kernels=lambda: kernels)


def test_how_kernels_are_is_asked_only_where_it_decides_something(machine):
    machine("AuthenticAMD avx512_bf16")
    asked = []
    for device, precision, compilation in ((CPU, "fp32", "off"), (CPU, "fp32", "auto"), (CUDA, "auto", "auto")):
        resolve_execution(precision, compilation, device, 1e9, 10_000, cpu_kernels=lambda: asked.append(1) or "fast")
    assert not asked
    resolve_execution("auto", "auto", CPU, 1e9, 10_000, cpu_kernels=lambda: asked.append(1) or "fast")
    assert asked == [1]
