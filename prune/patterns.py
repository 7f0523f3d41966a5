"""Which weights live and die together.

A pattern sees scores of weights and chooses masks. Most cut a layer into units, whose weights share one fate, and keep
the units with the highest scores; N:M keeps the best N of every M weights instead. A unit's score is the root of the mean
square of its weights' where these are magnitudes, so that units of a size rank by their L2 norm, and else the mean.
"""

import math
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Shape = tuple[int, ...]
Counts = dict[tuple[str, ...], int]  # weights to keep in each group of layers that competes for them


class Units:
    """A pattern that cuts each layer into units, whose weights live and die together.

    Args:
        name: as `find_pattern` knows it.
        number: a function from a weight's shape [out, in, ...] to the number of each weight's unit, int64 in that shape,
            counted from 0; None if each weight is a unit of its own.
    """

    density: float | None = None  # any

    def __init__(self, name: str, number: Callable[[Shape], Tensor] | None = None):
        self.name, self._number = name, number
        self._units: dict[tuple[Shape, torch.device], tuple[Tensor, Tensor]] = {}

    def pool(self, values: Tensor, square: bool = False) -> Tensor:
        """Return the mean value of each unit, or the root of its mean square: [units]."""
        if self._number is None:
            return values.flatten()
        number, sizes = self._units_of(tuple(values.shape), values.device)
        sums = torch.zeros(len(sizes), dtype=values.dtype, device=values.device)
        values = values.flatten()
        means = sums.index_add_(0, number, values.square() if square else values) / sizes
        return means.sqrt_() if square else means

    def sizes(self, values: Tensor) -> Tensor:
        """Return the number of weights of each unit: int64 [units]."""
        if self._number is None:
            return torch.ones((), dtype=torch.int64, device=values.device).expand(values.numel())
        return self._units_of(tuple(values.shape), values.device)[1]

    def smallest_unit(self, shape: Shape) -> int:
        """Return the size of the smallest unit of a layer."""
        return 1 if self._number is None else int(torch.bincount(self._number(shape).flatten()).min())

    def spread(self, alive: Tensor, shape: Shape) -> Tensor:
        """Return the mask of a weight's shape whose units live where `alive`, bool [units], says so."""
        if self._number is None:
            return alive.view(shape)
        return alive.index_select(0, self._units_of(shape, alive.device)[0]).view(shape)

    def keep(self, scores: dict[str, Tensor], counts: Counts, square: bool = False) -> dict[str, Tensor]:
        """Return boolean masks of the highest scores: the number of weights in `counts`, to within half a unit a group.

        Args:
            scores: of each weight, by layer.
            counts: see Counts.
            square: see `pool`.
        """
        masks = {}
        for layers, count in counts.items():
            pooled = [self.pool(scores[layer], square) for layer in layers]
            alive = top(torch.cat(pooled), torch.cat([self.sizes(scores[layer]) for layer in layers]), count)
            for layer, part in zip(layers, alive.split(list(map(len, pooled))), strict=True):
                masks[layer] = self.spread(part, tuple(scores[layer].shape))
        return masks

    def _units_of(self, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return each weight's unit, int32 [weights], and each unit's size, int64 [units]; made once for each shape."""
        if (shape, device) not in self._units:
            assert self._number is not None
            number = self._number(shape).flatten()
            self._units[shape, device] = number.int().to(device), torch.bincount(number).to(device)
        return self._units[shape, device]


class NofM:
    """At most n of every m consecutive weights along the input channels (Mishra et al. 2021 for 2:4).

    Where m does not divide the input channels, the last and shorter group keeps at most n and its part of n rounded up:
    the layer has the pattern once it is padded with zeros.
    """

    def __init__(self, n: int, m: int):
        self.name, self.n, self.m, self.density = f"{n}:{m}", n, m, n / m

    def keep(self, scores: dict[str, Tensor], counts: Counts, square: bool = False) -> dict[str, Tensor]:
        """Return masks as Units.keep does; the counts, one for each layer, say how far down to n a schedule has come."""
        masks: dict[str, Tensor] = {}
        for (layer,), count in counts.items():
            size = scores[layer].numel()
            # Counts are whole: the share of n is rounded up before it is compared.
            n = next((n for n in range(self.n, self.m) if -(-size * n // self.m) >= count), self.m)
            masks[layer] = self._best(scores[layer], n)
        return masks

    def _best(self, scores: Tensor, n: int) -> Tensor:
        channels = scores.shape[1]
        rest = channels % self.m
        rows = scores.movedim(1, -1)
        whole = rows[..., : channels - rest].unflatten(-1, (-1, self.m)) if channels >= self.m else None
        parts = []
        if whole is not None:
            parts.append(_top_of_last(whole, n).flatten(-2))
        if rest:
            parts.append(_top_of_last(rows[..., channels - rest :], -(-n * rest // self.m)))  # no more than n
        return torch.cat(parts, -1).movedim(-1, 1)


Pattern = Units | NofM


def top(scores: Tensor, sizes: Tensor, count: int) -> Tensor:
    """Return the units of the highest scores, bool [units], whose sizes sum to `count` to within half a unit.

    Ties go to the earlier unit, on every device.
    """
    order = scores.sort(descending=True, stable=True).indices
    sizes = sizes[order]
    alive = torch.empty(len(order), dtype=torch.bool, device=order.device)
    alive[order] = 2 * sizes.cumsum(0) - sizes <= 2 * count
    return alive


def find_pattern(name: str) -> Pattern:
    """Return the pattern of a name.

    The names are `unstructured`, `channel` (filters), `kernel` (k x k kernels), `RxC` (blocks such as 4x1) and `N:M`
    (such as 2:4). A block holds R consecutive outputs by C consecutive columns of a weight seen as a matrix
    [out, in * kh * kw]; blocks at the edges are smaller where the sizes do not divide.

    Raises:
        ValueError: no such pattern.
    """
    if name in UNITS:
        return Units(name, UNITS[name])
    if match := re.fullmatch(r"(\d+)x(\d+)", name):
        height, width = map(int, match.groups())
        if height and width:
            return Units(name, partial(_block, height=height, width=width))
    if match := re.fullmatch(r"(\d+):(\d+)", name):
        n, m = map(int, match.groups())
        if 0 < n < m:
            return NofM(n, m)
    raise ValueError(f"unknown pattern '{name}': choose {', '.join(UNITS)}, blocks such as 4x1, or N:M such as 2:4")


def _channel(shape: Shape) -> Tensor:
    return torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)


def _kernel(shape: Shape) -> Tensor:
    return torch.arange(shape[0] * shape[1]).view(shape[0], shape[1], *[1] * (len(shape) - 2)).expand(shape)


def _block(shape: Shape, height: int, width: int) -> Tensor:
    columns = math.prod(shape[1:])
    row = torch.arange(shape[0])[:, None] // height
    return (row * -(-columns // width) + torch.arange(columns) // width).view(shape)


UNITS: dict[str, Callable[[Shape], Tensor] | None] = {"unstructured": None, "kernel": _kernel, "channel": _channel}


def _top_of_last(scores: Tensor, n: int) -> Tensor:
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :n], True)
