"""What a weight is worth: functions of `Scored` to one tensor for each layer. The highest scores stay alive.

Scoring changes nothing: what needs a forward pass works on a copy of the network.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prune.copies import copied
from prune.masks import prunable_weights


@dataclass
class Scored:
    """What a score looks at.

    Attributes:
        model: the network, its dead weights zero.
        weights: those to be scored, by layer.
        generator: on the CPU, so that a seed means the same on every device.
        sample: a function of k to inputs and labels of k training images of each class, in random order.
        gradients: before they were masked, by layer: of the last training step, or their running average (SNFS).
        options: of the method, by name.
        initial: where a method scores in rounds, the weights before the first one, by layer.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    generator: torch.Generator
    sample: Callable[[int], tuple[Tensor, Tensor]] | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, float] = field(default_factory=dict)
    initial: Mapping[str, Tensor] = field(default_factory=dict)

    def images(self, per_class: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of so many images of each class. Raises ValueError where there is no `sample`."""
        if self.sample is None:
            raise ValueError("this score looks at images: give choose_masks a function that samples them")
        return self.sample(per_class)


Scores = dict[str, Tensor]
Score = Callable[[Scored], Scores]


def random(scored: Scored) -> Scores:
    """Draw independent scores from the Cauchy distribution.

    The mean of any number of them has that distribution too: units of a pattern are all as likely, whatever their size.
    """
    uniform = {
        n: torch.rand(w.shape, generator=scored.generator, dtype=torch.float64) for n, w in scored.weights.items()
    }
    draws = {name: (math.pi * (draw - 0.5)).tan_() for name, draw in uniform.items()}
    return {  # pinned, so that the copy does not make the host wait for the device
        name: (draw.pin_memory() if scored.weights[name].is_cuda else draw).to(
            scored.weights[name].device, non_blocking=True
        )
        for name, draw in draws.items()
    }


def magnitude(scored: Scored) -> Scores:
    """Score by |w| (Han et al. 2015)."""
    return _abs({name: w.detach() for name, w in scored.weights.items()})


def gradient(scored: Scored) -> Scores:
    """Score by |g| of the last step, for dead weights too (Evci et al. 2020)."""
    return _abs({name: scored.gradients[name] for name in scored.weights})


def magnitude_gradient(scored: Scored) -> Scores:
    """Score by |w| + lambda |g| (Yuan et al. 2021, section 3)."""
    return {
        name: w.detach().abs() + scored.options["mest_lambda"] * scored.gradients[name].abs()
        for name, w in scored.weights.items()
    }


def lamp(scored: Scored) -> Scores:
    """Score by w^2 over the sum of all squares in its layer that are not smaller (Lee et al. 2021, equation 3).

    The order within a layer is that of |w|, and the largest weight of every layer scores 1. Of equal weights the earlier one
    counts as larger. In float64, for the sums are long.
    """
    scores = {}
    for name, w in scored.weights.items():
        squares, order = w.detach().double().square().flatten().sort(descending=True, stable=True)
        ranked = (squares / squares.cumsum(0)).nan_to_num_(0.0)  # a layer of zeros
        scores[name] = torch.empty_like(ranked).index_copy_(0, order, ranked).view(w.shape)
    return scores


# A unit of a pattern has the L2 norm of these scores; others are parts of a sum, so that a unit has their mean.
POOLED_BY_NORM = {magnitude, gradient, magnitude_gradient}

MOST_IMAGES = 100  # that a second derivative is taken of at once

READ_GRADIENTS = {gradient, magnitude_gradient}  # of the last training step; add your own score if it does


def snip(scored: Scored) -> Scores:
    """Score by |g * w| of the loss on a few images of each class (Lee et al. 2019, equation 6, not normalised)."""
    model, weights = _copy(scored)
    grads = _gradients(_losses(scored, model), list(weights.values()))
    return {name: (g * w).abs().detach() for (name, w), g in zip(weights.items(), grads, strict=True)}


def force(scored: Scored) -> Scores:
    """Score by |g * w|, g of the pruned network and w before pruning (de Jorge et al. 2021, section 4).

    In rounds, a weight that was pruned may come back. With w pruned as well, which is `snip`, it may not: iterative SNIP.
    """
    model, weights = _copy(scored)
    grads = _gradients(_losses(scored, model), list(weights.values()))
    return {name: (g * scored.initial[name]).abs().detach() for name, g in zip(weights, grads, strict=True)}


REVIVING = {force}  # by which weights that an earlier round pruned may live again; add your own score if they may


def grasp(scored: Scored, temperature: float = 200.0) -> Scores:
    """Score by w * H g, what keeping a weight does for the gradient's norm (Wang et al. 2020, equation 8).

    The paper's score is -w * H g, and its highest go. Logits are divided by the temperature. The published code sorts its
    images by class, so that the halves it takes g and H from see different classes; here they are mixed. More than
    MOST_IMAGES are taken in parts, each batch-normalised by itself, and g and H g are sums over all parts.
    """
    model, weights = _copy(scored)
    leaves = list(weights.values())
    parts = _parts(scored)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        along = _sum(_gradients(part(model, temperature), leaves) for part in parts)
        curved = _sum(_along_hessian(part(model, temperature), leaves, along) for part in parts)
    return {name: (w * hg).detach() for (name, w), hg in zip(weights.items(), curved, strict=True)}


def synflow(scored: Scored) -> Scores:
    """Score by |w dR/dw|, R the summed outputs of the network of |w| for an input of ones (Tanaka et al. 2020, eq. 4).

    In float64 and with normalisation in eval mode: elsewhere the product over many layers over- or underflows.

    Raises:
        ValueError: normalisation by the input at hand, as in transformers: flow is conserved where outputs scale with their
            inputs. Or a network that does not compute in float64.
    """
    refuse_normalisation_by_input(scored.model)
    model, weights = _copy(scored)
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()
    ones = torch.ones_like(scored.images(1)[0][:1], dtype=torch.float64)
    try:
        flow = model(ones).sum()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"synflow computes in float64, in which this network does not ({next(iter(str(error).splitlines()), '')}): take "
            "another pruning method, such as snip"
        ) from error
    grads = _gradients(flow, list(weights.values()))
    return {name: (g * w).abs().detach() for (name, w), g in zip(weights.items(), grads, strict=True)}


def refuse_normalisation_by_input(model: nn.Module) -> None:
    """Raise ValueError for a network that synflow cannot score; this is known without scoring it."""
    for module in model.modules():
        without_statistics = isinstance(module, nn.modules.batchnorm._NormBase) and not module.track_running_stats
        if without_statistics or isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            raise ValueError(
                f"synflow has no meaning for a network with {type(module).__name__}, which normalises by the input at hand: take "
                "another pruning method, such as snip"
            )


def _abs(tensors: dict[str, Tensor]) -> Scores:
    return dict(zip(tensors, torch._foreach_abs(list(tensors.values())), strict=True)) if tensors else {}


def _copy(scored: Scored) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    model = copied(scored.model).train()
    weights = prunable_weights(model)
    for p in model.parameters():
        p.grad = None
        p.requires_grad_()  # a frozen weight is scored as well
    return model, {name: weights[name] for name in scored.weights}


def _gradients(output: Tensor, leaves: list[nn.Parameter], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Return the gradients of leaves; 0 for those that the output does not depend on."""
    return torch.autograd.grad(output, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _losses(scored: Scored, model: nn.Module) -> Tensor:
    """Return the mean cross-entropy over the images that a score looks at."""
    inputs, labels = scored.images(int(scored.options["score_images"]))
    return F.cross_entropy(model(inputs), labels)


def _parts(scored: Scored) -> list[Callable[[nn.Module, float], Tensor]]:
    """Return functions of model and temperature to parts of the mean cross-entropy, of at most MOST_IMAGES each."""
    inputs, labels = scored.images(int(scored.options["score_images"]))
    count = -(-len(labels) // MOST_IMAGES)

    def part(x: Tensor, y: Tensor) -> Callable[[nn.Module, float], Tensor]:
        return lambda model, temperature: F.cross_entropy(model(x) / temperature, y) * (len(y) / len(labels))

    return [part(x, y) for x, y in zip(inputs.tensor_split(count), labels.tensor_split(count), strict=True)]


def _along_hessian(loss: Tensor, leaves: list[nn.Parameter], along: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the product of the loss's Hessian and a direction."""
    grads = _gradients(loss, leaves, create_graph=True)
    product = torch.stack([(a * g).sum() for a, g in zip(along, grads, strict=True)]).sum()
    return _gradients(product, leaves)


def _sum(terms: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return the sums of corresponding tensors, of which only one term is held at a time."""
    rest = iter(terms)
    total = list(next(rest))
    for term in rest:
        torch._foreach_add_(total, list(term))
    return total
