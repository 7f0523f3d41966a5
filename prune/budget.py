"""How many weights each layer keeps: one sparsity for all layers, shared out, or one for each layer.

A distribution is a function of (shapes, budget) that returns each layer's part of the budget, as fractions of weights;
`distribute` turns them into whole numbers that sum to it exactly.
"""

import difflib
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from prune.patterns import Channels, Counts, NofM, Pattern, Shape, Units


class BudgetError(ValueError):
    """A sparsity that layers of these shapes cannot have."""


class EmptyLayerError(BudgetError):
    """A sparsity that leaves a layer, or all paths through a network, without a weight."""


def uniform(shapes: dict[str, Shape], budget: float) -> dict[str, float]:
    """Give every layer the same density."""
    density = budget / sum(math.prod(shape) for shape in shapes.values())
    return {name: density * math.prod(shape) for name, shape in shapes.items()}


def erk(shapes: dict[str, Shape], budget: float) -> dict[str, float]:
    """Give each layer a density in proportion to the sum of its weight's dimensions over their product.

    This is Erdos-Renyi-Kernel: Evci et al., "Rigging the Lottery", ICML 2020, section 3 (1 - s proportional to (n_in +
    n_out + w + h) / (n_in n_out w h); for linear layers the Erdos-Renyi rule of Mocanu et al. 2018).
    """
    return _in_proportion({name: sum(shape) for name, shape in shapes.items()}, shapes, budget)


def balanced(shapes: dict[str, Shape], budget: float) -> dict[str, float]:
    """Give every layer the same number of weights: Gadhikar et al., "Why Random Pruning Is All We Need", ICML 2023."""
    return _in_proportion(dict.fromkeys(shapes, 1), shapes, budget)


def _in_proportion(parts: dict[str, int], shapes: dict[str, Shape], budget: float) -> dict[str, float]:
    """Share the budget out in proportion to the layers' parts.

    Layers that would get more weights than they have become dense, and the factor of the others is solved again until none
    does.
    """
    dense: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        left = budget - sum(math.prod(shapes[name]) for name in dense)
        factor = left / sum(parts[name] for name in rest) if rest else 0.0
        full = {name for name in rest if factor * parts[name] > math.prod(shapes[name])}
        if not full:
            break
        dense |= full
    return {name: math.prod(shapes[name]) if name in dense else factor * parts[name] for name in shapes}


def global_(shapes: dict[str, Shape], budget: float) -> None:
    """Leave it to the scores: those of all layers compete for the budget."""


DISTRIBUTIONS: dict[str, Callable[[dict[str, Shape], float], dict[str, float] | None]] = {
    "uniform": uniform,
    "erk": erk,
    "balanced": balanced,
    "global": global_,
}


def distribute(name: str, shapes: dict[str, Shape], sparsity: float, dense: set[str]) -> Counts:
    """Return the number of weights that stay alive in each group of layers that competes for them.

    Args:
        name: a key of DISTRIBUTIONS.
        shapes: shape of each prunable weight by layer.
        sparsity: fraction of all these weights, those of dense layers included, that is to be zero.
        dense: layers that keep every weight; the others make up for them.

    Returns:
        {layers: count} for the layers outside `dense`: a group for each layer, or one for all of them if `global`.
        With the dense layers' weights the counts sum to round((1 - sparsity) * all weights).

    Raises:
        BudgetError: the sparsity cannot be reached, or a layer would be left empty.
    """
    sizes = {layer: math.prod(shape) for layer, shape in shapes.items()}
    sparse = {layer: shape for layer, shape in shapes.items() if layer not in dense}
    if not shapes and sparsity == 0:
        return {}
    _refuse_nothing_to_prune(sparse, shapes)
    kept_dense = sum(sizes[layer] for layer in dense)
    budget = round((1 - sparsity) * sum(sizes.values())) - kept_dense

    def works(lower: float) -> bool:
        """Return whether each layer keeps a weight at a lower sparsity."""
        least = round((1 - lower) * sum(sizes.values())) - kept_dense
        amounts = DISTRIBUTIONS[name](sparse, least) if least >= len(sparse) else {}
        return least >= len(sparse) if not amounts else min(_round_to_sum(amounts, least).values()) > 0

    if budget < len(sparse):
        highest = highest_sparsity(works, sparsity)
        held = f", {len(dense)} of them dense," if dense else ""
        raise BudgetError(
            f"sparsity {sparsity:g} is too high for the {len(shapes)} layers{held} here: at most {highest:g} is possible"
        )
    amounts = DISTRIBUTIONS[name](sparse, budget)
    if amounts is None:
        return {tuple(sparse): budget}
    counts = _round_to_sum(amounts, budget)
    for layer, count in counts.items():
        if count == 0:
            erk = "" if name == "erk" else ", or distribution=erk"
            raise EmptyLayerError(
                f"sparsity={sparsity:g} leaves layer '{layer}' without a weight: take sparsity="
                f"{highest_sparsity(works, sparsity):g}, the highest that works here{erk}, or keep layers dense by name"
            )
    return {(layer,): count for layer, count in counts.items()}


