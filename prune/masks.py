"""Masks of 0 and 1 over the prunable weights of a network, and their application to weights and gradients."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of all convolutions and linear layers by layer name, in the model's order.

    Biases and normalisation layers are not prunable. A weight shared by several layers counts once, under the first.
    """
    weights: dict[str, nn.Parameter] = {}
    seen = set()
    for name, module in model.named_modules():
        weight = module.weight if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) else None
        if isinstance(weight, nn.Parameter) and weight not in seen:
            weights[name] = weight
            seen.add(weight)
    return weights


def depthwise_layers(model: nn.Module) -> set[str]:
    """Return the names of the convolutions whose filters each see one channel of several."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1
    }


def select_layers(names: list[str], patterns: list[str], depthwise: Iterable[str] = ()) -> set[str]:
    """Return the layer names that match a pattern: a wildcard for the whole name, or one of its dot-separated parts.

    `stem`, `shortcut` and `classifier` select the layers that models/ calls so; `stage2.*` selects a stage.

    Args:
        names: of all layers.
        patterns: see above.
        depthwise: the layers that the pattern `depthwise` selects too, whatever they are called.

    Raises:
        ValueError: a pattern that matches no layer.
    """
    selected = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern) or pattern in name.split(".")}
        matches |= set(depthwise) if pattern == "depthwise" else set()
        if not matches:
            raise ValueError(f"no prunable layer matches '{pattern}': the layers are {', '.join(names)}")
        selected |= matches
    return selected


class Masks:
    """Masks of prunable weights, each in its weight's shape, dtype, memory layout and device.

    A layer without a mask is dense. Masks are floating point so that one multi-tensor multiplication applies them all,
    and stay at their addresses once made.
    """

    def __init__(self, weights: dict[str, nn.Parameter]):
        self.weights = weights
        self.masks: dict[str, Tensor] = {}
        self.version = 0  # of the masks: grows whenever they change

    @torch.no_grad()
    def set(self, alive: dict[str, Tensor]) -> None:
        """Set masks from boolean tensors in the weights' shapes, by layer, and zero the weights that die."""
        for name, tensor in alive.items():
            if name not in self.masks:
                self.masks[name] = torch.ones_like(self.weights[name], requires_grad=False)
            self.masks[name].copy_(tensor)
        self.version += 1
        self.apply_to_weights()

    @torch.no_grad()
    def apply_to_weights(self) -> None:
        """Zero the dead weights."""
        if self.masks:
            torch._foreach_mul_([self.weights[name] for name in self.masks], list(self.masks.values()))

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Zero the gradients of dead weights; weights may have none."""
        found = [(self.weights[name].grad, mask) for name, mask in self.masks.items()]
        pairs = [(grad, mask) for grad, mask in found if grad is not None]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [mask for _, mask in pairs])

    def alive_counts(self) -> Tensor:
        """Return the number of living weights of each layer: int64 [layers], without waiting for the device."""
        return torch.stack(
            [
                self.masks[name].count_nonzero() if name in self.masks else torch.full((), w.numel(), device=w.device)
                for name, w in self.weights.items()
            ]
        )

    def alive(self) -> dict[str, int]:
        """Return the number of living weights by layer."""
        return dict(zip(self.weights, self.alive_counts().tolist(), strict=True))

    def empty_filters(self, layers: Iterable[str]) -> tuple[int, int]:
        """Return the number of filters without a weight in the convolutions among layers, and of all there."""
        names = [name for name in layers if self.weights[name].ndim > 2]
        masks = [self.masks[name] for name in names if name in self.masks]
        empty = [(mask.flatten(1).amax(1) == 0).sum() for mask in masks]
        return int(torch.stack(empty).sum()) if empty else 0, sum(len(self.weights[name]) for name in names)

    def density(self) -> dict[str, float]:
        """Return the fraction of living weights by layer."""
        return {name: count / self.weights[name].numel() for name, count in self.alive().items()}

    def sparsity(self) -> float:
        """Return the fraction of prunable weights that are dead."""
        return 1 - sum(self.alive().values()) / sum(weight.numel() for weight in self.weights.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks as boolean tensors."""
        return {name: mask.bool() for name, mask in self.masks.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set the masks that `state_dict` returned."""
        self.set(state)
