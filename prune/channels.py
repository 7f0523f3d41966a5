"""Which channels of a network can go, and what goes with them.

A channel can be taken out of a network together with all that writes and reads it: the filters that compute it, their
biases, the scale and shift of its normalisation, and the slices of the next layers' weights that it is multiplied by.
Tensors that are added to each other, as on a residual path, share one group of channels: all layers that write to it and
read from it lose the same ones. `channel_groups` finds the groups by following the network's operations.
"""

import operator
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from prune.masks import own_weight, prunable_weights


@dataclass(frozen=True)
class Group:
    """Channels that can go one by one, and the layers that lose a part with each.

    Attributes:
        name: of the first layer that writes them.
        size: number of channels.
        writers: layers with a filter for each channel; depthwise convolutions, which read them too, are among these.
        readers: layers whose weights have a slice for each channel, along dimension 1.
        norms: batch norm of these channels.
    """

    name: str
    size: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    norms: tuple[str, ...]

    @property
    def others(self) -> list[str]:
        """Names of what goes with the channels beside weights: scales, shifts and biases. Not every layer has them."""
        return [f"{n}.{kind}" for n in self.norms for kind in ("weight", "bias")] + [f"{n}.bias" for n in self.writers]


@dataclass(eq=False)
class _Found:
    """A group while the walk is under way. Groups whose channels are added to each other are merged into one."""

    size: int
    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    fixed: bool = False  # something depends on all of its channels

    def merge(self, other: "_Found") -> None:
        for mine, theirs in zip(self.lists, other.lists, strict=True):
            mine += [name for name in theirs if name not in mine]
        self.fixed |= other.fixed

    @property
    def lists(self) -> tuple[list[str], ...]:
        return self.writers, self.readers, self.norms


class _Value:
    """Channels that a tensor holds: `maps` [N, C, ...], `flat` [N, C * pixels], or `last`, along the last dimension of any.

    The rank of maps is that of the weight that made them: 4 of [N, C, H, W].
    """

    def __init__(self, found: _Found, layout: str, rank: int = 4):
        self.found, self.layout, self.rank = found, layout, rank


# What acts on each channel by itself, and on maps [N, C, H, W] only.
CHANNELWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Sigmoid,
    nn.Hardsigmoid, nn.Tanh, nn.Softplus, nn.Dropout,
)  # fmt: skip
ON_MAPS = (nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
CHANNELWISE_FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardtanh, F.hardsigmoid, F.softplus,
    F.sigmoid, F.tanh, F.dropout, torch.relu, torch.sigmoid, torch.tanh, torch.clone, "relu", "sigmoid", "tanh", "clone",
    "contiguous",
}  # fmt: skip
ON_MAPS_FUNCTIONS = {
    F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout2d,
}  # fmt: skip
BETWEEN_TENSORS = {
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.mul, "add", "add_", "mul",
    "mul_",
}  # fmt: skip
BATCH_NORM = nn.modules.batchnorm._BatchNorm
CONVOLUTION = nn.modules.conv._ConvNd


class _Tracer(fx.Tracer):
    """Records a network's operations; layers and normalisation are one operation each, whoever wrote their class."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, CONVOLUTION | nn.Linear | BATCH_NORM) or super().is_leaf_module(m, module_qualified_name)


def _computes_as_torch(module: nn.Module) -> bool:
    """Return whether a layer is torch's own, or one of ours that computes the same in another way."""
    own = type(module).forward.__module__.startswith("torch.nn.")
    return own or getattr(module, "computes_as_torch", False)


