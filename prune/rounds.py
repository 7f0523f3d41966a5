"""Several trainings in a row, each from the masks that the last one led to: the rounds of lottery tickets."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Rounds:
    """Counts the rounds, and keeps the weights that they rewind to.

    Iterative magnitude pruning (Frankle and Carbin 2019; with rewinding, Frankle et al. 2020, algorithm 1): prune the
    trained weights, put those of step `rewind` in their place, and train again from there. Learning-rate rewinding
    (Renda et al. 2020), and LAMP, keep the trained weights and go back only in the schedule.

    Args:
        model: the network.
        count: rounds after the first training.
        rewind: the step, counted from 0, that each of them begins at.
        keep_weights: whether they go back only in the schedule.

    Attributes:
        number: of the round at hand; 0 is the first training.
    """

    def __init__(self, model: nn.Module, count: int, rewind: int, keep_weights: bool):
        self.count, self.rewind, self.number = count, rewind, 0
        self._model, self._keep_weights = model, keep_weights
        self._weights: dict[str, Tensor] = {}  # of the whole state, buffers included

    @classmethod
    def of(cls, model: nn.Module, options: Mapping[str, float], total_steps: int | None) -> "Rounds":
        """Return the rounds that the options of a method ask for. Raises ValueError for a training that is too short."""
        rewind = int(options["lth_rewind"])
        if total_steps is not None and rewind >= total_steps:
            raise ValueError(
                f"cannot rewind to step {rewind} of a training of {total_steps} steps: take lth_rewind=0, or another step below "
                f"{total_steps}"
            )
        keep_weights = bool(options.get("lth_keep_weights", True))  # LAMP always does, and has no such option
        return cls(model, int(options["lth_rounds"]), rewind, keep_weights)

    def sparsity(self, final: float) -> float:
        """Return the sparsity of the round at hand: each keeps the same fraction of what the last one kept."""
        return 1 - (1 - final) ** (self.number / self.count)

    def remembers(self, step: int) -> bool:
        """Return whether the weights after a step (-1: before training) are those to rewind to."""
        return not self._keep_weights and self.number == 0 and step + 1 == self.rewind

    def remember(self) -> None:
        """Keep the weights as those to rewind to."""
        self._weights = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights to rewind to in place, if rounds go back to them."""
        if not self._keep_weights:
            if not self._weights:
                raise RuntimeError(
                    f"there are no weights of step {self.rewind} to go back to: call update_masks(step) after every step"
                )
            for name, tensor in self._model.state_dict().items():
                tensor.copy_(self._weights[name])

    def extra_epochs(self, total_steps: int, steps_per_epoch: int) -> int:
        """Return the number of epochs, begun ones counted, that the rounds add to one training."""
        return self.count * -(-(total_steps - self.rewind) // steps_per_epoch)

    def state_dict(self) -> dict:
        """Return everything that training has to go on with."""
        return {"round": self.number, "rewound": self._weights}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned."""
        self.number, self._weights = state["round"], dict(state["rewound"])
