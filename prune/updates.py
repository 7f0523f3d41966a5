"""How masks change while a network trains. `Pruner` calls an update when its timing says so."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.patterns import Channels, Counts, FanIn, NofM, Pattern, Units
from prune.schedules import constant, cubic
from prune.scores import POOLED_BY_NORM, READ_GRADIENTS, Score, Scored, gradient, magnitude, random


@dataclass(frozen=True)
class UpdateInputs:
    """What an update looks at.

    Attributes:
        scored: the weights, the gradients of the last step, and the method's options.
        masks: of the layers that are not dense, in their weights' shapes, 1 where a weight lives.
        pattern: which weights live and die together.
        fraction: of the way to the last change, from 0 to 1.
        number: of the change, counted from 1.
        targets: number of living units of each layer or group of channels, where masks move; constant in
            `DropAndGrow`, and else at first.
        sparsity: the final one.
        counts: number of weights that each group of layers keeps, as a function of the sparsity.
        memory: what an update leaves there for the next one, saved with the masks.
    """

    scored: Scored
    masks: dict[str, Tensor]
    pattern: Pattern
    fraction: float
    number: int
    targets: dict[str, int]
    sparsity: float
    counts: Callable[[float], Counts]
    memory: dict[str, Tensor]


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
    moves, reallocates, smoothing = True, False, 0.0

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
        after = chosen | layers.grow(layers.scores(self.grow, now, growing=True), chosen, grown)
        return MaskChange(layers.spread(after), layers.spread(chosen) if self.regrown_from_zero else None)


@dataclass(frozen=True)
class MagnitudePruning:
    """Keep the largest weights, as many as a schedule says.

    Attributes:
        schedule: what part of the final sparsity there is, as a function of the fraction of the way to the last change, and
            of the number of this one. Where it falls, weights come alive at zero.
    """

    schedule: Callable[[float, int], float]
    reads_gradients = reads_dead_gradients = moves = reallocates = False
    smoothing = 0.0

    def __call__(self, now: UpdateInputs) -> MaskChange:
        """Return the change."""
        wanted = now.sparsity * self.schedule(now.fraction, now.number)
        return MaskChange(now.pattern.keep(magnitude(now.scored), now.counts(wanted), square=True))


@dataclass(frozen=True)
class PruneAndRegrow:
    """GraNet (Liu et al. 2021): prune some more, then in each layer drop the lowest and grow as many where gradients are large.

    As in its code a weight that is dropped and regrown keeps its value, and one that is pruned and regrown starts at zero.

    Attributes:
        decay: what is left of the drop fraction, as a function of the fraction of the way to the last change.
    """

    decay: Callable[[float], float]
    reads_gradients = reads_dead_gradients = moves = True
    reallocates, smoothing = False, 0.0

    def __call__(self, now: UpdateInputs) -> MaskChange:
        """Return the change."""
        options, layers = now.scored.options, FlatLayers.of(now)
        until = min(options["granet_until"], options["stop_update"]) / options["stop_update"]
        start = options["granet_start"]
        wanted = start + (now.sparsity - start) * cubic(min(1.0, now.fraction / until))
        pruned = now.pattern.keep(magnitude(now.scored), now.counts(wanted), square=True)
        alive = layers.alive(pruned)
        count = layers.sums(alive)
        drop = (options["drop_fraction"] * self.decay(now.fraction) * count).ceil()
        chosen = layers.top(layers.scores(magnitude, now), ~alive, count - drop)
        after = chosen | layers.grow(layers.scores(gradient, now, growing=True), chosen, drop)
        return MaskChange(layers.spread(after), pruned)


@dataclass(frozen=True)
class MomentumRedistribution:
    """Sparse momentum (Dettmers and Zettlemoyer 2019): drop the lowest of each layer, grow where the momentum is large.

    A layer grows in proportion to the mean momentum of its living weights; what does not fit into full layers is shared
    equally by the others. The momentum is an average of dense gradients of its own, for an optimizer has none of dead
    weights. A weight that is dropped and regrown keeps its value, as in the code.

    Attributes:
        decay: what is left of the drop fraction, as a function of the fraction of the way to the last change.
        smoothing: factor of the momentum from one step to the next.
    """

    decay: Callable[[float], float]
    smoothing: float
    reads_gradients = reads_dead_gradients = moves = reallocates = True

    def __call__(self, now: UpdateInputs) -> MaskChange:
        """Return the change."""
        layers = FlatLayers.of(now)
        alive = layers.alive(now.masks)
        count, weights = layers.sums(alive), layers.weights(alive)
        drop = (now.scored.options["drop_fraction"] * self.decay(now.fraction) * count).ceil()
        chosen = layers.top(layers.scores(magnitude, now), ~alive, count - drop)
        living = torch._foreach_mul(
            [now.scored.gradients[layer.name] for layer in layers], [now.masks[layer.name] for layer in layers]
        )
        mean = torch.stack(torch._foreach_norm(living, 1)).double() / weights.clamp_min(1)
        total = sum(now.counts(now.sparsity).values()) - layers.weights(chosen).sum()
        share = total * mean / mean.sum().clamp_min(torch.finfo(torch.float32).tiny)
        grown = share_out(total, layers.weights(~chosen), share, torch.ones_like(share))
        return MaskChange(layers.spread(chosen | layers.fill(layers.scores(gradient, now), chosen, grown)))


@dataclass(frozen=True)
class ThresholdReallocation:
    """Dynamic sparse reparameterization (Mostafa and Wang 2019): drop below one threshold for all layers, grow at random.

    A layer grows in proportion to the weights that it kept. The threshold is doubled or halved where it dropped less than
    nine tenths or more than eleven tenths of what it should. What was just dropped comes back, from zero, only where a layer
    has no other place; a layer keeps at least one unit.
    """

    reads_gradients = reads_dead_gradients = False
    moves = reallocates = True
    smoothing = 0.0

    def __call__(self, now: UpdateInputs) -> MaskChange:
        """Return the change; nothing moves at the last one."""
        layers, budget = FlatLayers.of(now), sum(now.counts(now.sparsity).values())
        alive, size = layers.alive(now.masks), layers.scores(magnitude, now)
        if "threshold" not in now.memory:
            now.memory["threshold"] = torch.full((), 1e-3, device=size.device, dtype=size.dtype)
        threshold = now.memory["threshold"]
        one = [min(1, layer.target) for layer in layers]
        chosen = (alive & (size >= threshold * constant(now.fraction))) | layers.top(size, ~alive, one)
        kept = layers.weights(chosen)
        dropped, wanted = layers.weights(alive & ~chosen).sum(), now.scored.options["drop_fraction"] * budget
        if now.fraction < 1:
            threshold *= torch.where(dropped > 1.1 * wanted, 0.5, torch.where(dropped < 0.9 * wanted, 2.0, 1.0))
        grown = share_out(budget - kept.sum(), layers.weights(~chosen), torch.zeros_like(kept), kept)
        # Bounded, so that what was just dropped comes after all others.
        draws = layers.scores(random, now).atan_() - math.pi * (alive & ~chosen).double()
        return MaskChange(layers.spread(chosen | layers.fill(draws, chosen, grown)), layers.spread(chosen))


Update = DropAndGrow | MagnitudePruning | PruneAndRegrow | MomentumRedistribution | ThresholdReallocation


def share_out(total: Tensor, room: Tensor, base: Tensor, slope: Tensor) -> Tensor:
    """Return min(room, base + c * slope), with the c for which it sums to total, in whole numbers: float64 [layers].

    Rounded by largest remainders, ties to the earlier layer. Does not wait for the device.
    """
    order = ((room - base) / slope).argsort(stable=True)  # the first of these is full first
    sorted_room, sorted_base, sorted_slope = room[order], base[order], slope[order]
    full = sorted_room.cumsum(0) - sorted_room  # what 0, 1, ... full layers take
    rest_base, rest_slope = (part.flip(0).cumsum(0).flip(0) for part in (sorted_base, sorted_slope))
    # Each of these lines lies above the sum, which is concave in c, and one touches it at `total`: that of the largest c.
    c = torch.where(rest_slope > 0, (total - full - rest_base) / rest_slope, 0).max()
    amounts = torch.minimum(room, base + c * slope)
    counts = (amounts + 1e-9).floor()
    by_remainder = (counts - amounts).argsort(stable=True)
    places = torch.arange(len(counts), device=counts.device, dtype=counts.dtype)
    return counts.index_add(0, by_remainder, (places < (total - counts.sum()).round()).to(counts.dtype))


@dataclass(frozen=True)
class Layer:
    """One layer, or group of channels, at a change of masks.

    Attributes:
        name: of the layer or group.
        units: how many it is cut into.
        target: how many of them live, where the budget of each layer is constant.
    """

    name: str
    units: int
    target: int


class FlatLayers:
    """The units of all layers, one layer after the other: what a GPU takes time for here is launches, not work.

    Args:
        layers: in their order.
        pattern: that cuts them into units.
    """

    def __init__(self, layers: list[Layer], pattern: Units | Channels):
        self._layers, self._pattern = layers, pattern
        self._sizes = [layer.units for layer in layers]

    @classmethod
    def of(cls, now: UpdateInputs) -> "FlatLayers":
        """Return the layers that an update looks at."""
        assert not isinstance(now.pattern, NofM)
        units = now.pattern.pool(now.masks)
        return cls([Layer(name, len(units[name]), target) for name, target in now.targets.items()], now.pattern)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def scores(self, score: Score, now: UpdateInputs, growing: bool = False) -> Tensor:
        """Return the score of each unit, to be dropped or grown by: [units]."""
        pool = self._pattern.pool_growth if growing else self._pattern.pool
        units = pool(score(now.scored), square=score in POOLED_BY_NORM)
        return torch.cat([units[layer.name] for layer in self])

    def alive(self, masks: dict[str, Tensor]) -> Tensor:
        """Return whether each unit lives: bool [units]."""
        units = self._pattern.pool(masks)
        return torch.cat([units[layer.name] for layer in self]) != 0

    def spread(self, units: Tensor) -> dict[str, Tensor]:
        """Return the masks of the layers whose units live where `units`, bool [units], says so."""
        parts = zip(self, units.split(self._sizes), strict=True)
        return self._pattern.spread({layer.name: part for layer, part in parts})

    def sums(self, units: Tensor) -> Tensor:
        """Return the sum over each layer's units: float64 [layers]."""
        return torch.stack([part.sum() for part in units.double().split(self._sizes)])

    def weights(self, units: Tensor) -> Tensor:
        """Return how many weights of each layer are in units where `units`, bool [units], says so: float64 [layers]."""
        return self.sums(units * self._unit_sizes(units.device))

    def top(self, scores: Tensor, excluded: Tensor, counts: Tensor | list[int]) -> Tensor:
        """Return each layer's highest scores, bool [units], ignoring `excluded`; ties go to the earlier unit.

        Args:
            scores: [units].
            excluded: bool [units].
            counts: how many units of each layer.
        """
        order = self._order(scores, excluded)
        place = torch.cat([torch.arange(size, device=order.device) for size in self._sizes])
        return torch.empty_like(excluded).scatter_(0, order, place < self._by_unit(counts, order.device))

    def grow(self, scores: Tensor, chosen: Tensor, counts: Tensor | list[int]) -> Tensor:
        """Return as many of each layer's highest scores beside the chosen units as `top` does.

        With a constant fan-in the outputs that lost most grow most.
        """
        if not isinstance(self._pattern, FanIn):
            return self.top(scores, chosen, counts)
        parts = zip(self, scores.split(self._sizes), chosen.split(self._sizes), counts, strict=True)
        return torch.cat([self._pattern.fill(layer.name, s, c, c.sum() + count) for layer, s, c, count in parts])

    def fill(self, scores: Tensor, excluded: Tensor, weights: Tensor) -> Tensor:
        """Return each layer's highest scores as `top` does, so many weights, to within half a unit a layer."""
        order = self._order(scores, excluded)
        sizes = self._unit_sizes(order.device)[order]
        ends = torch.cat([part.cumsum(0) for part in sizes.split(self._sizes)])
        fits = 2 * ends - sizes <= 2 * self._by_unit(weights, order.device)
        return torch.empty_like(excluded).scatter_(0, order, fits) & ~excluded

    def _order(self, scores: Tensor, excluded: Tensor) -> Tensor:
        """Return the units layer by layer, and by score within each, those excluded last: int64 [units]."""
        layer = self._by_unit(range(len(self._sizes)), scores.device).short()
        order = scores.masked_fill(excluded, -torch.inf).sort(descending=True, stable=True).indices
        return order[layer[order].sort(stable=True).indices]

    def _by_unit(self, values: Tensor | Iterable[int], device: torch.device) -> Tensor:
        """Return the value of each unit's layer: [units]."""
        if isinstance(values, Tensor):
            return torch.cat([value.expand(size) for value, size in zip(values.unbind(), self._sizes, strict=True)])
        return torch.cat([torch.full((n,), v, device=device) for v, n in zip(values, self._sizes, strict=True)])

    def _unit_sizes(self, device: torch.device) -> Tensor:
        """Return the number of weights of each unit: int64 [units]."""
        assert isinstance(self._pattern, Units)
        return torch.cat([self._pattern.sizes(layer.name, device) for layer in self])
