"""How one global sparsity is shared out over the layers: how many weights of each layer stay alive.

A distribution is a function of (shapes, budget) that returns the share of each layer in the budget, as fractions of
weights; `distribute` turns them into whole numbers that sum to it exactly.
"""

import math
from collections.abc import Callable

from prune.patterns import refuse_empty

Shape = tuple[int, ...]


def uniform(shapes: dict[str, Shape], budget: float) -> dict[str, float]:
    """The same density in every layer."""
    density = budget / sum(math.prod(shape) for shape in shapes.values())
    return {name: density * math.prod(shape) for name, shape in shapes.items()}


def erk(shapes: dict[str, Shape], budget: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: density in proportion to the sum of a weight's dimensions over their product.

    Evci et al., "Rigging the Lottery", ICML 2020, section 3 (1 - s proportional to (n_in + n_out + w + h) /
    (n_in n_out w h); for linear layers this is the Erdos-Renyi rule of Mocanu et al. 2018). Layers that would exceed
    density 1 become dense, and the factor of the others is solved again until none does.
    """
    dense: set[str] = set()
    while True:
        rest = {name: shape for name, shape in shapes.items() if name not in dense}
        left = budget - sum(math.prod(shapes[name]) for name in dense)
        factor = left / sum(sum(shape) for shape in rest.values()) if rest else 0.0
        full = {name for name, shape in rest.items() if factor * sum(shape) > math.prod(shape)}
        if not full:
            break
        dense |= full
    return {name: math.prod(shape) if name in dense else factor * sum(shape) for name, shape in shapes.items()}


def global_(shapes: dict[str, Shape], budget: float) -> None:
    """No shares: the scores of all layers compete for the budget."""


DISTRIBUTIONS: dict[str, Callable[[dict[str, Shape], float], dict[str, float] | None]] = {
    "uniform": uniform,
    "erk": erk,
    "global": global_,
}


def distribute(name: str, shapes: dict[str, Shape], sparsity: float, dense: set[str]) -> dict[tuple[str, ...], int]:
    """Number of weights that stay alive in each group of layers that competes for them.

    Args:
        name: a key of DISTRIBUTIONS.
        shapes: shape of each prunable weight by layer.
        sparsity: share of all these weights, those of dense layers included, that is to be zero.
        dense: layers that keep every weight; the others make up for them.

    Returns:
        {layers: count} for the layers outside `dense`: a group for each layer, or one for all of them if `global`.
        With the dense layers' weights the counts sum to round((1 - sparsity) * all weights).

    Raises:
        ValueError: the sparsity cannot be reached, or a layer would be left empty.
    """
    sizes = {layer: math.prod(shape) for layer, shape in shapes.items()}
    sparse = {layer: shape for layer, shape in shapes.items() if layer not in dense}
    if not sparse:
        raise ValueError("every layer is to stay dense: name fewer of them, or take no pruning method")
    kept_dense = sum(sizes[layer] for layer in dense)
    budget = round((1 - sparsity) * sum(sizes.values())) - kept_dense
    if budget < len(sparse):
        highest = math.floor(1e4 * (1 - (kept_dense + len(sparse)) / sum(sizes.values()))) / 1e4
        held = f", {len(dense)} of them dense," if dense else ""
        raise ValueError(
            f"sparsity {sparsity:g} is too high for the {len(shapes)} layers{held} here: at most {highest:g} is possible"
        )
    amounts = DISTRIBUTIONS[name](sparse, budget)
    if amounts is None:
        return {tuple(sparse): budget}
    counts = _round_to_sum(amounts, budget)
    refuse_empty([layer for layer, count in counts.items() if count == 0])
    return {(layer,): count for layer, count in counts.items()}


def _round_to_sum(amounts: dict[str, float], total: int) -> dict[str, int]:
    """Round each amount down or up so that they sum to total (largest remainders; ties to the earlier layer)."""
    counts = {name: math.floor(amount + 1e-9) for name, amount in amounts.items()}
    by_remainder = sorted(amounts, key=lambda name: counts[name] - amounts[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
