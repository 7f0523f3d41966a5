"""A copy of a network, whatever it keeps."""

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module, instead: Mapping[int, Tensor] | None = None) -> Module:
    """Return a copy of a network, as copy.deepcopy does, which refuses tensors that were computed.

    A network may hold such: activations that its forward pass keeps for others, or the weights that the older weight norm
    and spectral norm of torch compute. They are copied as values.

    Args:
        model: the network.
        instead: what takes the place of tensors, by their id.
    """
    kept = [value for module in model.modules() for value in tree_leaves(list(vars(module).values()))]
    computed = {id(value): value.detach().clone() for value in kept if isinstance(value, Tensor) and not value.is_leaf}
    return copy.deepcopy(model, {**computed, **(instead or {})})
