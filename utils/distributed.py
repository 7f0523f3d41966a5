"""Several processes on one training: each computes its part of every batch, and all take the same step.

DistributedDataParallel does not serve here: it averages over processes where an uneven batch needs the mean over images,
wants images in every process, and reduces within the backward pass, which a second pass and --sam-local would have to
switch off. Here one all-reduce follows a backward pass, of everything that processes have to agree on.
"""

import contextlib
import ctypes
import hashlib
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import TrainingError, UsageError

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
CLOCKS = ("seconds", "images_per_second")  # each process has its own
TIMEOUT = timedelta(minutes=30)  # the first process may decode images or write for so long; nccl's own is ten


@dataclass(frozen=True)
class ProcessGroup:
    """Which of how many processes this is. By default there is one, and then everything here does nothing.

    Attributes:
        rank: of this process.
        world: number of processes.
        local_rank: among the processes of this machine.
        synchronised: batch norm looks at all images, so that all processes have to run every forward and backward pass.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    synchronised: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which writes and prints."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a tensor's first dimension: sizes differ by one at most and may be zero."""
        return batch if self.world == 1 else batch.tensor_split(self.world)[self.rank]

    def reduce(self, model: nn.Module, sums: Tensor, gradients: bool = True) -> Tensor:
        """Add up gradients and sums over all processes, and average batch norm's statistics.

        To be called after a backward pass whose loss was divided by the whole batch's size. All of a run's state is then
        the same everywhere. A parameter that no process has a gradient for, frozen or unused, is left without one, as in one
        process: weight decay would move it otherwise. Waits for the device where this process lacks a gradient.

        Args:
            model: its parameters have the gradients, its buffers are the statistics.
            sums: float32, summed over images.
            gradients: False to leave each process its own.

        Returns:
            The sums of all processes.
        """
        if self.world == 1:
            return sums
        trained = [p for p in model.parameters() if p.requires_grad]
        missing = [number for number, p in enumerate(trained) if p.grad is None]  # all, in a process without images
        found = torch.ones(len(trained), device=sums.device)
        for number in missing:
            trained[number].grad = torch.zeros_like(trained[number])
            found[number] = 0
        tensors = [p.grad for p in trained if p.grad is not None and gradients]
        statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        shares = torch._foreach_div(statistics, self.world) if statistics else []
        flat = torch.cat([t.flatten() for t in (*tensors, *shares, found, sums)])
        dist.all_reduce(flat)
        agreed = [*tensors, *statistics]
        *parts, found, total = flat.split([t.numel() for t in (*agreed, found, sums)])
        if agreed:
            torch._foreach_copy_(agreed, [part.view(t.shape) for t, part in zip(agreed, parts, strict=True)])
        anywhere = found.tolist() if missing else []
        for number in missing:
            if not anywhere[number]:
                trained[number].grad = None
        return total

    def add(self, sums: Tensor) -> Tensor:
        """Return the sum over all processes, computed in place."""
        if self.world > 1:
            dist.all_reduce(sums)
        return sums

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether a flag is set in any process. Waits for all of them."""
        return bool(self.add(torch.tensor(float(flag), device=device)).item()) if self.world > 1 else flag

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first process of each machine do something before the others, such as download or cache."""
        if self.local_rank:
            self.wait()
        try:
            yield
        finally:
            if not self.local_rank:
                self.wait()  # after a failure too: the others will fail in the same way

    def check_same(self, state: dict) -> None:
        """Compare every value of nested dicts and lists across processes, tensors by hash, except times.

        Raises:
            TrainingError: in all processes; it names the first value that differs.
        """
        if self.world == 1:
            return
        hashes = [(name, _hash(value)) for name, value in _leaves(state)]
        gathered: list = [None] * self.world
        dist.all_gather_object(gathered, hashes)
        for rank, others in enumerate(gathered):
            for mine, other in itertools.zip_longest(gathered[0], others):
                if mine != other:
                    raise TrainingError(
                        f"process {rank} has another '{(mine or other)[0]}' than process 0, so that they do not train the same "
                        "network: launch all with the same flags, data and run directory, and go on from the last checkpoint "
                        "by --resume auto"
                    )


def start(device: torch.device) -> ProcessGroup:
    """Join the processes that torchrun has started, if it has, by gloo on the CPU and nccl on GPUs.

    Raises:
        UsageError: they cannot find each other.
    """
    world = launched("WORLD_SIZE", 1)
    if world == 1 or "RANK" not in os.environ:
        return ProcessGroup()
    if device.index is not None:
        torch.cuda.set_device(device)  # where barriers and gathered objects go, or all processes meet on the first GPU
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_the_launcher()
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"the processes cannot find each other ({error}): launch them by torchrun") from error
    return ProcessGroup(dist.get_rank(), world, launched("LOCAL_RANK", 0))


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launched(name: str, otherwise: int) -> int:
    """Return a number that torchrun sets in the environment."""
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise UsageError(f"{name} in the environment has to be a number, as torchrun sets it, not '{text}'")
    return int(text)


def local_device(name: str, no_cuda: bool = False) -> str:
    """Return the name of this process's device: under torchrun each process of a machine has a GPU of its own.

    Raises:
        UsageError: one GPU is named for several processes, or there are fewer than processes.
    """
    rank, world = launched("LOCAL_RANK", 0), launched("LOCAL_WORLD_SIZE", 1)
    if "LOCAL_RANK" not in os.environ or name == "cpu" or no_cuda or not torch.cuda.is_available():
        return name
    if name not in ("auto", "cuda"):
        if world > 1:
            raise UsageError(
                f"--device {name} names one GPU for {world} processes: leave it out, and each takes its own"
            )
        return name
    count = torch.cuda.device_count()
    if world > count:
        raise UsageError(f"there are {count} GPUs for {world} processes: launch fewer, or give --device cpu")
    return f"cuda:{rank}"


def complain(words: str, alike: bool = False) -> None:
    """Print on stderr what went wrong, and in which process if that is not the first.

    Args:
        words: one sentence.
        alike: all processes of a machine say the same, so that one of them is enough.
    """
    rank = os.environ.get("RANK", "0")
    if not (alike and os.environ.get("LOCAL_RANK", "0") != "0"):
        print(f"process {rank}: {words}" if rank != "0" else words, file=sys.stderr)


def together() -> bool:
    """Return whether processes have found each other."""
    return dist.is_initialized()


def _end_with_the_launcher() -> None:
    """Make Linux send SIGTERM when torchrun is gone, so that no process trains on without the others."""
    launcher = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # It was gone already, and process 1 has taken its place; in a container torchrun may itself be process 1.
    if (launcher == 1 and not _is_python(1)) or os.getppid() != launcher:
        signal.raise_signal(signal.SIGTERM)


def _is_python(pid: int) -> bool:
    """Return whether a process is a Python program, as launchers of training processes are."""
    try:
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def lost_another(error: RuntimeError) -> bool:
    """Return whether an error of nccl or gloo says that another process is gone; that one has said why."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if key not in CLOCKS]
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


def _hash(value: object) -> str:
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return hashlib.sha256(content.numpy().data).hexdigest()
    return repr(value)
