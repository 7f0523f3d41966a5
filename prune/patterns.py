"""Which weights live and die together.

A pattern sees scores of weights and chooses masks. Most cut each layer into units, whose weights share one fate, and keep
the units with the highest scores; channels are units of several layers; N:M keeps the best N of every M weights instead.
A unit's score is the root of the mean square of its weights' where these are magnitudes, so that units of a size rank by
their L2 norm, and else the mean.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prune.channels import Group, channel_groups
from prune.masks import prunable_weights

Shape = tuple[int, ...]
Counts = dict[tuple[str, ...], int]  # weights to keep in each group of layers that competes for them


class Units:
    """A pattern that cuts each layer into units, whose weights live and die together.

    Args:
        name: as `find_pattern` knows it.
        number: a function from a weight's shape [out, in, ...] to the number of each weight's unit, int64 in that shape,
            counted from 0; None if each weight is a unit of its own.
        shapes: of each layer's weight.
    """

    density: float | None = None  # any

    def __init__(self, name: str, number: Callable[[Shape], Tensor] | None, shapes: Mapping[str, Shape]):
        self.name, self._number, self._shapes = name, number, shapes
        self._units: dict[tuple[Shape, torch.device], tuple[Tensor, Tensor]] = {}

    def pool(self, values: Mapping[str, Tensor], square: bool = False) -> dict[str, Tensor]:
        """Return the mean value of each unit, or the root of its mean square: [units] by layer."""
        if self._number is None:
            return {name: value.flatten() for name, value in values.items()}
        pooled = {}
        for name, value in values.items():
            number, sizes = self._units_of(name, value.device)
            flat = _summable(value.flatten())
            sums = torch.zeros(len(sizes), dtype=flat.dtype, device=flat.device)
            means = sums.index_add_(0, number, flat.square() if square else flat) / sizes
            pooled[name] = means.sqrt_() if square else means
        return pooled

    pool_growth = pool  # all weights of a unit have a gradient, whether they live or not

    def spread(self, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks by layer, whose units live where `alive`, bool [units] by layer, says so."""
        masks = {}
        for name, units in alive.items():
            if self._number is not None:
                units = units.index_select(0, self._units_of(name, units.device)[0])
            masks[name] = units.view(self._shapes[name])
        return masks

    def smallest_unit(self, layer: str) -> int:
        """Return the size of the smallest unit of a layer."""
        return 1 if self._number is None else int(torch.bincount(self._number(self._shapes[layer]).flatten()).min())

    def keep(self, scores: Mapping[str, Tensor], counts: Counts, square: bool = False) -> dict[str, Tensor]:
        """Return boolean masks of the highest scores: the number of weights in `counts`, to within half a unit a group.

        Args:
            scores: of each weight, by layer.
            counts: see Counts.
            square: see `pool`.
        """
        pooled, alive = self.pool(scores, square), dict[str, Tensor]()
        for layers, count in counts.items():
            parts = [pooled[layer] for layer in layers]
            chosen = top(torch.cat(parts), torch.cat([self.sizes(layer, parts[0].device) for layer in layers]), count)
            alive.update(zip(layers, chosen.split(list(map(len, parts))), strict=True))
        return self.spread(alive)

    def sizes(self, layer: str, device: torch.device) -> Tensor:
        """Return the number of weights of each unit: int64 [units]."""
        if self._number is None:
            return torch.ones((), dtype=torch.int64, device=device).expand(math.prod(self._shapes[layer]))
        return self._units_of(layer, device)[1]

    def _units_of(self, layer: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return each weight's unit, int32 [weights], and each unit's size, int64 [units]; made once for each shape."""
        shape = self._shapes[layer]
        if (shape, device) not in self._units:
            assert self._number is not None
            number = self._number(shape).flatten()
            self._units[shape, device] = number.int().to(device), torch.bincount(number).to(device)
        return self._units[shape, device]


class FanIn(Units):
    """As many weights for every output of a layer as for any other: constant fan-in (Lasby et al. 2024).

    Each output keeps at least one.

    Args:
        shapes: of each layer's weight.
    """

    def __init__(self, shapes: Mapping[str, Shape]):
        super().__init__("fan-in", None, shapes)

    def keep(self, scores: Mapping[str, Tensor], counts: Counts, square: bool = False) -> dict[str, Tensor]:
        """Return masks as Units.keep does, of counts that each output of a layer gets its share of, rounded."""
        masks = {}
        for layers, count in counts.items():
            flat = torch.cat([scores[layer].flatten() for layer in layers])
            best = top(flat, torch.ones_like(flat, dtype=torch.int64), count)
            for layer, part in zip(layers, best.split([scores[layer].numel() for layer in layers]), strict=True):
                rows = scores[layer].flatten(1)
                masks[layer] = self._highest(rows, self.share(layer, part.sum())).view_as(scores[layer])
        return masks

    def share(self, layer: str, weights: Tensor) -> Tensor:
        """Return how many weights each output has where the layer has so many."""
        return (weights / self._shapes[layer][0]).round().clamp_min(1)

    def fill(self, layer: str, scores: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return chosen weights and the highest scores beside them, so that every output has its share of the weights.

        Args:
            layer: of all that follow.
            scores: [weights].
            chosen: bool [weights], no more of an output than its share.
            weights: how many the layer is to have.
        """
        outputs = self._shapes[layer][0]
        rows = scores.masked_fill(chosen, torch.inf).view(outputs, -1)
        return self._highest(rows, self.share(layer, weights)).flatten()

    def _highest(self, rows: Tensor, count: Tensor) -> Tensor:
        """Return which entries of each row are its highest, so many of them."""
        order = rows.sort(dim=1, descending=True, stable=True).indices
        places = torch.arange(rows.shape[1], device=rows.device).expand_as(order)
        return torch.zeros_like(order).scatter_(1, order, places) < count


class Channels:
    """Channels with everything that writes and reads them: what a network can be rid of, see prune/channels.py.

    Its masks cover the filters of a channel, their biases, the scale and shift of its batch norm, and the slices of the
    next layers' weights. A channel without them is 0 after its batch norm, and nothing reads it.

    Args:
        groups: of the network.
        shapes: of each layer's weight.
        parameters: names of the network's other parameters.

    Attributes:
        groups: by name.
        layers: names of the layers that lose weights.
        written: names of the layers and other parameters that compute the channels of a group.
    """

    name, density = "channel", None

    def __init__(self, groups: Collection[Group], shapes: Mapping[str, Shape], parameters: Collection[str]):
        self.groups = {group.name: group for group in groups}
        self._writers = {layer: group for group in groups for layer in group.writers}
        self._readers = {layer: group for group in groups for layer in group.readers}
        self.layers = [layer for layer in shapes if layer in self._writers or layer in self._readers]
        self._shapes = {layer: shapes[layer] for layer in self.layers}
        self._followers = {name: group for group in groups for name in group.others if name in parameters}
        self.written = [*self._followers, *self._writers]

    def weights(self, kept: Mapping[str, Any]) -> Any:
        """Return the number of weights that are left in `layers` where groups keep so many channels, ints or tensors."""
        total = 0
        for layer, (rows, columns, *kernel) in self._shapes.items():
            if layer in self._writers:
                rows = kept[self._writers[layer].name]
            if layer in self._readers:
                group = self._readers[layer]
                columns = kept[group.name] * (columns // group.size)
            total = total + rows * columns * math.prod(kernel)
        return total

    def shapes_of(self, group: str) -> list[Shape]:
        """Return the shapes of the weights of the layers that a group is part of."""
        return [self._shapes[layer] for layer in (*self.groups[group].writers, *self.groups[group].readers)]

    def pool(self, values: Mapping[str, Tensor], square: bool = False) -> dict[str, Tensor]:
        """Return the mean value of each channel's weights, or the root of its mean square: [channels] by group."""
        return {name: self._pool(group, values, square, group.writers) for name, group in self.groups.items()}

    def pool_growth(self, values: Mapping[str, Tensor], square: bool = False) -> dict[str, Tensor]:
        """Return the same of the weights that read a channel: what computes one that nothing reads has no gradient."""
        return {name: self._pool(group, values, square, ()) for name, group in self.groups.items()}

    def spread(self, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks of layers by name, and of other parameters by theirs, where `alive` says which channels live."""
        masks = {name: alive[group.name] for name, group in self._followers.items()}
        for layer, shape in self._shapes.items():
            sides = [self._rows(layer, alive)] if layer in self._writers else []
            sides += [self._columns(layer, alive)] if layer in self._readers else []
            masks[layer] = (sides[0] & sides[-1]).expand(shape)  # the same one where a layer has one side
        return masks

    def computing(self, channels: Mapping[str, Tensor], alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks of what computes channels from the others that live, and not of what reads them."""
        masks = {name: channels[group.name] for name, group in self._followers.items()}
        others = {name: alive[name] & ~channels[name] for name in alive}
        for layer in self._writers:
            rows = self._rows(layer, channels)
            rows = rows & self._columns(layer, others) if layer in self._readers else rows
            masks[layer] = rows.expand(self._shapes[layer])
        return masks

    def keep(self, scores: Mapping[str, Tensor], counts: Counts, square: bool = False) -> dict[str, Tensor]:
        """Return masks of the highest scores, see `spread`.

        Args:
            scores: of each weight, by layer.
            counts: the number of channels of each group or, where all groups compete, the number of weights of all
                layers, which is kept to within half a channel; then each group keeps its best channel.
            square: see `pool`.
        """
        pooled, alive = self.pool(scores, square), dict[str, Tensor]()
        for names, count in counts.items():
            compete = len(names) > 1
            parts = [pooled[name] for name in names]
            if compete:
                parts = [part.index_fill(0, part.argmax(), torch.inf) for part in parts]
            order = torch.cat(parts).sort(descending=True, stable=True).indices
            first = self._nearest(order, count) if compete else torch.arange(len(order), device=order.device) < count
            chosen = torch.zeros_like(order, dtype=torch.bool).index_copy_(0, order, first)
            alive.update(zip(names, chosen.split(list(map(len, parts))), strict=True))
        return self.spread(alive)

    def _nearest(self, order: Tensor, weights: int) -> Tensor:
        """Return which of the channels in an order, bool, leave the number of weights that is nearest to this one."""
        sizes = [group.size for group in self.groups.values()]
        owner = torch.repeat_interleave(torch.tensor(sizes)).to(order.device)[order]
        kept = (owner[:, None] == torch.arange(len(sizes), device=order.device)).cumsum(0)
        left = self.weights(dict(zip(self.groups, kept.unbind(1), strict=True)))
        return torch.arange(len(order), device=order.device) <= (left - weights).abs().argmin()

    def _pool(self, group: Group, values: Mapping[str, Tensor], square: bool, writers: Collection[str]) -> Tensor:
        parts = [_summable(values[layer].flatten(1)) for layer in writers]
        for layer in group.readers:
            parts.append(_summable(values[layer].unflatten(1, (group.size, -1)).movedim(1, 0).flatten(1)))
        sums = torch.stack([(part.square() if square else part).sum(1) for part in parts]).sum(0)
        means = sums / sum(part.shape[1] for part in parts)
        return means.sqrt_() if square else means

    def _rows(self, layer: str, channels: Mapping[str, Tensor]) -> Tensor:
        """Return the filters of a layer that write channels, in a shape that is expanded to the weight's."""
        return channels[self._writers[layer].name].view(-1, *[1] * (len(self._shapes[layer]) - 1))

    def _columns(self, layer: str, channels: Mapping[str, Tensor]) -> Tensor:
        """Return the slices of a layer's weight that read channels, in a shape that is expanded to the weight's."""
        shape, group = self._shapes[layer], self._readers[layer]
        columns = channels[group.name].repeat_interleave(shape[1] // group.size)
        return columns.view(1, -1, *[1] * (len(shape) - 2))


class NofM:
    """At most n of every m consecutive weights along the input channels (Mishra et al. 2021 for 2:4).

    Where m does not divide the input channels, the last and shorter group keeps at most n and its part of n rounded up:
    the layer has the pattern once it is padded with zeros.
    """

    def __init__(self, n: int, m: int):
        self.name, self.n, self.m, self.density = f"{n}:{m}", n, m, n / m

    def keep(self, scores: Mapping[str, Tensor], counts: Counts, square: bool = False) -> dict[str, Tensor]:
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


Pattern = Units | Channels | NofM


def top(scores: Tensor, sizes: Tensor, count: int) -> Tensor:
    """Return the units of the highest scores, bool [units], whose sizes sum to `count` to within half a unit.

    Ties go to the earlier unit, on every device.
    """
    order = scores.sort(descending=True, stable=True).indices
    sizes = sizes[order]
    alive = torch.empty(len(order), dtype=torch.bool, device=order.device)
    alive[order] = 2 * sizes.cumsum(0) - sizes <= 2 * count
    return alive


def find_pattern(name: str, model: nn.Module, dense_layers: Collection[str] = ()) -> Pattern:
    """Return the pattern of a name for a network.

    The names are `unstructured`, `fan-in` (see FanIn), `channel` (see Channels), `kernel` (k x k kernels), `RxC` (blocks
    such as 4x1) and `N:M` (such as 2:4). A block holds R consecutive outputs by C consecutive columns of a weight seen as
    a matrix [out, in * kh * kw]; blocks at the edges are smaller where the sizes do not divide.

    Args:
        name: see above.
        model: the network.
        dense_layers: that lose no channel.

    Raises:
        ValueError: no such pattern, or a network whose channels cannot be followed.
    """
    shapes = {layer: tuple(weight.shape) for layer, weight in prunable_weights(model).items()}
    if name == "channel":
        return Channels(channel_groups(model, dense_layers), shapes, dict(model.named_parameters()))
    if name == "fan-in":
        return FanIn(shapes)
    if name in UNITS:
        return Units(name, UNITS[name], shapes)
    if match := re.fullmatch(r"(\d+)x(\d+)", name):
        height, width = map(int, match.groups())
        if height and width:
            return Units(name, partial(_block, height=height, width=width), shapes)
    if match := re.fullmatch(r"(\d+):(\d+)", name):
        n, m = map(int, match.groups())
        if 0 < n < m:
            return NofM(n, m)
    names = "unstructured, fan-in, kernel, channel"
    raise ValueError(f"unknown pattern '{name}': choose {names}, blocks such as 4x1, or N:M such as 2:4")


def _summable(values: Tensor) -> Tensor:
    """Return values in float32 at least: sums in half precision stop growing."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _kernel(shape: Shape) -> Tensor:
    return torch.arange(shape[0] * shape[1]).view(shape[0], shape[1], *[1] * (len(shape) - 2)).expand(shape)


def _block(shape: Shape, height: int, width: int) -> Tensor:
    columns = math.prod(shape[1:])
    row = torch.arange(shape[0])[:, None] // height
    return (row * -(-columns // width) + torch.arange(columns) // width).view(shape)


UNITS: dict[str, Callable[[Shape], Tensor] | None] = {"unstructured": None, "kernel": _kernel}


def _top_of_last(scores: Tensor, n: int) -> Tensor:
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :n], True)