# What the density of a group of channels is proportional to, by the shapes of its layers' weights taken together.
CHANNEL_DENSITY: dict[str, Callable[[list[Shape]], float]] = {
    "uniform": lambda shapes: 1.0,
    "erk": lambda shapes: sum(map(sum, shapes)) / sum(map(math.prod, shapes)),
    "balanced": lambda shapes: 1 / sum(map(math.prod, shapes)),
}


def distribute_channels(name: str, pattern: Channels, shapes: dict[str, Shape], sparsity: float) -> Counts:
    """Return how many channels each group keeps so that this sparsity is reached to within half a channel's weights.

    Each group begins with one channel. Then one channel after the other is added, always to the group that is furthest below
    its share (CHANNEL_DENSITY), until the sparsity is nearest. So a higher sparsity never keeps more channels of any group.

    Args:
        name: a key of DISTRIBUTIONS.
        pattern: the groups.
        shapes: shape of each prunable weight by layer.
        sparsity: fraction of all these weights that is to be zero.

    Returns:
        {(group,): channels}, or {all groups: weights} if `global`.

    Raises:
        BudgetError: the sparsity cannot be reached.
    """
    total, size = sum(map(math.prod, shapes.values())), {name: group.size for name, group in pattern.groups.items()}
    staying = total - pattern.weights(size)  # weights that no channel takes along
    budget = round((1 - sparsity) * total) - staying
    least = pattern.weights(dict.fromkeys(size, 1))
    if budget < least:
        highest = math.floor(1e4 * (1 - (staying + least) / total)) / 1e4
        outside = len(shapes) - len(pattern.layers)
        of_these = f", and {outside} of {len(shapes)} layers all of theirs" if outside else ""
        raise BudgetError(
            f"sparsity {sparsity:g} is too high for channels: each group of them keeps one{of_these}; at most {highest:g} "
            "is possible, or take another pattern"
        )
    if name == "global" and len(size) > 1:
        return {tuple(size): budget}
    density = CHANNEL_DENSITY["uniform" if name == "global" else name]  # for one group any is the same
    ratio = {group: density(pattern.shapes_of(group)) for group in size}
    gains = sorted(
        ((kept + 0.5) / (count * ratio[group]), group) for group, count in size.items() for kept in range(1, count)
    )

    def kept(steps: int) -> dict[str, int]:
        return dict.fromkeys(size, 1) | {g: 1 + n for g, n in Counter(group for _, group in gains[:steps]).items()}

    def left(steps: int) -> int:
        return pattern.weights(kept(steps))

    steps = bisect_left(range(len(gains)), budget, key=left)
    if steps and budget - left(steps - 1) < left(steps) - budget:
        steps -= 1
    return {(group,): count for group, count in kept(steps).items()}


def highest_sparsity(works: Callable[[float], bool], below: float) -> float:
    """Return the highest sparsity below one that does not work, to four digits; 0 where none works."""
    low, high = 0, int(1e4 * below)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(middle / 1e4) else (low, middle - 1)
    return low / 1e4


