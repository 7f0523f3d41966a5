"""What a weight is worth. Each score is a function of `Scored` to one tensor a layer; the highest stay alive.

Scoring changes nothing: whatever needs a forward pass works on a copy of the network.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class Scored:
    """What scores look at.

    Attributes:
        model: the network, its dead weights zero.
        weights: those to be scored, by layer.
        generator: on the CPU, so that a seed means the same on every device.
        sample: function of a number k to (inputs, labels) of k images of each class, in random order.
        images_per_class: how many of them a score looks at.
        gradients: of the last training step, before they were masked, by layer.
        gradient_share: lambda of MEST.
    """

    model: nn.Module
    weights: dict[str, Tensor]
    generator: torch.Generator
    sample: Callable[[int], tuple[Tensor, Tensor]] | None = None
    images_per_class: int = 10
    gradients: dict[str, Tensor] = field(default_factory=dict)
    gradient_share: float = 1.0


Scores = dict[str, Tensor]
Score = Callable[[Scored], Scores]


def random(scored: Scored) -> Scores:
    """Independent and uniform."""
    draws = {n: torch.rand(w.shape, generator=scored.generator, dtype=torch.float64) for n, w in scored.weights.items()}
    return {  # pinned, so that the copy does not make the host wait for the device
        name: (draw.pin_memory() if scored.weights[name].is_cuda else draw).to(
            scored.weights[name].device, non_blocking=True
        )
        for name, draw in draws.items()
    }


def magnitude(scored: Scored) -> Scores:
    """|w| (Han et al. 2015)."""
    return _abs({name: w.detach() for name, w in scored.weights.items()})


def gradient(scored: Scored) -> Scores:
    """|g| of the last step, dead weights' included (Evci et al. 2020)."""
    return _abs({name: scored.gradients[name] for name in scored.weights})


def magnitude_gradient(scored: Scored) -> Scores:
    """|w| + lambda |g| (Yuan et al. 2021, section 3)."""
    return {
        name: w.detach().abs() + scored.gradient_share * scored.gradients[name].abs()
        for name, w in scored.weights.items()
    }


READ_GRADIENTS = {gradient, magnitude_gradient}  # of the last training step; a score of one's own that does joins them


def snip(scored: Scored) -> Scores:
    """|g * w| of the loss on a few images of each class (Lee et al. 2019, equation 6, without its common denominator)."""
    model, weights = _copy(scored)
    grads = torch.autograd.grad(_losses(scored, model), list(weights.values()))
    return {name: (g * w).abs().detach() for (name, w), g in zip(weights.items(), grads, strict=True)}


def grasp(scored: Scored, temperature: float = 200.0) -> Scores:
    """w * H g: what keeping a weight does for the gradient's norm (Wang et al. 2020, equation 8 with the sign turned).

    The paper's score is -w * H g and the highest go. Logits are divided by the temperature. The published code sorts its
    images by class, so that the halves it takes g and H from see different classes; here every class is in every batch.
    """
    model, weights = _copy(scored)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        loss = _losses(scored, model, temperature)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        product = sum((g.detach() * g).sum() for g in grads)
        curved = torch.autograd.grad(product, list(weights.values()))
    return {name: (w * hg).detach() for (name, w), hg in zip(weights.items(), curved, strict=True)}


def synflow(scored: Scored) -> Scores:
    """|w dR/dw| with R the sum of the outputs of the network of |w| for an input of ones (Tanaka et al. 2020, eq. 4).

    In float64, with normalisation in eval mode, or the product over many layers over- or underflows.

    Raises:
        ValueError: layer normalisation, as beside attention: flow is conserved where outputs scale with their inputs.
    """
    if any(isinstance(module, nn.LayerNorm) for module in scored.model.modules()):
        raise ValueError("synflow has no meaning for a network with layer normalisation: take another pruning method")
    model, weights = _copy(scored)
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()
    ones = torch.ones_like(scored.sample(1)[0][:1], dtype=torch.float64)
    grads = torch.autograd.grad(model(ones).sum(), list(weights.values()))
    return {name: (g * w).abs().detach() for (name, w), g in zip(weights.items(), grads, strict=True)}


def _abs(tensors: dict[str, Tensor]) -> Scores:
    return dict(zip(tensors, torch._foreach_abs(list(tensors.values())), strict=True)) if tensors else {}


def _copy(scored: Scored) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    model = copy.deepcopy(scored.model).train()
    modules = dict(model.named_modules())
    for p in model.parameters():
        p.grad = None
    return model, {name: modules[name].weight for name in scored.weights}


def _losses(scored: Scored, model: nn.Module, temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy over the images to look at."""
    inputs, labels = scored.sample(scored.images_per_class)
    return F.cross_entropy(model(inputs) / temperature, labels)
