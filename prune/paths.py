"""Whether the living weights still connect the input of a network with its output."""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prune.copies import copied
from prune.masks import prunable_weights

# What is the identity in the network that flow runs through.
IDENTITIES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
SMALL = 1e-6  # learned shifts and factors there: no shift drowns what comes from the input, no factor stops it


def _softmax(scores: Tensor, *_: Any, **__: Any) -> Tensor:
    """All take part, masked ones too, and so do the scores: where one is far above the others a softmax has no slope."""
    return scores.clamp(min=0) + 1


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _softmax(query @ key.transpose(-2, -1)) @ value


def _average(pool: Callable, pool_to: Callable) -> tuple[Callable, Callable]:
    """Return averages with the arguments of the function that takes the largest value, within windows and to a size."""

    def average(inputs: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
                ceil_mode: bool = False, return_indices: bool = False) -> Tensor:  # fmt: skip
        return pool(inputs, kernel_size, stride or kernel_size, padding, ceil_mode)

    return average, lambda inputs, size, return_indices=False: pool_to(inputs, size)


# What takes the place of functions that look at values, so that all they may pass on has a slope.
MIXING: dict[str, Callable] = {  # no flow describes which weights they use
    "softmax": _softmax, "log_softmax": _softmax, "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm", "rms_norm"), lambda inputs, *_, **__: inputs),
}  # fmt: skip
OPAQUE = ("multi_head_attention_forward",)  # mixes, too, and stays as it is: nothing takes the place of its parts
AVERAGES: dict[str, Callable] = {}  # for max pooling alone: amax, max and the like stay as they are
for _dimensions in (1, 2, 3):
    _within, _to_size = f"max_pool{_dimensions}d", f"adaptive_max_pool{_dimensions}d"
    AVERAGES[_within], AVERAGES[_to_size] = _average(
        getattr(F, f"avg_pool{_dimensions}d"), getattr(F, f"adaptive_avg_pool{_dimensions}d")
    )


class _Flow(TorchFunctionMode):
    """Puts others in the place of functions.

    Attributes:
        mixed: results of functions of MIXING and OPAQUE.
    """

    def __init__(self):
        super().__init__()
        self.mixed: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        instead = MIXING.get(name) or AVERAGES.get(name)
        result = func(*args, **kwargs)
        if instead and isinstance(result, Tensor):
            with contextlib.suppress(RuntimeError, TypeError):  # arguments of a rarer kind
                flow = instead(*args, **kwargs)
                result = flow if flow.shape == result.shape else result
        if name in MIXING or name in OPAQUE:
            self.mixed.append(result)
        return result


def reaches_output(model: nn.Module, alive: Mapping[str, Tensor], input_shape: tuple[int, ...]) -> bool:
    """Return whether any path of living weights leads from the input to the output. Waits for the device.

    This is SynFlow's flow (Tanaka et al. 2020) in a network whose living weights are 1 and whose normalisation is the
    identity, on an input of ones. Each layer's output is scaled to a largest value of 1/2, so that the flow through many
    layers neither over- nor underflows. Biases do not count: they reach the output without the input. Attention lets all
    values through, and max pooling averages.

    Args:
        model: the network, which stays as it is.
        alive: masks of its weights by layer; a layer without one is dense.
        input_shape: of one input, without the batch.
    """
    of_input, _, _ = _slopes(model, alive, input_shape)
    return bool(of_input.any())


