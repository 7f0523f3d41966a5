"""Everything that changes while a network trains, and what of it a checkpoint holds."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prune import Pruner
from training.nonfinite import NonFiniteGuard
from training.optim import passes_per_step
from utils.errors import UsageError


@dataclass
class PartialEpoch:
    """The part of an epoch that is done when a checkpoint is written in the middle of it.

    Attributes:
        sums: float32 [steps done, 2], each step's sum of losses and number of correct predictions.
        images: trained on in these steps.
        counted: the same without those of skipped steps.
        seconds: that this took.
        meter: state of the FlopsMeter.
    """

    sums: Tensor
    images: int
    counted: int
    seconds: float
    meter: dict


@dataclass
class TrainState:
    """All that changes during training.

    Attributes:
        schedule_step: place in the schedule; learning rate and data follow from it. A method may set it back.
        global_step: batches trained on, those of skipped steps included; only grows. The axis of logs.
        rows: one row of metrics.csv for each finished epoch.
        passes: forward and backward passes that these steps took.
        images: trained on, repetitions counted.
        training_flops: that this took, at the densities that the steps had.
        partial: of the epoch at hand, where this was saved in the middle of one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: Pruner
    guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)
    schedule_step: int = 0
    global_step: int = 0
    passes: int = 0
    rows: list[dict] = field(default_factory=list)
    images: int = 0
    training_flops: float = 0.0
    partial: PartialEpoch | None = None

    _PARTS = ("model", "pruner", "optimizer", "guard")
    _VALUES = ("schedule_step", "global_step", "rows", "images", "training_flops")

    def state_dict(self) -> dict:
        """Return everything as tensors and plain values."""
        parts = {name: getattr(self, name).state_dict() for name in self._PARTS}
        values = {name: getattr(self, name) for name in (*self._VALUES, "passes")}
        return parts | values | {"partial": vars(self.partial) if self.partial else None}

    def is_best(self) -> bool:
        """Return whether the last epoch is the best so far on held-out images; False where it was not evaluated on any.

        A sparser network is better than a denser one, whatever that reached: the target is what a run is for.
        """
        if self.rows[-1].get("val_top1") is None:
            return False
        *earlier, last = (row for row in self.rows if row["val_top1"] is not None)

        def better(row: dict) -> bool:
            alike = self.pruner.same_sparsity(last["sparsity"], row["sparsity"])
            return last["val_top1"] > row["val_top1"] if alike else last["sparsity"] > row["sparsity"]

        return all(map(better, earlier))

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned.

        Raises:
            UsageError: it is of another network or optimizer.
        """
        # How kernels are launched is a matter of this device, not of the checkpoint's.
        keys = {"fused", "capturable"}
        launching = [{k: v for k, v in group.items() if k in keys} for group in self.optimizer.param_groups]
        name = ""
        try:
            for name in self._PARTS:
                getattr(self, name).load_state_dict(state[name])
            for group, options in zip(self.optimizer.param_groups, launching, strict=True):
                group.update(options)
            for name in self._VALUES:
                setattr(self, name, state[name])
            # Before this was counted all steps of an optimizer took the same number.
            self.passes = state.get("passes", passes_per_step(self.optimizer) * self.global_step)
            self.partial = PartialEpoch(**state["partial"]) if state["partial"] else None
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UsageError(
                f"the checkpoint does not fit the network and optimizer of its flags ({name}), and so is damaged or of another "
                "version of this program: begin anew in another --output-dir"
            ) from error
