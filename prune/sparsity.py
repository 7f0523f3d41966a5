"""The one object through which a training loop keeps a network sparse."""

import torch
from torch import nn

from prune.distribution import distribute, keep_top
from prune.masks import Masks, prunable_weights, select_layers
from prune.methods import METHODS


class Sparsity:
    """Chooses the masks of a network, applies them at the right moments of a training step, and remembers them.

        sparsity.before_training(generator)          # once, on fresh weights
        ...
        loss.backward()
        sparsity.after_backward(step)                # before clipping and before the optimizer sees the gradients
        optimizer.step()
        step = sparsity.after_step(step)             # masks change here; returns the step to go on with

    Args:
        model: the network; its convolution and linear weights are prunable, nothing else.
        method: a key of METHODS.
        sparsity: share of all prunable weights that is zero, in [0, 1). None or 0 with method `none` only.
        distribution: how it is shared out over the layers; None for the method's default.
        dense_layers: patterns of layer names that stay dense (see `masks.select_layers`); they count, as zeros that the
            other layers have to make up for.

    Raises:
        ValueError: unknown names, a combination that makes no sense, or a sparsity that cannot be reached.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "none",
        sparsity: float | None = None,
        distribution: str | None = None,
        dense_layers: list[str] | tuple[str, ...] = (),
    ):
        if method not in METHODS:
            raise ValueError(f"unknown pruning method '{method}': choose one of {', '.join(METHODS)}")
        self.method = METHODS[method]
        if self.method.score is None and (sparsity or distribution or dense_layers):
            raise ValueError(f"pruning method '{method}' keeps every weight: name another one to reach a sparsity")
        if self.method.score is not None and sparsity is None:
            raise ValueError(f"pruning method '{method}' needs a sparsity")
        self.target = sparsity or 0.0
        if not 0 <= self.target < 1:
            raise ValueError(f"sparsity has to be at least 0 and less than 1, not {self.target:g}")
        self.distribution = distribution or self.method.distributions[0]
        if self.distribution not in self.method.distributions:
            choices = " or ".join(self.method.distributions)
            raise ValueError(f"pruning method '{method}' has no {self.distribution} distribution: choose {choices}")
        weights = prunable_weights(model)
        self.masks = Masks(weights)
        self.dense = select_layers(list(weights), list(dense_layers))
        # Worked out here so that an impossible sparsity is known before anything is written.
        self.counts = distribute(
            self.distribution, {n: tuple(w.shape) for n, w in weights.items()}, self.target, self.dense
        )

    def before_training(self, generator: torch.Generator) -> None:
        """Score the fresh weights, choose the masks and zero what they drop.

        Raises:
            ValueError: the global distribution left a layer empty.
        """
        if self.method.score is not None:
            weights = {name: w for name, w in self.masks.weights.items() if name not in self.dense}
            self.masks.set(keep_top(self.method.score(weights, generator), self.counts))

    def mask_gradients(self) -> None:
        """Zero the gradients of dead weights, for whoever needs gradients before the pass that counts."""
        self.masks.apply_to_gradients()

    def after_backward(self, step: int) -> None:
        """With the unscaled gradients of a step: let only those of living weights through."""
        self.masks.apply_to_gradients()

    def after_step(self, step: int) -> int:
        """With the weights just moved: keep the dead ones at zero. Returns the step that training goes on with."""
        self.masks.apply_to_weights()
        return step + 1

    def describe(self) -> str:
        """One line: how many weights are zero, of which, and what stays dense."""
        total = sum(weight.numel() for weight in self.masks.weights.values())
        dead = total - sum(self.masks.alive().values())
        line = f"sparsity {dead / total:.4f}: {dead:,} of {total:,} convolution and linear weights are zero"
        dense = sum(self.masks.weights[name].numel() for name in self.dense)
        if dense:
            line += f"; {len(self.dense)} layers ({dense:,} weights) stay dense, the others have {dead / (total - dense):.4f}"
        return line

    def state_dict(self) -> dict:
        return {"masks": self.masks.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.masks.load_state_dict(state["masks"])
