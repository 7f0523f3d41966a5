"""Linear layers that skip the zeros of their weights at inference, where that is faster.

On CPUs the living weights of each output are gathered (`GatheredLinear`), whatever the pattern. On GPUs 2:4 weights take
torch's semi-structured form. Both are for inference: they have no gradient. Convolutions have neither: sparse tensor cores
multiply matrices, torch has no convolution for them, and unfolding it into a matrix product repeats each pixel for every
weight of a kernel.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TURNS = 7  # of each layer and its replacement
LEAST = 1.1  # speed-up from which on a layer is replaced: less is within the noise of these turns
ROWS = 256  # that are gathered from at once: their values stay in the cache


class GatheredLinear(nn.Module):
    """A linear layer whose outputs are sums over their living weights alone.

    This is torch's sum of embeddings: an input is an embedding, one value for each row of a batch, and an output is the
    weighted sum of its inputs. It is condensed as the layer of SRigL (Lasby et al. 2024) is, for any number of weights per
    output.

    Args:
        layer: dense, its dead weights zero.
        alive: mask of its weight.
    """

    values: Tensor
    inputs: Tensor
    starts: Tensor

    def __init__(self, layer: nn.Linear, alive: Tensor):
        super().__init__()
        alive = alive.bool()
        self.out_features, self.bias = layer.out_features, layer.bias
        self.register_buffer("values", layer.weight.detach()[alive])
        self.register_buffer("inputs", alive.nonzero()[:, 1].int())
        self.register_buffer("starts", F.pad(alive.sum(1).cumsum(0), (1, -1)).int())

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        out = torch.cat([self._sums(part) for part in rows.split(ROWS)]).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def _sums(self, rows: Tensor) -> Tensor:
        columns = rows.t().to(self.values.dtype).contiguous()  # whatever autocast made of them
        return F.embedding_bag(self.inputs, columns, self.starts, mode="sum", per_sample_weights=self.values).t()


def semi_structured(layer: nn.Linear) -> nn.Linear:
    """Return a copy of a linear layer on a GPU, at most two of every four consecutive weights not zero, in torch's form.

    Raises:
        RuntimeError, ValueError, NotImplementedError: neither dtype nor shape have such a form on this device.
    """
    from torch.sparse import to_sparse_semi_structured

    fast = copy.deepcopy(layer)
    fast.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach().contiguous()), requires_grad=False)
    return fast


@torch.no_grad()
def skip_zeros(model: nn.Module, masks: Mapping[str, Tensor], images: Tensor) -> None:
    """Replace linear layers, in place, by forms that skip zeros, each where that is faster for such images here.

    A network that reads a layer's weight by itself, as torch's transformer layers do, stays as it is.

    Args:
        model: in evaluation mode, its dead weights zero; at inference it computes the same as before, to rounding.
        masks: of the weights of its linear layers, by name.
        images: a batch of its inputs, of the size that it will see.
    """
    layers = {n: layer for n, layer in model.named_modules() if n and type(layer) is nn.Linear and n in masks}
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, inputs, name=name: seen.update({name: inputs[0]}) if inputs else None
        )
        for name, layer in layers.items()
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    replaced = []
    for name, x in seen.items():
        other = _other_form(layers[name], masks[name])
        if other is not None and _speed_up(other, layers[name], x) >= LEAST:
            model.set_submodule(name, other)
            replaced.append(name)
    try:
        model(images)
    except AttributeError:  # of a weight that is not there
        for name in replaced:
            model.set_submodule(name, layers[name])


def _other_form(layer: nn.Linear, mask: Tensor) -> nn.Module | None:
    if not layer.weight.is_cuda:
        return GatheredLinear(layer, mask) if layer.weight.dtype == torch.float32 else None
    if mask.shape[1] % 4 or bool((mask.view(len(mask), -1, 4).sum(2) > 2).any()):
        return None
    try:
        return semi_structured(layer)
    except (RuntimeError, ValueError, NotImplementedError):  # as small layers and float64 raise
        return None


def _speed_up(fast: Callable[[Tensor], Tensor], dense: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the median ratio of the seconds that two functions take in turns, the dense one's over the fast one's."""

    def seconds(function: Callable[[Tensor], Tensor]) -> float:
        began = time.perf_counter()
        function(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - began

    seconds(fast), seconds(dense)  # not counted
    return statistics.median(seconds(dense) / seconds(fast) for _ in range(TURNS))
