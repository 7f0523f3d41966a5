"""A copy of a network that keeps what it computed."""

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module, instead: Mapping[int, Tensor] | None = None) -> Module:
    """Return a copy of a network. Unlike copy.deepcopy it also copies tensors that were computed, as values.

    A network may hold such: activations that its forward pass keeps for others, or the weights that the older weight norm
    and spectral norm of torch compute. They are found in the attributes of modules, and in lists, tuples and dicts of these.

    Args:
        model: the network.
        instead: what takes the place of tensors, by their id.
    """
    kept = [value for module in model.modules() for value in tree_leaves(list(vars(module).values()))]
    computed = {id(value): value.detach().clone() for value in kept if isinstance(value, Tensor) and not value.is_leaf}
    return copy.deepcopy(model, {**computed, **(instead or {})})
