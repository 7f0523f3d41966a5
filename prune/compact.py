"""The network that is left when dead channels are taken out: smaller, and the same function.

A channel goes if all its masks are 0: its filters and biases, its batch norm, and what reads it. Other zeros stay where they
are, since kernels for dense tensors multiply by them as by any number.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from prune.channels import Group, channel_groups
from prune.copies import copied
from prune.flops import Flops, count_flops
from prune.kernels import skip_zeros
from prune.masks import Masks


def compact(model: nn.Module, masks: Masks, images: Tensor | None = None) -> nn.Module:
    """Return a copy of a masked network without its dead channels; in train and in eval mode it computes the same.

    A group without a living channel keeps one dead channel, so that every layer has a weight. A network whose channels
    cannot be followed is copied whole.

    Args:
        model: the network, its dead weights zero.
        masks: of that network.
        images: for inference alone, in evaluation mode: a batch of inputs such as it will see. Linear layers that lost no
            channel then skip the zeros of their weights where that is faster here, see `kernels.skip_zeros`.
    """
    small = _without_dead_channels(model, masks)
    if images is not None:
        modules = dict(small.named_modules())
        skip_zeros(small.eval(), {n: m for n, m in masks.masks.items() if _has_weight_of(modules.get(n), m)}, images)
    return small


def _has_weight_of(layer: nn.Module | None, mask: Tensor) -> bool:
    """Return whether a layer has lost no channel, so that its mask fits."""
    return isinstance(layer, nn.Linear) and layer.weight.shape == mask.shape


def _without_dead_channels(model: nn.Module, masks: Masks) -> nn.Module:
    small = copied(model)
    try:
        groups = channel_groups(small)
    except ValueError:
        return small
    modules, parameters = dict(small.named_modules()), dict(small.named_parameters(remove_duplicate=False))
    for group in groups:
        alive = _alive(group, masks, parameters)
        kept = alive.nonzero().flatten() if alive.any() else alive.new_zeros(1, dtype=torch.int64)
        if len(kept) == group.size:
            continue
        for name in group.writers:
            _keep_outputs(modules[name], kept)
        for name in group.readers:
            _keep_inputs(modules[name], kept, group.size)
        for name in group.norms:
            modules[name].num_features = len(kept)
            for kind in ("weight", "bias", "running_mean", "running_var"):
                _take(modules[name], kind, 0, kept)
    return small


def expand(state: Mapping[str, Tensor], model: nn.Module, masks: Masks) -> None:
    """Put the weights of a compacted network into the network that it came from, whose dead weights become zero.

    Args:
        state: the compacted network's state_dict.
        model: the whole network, which changes.
        masks: by which it was compacted.

    Raises:
        KeyError, RuntimeError: the state is of another network.
    """
    places = copied(model).to("cpu", torch.float64)  # exact up to 2^53
    for tensor in places.state_dict().values():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    whole = model.state_dict()
    for name, place in compact(places, masks).state_dict().items():
        if place.shape == whole[name].shape:
            whole[name].copy_(state[name])
            continue
        flat = whole[name].flatten().clone()
        flat[place.flatten().long().to(flat.device)] = state[name].flatten().to(flat)
        whole[name].copy_(flat.view(whole[name].shape))
    masks.apply_to_weights()


def compacted_size(model: nn.Module, masks: Masks, image_shape: tuple[int, int, int], flops: Flops) -> dict[str, int]:
    """Return the number of parameters of the compacted network, and the operations of its forward pass on one image.

    Args:
        model, masks: see `compact`.
        image_shape: [C, H, W].
        flops: of the network as it is.
    """
    small = model
    if any(not mask.flatten(1).any(1).all() for mask in masks.masks.values()):  # else no channel is dead
        small = compact(model, masks)
        flops = count_flops(small, image_shape)
    return {
        "parameters_compacted": sum(p.numel() for p in small.parameters()),
        "flops_compacted": int(flops.inference(dict.fromkeys(flops.forward, 1.0))),
    }


def _alive(group: Group, masks: Masks, parameters: Collection[str]) -> Tensor:
    """Return which channels have a part without a mask of 0: bool [channels], on the CPU."""
    found = [_of_channels(masks.masks.get(name), group.size, 0) for name in group.writers]
    found += [_of_channels(masks.masks.get(name), group.size, 1) for name in group.readers]
    found += [_of_channels(masks.other_masks.get(name), group.size, 0) for name in group.others if name in parameters]
    return torch.stack(found).any(0)


def _of_channels(mask: Tensor | None, channels: int, dim: int) -> Tensor:
    """Return which channels have a 1 in a mask, along one of its dimensions."""
    if mask is None:
        return torch.ones(channels, dtype=torch.bool)
    return mask.unflatten(dim, (channels, -1)).movedim(dim, 0).flatten(1).bool().any(1).cpu()


def _keep_outputs(layer: nn.Module, kept: Tensor) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features = len(kept)
    else:
        if layer.groups == layer.out_channels:  # depthwise
            layer.in_channels = layer.groups = len(kept)  # type: ignore[assignment]
        layer.out_channels = len(kept)  # type: ignore[assignment]
    _take(layer, "weight", 0, kept)
    _take(layer, "bias", 0, kept)


def _keep_inputs(layer: nn.Module, kept: Tensor, channels: int) -> None:
    if isinstance(layer, nn.Linear):
        each = layer.in_features // channels  # pixels of each channel's map
        kept = (kept[:, None] * each + torch.arange(each)).flatten()
        layer.in_features = len(kept)
    else:
        layer.in_channels = len(kept)  # type: ignore[assignment]
    _take(layer, "weight", 1, kept)


def _take(module: nn.Module, name: str, dim: int, kept: Tensor) -> None:
    """Replace a parameter or buffer, if there is one, by the part of it that is kept."""
    tensor = getattr(module, name, None)
    if tensor is None:
        return
    part = tensor.detach().index_select(dim, kept.to(tensor.device))
    if tensor.ndim == 4 and not tensor.is_contiguous():
        part = part.contiguous(memory_format=torch.channels_last)
    setattr(module, name, nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part)
