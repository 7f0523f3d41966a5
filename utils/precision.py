"""How a network computes: in which precision, and compiled or not. Every `auto` is resolved here, once a run."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._dynamo.exc import TorchDynamoException

from utils.errors import TrainingError, UsageError

PRECISIONS = ("fp32", "bf16")

# For a step of so many FLOPs: seconds that compilation takes with nothing cached, and seconds a step that it then saves.
# In fp32 on a CPU it saves too little to count on (BENCHMARKS.md: 2%). The other savings are estimates, of the conversions
# that bf16 needs without it and of the launches that a graph replaces.
COMPILATION = {
    ("cpu", "fp32"): (35.0, lambda flops: 0.0),
    ("cpu", "bf16"): (35.0, lambda flops: 1e-12 * flops),
    ("cuda", "fp32"): (60.0, lambda flops: 2e-3),
    ("cuda", "bf16"): (60.0, lambda flops: 2e-3),
}


@dataclass(frozen=True)
class Execution:
    """Precision of the forward pass (weights, gradients and optimizer stay in float32), and whether it is compiled."""

    precision: str = "fp32"
    compiled: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def compile(self, function: Callable, rows: int, graphs: bool) -> Callable:
        """The function, compiled for a first argument of so many rows; others, as of an epoch's last batch, run as it is.

        Args:
            graphs: on CUDA replay the kernels from a graph. What it returns lasts until the next call.

        Raises:
            TrainingError: by the first call, if it cannot be compiled.
        """
        if not self.compiled:
            return function
        fast = torch.compile(function, dynamic=False, mode="reduce-overhead" if graphs else None)

        def run(first: torch.Tensor, *others: object) -> object:
            if len(first) != rows:
                return function(first, *others)
            try:
                return fast(first, *others)
            except TorchDynamoException as error:
                line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise TrainingError(f"the network could not be compiled ({line}): give --compile off") from error

        return run

    def __str__(self) -> str:
        return f"{self.precision}, {'compiled' if self.compiled else 'not compiled'}"


def choose(
    precision: str,
    compilation: str,
    device: torch.device,
    step_flops: float = 0.0,
    steps: int = 0,
    deterministic: bool = False,
) -> Execution:
    """Resolve the flags for a device and a run.

    `auto` is the fastest that does not cost accuracy: bf16 where the device computes in it, and compilation where it
    earns back what it takes.

    Args:
        precision: auto, or one of PRECISIONS.
        compilation: auto, on or off.
        step_flops: of a training step.
        steps: of the run.
        deterministic: bits may not depend on what was tuned when.

    Raises:
        UsageError: what is asked for by name is not possible here.
    """
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions: it is not what fp32 says
    missing = what_compilation_lacks(device)
    if compilation == "on" and missing:
        raise UsageError(f"--compile on needs {missing}: install it, or give --compile off")
    if compilation == "auto":
        cost, saved = COMPILATION[device.type, precision]
        compilation = "on" if not (missing or deterministic) and steps * saved(step_flops) > cost else "off"
    return Execution(precision, compilation == "on")


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16; one that only emulates it is ten times slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        features = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in features or "amx_bf16" in features


def what_compilation_lacks(device: torch.device) -> str | None:
    """What torch.compile needs and this machine has not, or None."""
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