class Budget:
    """How many weights each layer of a network keeps, at the final sparsity and on the way there.

    Args:
        shapes: shape of each prunable weight by layer.
        pattern: an N:M pattern fixes the sparsity of every layer; one of channels counts them, not weights.
        sparsity: fraction of all prunable weights that is zero in the end; None where `by_layer` or the pattern says it.
        distribution: a key of DISTRIBUTIONS; None for `default`.
        default: the distribution where none is named.
        by_layer: the sparsity of each layer by name; layers that are not named stay dense.
        dense_layers: names of the layers that stay dense.

    Attributes:
        sparsity: the final one; by layer, that of the layers that are not dense.
        dense: names of the layers that keep every weight.
        distribution: how layers share the sparsity; None where each has its own.

    Raises:
        ValueError: a sparsity that cannot be reached, or arguments that leave each other no choice.
    """

    def __init__(
        self,
        shapes: dict[str, Shape],
        pattern: Pattern,
        sparsity: float | None,
        distribution: str | None,
        default: str,
        by_layer: dict[str, float] | None = None,
        dense_layers: Iterable[str] = (),
    ):
        self._shapes, self._pattern = shapes, pattern
        self.dense = set(dense_layers)
        if isinstance(pattern, Channels):
            self._refuse_without_channels(pattern, by_layer)
        self._by_layer = self._fixed_layers(by_layer, pattern)
        self.distribution = None if self._by_layer is not None else distribution or default
        if self._by_layer is None:
            if sparsity is None or not 0 <= sparsity < 1:
                raise ValueError(f"sparsity has to be at least 0 and less than 1, not {sparsity}")
            self.sparsity = sparsity
        else:
            source = f"pattern {pattern.name}" if isinstance(pattern, NofM) else "the sparsity by layer"
            if distribution is not None:
                raise ValueError(f"{source} leaves nothing to distribute: leave out distribution={distribution}")
            _refuse_nothing_to_prune(self._by_layer, self._shapes)
            self.sparsity = self._fixed_sparsity(sparsity, source)
            if isinstance(pattern, Units):
                self._refuse_emptied_layers(pattern)
        self.counts(self.sparsity)  # an impossible sparsity is known before anything is scored

    def counts(self, sparsity: float, distribution: str | None = None) -> Counts:
        """Return how many weights each group of layers outside `dense` keeps at a sparsity, or channels each of theirs.

        Args:
            sparsity: see the class.
            distribution: another one than the budget's.
        """
        distribution = distribution or self.distribution
        if isinstance(self._pattern, Channels):
            assert distribution is not None
            return distribute_channels(distribution, self._pattern, self._shapes, sparsity)
        if distribution is not None:
            return distribute(distribution, self._shapes, sparsity, self.dense)
        assert self._by_layer is not None
        fraction = sparsity / self.sparsity if self.sparsity else 0.0  # of the way there, for schedules
        return {
            (name,): round((1 - fraction * final) * math.prod(self._shapes[name]))
            for name, final in self._by_layer.items()
        }

    def _fixed_layers(self, by_layer: dict[str, float] | None, pattern: Pattern) -> dict[str, float] | None:
        """Return each layer's sparsity where a file or the pattern says it."""
        if by_layer is None:
            if pattern.density is None:
                return None
            return {name: 1 - pattern.density for name in self._shapes if name not in self.dense}
        if pattern.density is not None:
            raise ValueError("an N:M pattern fixes the sparsity of every layer: leave layer_sparsity out")
        for name, value in by_layer.items():
            if name not in self._shapes:
                _refuse_nothing_to_prune(self._shapes, self._shapes)
                nearest = difflib.get_close_matches(name, self._shapes, 1, cutoff=0)[0]
                raise ValueError(f"there is no prunable layer '{name}': the nearest name is '{nearest}'")
            if not 0 <= value < 1:
                raise ValueError(f"the sparsity of layer '{name}' has to be at least 0 and less than 1, not {value:g}")
            if value and name in self.dense:
                raise ValueError(
                    f"layer '{name}' has sparsity {value:g} and is among the dense layers: leave it out of one of them"
                )
        self.dense |= self._shapes.keys() - by_layer.keys()
        return {name: value for name, value in by_layer.items() if name not in self.dense}

    def _fixed_sparsity(self, sparsity: float | None, source: str) -> float:
        """Return the sparsity of the layers that are not dense. Raises ValueError if another one of all layers was asked for."""
        assert self._by_layer is not None
        sizes = {name: math.prod(self._shapes[name]) for name in self._by_layer}
        dead = sum(value * sizes[name] for name, value in self._by_layer.items())
        fixed = dead / sum(math.prod(shape) for shape in self._shapes.values())
        if sparsity is not None and abs(sparsity - fixed) > 1e-6:  # as many digits as the sentence below gives
            # What 2:4 fixes without dense layers holds for any network; else sizes count, and so do the classes.
            error = ValueError if isinstance(self._pattern, NofM) and not self.dense else BudgetError
            raise error(
                f"{source} fixes the sparsity at {fixed:g}: leave out sparsity={sparsity:g}, or change one of them"
            )
        return dead / sum(sizes.values())

    def _refuse_emptied_layers(self, pattern: Units) -> None:
        """Raise EmptyLayerError for a layer whose own sparsity leaves it nothing, before masks come to that."""
        assert self._by_layer is not None
        for (name,), count in self.counts(self.sparsity).items():
            unit = pattern.smallest_unit(name)
            if 2 * count < unit:  # see patterns.top
                what = "a weight" if unit == 1 else f"a unit of {unit} weights"
                raise EmptyLayerError(
                    f"sparsity {self._by_layer[name]:g} leaves layer '{name}' without {what}: give it a lower one, or take a "
                    "finer pattern"
                )

    def _refuse_without_channels(self, pattern: Channels, by_layer: dict[str, float] | None) -> None:
        """Count the layers without channels that can go as dense. Raises ValueError where there are no others."""
        if by_layer is not None:
            raise ValueError(
                "a channel is part of several layers, which lose it together: give sparsity in place of layer_sparsity, or "
                "take another pattern"
            )
        if not pattern.groups:
            why = ", or leave dense_layers out" if self.dense else ""
            raise ValueError(f"no channel can be taken out of this network: take another pattern{why}")
        self.dense = self._shapes.keys() - set(pattern.layers)


def _refuse_nothing_to_prune(sparse: Collection[str], shapes: Collection[str]) -> None:
    """Raise ValueError where a network has no prunable layers (`shapes`), or none of them is to be sparse."""
    if not shapes:
        raise ValueError(
            "there is no convolution or linear layer here whose weight can be pruned: take no pruning method"
        )
    if not sparse:
        raise ValueError("every layer is to stay dense: let at least one be pruned, or take no pruning method")


def _round_to_sum(amounts: dict[str, float], total: int) -> dict[str, int]:
    """Round each amount down or up so that they sum to total (largest remainders; ties to the earlier layer)."""
    counts = {name: math.floor(amount + 1e-9) for name, amount in amounts.items()}
    by_remainder = sorted(amounts, key=lambda name: counts[name] - amounts[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
