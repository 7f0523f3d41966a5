"""How masks change while a network trains. `Pruner` calls an update when its timing says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune.schedules import cubic
from prune.scores import READ_GRADIENTS, Score, magnitude

if TYPE_CHECKING:
    from prune.pruner import Pruner


@dataclass(frozen=True)
class DropAndGrow:
    """At a constant budget drop the lowest of a layer's living weights and grow as many others.

    Rigged lottery (Evci et al. 2020) takes this in the place of the step's SGD update. Here it follows that update, so
    that the training step is the same for every method: one step in `interval` more, and growth sees the same gradient.
    As there, a weight just dropped may grow again, and then keeps its value.

    Attributes:
        drop: score of living weights; the lowest go.
        grow: score of all others; the highest come, at zero unless they were dropped just now.
        decay: share of the drop fraction, as a function of the progress to the last change.
    """

    drop: Score
    grow: Score
    decay: Callable[[float], float]

    @property
    def reads_gradients(self) -> bool:
        return bool(READ_GRADIENTS & {self.drop, self.grow})

    @property
    def reads_dead_gradients(self) -> bool:
        return self.grow in READ_GRADIENTS

    def __call__(self, pruner: Pruner, step: int) -> dict[str, Tensor]:
        """The masks after a step. With the option `soft` a layer grows above its target and drops back the next time."""
        pattern, targets = pruner.pattern, pruner.targets
        fraction = pruner.options.drop_fraction * self.decay(pruner.timing.fraction(step))
        moved = [int(fraction * target) for target in targets.values()]
        kept = [
            target if pruner.options.soft else target - move
            for target, move in zip(targets.values(), moved, strict=True)
        ]
        alive = [pattern.pool(pruner.masks.masks[name]) for name in targets]
        sizes = list(map(len, alive))
        room = [size - keep for size, keep in zip(sizes, kept, strict=True)]

        # All layers at once: what a GPU takes time for here is launches, not work.
        def flat(scores: dict[str, Tensor]) -> Tensor:
            return torch.cat([pattern.pool(scores[name]) for name in targets])

        scored = pruner.scored(step)
        new = _highest(flat(self.drop(scored)), torch.cat(alive) == 0, sizes, kept)
        new |= _highest(flat(self.grow(scored)), new, sizes, list(map(min, moved, room)))
        return {n: pattern.spread(part, pruner.shapes[n]) for n, part in zip(targets, new.split(sizes), strict=True)}


@dataclass(frozen=True)
class GradualPruning:
    """Keep the largest weights, fewer each time, down to the target (Zhu and Gupta 2018)."""

    reads_gradients = reads_dead_gradients = False

    def __call__(self, pruner: Pruner, step: int) -> dict[str, Tensor]:
        wanted = cubic(pruner.timing.fraction(step), pruner.target)
        return pruner.pattern.keep(magnitude(pruner.scored(step)), pruner.counts(wanted))


def _highest(scores: Tensor, excluded: Tensor, sizes: list[int], counts: list[int]) -> Tensor:
    """Boolean: of each layer's scores as many of the highest outside `excluded` as counted; ties go to the earlier one.

    Args:
        sizes, counts: how many scores the layers have, one layer after the other, and how many of them to choose.
    """
    layer = torch.cat([excluded.new_full((size,), number, dtype=torch.int16) for number, size in enumerate(sizes)])
    order = scores.masked_fill(excluded, -torch.inf).sort(descending=True, stable=True).indices
    order = order[layer[order].sort(stable=True).indices]  # layer by layer, and by score within each
    chosen = torch.cat([part[:count] for part, count in zip(order.split(sizes), counts, strict=True)])
    return torch.zeros_like(excluded).index_fill_(0, chosen, True)
