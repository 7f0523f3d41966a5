"""Whether the living weights still connect the input of a network with its output."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prune.copies import copied
from prune.masks import prunable_weights

# What is the identity in the network that flow runs through. (At its end, a softmax would have no slope for all outputs.)
IDENTITIES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Softmax, nn.LogSoftmax)


# What mixes its inputs by their own values, so that a slope of 0 does not mean that nothing passes.
MIXING = {
    "softmax", "log_softmax", "layer_norm", "group_norm", "instance_norm", "rms_norm", "scaled_dot_product_attention",
    "multi_head_attention_forward",
}  # fmt: skip


class _Seen(TorchFunctionMode):
    """Notes first argument and result of each call of a function of MIXING."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in MIXING:
            self.calls.append((args[0] if args else None, result))
        return result


def reaches_output(model: nn.Module, alive: Mapping[str, Tensor], input_shape: tuple[int, ...]) -> bool:
    """Return whether any path of living weights leads from the input to the output. Waits for the device.

    This is SynFlow's flow (Tanaka et al. 2020) in a network whose living weights are 1 and whose normalisation is the
    identity, on an input of ones. Each layer's output is scaled to a largest value of 1/2, so that the flow through many
    layers neither over- nor underflows. Biases do not count: they reach the output without the input.

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
    """Return the slope of the flow along the input, that along each weight times the weight, and whether anything mixes."""
    for dtype in (torch.float64, torch.float32):  # a network may convert to float32 within
        shadow, weights = _shadow(model, alive, dtype)
        ones = torch.ones(1, *input_shape, dtype=dtype, device=next(shadow.parameters()).device, requires_grad=True)
        try:
            with torch.enable_grad(), _Seen() as seen:
                output = shadow(ones)
            break
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if dtype == torch.float32:
                raise
    if seen.calls and seen.calls[-1][1] is output and isinstance(seen.calls[-1][0], Tensor):
        output = seen.calls.pop()[0]  # before a softmax at the end
    of_input, *slopes = torch.autograd.grad(
        output.sum(), [ones, *weights.values()], allow_unused=True, materialize_grads=True
    )
    products = {n: w.detach() * slope for (n, w), slope in zip(weights.items(), slopes, strict=True)}
    return of_input, products, bool(seen.calls)


def _shadow(
    model: nn.Module, alive: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the network that flow runs through, and its weights. It averages where the model takes a largest value."""
    shadow = copied(model).to(dtype).eval()
    weights = prunable_weights(shadow)
    with torch.no_grad():
        for name, weight in weights.items():
            mask = alive.get(name)
            weight.fill_(1) if mask is None else weight.copy_(mask)
            weight.requires_grad_()
    for module in shadow.modules():
        if isinstance(module, IDENTITIES):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]
        elif isinstance(module, nn.MaxPool2d):  # all places have a slope, and not one of them
            pool = nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
            module.forward = pool.forward  # type: ignore[method-assign]
        elif isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            module.register_forward_hook(_plain)
            module.register_forward_hook(_scaled)
        elif isinstance(module, nn.MultiheadAttention):  # it uses its layers without calling them
            module.register_forward_hook(lambda module, inputs, output: (_scaled(module, inputs, output[0]), None))
    return shadow, weights


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