class _Walk:
    """Follows the channels of each layer's output through a network, operation by operation.

    Where an operation is not known to treat channels one by one, all channels that go into it stay, and so do those of a
    layer that is called twice or shares its weight.
    """

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules())
        self.values: dict[fx.Node, _Value] = {}
        self.called: set[str] = set()
        layers = [name for name, module in self.modules.items() if isinstance(module, CONVOLUTION | nn.Linear)]
        own = Counter(id(own_weight(self.modules[name])) for name in layers)
        prunable = prunable_weights(model)
        self.unlike = {name for name in layers if name not in prunable or own[id(prunable[name])] > 1}
        self.unlike |= {
            name
            for name, module in self.modules.items()
            if isinstance(module, CONVOLUTION | nn.Linear | BATCH_NORM) and not _computes_as_torch(module)
        }
        for node in _Tracer().trace(model).nodes:
            self._visit(node)

    def groups(self) -> list[_Found]:
        """Return what was found, in the network's order."""
        groups = dict.fromkeys(value.found for value in self.values.values())
        for found in groups:
            found.fixed |= any(name in self.unlike for names in found.lists for name in names)
        return list(groups)

    def _visit(self, node: fx.Node) -> None:
        before = [self.values[source] for source in node.all_input_nodes if source in self.values]
        after = None
        if node.op == "get_attr":  # a parameter that is used by itself
            self.unlike.add(str(node.target).rpartition(".")[0])
        if node.op == "call_module":
            after = self._module(str(node.target), before)
        elif node.op in ("call_function", "call_method"):
            after = self._function(node, before)
        if after is not None:
            self.values[node] = after
        elif not _asks_for_batch(node):
            for value in before:
                value.found.fixed = True

    def _module(self, name: str, before: list[_Value]) -> _Value | None:
        module, source = self.modules[name], before[0] if len(before) == 1 else None
        if name in self.called:
            self.unlike.add(name)
        self.called.add(name)
        for value in before if len(before) > 1 else ():  # it does with them whatever it likes
            value.found.fixed = True
        if isinstance(module, CONVOLUTION | nn.Linear):
            return self._layer(name, module, source)
        if source is None:
            return None
        maps = source.layout == "maps"
        if isinstance(module, BATCH_NORM) and source.layout != "last" and module.num_features == source.found.size:
            source.found.norms.append(name)
            return source
        if isinstance(module, CHANNELWISE) or (isinstance(module, ON_MAPS) and maps and source.rank == 4):
            return source
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1) and maps:
            return _Value(source.found, "flat")
        return None

    def _layer(self, name: str, module: nn.modules.conv._ConvNd | nn.Linear, source: _Value | None) -> _Value:
        """Return the channels that a layer writes, having noted what it reads."""
        if isinstance(module, nn.Linear):
            flat = source is not None and source.layout == "flat"
            written, groups = _Value(_Found(module.out_features, [name]), "flat" if flat else "last"), 1
        else:
            written, groups = _Value(_Found(module.out_channels, [name]), "maps", module.weight.ndim), module.groups
            written.found.fixed = module.transposed
        if source is None:  # it reads the images, or channels that are not followed
            written.found.fixed |= groups > 1
        elif groups == 1 and _reads(module, source):
            source.found.readers.append(name)
            source.found.fixed |= written.found.fixed
        elif (
            source.layout == "maps" and groups == written.found.size == source.found.size
        ):  # depthwise: a filter for each
            source.found.writers.append(name)
            return source
        else:
            source.found.fixed = written.found.fixed = True
        return written

    def _function(self, node: fx.Node, before: list[_Value]) -> _Value | None:
        target = node.target
        if target in BETWEEN_TENSORS:
            return self._merged(node, before)
        if len(before) != 1:
            return None
        (source,) = before
        maps = source.layout == "maps"
        if target in CHANNELWISE_FUNCTIONS or (target in ON_MAPS_FUNCTIONS and maps and source.rank == 4):
            return source
        if maps and (_flattens(node, target) or (_averages(node, target) and source.rank == 4)):
            return _Value(source.found, "flat")
        return None

    def _merged(self, node: fx.Node, before: list[_Value]) -> _Value | None:
        """Return the channels of a sum or product of tensors, or of a tensor and a number."""
        if len(before) != len(node.all_input_nodes) or not before:
            return None
        first, *others = before
        if any(v.layout != first.layout or v.found.size != first.found.size for v in others):
            return None
        for other in others:
            if other.found is not first.found:
                first.found.merge(other.found)
                merged = other.found
                for value in self.values.values():
                    if value.found is merged:
                        value.found = first.found
        return first


def _reads(module: nn.Module, source: _Value) -> bool:
    """Return whether a layer's input dimension is that of the channels, or of the maps that they were flattened from."""
    if isinstance(module, CONVOLUTION):
        return source.layout == "maps" and module.in_channels == source.found.size
    features = int(module.in_features)  # type: ignore[arg-type]
    return source.layout != "maps" and features % source.found.size == 0


def _flattens(node: fx.Node, target: object) -> bool:
    """Return whether this is flatten(1), or view(len(x), -1)."""
    arguments = node.args[1:]
    if target in (torch.flatten, "flatten"):
        return (arguments == (1,) and not node.kwargs) or (not arguments and dict(node.kwargs) == {"start_dim": 1})
    batch, rest = arguments if len(arguments) == 2 else (None, None)
    return target in ("view", "reshape") and isinstance(batch, fx.Node) and _is_batch(batch) and bool(rest == -1)


def _averages(node: fx.Node, target: object) -> bool:
    """Return whether this is a mean over the pixels of maps [N, C, H, W]."""
    if target not in (torch.mean, "mean"):
        return False
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = set(given) if isinstance(given, list | tuple) else set()
    return dims in ({2, 3}, {-1, -2}) and not (len(node.args) > 2 or node.kwargs.get("keepdim"))


def _is_batch(node: fx.Node) -> bool:
    """Return whether this is size(0), size()[0] or shape[0]."""
    if node.target == "size":
        return node.args[1:] == (0,)
    source = node.args[0] if node.args else None
    return (
        node.target is operator.getitem
        and node.args[1:] == (0,)
        and isinstance(source, fx.Node)
        and (source.target == "size" or (source.target is getattr and source.args[1:] == ("shape",)))
    )


def _asks_for_batch(node: fx.Node) -> bool:
    """Return whether this asks a tensor for nothing but its number of images."""
    shape = node.target is getattr and node.args[1:] == ("shape",)
    return _is_batch(node) or (
        (shape or (node.target == "size" and len(node.args) == 1)) and all(map(_is_batch, node.users))
    )


def channel_groups(model: nn.Module, dense_layers: Collection[str] = ()) -> list[Group]:
    """Return the groups of channels that can go, in the network's order.

    Args:
        model: the network; torch.fx has to be able to trace it.
        dense_layers: names of layers that stay as they are, and with them all channels that they write or read.

    Raises:
        ValueError: the network cannot be traced, or other channels can go in training than in evaluation mode.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        training, evaluating = (_groups(model.train(mode), dense_layers) for mode in (True, False))
    except Exception as error:  # whatever a network does with the values that stand for its tensors
        raise ValueError(
            f"the channels of this network cannot be followed, since torch.fx cannot trace it ({type(error).__name__}): take "
            "another pattern"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if training != evaluating:
        raise ValueError("this network reads other channels in training than in evaluation mode: take another pattern")
    return training


def _groups(model: nn.Module, dense_layers: Collection[str]) -> list[Group]:
    place = {name: number for number, (name, _) in enumerate(model.named_modules())}
    groups = [
        Group(
            min(group.writers, key=place.__getitem__),
            group.size,
            *(tuple(sorted(x, key=place.__getitem__)) for x in group.lists),
        )
        for group in _Walk(model).groups()
        if not group.fixed and group.readers and not {*group.writers, *group.readers} & set(dense_layers)
    ]
    return sorted(groups, key=lambda group: place[group.name])
