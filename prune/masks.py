"""Masks of 0 and 1 over the prunable weights of a network, and their application to weights and gradients."""

import copy
import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Of nn.MultiheadAttention, which holds them as parameters of its own, without a layer around them.
PROJECTIONS = ("in_proj", "q_proj", "k_proj", "v_proj")
# Where the weight is among the arguments of torch's operators.
WEIGHT_PLACES = {"convolution": 1, "linear": 1, "mm": 1, "addmm": 2}


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of all convolutions and linear layers by layer name, in the model's order.

    The input projections of nn.MultiheadAttention are linear layers too: `in_proj` below the attention's name. Biases and
    normalisation layers are not prunable, nor are weights that are computed from others (`computed_weights`). A weight shared
    by several layers counts once, under the first.
    """
    weights: dict[str, nn.Parameter] = {}
    seen = set()
    for name, module in model.named_modules():
        found: dict[str, object] = {}
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            found = {name: own_weight(module)}
        elif isinstance(module, nn.MultiheadAttention):
            below = f"{name}." if name else ""
            found = {f"{below}{part}": getattr(module, f"{part}_weight", None) for part in PROJECTIONS}
        for layer, weight in found.items():
            if isinstance(weight, nn.Parameter) and weight not in seen and weight.numel():
                weights[layer] = weight
                seen.add(weight)
    return weights


def computed_weights(model: nn.Module) -> list[str]:
    """Return the names of the convolutions and linear layers that masks cannot hold: their weights are computed from others.

    So it is under torch.nn.utils.parametrizations, weight norm for one.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and own_weight(module) is None
    ]


def own_weight(layer: nn.Module) -> nn.Parameter | None:
    """Return a layer's weight, or None if it is computed: not read as an attribute, which spectral norm would take a step at."""
    return dict(layer.named_parameters(recurse=False)).get("weight")


def memory_of(weight: Tensor) -> object:
    """Return where a weight begins in memory; a weight without memory of its own, as in FSDP, is a place for itself."""
    try:
        return weight.untyped_storage()._cdata, weight.storage_offset()
    except (RuntimeError, NotImplementedError):
        return id(weight)


def recomputed_weights(model: nn.Module) -> list[str]:
    """Return the names of the layers in which zeros of the weight are no zeros: their `forward` makes another weight of it.

    So it is under weight standardisation, which subtracts the mean. Each layer with a `forward` of its own is tried with a
    weight of which one entry is not zero, and what it multiplies its input by is looked at. Layers on the meta device, and
    ones that do not take a plain tensor, are not known.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
        and (weight := own_weight(module)) is not None
        and not weight.is_meta
        and not type(module).forward.__module__.startswith("torch.nn.")
        and _fills_zeros(module)
    ]


def _fills_zeros(layer: nn.modules.conv._ConvNd | nn.Linear) -> bool:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _Multipliers() as seen:
            probe = copy.deepcopy(layer).to("cpu", torch.float32).eval()
            probe.weight.zero_()[(0,) * probe.weight.ndim] = 1
            if isinstance(layer, nn.Linear):
                shape = [1, layer.in_features]
            else:
                sizes = zip(layer.dilation, layer.kernel_size, strict=True)
                shape = [2, layer.in_channels, *(dilation * (size - 1) + 2 for dilation, size in sizes)]
            probe(torch.linspace(1, 2, math.prod(shape)).view(shape))
    except Exception:  # it is code of somebody else, and this a hint
        return False
    return any(tensor.numel() == layer.weight.numel() and tensor.count_nonzero() > 1 for tensor in seen.tensors)


class _Multipliers(TorchDispatchMode):
    """Notes what convolutions and linear layers multiply their input by."""

    def __init__(self):
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = WEIGHT_PLACES.get(func.overloadpacket.__name__)
        if place is not None:
            self.tensors.append(args[place].detach().clone())
        return func(*args, **(kwargs or {}))


def depthwise_layers(model: nn.Module) -> set[str]:
    """Return the names of the convolutions whose filters each see one channel of several."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1
    }


def layers_by_position(model: nn.Module) -> dict[str, list[str]]:
    """Return the `stem`, which is the first convolution, and the `classifier`, which is the last layer, by their names.

    They are the first and the last in the order in which the model defines its layers, whatever it calls them. A network
    without a convolution has its first layer as the stem.
    """
    weights = prunable_weights(model)
    convolutions = [name for name, weight in weights.items() if weight.ndim > 2]
    names = list(weights)
    return {"stem": (convolutions or names)[:1], "classifier": names[-1:]}


