"""Several processes on one training: each computes its share of every batch, and all take the same step.

Not by DistributedDataParallel: it averages over processes where an uneven batch needs the mean over images, wants images in
every process, and reduces within the backward pass, which a second pass and --sam-local would have to switch off. Here a
backward pass is followed by one all-reduce of everything that processes have to agree on.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.data import Images
from utils.errors import TrainingError, UsageError

PATIENCE = timedelta(minutes=30)  # while the first process decodes images or writes; nccl's own is ten


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is; alone by default, and then everything here does nothing.

    Attributes:
        synchronised: batch norm looks at all images, and so has all processes run every forward and backward pass.
    """

    rank: int = 0
    world: int = 1
    synchronised: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch's first dimension: sizes differ by one at most and may be zero."""
        return batch if self.world == 1 else batch.tensor_split(self.world)[self.rank]

    def share_of(self, images: Images) -> Images:
        """This process's part of images that are evaluated."""
        return Images(self.share(images.pixels), self.share(images.labels))

    def reduce(self, model: nn.Module, sums: Tensor, gradients: bool = True) -> Tensor:
        """After a backward pass whose loss was divided by the whole batch's size: add up gradients and sums of all.

        Batch norm's statistics become the mean over processes, so that all of a run's state is the same everywhere.

        Args:
            sums: float32, summed over images.
            gradients: False to leave each process its own.

        Returns:
            The sums of all processes.
        """
        if self.world == 1:
            return sums
        for p in model.parameters():
            if p.grad is None:  # of a share without images
                p.grad = torch.zeros_like(p)
        tensors = [p.grad for p in model.parameters()] if gradients else []
        statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        shares = torch._foreach_div(statistics, self.world) if statistics else []
        flat = torch.cat([t.flatten() for t in (*tensors, *shares, sums)])
        dist.all_reduce(flat)
        agreed = [*tensors, *statistics]
        *parts, total = flat.split([t.numel() for t in (*agreed, sums)])
        if agreed:
            torch._foreach_copy_(agreed, [part.view(t.shape) for t, part in zip(agreed, parts, strict=True)])
        return total

    def add(self, sums: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(sums)
        return sums

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so in any process. Waits for all of them."""
        return bool(self.add(torch.tensor(float(flag), device=device)).item()) if self.world > 1 else flag

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process does it, then all others: of what should be downloaded or cached once."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()  # also where it failed: the others will fail in the same way

    def check_same(self, state: dict) -> None:
        """Compare every value of nested dicts and lists across processes, tensors by hash; not what a clock says.

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


def start(device: torch.device) -> Ranks:
    """Join the processes that torchrun has started, if it has: gloo on the CPU, nccl on GPUs.

    Raises:
        UsageError: they cannot find each other.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or "RANK" not in os.environ:
        return Ranks()
    if device.index is not None:
        torch.cuda.set_device(device)  # where barriers and gathered objects go, or all processes meet on the first GPU
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"the processes cannot find each other ({error}): launch them by torchrun") from error
    return Ranks(dist.get_rank(), world)


def stop() -> None:
    """Leave the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(name: str) -> str:
    """Of the GPUs of a machine the one that torchrun means for this process.

    Raises:
        UsageError: one GPU is named for several processes.
    """
    rank, world = os.environ.get("LOCAL_RANK"), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if rank is None or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in ("auto", "cuda") and world > 1:
        raise UsageError(f"--device {name} names one GPU for {world} processes: leave it out, and each takes its own")
    return f"cuda:{rank}" if name in ("auto", "cuda") else name


def said_by_another(error: Exception) -> bool:
    """Whether the first process prints this too: all refuse the same flags."""
    return isinstance(error, UsageError) and os.environ.get("RANK", "0") != "0"


def lost_another(error: RuntimeError) -> bool:
    """Whether it tells of a process that is gone, in the words of nccl or gloo; that one has told why."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


CLOCKS = ("seconds", "images_per_second")


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
        return hashlib.sha256(content.numpy()).hexdigest()
    return repr(value)
