"""Devices: which one a run computes on, its memory, and whether its kernels are deterministic."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

import torch
from torch import Tensor

from utils.errors import UsageError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def pick_device(name: str, no_cuda: bool = False) -> torch.device:
    """Return the device of a name: `auto`, or what torch.device takes. Raises UsageError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not no_cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device has to be auto, cpu, cuda or cuda:N, not '{name}'") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UsageError(f"--device has to be auto, cpu, cuda or cuda:N, not '{name}'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; use --device auto or cpu"
        )
    return device


def device_name(device: torch.device) -> str:
    """Return a name for people to read."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next step, instead of giving it back and faulting it in page by page.

    This saves a tenth of a step of ResNet-20 on the CPU (docs/performance.md). Does nothing except on Linux with glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for option, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            library.mallopt(option, value)


def use_deterministic_kernels(wanted: bool) -> None:
    """Allow only deterministic kernels, or let cuDNN try which of its convolutions is the fastest."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = not wanted, 0  # 0: try all there are
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first use
    torch.use_deterministic_algorithms(wanted)


@contextlib.contextmanager
def kernels_restored() -> Iterator[None]:
    """Put back after the block what `use_deterministic_kernels` sets in torch."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    backend = torch.backends.cudnn
    benchmark, limit = backend.benchmark, backend.benchmark_limit
    try:
        yield
    finally:
        backend.benchmark, backend.benchmark_limit = benchmark, limit
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)


def memory_size() -> int:
    """Return the size of this machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
