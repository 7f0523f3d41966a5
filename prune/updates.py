"""How masks change while a network trains. `Pruner` calls an update when its timing says so."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.patterns import Counts, Pattern, Shape, Units
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
        options, layers = now.scored.options, FlatLayers.of(now)
        fraction = options["drop_fraction"] * self.decay(now.fraction)
        soft = options.get("mest_soft", False)
        kept, grown = [], []
        for layer in layers:
            move = int(fraction * layer.target)
            kept.append(layer.target if soft else layer.target - move)
            grown.append(min(move, layer.units - kept[-1]))
        chosen = layers.top(layers.scores(self.drop, now), ~layers.alive(now.masks), kept)
        after = chosen | layers.top(layers.scores(self.grow, now), chosen, grown)
        return MaskChange(layers.spread(after), layers.spread(chosen) if self.regrown_from_zero else None)


@dataclass(frozen=True)
class GradualPruning:
    """Keep the largest weights, fewer each time, down to the target (Zhu and Gupta 2018)."""

    reads_gradients = reads_dead_gradients = False

    def __call__(self, now: UpdateInputs) -> MaskChange:
        """Return the change."""
        wanted = cubic(now.fraction, now.sparsity)
        return MaskChange(now.pattern.keep(magnitude(now.scored), now.counts(wanted), square=True))


@dataclass(frozen=True)
class Layer:
    """One layer at a change of masks.

    Attributes:
        name: of the layer.
        shape: of its weight.
        units: how many it is cut into.
        target: how many of them live, where the budget of each layer is constant.
    """

    name: str
    shape: Shape
    units: int
    target: int


class FlatLayers:
    """The units of all layers, one layer after the other: what a GPU takes time for here is launches, not work.

    Args:
        layers: in their order.
        pattern: that cuts them into units.
    """

    def __init__(self, layers: list[Layer], pattern: Units):
        self._layers, self._pattern = layers, pattern
        self._sizes = [layer.units for layer in layers]

    @classmethod
    def of(cls, now: UpdateInputs) -> "FlatLayers":
        """Return the layers that an update looks at."""
        assert isinstance(now.pattern, Units)
        layers = []
        for name, target in now.targets.items():
            mask = now.masks[name]
            layers.append(Layer(name, tuple(mask.shape), len(now.pattern.sizes(mask)), target))
        return cls(layers, now.pattern)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def scores(self, score: Score, now: UpdateInputs) -> Tensor:
        """Return the score of each unit: [units]."""
        scores, square = score(now.scored), score in NORMS
        return torch.cat([self._pattern.pool(scores[layer.name], square=square) for layer in self])

    def alive(self, masks: dict[str, Tensor]) -> Tensor:
        """Return whether each unit lives: bool [units]."""
        return torch.cat([self._pattern.pool(masks[layer.name]) for layer in self]) != 0

    def spread(self, units: Tensor) -> dict[str, Tensor]:
        """Return the masks of the layers whose units live where `units`, bool [units], says so."""
        parts = zip(self, units.split(self._sizes), strict=True)
        return {layer.name: self._pattern.spread(part, layer.shape) for layer, part in parts}

    def top(self, scores: Tensor, excluded: Tensor, counts: list[int]) -> Tensor:
        """Return each layer's highest scores, bool [units], ignoring `excluded`; ties go to the earlier unit.

        Args:
            scores: [units].
            excluded: bool [units].
            counts: how many of each layer.
        """
        layer = torch.cat(
            [excluded.new_full((size,), number, dtype=torch.int16) for number, size in enumerate(self._sizes)]
        )
        order = scores.masked_fill(excluded, -torch.inf).sort(descending=True, stable=True).indices
        order = order[layer[order].sort(stable=True).indices]  # layer by layer, and by score within each
        chosen = torch.cat([part[:count] for part, count in zip(order.split(self._sizes), counts, strict=True)])
        return torch.zeros_like(excluded).index_fill_(0, chosen, True)
