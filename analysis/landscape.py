"""The loss of a trained network over fixed images, as a function of its weights."""

import re
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from imagedata.images import AnyImages
from prune.copies import copied
from prune.masks import Masks, prunable_weights
from utils.precision import Execution, resolve_execution, what_compilation_lacks

# Compilation on a CPU: the seconds it takes, and the seconds it saves per FLOP. Measured for Hessian products: one over 250
# images of ResNet-20 took 2.5 s on one core, and 1.5 s compiled. Forward passes are taken to save as much.
COMPILATION_TAKES, COMPILATION_SAVES = 40.0, 7.5e-12


class FixedImagesLoss:
    """Mean cross-entropy over fixed images, with its gradient and products with its Hessian.

    The weights are one flat vector [P] of all parameters in the model's order. The loss is in nats, without label
    smoothing. The network is a copy in evaluation mode: batch norm uses its running statistics, which stay, so that the
    loss is the same function at all weights. Everything is computed in the model's dtype.

    Args:
        model: maps images to logits.
        inputs: [N, C, H, W], or whatever the model takes.
        labels: int64 [N].
        batch_size: images per forward pass.
        execution: whether losses and Hessian products are compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        batch_size: int = 250,
        execution: Execution = Execution(),
    ):
        self.model = copied(model).eval().requires_grad_(False)
        self.inputs, self.labels, self.batch_size = inputs, labels, batch_size
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self.weights = torch.cat([p.flatten() for p in self.model.parameters()])
        self._logits = execution.compile(self._logits_of, batch_size)
        self._product = execution.compile(self._product_of, batch_size)

    @torch.no_grad()
    def loss(self, weights: Tensor | None = None) -> tuple[float, float]:
        """Return mean loss and top-1 accuracy (percent) at the given weights [P], or at the model's."""
        weights = self.weights if weights is None else weights
        sums = torch.zeros(2, dtype=torch.float64, device=self.labels.device)
        for inputs, labels in self._batches():
            logits = self._logits(inputs, weights)
            sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()])
        loss, correct = (sums / len(self.labels)).tolist()
        return loss, 100 * correct

    @torch.no_grad()
    def gradient(self, weights: Tensor | None = None) -> tuple[float, Tensor]:
        """Return mean loss and its gradient [P] at the given weights, or at the model's."""
        weights = self.weights if weights is None else weights
        total, loss = torch.zeros_like(weights), 0.0
        for inputs, labels in self._batches():
            gradient, part = self._gradient_of(inputs, labels, weights)  # called too rarely to be worth a compilation
            total += gradient
            loss += float(part)
        return loss / len(self.labels), total / len(self.labels)

    @torch.no_grad()
    def hessian_product(self, vector: Tensor) -> Tensor:
        """Multiply the Hessian at the model's weights by a vector [P].

        The product is the derivative of the gradient along the vector (Pearlmutter 1994).

        Raises:
            ValueError: torch cannot derive an operation of the network twice.
        """
        total = torch.zeros_like(vector)
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # the only attention with a second derivative
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch itself uses it here
            try:
                for inputs, labels in self._batches():
                    total += self._product(inputs, labels, self.weights, vector)
            except NotImplementedError as error:
                operation = re.search(r"forward AD with (aten::\w+)", str(error))
                if not operation:
                    raise
                raise ValueError(
                    "this network has no Hessian in torch, which cannot derive the gradient of an operation in it once more "
                    f"({operation[1]}): measure one without that operation"
                ) from error
        return total / len(self.labels)

    def parameters_of(self, weights: Tensor) -> dict[str, Tensor]:
        """Split a flat vector into the parameters, by name and in their shapes."""
        parts = weights.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.inputs.split(self.batch_size), self.labels.split(self.batch_size), strict=True)

    def _logits_of(self, inputs: Tensor, weights: Tensor) -> Tensor:
        return functional_call(self.model, self.parameters_of(weights), (inputs,))

    def _loss_of(self, inputs: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda weights: F.cross_entropy(self._logits_of(inputs, weights), labels, reduction="sum")

    def _gradient_of(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return grad_and_value(self._loss_of(inputs, labels))(weights)

    def _product_of(self, inputs: Tensor, labels: Tensor, weights: Tensor, vector: Tensor) -> Tensor:
        return jvp(lambda at: self._gradient_of(inputs, labels, at)[0], (weights,), (vector,))[1]


def living_weights(model: nn.Module, masks: Masks) -> Tensor:
    """Return which entries of the flat vector of all parameters are not pruned: bool [P].

    Args:
        model: the network, or a copy of it.
        masks: of that network; layers are matched by name.
    """
    parameters = dict(model.named_parameters()) | prunable_weights(model)
    alive = {id(parameters[name]): mask.bool() for name, mask in (masks.masks | masks.other_masks).items()}
    return torch.cat([alive.get(id(p), torch.ones_like(p, dtype=torch.bool)).flatten() for p in model.parameters()])


def fixed_images(images: AnyImages, count: int) -> AnyImages:
    """Draw `count` images in random order, or all if there are fewer; every call draws the same ones."""
    order = np.random.default_rng(0).permutation(len(images))[:count]
    return images[torch.from_numpy(order)]


def resolve_compilation(compilation: str, device: torch.device, flops: float) -> Execution:
    """Resolve `auto` to compilation where so many FLOPs earn it back; the precision is fp32.

    Args:
        compilation: auto, on or off.
        device: where to compute; `auto` never compiles on CUDA, where it has not been measured.
        flops: of all forward passes or Hessian products.
    """
    if compilation == "auto":
        worthwhile = device.type == "cpu" and COMPILATION_SAVES * flops > COMPILATION_TAKES
        compilation = "on" if worthwhile and not what_compilation_lacks(device) else "off"
    return resolve_execution("fp32", compilation, device)
