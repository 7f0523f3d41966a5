"""Checkpoints: everything that a run needs to go on, in one file that is whole or not there."""

import contextlib
import errno
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import nn

from prune.compact import expand
from prune.masks import Masks
from training.exported import is_safetensors, read_exported
from training.state import TrainState
from utils.errors import DamagedError, UsageError
from utils.files import load_whole, save_atomically

NEWEST, PREVIOUS, BEST = "checkpoint.pt", "previous.pt", "best.pt"
FORMAT, OLDER_FORMAT = "sam-sparse-training/3", "sam-sparse-training/2"
RENAMED = {"step": "schedule_step", "progress": "global_step", "sparsity": "pruner"}  # since the older format


class CheckpointSchedule:
    """When a checkpoint is due: after so many epochs, or so many minutes since the last one.

    Args:
        text: `3` for epochs, `10m` for minutes.

    Raises:
        UsageError: the text is neither.
    """

    def __init__(self, text: str = "1"):
        minutes = text.endswith("m")
        try:
            value = float(text[:-1]) if minutes else int(text)
        except ValueError:
            value = 0
        if not 0 < value < 1e9:
            raise UsageError(f"--checkpoint-every takes epochs, as 5, or minutes, as 10m, not '{text}'")
        self._epochs = None if minutes else int(value)
        self._seconds = 60 * value if minutes else None
        self._last = time.monotonic()

    def due_in_epoch(self) -> bool:
        """Return whether a checkpoint is due in the middle of an epoch."""
        return self._seconds is not None and time.monotonic() - self._last >= self._seconds

    def due_after_epoch(self, epoch: int) -> bool:
        """Return whether a checkpoint is due after an epoch, counted from 1."""
        return self.due_in_epoch() if self._epochs is None else epoch % self._epochs == 0

    def saved(self) -> None:
        """Note that a checkpoint has been written."""
        self._last = time.monotonic()


class CheckpointWriter:
    """Writes the checkpoints of a run.

    Args:
        directory: of the run.
        schedule: when they are due.
        args: the flags of the run, as plain values.
        data: what the network has to know of its data: classes (names by label), shape of an image, mean and deviation of each
            channel, fingerprint of the images, number of processes.
        writes: False in all processes except the first.
    """

    def __init__(self, directory: Path, schedule: CheckpointSchedule, args: dict, data: dict, writes: bool = True):
        self.directory, self.schedule, self.args, self.data, self.writes = directory, schedule, args, data, writes

    def save(self, state: TrainState) -> None:
        """Write checkpoint.pt, and best.pt after an epoch that is the best on held-out images."""
        if self.writes:
            if state.partial is None and state.is_best():
                save_checkpoint(self.directory / BEST, state, self.args, self.data)
            save_checkpoint(self.directory / NEWEST, state, self.args, self.data)
        self.schedule.saved()


def save_checkpoint(path: Path, state: TrainState, args: dict, data: dict) -> None:
    """Write a checkpoint that is whole or not there. The one before a checkpoint.pt is kept beside it as previous.pt.

    Args:
        path: of the file.
        state, args, data: see CheckpointWriter.
    """
    previous = path.with_name(PREVIOUS) if path.name == NEWEST else None
    save_atomically(path, {"format": FORMAT, "args": args, "data": data, "state": state.state_dict()}, previous)


def load_newest(path: Path) -> tuple[dict, Path]:
    """Return a checkpoint and the file that it was read from.

    For a checkpoint.pt that is damaged this is the one before it, with a warning on stderr.

    Raises:
        UsageError: see `load_checkpoint`.
    """
    try:
        return load_checkpoint(path), path
    except DamagedError as error:
        previous = path.with_name(PREVIOUS)
        if path.name == NEWEST and previous.exists():
            with contextlib.suppress(UsageError):
                checkpoint = load_checkpoint(previous)
                print(f"warning: {error}; going on from '{previous}', the one before it", file=sys.stderr)
                return checkpoint, previous
        raise


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint on the CPU, or an exported network. Nothing but tensors and plain values is ever loaded.

    Raises:
        UsageError: there is no such file, it is damaged, or it is of another program.
    """
    if is_safetensors(path):
        return read_exported(path)
    try:
        checkpoint = load_whole(path)
    except FileNotFoundError as error:
        raise DamagedError(f"there is no checkpoint '{path}'") from error
    except IsADirectoryError as error:
        raise UsageError(f"'{path}' is a directory: name the checkpoint in it, '{path / NEWEST}'") from error
    except (OSError, MemoryError) as error:
        if getattr(error, "errno", None) == errno.EINVAL:  # an offset in the file that cannot be
            raise DamagedError(f"'{path}' is not a whole checkpoint of this program (truncated or damaged)") from error
        raise UsageError(f"cannot read '{path}' ({getattr(error, 'strerror', 'out of memory')})") from error
    except Exception as error:  # torch.load has no closed list of what damaged and foreign files raise
        raise DamagedError(
            f"'{path}' is not a whole checkpoint of this program (truncated, damaged or foreign)"
        ) from error
    known = isinstance(checkpoint, dict) and checkpoint.get("format") in (FORMAT, OLDER_FORMAT)
    if not known or not all(isinstance(checkpoint.get(part), dict) for part in ("args", "data", "state")):
        raise DamagedError(
            f"'{path}' is not a checkpoint of this program, or of another version of it: name a checkpoint.pt or best.pt "
            "of a run"
        )
    if checkpoint["format"] == OLDER_FORMAT:
        checkpoint["state"] = {RENAMED.get(name, name): value for name, value in checkpoint["state"].items()}
    return checkpoint


def load_network(model: nn.Module, masks: Masks, checkpoint: dict) -> None:
    """Load only weights and masks from a checkpoint. Raises UsageError where they do not fit.

    A checkpoint of --compact holds the smaller network, whose weights find their places in the whole one by the masks. An
    exported network is whole.
    """
    own: Any = model.state_dict()
    try:
        saved: Any = OrderedDict(checkpoint["state"]["model"])
        if checkpoint["args"].get("compact") and any(saved[name].shape != own[name].shape for name in own):
            masks.load_state_dict(checkpoint["state"]["pruner"]["masks"])
            expand(saved, model, masks)
            return
        saved._metadata = own._metadata  # the versions of its layers, which an exported file does not have
        model.load_state_dict(saved)  # its hooks know what earlier versions saved
        masks.load_state_dict(checkpoint["state"]["pruner"]["masks"])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(
            "the checkpoint does not fit the network of its flags, and so is damaged or of another version of this program: name "
            "another one"
        ) from error
