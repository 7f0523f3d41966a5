"""How masks change while a network trains. `Sparsity` calls an update when its timing says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune.schedules import cubic
from prune.scores import Score, gradient, magnitude

if TYPE_CHECKING:
    from prune.sparsity import Sparsity


@dataclass(frozen=True)
class Regrow:
    """At a constant budget drop the lowest of a layer's living weights and grow as many others.

    Rigged lottery (Evci et al. 2020) takes this in the place of the step's SGD update. Here it follows that update, so
    that the training step is the same for every method: one step in `interval` more, and growth sees the same gradient.
    As there, a weight just dropped may grow again, and then keeps its value.

    Attributes:
        drop: score of living weights; the lowest go.
        grow: score of all others; the highest come, at zero.
        decay: share of the drop fraction, as a function of the progress to the last change.
    """

    drop: Score
    grow: Score
    decay: Callable[[float], float]
    needs_gradients = True

    @property
    def reads_dead_gradients(self) -> bool:
        return self.grow is gradient

    def __call__(self, sparsity: Sparsity, step: int) -> dict[str, Tensor]:
        """The masks after a step. With the option `soft` a layer grows above its target and drops back the next time."""
        fraction = sparsity.options.drop_fraction * self.decay(sparsity.timing.progress(step))
        scored = sparsity.scored(step)
        drop, grow = self.drop(scored), self.grow(scored)
        masks = {}
        for name, target in sparsity.targets.items():
            alive = sparsity.pattern.pool(sparsity.masks.masks[name])[0] > 0
            moved = int(fraction * target)
            kept = target if sparsity.options.soft else target - moved
            new = _highest(sparsity.pattern.pool(drop[name])[0], ~alive, kept)
            new |= _highest(sparsity.pattern.pool(grow[name])[0], new, min(moved, len(new) - kept))
            masks[name] = sparsity.pattern.spread(new, tuple(drop[name].shape))
        return masks


@dataclass(frozen=True)
class Shrink:
    """Keep the largest weights, fewer each time, down to the target (Zhu and Gupta 2018)."""

    needs_gradients = False
    reads_dead_gradients = False

    def __call__(self, sparsity: Sparsity, step: int) -> dict[str, Tensor]:
        wanted = cubic(sparsity.timing.progress(step), sparsity.target)
        return sparsity.pattern.keep(magnitude(sparsity.scored(step)), sparsity.counts(wanted))


def _highest(scores: Tensor, excluded: Tensor, count: int) -> Tensor:
    """Boolean: the `count` highest scores outside `excluded`; ties go to the earlier one."""
    order = scores.masked_fill(excluded, -torch.inf).sort(descending=True, stable=True).indices
    chosen = torch.zeros_like(excluded)
    return chosen.index_fill_(0, order[:count], True)
