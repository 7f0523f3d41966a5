"""What masks have become: how far they have moved, and how many of the living weights do anything."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from prune.masks import Masks
from prune.paths import weights_on_paths

NEAR_COLLAPSE = 0.5  # share of the living weights on paths below which a user is warned


def overlap(left: Iterable[Tensor], right: Iterable[Tensor]) -> Tensor:
    """Return the Jaccard index of two lists of masks of 0 and 1, on the device: what lives in both over what lives in any."""
    pairs = list(zip(left, right, strict=True))
    both = torch.stack([(a * b).count_nonzero() for a, b in pairs]).sum()
    either = torch.stack([(a + b).count_nonzero() for a, b in pairs]).sum()
    return both / either.clamp_min(1)


def units(model: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which filters and outputs of layers have any part that is not zero: bool [out channels], by layer.

    Args:
        model: the network.
        parts: a tensor in the shape of its weight for each layer.
    """
    groups = {n: module.groups for n, module in model.named_modules() if getattr(module, "transposed", False)}

    def by_output(name: str, part: Tensor) -> Tensor:
        if name in groups:  # [in, out / groups, ...]
            part = part.unflatten(0, (groups[name], -1)).transpose(1, 2).flatten(0, 1)
        return part.flatten(1).any(1)

    return {name: by_output(name, part) for name, part in parts.items()}


def empty_filters(model: nn.Module, masks: Masks, layers: Iterable[str]) -> tuple[int, int]:
    """Return the number of filters without a weight in the convolutions among layers, and of all there."""
    weights = {name: weight for name in layers if (weight := masks.weights[name]).ndim > 2}
    alive = units(model, {name: masks.masks.get(name, w.new_ones(()).expand_as(w)) for name, w in weights.items()})
    living = torch.cat(list(alive.values())) if alive else torch.ones(0, dtype=torch.bool)
    return int((~living).sum()), len(living)


def path_figures(model: nn.Module, masks: Masks, input_shape: tuple[int, ...] | None) -> dict[str, float]:
    """Return the sparsity that counts only weights on a path, and how many filters and outputs no path leads through.

    Effective sparsity is Vysogorets and Kempe, "Connectivity Matters", JMLR 2023. Waits for the device.

    Args:
        model: the network, which stays as it is.
        masks: of its weights.
        input_shape: of one input; nothing is returned where it is not known, or for a network with layer normalisation or
            attention, which no flow describes.
    """
    if input_shape is None or any(
        isinstance(module, nn.LayerNorm | nn.MultiheadAttention) for module in model.modules()
    ):
        return {}
    used = weights_on_paths(model, masks.masks, input_shape)
    if not used:
        return {}
    total, effective = sum(part.numel() for part in used.values()), sum(int(part.sum()) for part in used.values())
    idle = sum(int((~part).sum()) for part in units(model, used).values())
    return {"effective_sparsity": 1 - effective / total, "dead_units": float(idle)}


def collapse(figures: Mapping[str, float], sparsity: float) -> str:
    """Return a sentence where few of the living weights lie on a path, or ""."""
    living, effective = 1 - sparsity, 1 - figures.get("effective_sparsity", sparsity)
    if effective >= NEAR_COLLAPSE * living:
        return ""
    return (
        f"only {effective / living:.0%} of the living weights lie on a path from the input to the output: the sparsity is "
        f"{1 - effective:.4f} in effect, and {figures['dead_units']:,.0f} filters and outputs are cut off; lower it, or take "
        "another distribution"
    )
