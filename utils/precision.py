"""How a network computes: in which precision, and compiled or not. Every `auto` is resolved here, once per run."""

import copy
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from utils.errors import TrainingError, UsageError

PRECISIONS = ("fp32", "bf16", "fp16")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Seconds that compilation takes with nothing cached, and seconds that it saves per step and FLOP of the step. Measured
# (docs/performance.md) with ResNet-20 on an H100, and with four ResNets on two cores of a CPU with AMX (their median), which
# multiplies so fast that the rest of a step counts. On other CPUs compilation saved nothing beyond noise, except of networks
# without dead channels, in which little else is left: here the FLOPs are those of the whole network.
COMPILATION = {"cuda": (25.0, 1.5e-14), "amx": (35.0, 2.8e-13), "compacted": (30.0, 2e-13)}

# Of torch.compile. On CUDA launches count: small independent kernels, such as conversions of weights, become one. On CPUs a
# kernel that writes bf16 into the buffer it reads from is slow: each load waits for the overlapping store before it.
OPTIONS: dict[str, dict] = {"cuda": {"combo_kernels": True}, "cpu": {"inplace_buffers": False}}

# From so many FLOPs per step on, launching kernels one by one is no slower than running them, and a graph would only take
# memory.
GRAPHED_BELOW = 1e12


@dataclass(frozen=True)
class Execution:
    """The precision of the forward pass, and how kernels are launched. Weights, gradients and optimizer are in float32.

    Attributes:
        precision: one of PRECISIONS.
        compiled: whether by torch.compile.
        graphed: whether a training step is one CUDA graph.
    """

    precision: str = "fp32"
    compiled: bool = False
    graphed: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(device.type, HALF.get(self.precision), enabled=self.precision in HALF)

    def compile(self, function: Callable, rows: int) -> Callable:
        """Return the function, compiled for a first argument of so many rows; other sizes run as they are.

        Raises:
            TrainingError: the first call found that it cannot be compiled.
        """
        if not self.compiled:
            return function
        from torch._dynamo.exc import TorchDynamoException  # here: a second of start-up

        def own(*arguments: object) -> object:
            return function(*arguments)

        # Torch keeps what it compiled with a function's code, eight times at most, and does not compile what comes after:
        # each function gets a copy of the code.
        own.__code__ = own.__code__.replace()
        fast = None

        def run(first: torch.Tensor, *others: object) -> object:
            nonlocal fast
            if len(first) != rows:
                return function(first, *others)
            if fast is None:
                fast = torch.compile(own, dynamic=False, options=OPTIONS.get(first.device.type))
            try:
                return fast(first, *others)
            except TorchDynamoException as error:
                line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise TrainingError(f"the network could not be compiled ({line}): give --compile off") from error

        return run

    def __str__(self) -> str:
        text = f"{self.precision}, {'compiled' if self.compiled else 'not compiled'}"
        return f"{text}, a CUDA graph a step" if self.graphed else text


def resolve_execution(
    precision: str,
    compilation: str,
    device: torch.device,
    step_flops: float = 0.0,
    steps: int = 0,
    deterministic: bool = False,
    cpu_kernels: Callable[[], str] = lambda: "fast",
    watched: bool = False,
    compacted: bool = False,
) -> Execution:
    """Resolve --precision and --compile for a device and a run.

    `auto` is bf16 where that is faster, and compilation where it saves more time than it takes.

    Args:
        precision: auto, or one of PRECISIONS.
        compilation: auto, on or off.
        device: where the run computes.
        step_flops: of a training step.
        steps: of the run.
        deterministic: results may not depend on what was tuned when.
        cpu_kernels: returns what `bf16_on_cpu` says of the network; is called only where that matters.
        watched: the host looks at every step's gradient, which no graph can hold (in fp16 it always does), other
            processes take part, or a step draws random numbers.
        compacted: the network trains without its dead channels.

    Raises:
        UsageError: what is asked for by name is not possible here.
    """
    kernels = cache(cpu_kernels) if device.type == "cpu" else lambda: "fast"
    if precision == "bf16" and kernels() == "wrong":
        raise UsageError(
            "bf16 on a CPU gives wrong gradients where a convolution with a stride meets a map of one pixel, as in this "
            "network with images of this size: give --precision fp32, or larger images"
        )
    if precision == "auto":
        precision = "bf16" if gains_from_bf16(device) and kernels() == "fast" else "fp32"
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions: it is not what fp32 says
    if compilation == "on":
        refuse_uncompilable(device)
    if compilation == "auto":
        kind = device.type
        if kind == "cpu":
            kind = "amx" if has_amx(device) else "compacted" if compacted else kind
        takes, saves = COMPILATION.get(kind, (math.inf, 0.0))
        # MobileNet, whose depthwise kernels are slow in bf16, gets slower by compilation in fp32 as well.
        worthwhile = steps * step_flops * saves > takes and kernels() == "fast"
        compilation = "on" if worthwhile and not (what_compilation_lacks(device) or deterministic) else "off"
    graphed = device.type == "cuda" and step_flops < GRAPHED_BELOW and precision != "fp16" and not watched
    return Execution(precision, compilation == "on", graphed)


def has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies in bf16; one that only emulates it is ten times slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(_processor() & {"avx512_bf16", "amx_bf16"})


def has_amx(device: torch.device) -> bool:
    """Return whether the device is a CPU with AMX, which multiplies matrices in bf16 (Intel, since Sapphire Rapids)."""
    return device.type == "cpu" and "amx_bf16" in _processor()


def gains_from_bf16(device: torch.device) -> bool:
    """Return whether training is faster in bf16, as measured (docs/performance.md): on GPUs, AMD's CPUs, and with AMX.

    With AVX512-BF16 alone Intel's CPUs are slower in bf16 than in float32. ONEDNN_MAX_CPU_ISA is not taken into account.
    """
    return has_bf16(device) and (device.type == "cuda" or has_amx(device) or "AuthenticAMD" in _processor())


def _processor() -> set[str]:
    """Return the words that Linux has about the processor; none elsewhere."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def bf16_on_cpu(model: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """Return what torch's bf16 kernels for CPUs are for a network on images [C, H, W]: "wrong", "slow" or "fast".

    They are wrong where a convolution with a stride meets a map of one pixel: they read memory that nobody wrote, and now
    and then a weight's gradient has any size. They are slow where a depthwise convolution has a stride: its backward pass
    takes fifteen times as long as in float32. (Both seen with torch 2.14.1.)
    """
    found = set()

    def look(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        assert isinstance(module, nn.Conv2d)
        if max(module.stride) > 1 and max(inputs[0].shape[2:]) == 1:
            found.add("wrong")
        if max(module.stride) > 1 and module.groups > 1:
            found.add("slow")

    shadow = copy.deepcopy(model).to("meta").eval()
    for module in shadow.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(look)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = lambda inputs: inputs  # type: ignore[method-assign, assignment]  # itself slow on meta
    shadow(torch.zeros(1, *image_shape, device="meta"))
    return next((kind for kind in ("wrong", "slow") if kind in found), "fast")


def refuse_uncompilable(device: torch.device) -> None:
    """Raise UsageError where this machine lacks what torch.compile needs."""
    if missing := what_compilation_lacks(device):
        raise UsageError(f"--compile on needs {missing}: install it, or give --compile off")


def what_compilation_lacks(device: torch.device) -> str | None:
    """Return what torch.compile needs and this machine lacks, or None."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        return f"a C++ compiler ('{compiler}' is not there)"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "a GPU of compute capability 7.0"
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton"
    return None