def weights_on_paths(model: nn.Module, alive: Mapping[str, Tensor], input_shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the weights that lie on a path of living weights from the input to the output: bool, by layer.

    By the same flow: a weight of 1 with a slope lies on a path. Where the input has no slope none does: what reaches the
    output then comes from the network itself, such as a learned shift. {} for a network with attention or another
    function of MIXING, which no flow describes.

    Args:
        model, alive, input_shape: see `reaches_output`.
    """
    of_input, products, mixing = _slopes(model, alive, input_shape)
    return {} if mixing else {name: (product != 0) & of_input.any() for name, product in products.items()}


def _slopes(
    model: nn.Module, alive: Mapping[str, Tensor], input_shape: tuple[int, ...]
) -> tuple[Tensor, dict[str, Tensor], bool]:
    """Return the slope of the flow along the input, that along each weight times the weight, and whether anything mixes.

    Where nothing gets through with small shifts and factors, it tries once more with those that the network has: some divide by
    them, such as spectral norm.
    """
    found = _slopes_with(SMALL, model, alive, input_shape)
    return found if found[0].any() else _slopes_with(None, model, alive, input_shape)


def _slopes_with(
    others: float | None, model: nn.Module, alive: Mapping[str, Tensor], input_shape: tuple[int, ...]
) -> tuple[Tensor, dict[str, Tensor], bool]:
    for dtype in (torch.float64, torch.float32):  # a network may convert to float32 within
        shadow, weights = _shadow(model, alive, dtype, others)
        ones = torch.ones(1, *input_shape, dtype=dtype, device=next(shadow.parameters()).device, requires_grad=True)
        try:
            with torch.enable_grad(), _Flow() as flow:
                output = shadow(ones)
            break
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if dtype == torch.float32:
                raise
    mixes = any(result is not output for result in flow.mixed)  # a softmax at the end does not
    mixes = mixes or any(isinstance(module, nn.MultiheadAttention) for module in shadow.modules())
    of_input, *slopes = torch.autograd.grad(
        output.sum(), [ones, *weights.values()], allow_unused=True, materialize_grads=True
    )
    products = {n: w.detach() * slope for (n, w), slope in zip(weights.items(), slopes, strict=True)}
    return of_input, products, mixes


def _shadow(
    model: nn.Module, alive: Mapping[str, Tensor], dtype: torch.dtype, others: float | None
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the network that flow runs through, and its weights; its other parameters have the value `others`, or their own."""
    shadow = copied(model).to(dtype).eval()
    weights = prunable_weights(shadow)
    with torch.no_grad():
        for parameter in shadow.parameters():
            if others is not None and parameter.is_floating_point():
                parameter.fill_(others)
        for name, weight in weights.items():
            mask = alive.get(name)
            weight.fill_(1) if mask is None else weight.copy_(mask)
            weight.requires_grad_()
    for module in shadow.modules():
        if isinstance(module, IDENTITIES):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]
        elif isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            module.register_forward_hook(_plain)
            module.register_forward_hook(_scaled)
        elif isinstance(module, nn.MultiheadAttention):  # it uses its layers without calling them
            module.forward = partial(_multihead_attention, module)  # type: ignore[method-assign]
    return shadow, weights


def _multihead_attention(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Return the output of all heads as if they were one, which reaches as far, and no weights of attention."""
    if module.in_proj_weight is None:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    else:
        weights = list(module.in_proj_weight.chunk(3))
    projected = [
        _scaled(module, (), F.linear(tensor, weight))
        for tensor, weight in zip((query, key, value), weights, strict=True)
    ]
    if not module.batch_first and query.ndim == 3:
        projected = [tensor.transpose(0, 1) for tensor in projected]
    output = F.linear(_attention(*projected), module.out_proj.weight)
    if not module.batch_first and query.ndim == 3:
        output = output.transpose(0, 1)
    return _scaled(module, (), output), None


def _plain(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """Return what torch's own kind of layer makes, if it has the same shape.

    A layer that standardises its weights makes 0 of ones, and would let nothing through.
    """
    kind: Any = type(module)
    own: Any = next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn."))
    if kind.forward is own.forward or not inputs:
        return output
    try:
        plain = own.forward(module, inputs[0])
    except (RuntimeError, TypeError):  # its weights are of another layer
        return output
    return plain if plain.shape == output.shape else output


def _scaled(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    largest = 2 * output.detach().abs().amax()  # below 1, from which on some activations have no slope
    return output / torch.where(largest > 0, largest, 1)
