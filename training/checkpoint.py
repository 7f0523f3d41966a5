"""Everything a run needs to go on, in one file."""

import contextlib
import errno
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from prune import Pruner
from training.checkpoint_schema import FORMAT, is_checkpoint
from training.nonfinite import NonFiniteGuard
from utils.errors import DamagedError, UsageError
from utils.files import load_whole, save_atomically

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
    pruner: Pruner
    guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)
    schedule_step: int = 0
    global_step: int = 0
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

    _HOLDERS = ("model", "pruner", "optimizer", "guard")
    _VALUES = ("schedule_step", "global_step", "rows", "images", "training_flops", "partial")


def load_network(model: nn.Module, pruner: Pruner, checkpoint: dict) -> None:
    """Take weights and masks alone out of a checkpoint. Raises UsageError where they do not fit."""
    try:
        model.load_state_dict(checkpoint["state"]["model"])
        pruner.masks.load_state_dict(checkpoint["state"]["pruner"]["masks"])
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
    if not is_checkpoint(checkpoint):
        raise DamagedError(
            f"'{path}' is not a checkpoint of this program, or of another version of it: name a checkpoint.pt or best.pt of a run"
        )
    return checkpoint
