"""How masks change while a network trains. `Pruner` calls an update when its timing says so."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.patterns import Counts, Pattern, Units
from prune.schedules import cubic
from prune.scores import NORMS, READ_GRADIENTS, Score, Scored, magnitude


@dataclass(frozen=True)
class UpdateInputs:
    """What an update looks at.

    Attributes:
        scored: the weights, the gradients of the last step, and the method's options.
        masks: of the layers that are not dense, in their weights' shapes, 1 where a weight lives.
        pattern: which weights live and die together.
        fraction: of the way to the last change, from 0 to 1.
        targets: number of living units of each layer, where the budget is constant.
        sparsity: the final one.
        counts: number of weights that each group of layers keeps, as a function of the sparsity.
    """

    scored: Scored
    masks: dict[str, Tensor]
    pattern: Pattern
    fraction: float
    targets: dict[str, int]
    sparsity: float
    counts: Callable[[float], Counts]


@dataclass(frozen=True)
class MaskChange:
    """What an update comes to.

    Attributes:
        masks: the new ones, boolean, by layer.
        survivors: the weights that keep their values, where others grow from zero although they were alive just now.
    """

    masks: dict[str, Tensor]
    survivors: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class DropAndGrow:
    """At a constant budget, drop the lowest of a layer's living weights and grow as many others.

    Rigged lottery (Evci et al. 2020) does this instead of the step's SGD update. Here it follows that update, so that
    the training step is the same for every method: one more step in `update_interval`, and growth sees the same gradient.
    A weight that was just dropped may grow again. Then it keeps its value in rigged lottery, and starts at zero in sparse
    evolutionary training (Mocanu et al. 2018) and MEST (Yuan et al. 2021), as in their code.

    Attributes:
        drop: score of the living weights; the lowest go.
        grow: score of all others; the highest come, at zero unless they were dropped just now.
        decay: what is left of the drop fraction, as a function of the fraction of the way to the last change.
        regrown_from_zero: whether those that were dropped just now start at zero too.
    """

    drop: Score
    grow: Score
    decay: Callable[[float], float]
    regrown_from_zero: bool = True

    @property
    def reads_gradients(self) -> bool:
        """Whether the step's gradients are needed."""
        return bool(READ_GRADIENTS & {self.drop, self.grow})

    @property
    def reads_dead_gradients(self) -> bool:
        """Whether the gradients of dead weights are needed."""
        return self.grow in READ_GRADIENTS

    def __call__(self, now: UpdateInputs) -> MaskChange:
        """Return the change. With `mest_soft` a layer grows above its target and drops back the next time."""
        pattern, targets, options = now.pattern, now.targets, now.scored.options
        assert isinstance(pattern, Units)
        fraction = options["drop_fraction"] * self.decay(now.fraction)
        moved = [int(fraction * target) for target in targets.values()]
        soft = options.get("mest_soft", False)
        kept = [target if soft else target - move for target, move in zip(targets.values(), moved, strict=True)]
        alive = [pattern.pool(now.masks[name]) for name in targets]
        sizes = list(map(len, alive))
        room = [size - keep for size, keep in zip(sizes, kept, strict=True)]

        # All layers at once: what a GPU takes time for here is launches, not work.
        def flat(score: Score) -> Tensor:
            scores = score(now.scored)
            return torch.cat([pattern.pool(scores[name], square=score in NORMS) for name in targets])

        chosen = top_by_layer(flat(self.drop), torch.cat(alive) == 0, sizes, kept)

        def spread(units: Tensor) -> dict[str, Tensor]:
            parts = zip(targets, units.split(sizes), strict=True)
            return {name: pattern.spread(part, tuple(now.masks[name].shape)) for name, part in parts}

        grown = list(map(min, moved, room))
        after = chosen | top_by_layer(flat(self.grow), chosen, sizes, grown)
        return MaskChange(spread(after), spread(chosen) if self.regrown_from_zero else None)


@dataclass(frozen=True)
class GradualPruning:
    """Keep the largest weights, fewer each time, down to the target (Zhu and Gupta 2018)."""

    reads_gradients = reads_dead_gradients = False

    def __call__(self, now: UpdateInputs) -> MaskChange:
        """Return the change."""
        wanted = cubic(now.fraction, now.sparsity)
        return MaskChange(now.pattern.keep(magnitude(now.scored), now.counts(wanted), square=True))


def top_by_layer(scores: Tensor, excluded: Tensor, sizes: list[int], counts: list[int]) -> Tensor:
    """Return the per-layer top-k mask, ignoring `excluded`; ties go to the earlier score.

    Args:
        scores: [N], one layer after the other.
        excluded: bool [N].
        sizes: number of scores of each layer.
        counts: k of each layer.
    """
    layer = torch.cat([excluded.new_full((size,), number, dtype=torch.int16) for number, size in enumerate(sizes)])
    order = scores.masked_fill(excluded, -torch.inf).sort(descending=True, stable=True).indices
    order = order[layer[order].sort(stable=True).indices]  # layer by layer, and by score within each
    chosen = torch.cat([part[:count] for part, count in zip(order.split(sizes), counts, strict=True)])
    return torch.zeros_like(excluded).index_fill_(0, chosen, True)