def select_layers(
    names: list[str],
    patterns: list[str],
    depthwise: Iterable[str] = (),
    positions: Mapping[str, list[str]] | None = None,
) -> dict[str, list[str]]:
    """Return the layers that each pattern matches: a wildcard for the whole name, or one of its dot-separated parts.

    `shortcut` selects the layers that models/ calls so; `stage2.*` selects a stage.

    Args:
        names: of all layers.
        patterns: see above.
        depthwise: the layers that the pattern `depthwise` selects too, whatever they are called.
        positions: layers that a pattern selects instead of those of that name, see `layers_by_position`.

    Raises:
        ValueError: a pattern that matches no layer.
    """
    selected = {}
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern) or pattern in name.split(".")}
        matches |= set(depthwise) if pattern == "depthwise" else set()
        if positions and pattern in positions:
            matches = set(positions[pattern])
        if not matches:
            raise ValueError(f"no prunable layer matches '{pattern}': the layers are {', '.join(names)}")
        selected[pattern] = [name for name in names if name in matches]
    return selected


class Masks:
    """Masks of prunable weights, each in its weight's shape, dtype, memory layout and device.

    A layer without a mask is dense. Masks are floating point so that one multi-tensor multiplication applies them all,
    and stay at their addresses once made.

    Args:
        weights: the prunable ones, by layer: sparsity is theirs.
        others: further parameters by name, of which parts may go with a channel: biases and normalisation.

    Attributes:
        masks: of prunable weights, by layer.
        other_masks: of other parameters, by name.
    """

    def __init__(self, weights: dict[str, nn.Parameter], others: Mapping[str, nn.Parameter] | None = None):
        self.weights, self.others = weights, dict(others or {})
        self.masks: dict[str, Tensor] = {}
        self.other_masks: dict[str, Tensor] = {}
        self.version = 0  # of the masks: grows whenever they change

    @classmethod
    def of(cls, model: nn.Module) -> "Masks":
        """Return the masks of a network, of which none is set."""
        weights = prunable_weights(model)
        prunable = set(map(id, weights.values()))
        return cls(weights, {name: p for name, p in model.named_parameters() if id(p) not in prunable})

    @torch.no_grad()
    def set(self, alive: Mapping[str, Tensor]) -> None:
        """Set masks from boolean tensors, by layer or parameter, and zero the weights that die."""
        for name, tensor in alive.items():
            masks = self.masks if name in self.weights else self.other_masks
            if name not in masks:
                masks[name] = torch.ones_like(self.parameter(name), requires_grad=False)
            masks[name].copy_(tensor)
        self.version += 1
        self.apply_to_weights()

    def parameter(self, name: str) -> nn.Parameter:
        """Return the weight of a layer, or another parameter."""
        return self.weights[name] if name in self.weights else self.others[name]

    def mask(self, name: str) -> Tensor:
        """Return the mask of a layer's weight, or of another parameter, that has one."""
        return self.masks[name] if name in self.weights else self.other_masks[name]

    def pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each parameter that has a mask, with its mask."""
        return [(self.parameter(name), mask) for name, mask in (self.masks | self.other_masks).items()]

    @torch.no_grad()
    def apply_to_weights(self) -> None:
        """Zero the dead weights."""
        if pairs := self.pairs():
            torch._foreach_mul_([p for p, _ in pairs], [mask for _, mask in pairs])

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Zero the gradients of dead weights; weights may have none."""
        pairs = [(p.grad, mask) for p, mask in self.pairs() if p.grad is not None]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [mask for _, mask in pairs])

    def alive_counts(self) -> Tensor:
        """Return the number of living weights of each layer: int64 [layers], without waiting for the device."""
        if not self.weights:  # a network without a layer that can be pruned
            return torch.zeros(0, dtype=torch.long)
        return torch.stack(
            [
                self.masks[name].count_nonzero() if name in self.masks else torch.full((), w.numel(), device=w.device)
                for name, w in self.weights.items()
            ]
        )

    def alive(self) -> dict[str, int]:
        """Return the number of living weights by layer."""
        return dict(zip(self.weights, self.alive_counts().tolist(), strict=True))

    def density(self) -> dict[str, float]:
        """Return the fraction of living weights by layer."""
        return {name: count / self.weights[name].numel() for name, count in self.alive().items()}

    def sparsity(self) -> float:
        """Return the fraction of prunable weights that are dead; 0 where there are none."""
        total = sum(weight.numel() for weight in self.weights.values())
        return 1 - sum(self.alive().values()) / total if total else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks as boolean tensors."""
        return {name: mask.bool() for name, mask in (self.masks | self.other_masks).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set the masks that `state_dict` returned. Raises ValueError for those of another network."""
        for name, mask in state.items():
            own = self.weights.get(name, self.others.get(name))
            if own is None or own.shape != mask.shape:
                raise ValueError(
                    f"the mask of '{name}' is of another network: load it into the one that it was made for"
                )
        self.set(state)


def listed(names: list[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - 5} other layers" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
