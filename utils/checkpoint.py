"""Everything a run needs to go on, in one file."""

import contextlib
import errno
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from prune import Sparsity
from utils.errors import DamagedError, UsageError
from utils.files import load_whole, save_atomically
from utils.guard import Guard

FORMAT = "sam-sparse-training/2"
NEWEST, PREVIOUS = "checkpoint.pt", "previous.pt"


@dataclass
class TrainState:
    """All that changes during training.

    Attributes:
        step: position in the schedule; learning rate and data follow from it. A method may set it back.
        progress: steps taken; only grows. The axis of logs.
        rows: one of metrics.csv for each finished epoch.
        images: trained on, repetitions counted.
        training_flops: that this took, at the densities the steps had.
        partial: of the epoch at hand, in the middle of which this was saved: see engine.train_epoch. Else empty.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sparsity: Sparsity
    guard: Guard = field(default_factory=Guard)
    step: int = 0
    progress: int = 0
    rows: list[dict] = field(default_factory=list)
    images: int = 0
    training_flops: float = 0.0
    partial: dict = field(default_factory=dict)

    def state_dict(self) -> dict:
        holders = {name: getattr(self, name).state_dict() for name in self._HOLDERS}
        return holders | {name: getattr(self, name) for name in self._VALUES}

    def load_state_dict(self, state: dict) -> None:
        """Take over what state_dict returned.

        Raises:
            UsageError: it is of another network or optimizer.
        """
        # How kernels are launched is a matter of this device, not of the checkpoint's.
        launching = [
            {k: group[k] for k in ("fused", "capturable") if k in group} for group in self.optimizer.param_groups
        ]
        try:
            for name in self._HOLDERS:
                if name in state or name != "guard":  # a later addition
                    getattr(self, name).load_state_dict(state[name])
            for group, options in zip(self.optimizer.param_groups, launching, strict=True):
                group.update(options)
            for name in self._VALUES:
                if name in state:  # or it came with a later version of this program, and has its default
                    setattr(self, name, state[name])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UsageError(f"the checkpoint does not fit the network and optimizer of its flags ({name})") from error

    _HOLDERS = ("model", "sparsity", "optimizer", "guard")
    _VALUES = ("step", "progress", "rows", "images", "training_flops", "partial")


def load_network(model: nn.Module, sparsity: Sparsity, checkpoint: dict) -> None:
    """Take weights and masks alone out of a checkpoint. Raises UsageError where they do not fit."""
    try:
        model.load_state_dict(checkpoint["state"]["model"])
        sparsity.masks.load_state_dict(checkpoint["state"]["sparsity"]["masks"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise UsageError("the checkpoint does not fit the network of its flags") from error


def save_checkpoint(path: Path, state: TrainState, args: dict, data: dict) -> None:
    """Write a checkpoint that is whole or not there; the one before it is kept as PREVIOUS beside a checkpoint.pt.

    Args:
        args: the flags of the run, as plain values.
        data: what the network has to know of its data: classes (names by label), mean and deviation of each channel.
    """
    previous = path.with_name(PREVIOUS) if path.name == NEWEST else None
    save_atomically(path, {"format": FORMAT, "args": args, "data": data, "state": state.state_dict()}, previous)


def load_newest(path: Path) -> tuple[dict, Path]:
    """load_checkpoint and what it has read: for a damaged checkpoint.pt the one before it, with a warning on stderr."""
    try:
        return load_checkpoint(path), path
    except DamagedError as error:
        previous = path.with_name(PREVIOUS)
        if path.name != NEWEST or not previous.exists():
            raise
        with contextlib.suppress(UsageError):
            checkpoint = load_checkpoint(previous)
            print(f"warning: {error}; going on from '{previous}', the one before it", file=sys.stderr)
            return checkpoint, previous
        raise


def load_checkpoint(path: Path) -> dict:
    """Read what save_checkpoint wrote, on the CPU. Nothing but tensors and plain values is ever loaded.

    Raises:
        UsageError: no such file, a damaged one, or one of another program.
    """
    try:
        checkpoint = load_whole(path)
    except FileNotFoundError as error:
        raise DamagedError(f"there is no checkpoint '{path}'") from error
    except IsADirectoryError as error:
        raise UsageError(f"'{path}' is a directory: name the checkpoint in it, '{path / 'checkpoint.pt'}'") from error
    except (OSError, MemoryError) as error:
        if getattr(error, "errno", None) == errno.EINVAL:  # a place in the file that is none
            raise DamagedError(f"'{path}' is not a whole checkpoint of this program (truncated or damaged)") from error
        raise UsageError(f"cannot read '{path}' ({getattr(error, 'strerror', 'out of memory')})") from error
    except Exception as error:  # torch.load has no closed list of what damaged and foreign files raise
        raise DamagedError(
            f"'{path}' is not a whole checkpoint of this program (truncated, damaged or foreign)"
        ) from error
    if not _is_ours(checkpoint):
        raise DamagedError(
            f"'{path}' is not a checkpoint of this program, or of another version of it: name a checkpoint.pt or best.pt of a run"
        )
    return checkpoint


def _is_ours(checkpoint: object) -> bool:
    """Whether it has the parts that are not checked where they are used, of the kinds that they have."""
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        return False
    args, data, state = (checkpoint.get(part) for part in ("args", "data", "state"))
    if not all(isinstance(part, dict) and all(isinstance(key, str) for key in part) for part in (args, data, state)):
        return False
    numbers, rows, partial = (int, float), state.get("rows"), state.get("partial", {})
    return (
        _all(data.get("classes"), str)
        and isinstance(data.get("fingerprint"), str)
        and _all(data.get("mean"), numbers)
        and _all(data.get("deviation"), numbers)
        and len(data["mean"]) == len(data["deviation"])
        and all(_is_count(state.get(name, 0)) for name in ("step", "progress", "images"))
        and _is_count(_get(state.get("guard"), "skipped_steps"))
        and _is_count(_get(state.get("sparsity"), "round"))
        and isinstance(state.get("training_flops"), numbers)
        and _all(rows, dict)
        and all(row.keys() == rows[0].keys() >= COLUMNS and _all(list(row.values()), numbers) for row in rows)
        and isinstance(partial, dict)
        and (not partial or _is_part_of_an_epoch(partial))
    )


COLUMNS = {
    "epoch",
    "lr",
    "train_loss",
    "train_top1",
    "test_loss",
    "test_top1",
    "sparsity",
    "images_per_second",
    "seconds",
}


def _is_part_of_an_epoch(partial: dict) -> bool:
    sums = partial.get("sums")
    return (
        isinstance(sums, Tensor)
        and sums.dtype == torch.float32
        and sums.ndim == 2
        and sums.shape[1] == 2
        and _is_count(partial.get("images"))
        and _is_count(partial.get("counted"))
        and isinstance(partial.get("seconds"), float)
        and 0 <= partial["seconds"] < math.inf
        and isinstance(partial.get("meter"), dict)
        and partial["meter"].keys() == {"counted", "current"}
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**53


def _get(holder: object, name: str) -> object:
    """Of what is no dict, or lacks it, 0: that is refused where it is used, or came before this was kept."""
    return holder.get(name, 0) if isinstance(holder, dict) else 0


def _all(values: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
