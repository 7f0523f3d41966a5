"""Floating-point operations of a sparse network, for one image.

Counted by torch's formulas: convolutions, linear layers and attention, two operations per multiply-add; normalisation and
elementwise work are not counted. A layer at density d is charged d times its dense count, forward and backward, as if the
hardware made use of every zero (Evci et al. 2020, appendix H).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from prune.copies import copied
from prune.masks import Masks, prunable_weights


@dataclass(frozen=True)
class Flops:
    """Dense counts for one image.

    Attributes:
        forward: of each prunable layer.
        training: forward and backward of each prunable layer.
        other_forward: of everything else, whatever the masks (attention products).
    """

    forward: dict[str, int]
    training: dict[str, int]
    other_forward: int

    @property
    def dense_training(self) -> float:
        """Forward and backward pass of the dense network."""
        return self.train(dict.fromkeys(self.forward, 1.0))

    def inference(self, density: dict[str, float]) -> float:
        """Return the count of a forward pass with layers at these densities."""
        return self.other_forward + sum(density[name] * count for name, count in self.forward.items())

    def train(self, density: dict[str, float], dense_gradients: bool = False) -> float:
        """Return the count of a forward and backward pass with layers at these densities.

        Args:
            density: fraction of living weights by layer.
            dense_gradients: whether gradients of dead weights are computed too, as growing by gradient needs them.
        """
        # A product of two activations has two gradients, each as much work as the product.
        total = 3 * self.other_forward + sum(density[name] * count for name, count in self.training.items())
        if dense_gradients:
            total += sum((1 - density[name]) * count for name, count in self.forward.items())  # as many as forward
        return total


def count_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> Flops:
    """Count the operations of a network on one image [C, H, W], on a copy of it without data.

    An operation belongs to the layer whose weight it multiplies by, whichever module calls it: attention and windows of
    transformers use the weights of their layers without calling them.
    """
    shadow = _without_data(model).train()
    for module in shadow.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # Its scale stands for it: without data batch norm takes longer than all the rest, and is not counted.
            module.forward = partial(_scaled, module.weight)  # type: ignore[method-assign]
    images = torch.zeros(2, *image_shape, device="meta")
    with _Counter(shadow, images) as counter:
        shadow(images)
    # A layer's forward pass, weight gradient and input gradient take as many operations each. A frozen layer has no weight
    # gradient, one that sees the images no input gradient. Only the forward pass is counted: backward torch takes a grouped
    # convolution for a whole one.
    forward = {name: count // len(images) for name, count in counter.forward.items()}
    trained = {name for name, weight in prunable_weights(shadow).items() if weight.requires_grad}
    training = {
        name: (1 + (name in trained) + (name not in counter.of_images)) * count for name, count in forward.items()
    }
    return Flops(forward, training, counter.other // len(images))


def _without_data(model: nn.Module) -> nn.Module:
    """Return a copy on the meta device, in which layers share the weights that they share in the model."""
    parameters = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copied(model, parameters).to("meta")


class _Counter(TorchDispatchMode):
    """Counts operations by the layer whose weight they read, where that is a view of it, or else by the layer at work.

    Attributes:
        forward: operations of each layer that took part.
        other: of everything else.
        of_images: layers whose input comes from the images without a weight in between that is trained. Buffers, such as a
            mean that is subtracted, are no weights.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        super().__init__()
        weights = prunable_weights(model)
        self.forward: dict[str, int] = {}
        self.other = 0
        self.of_images: set[str] = set()
        self._layers = {_storage(weight): name for name, weight in weights.items()}
        self._at_work: list[str] = []
        self._held = [images]  # and what is computed of them and buffers: so no other tensor takes their place
        self._known = {_storage(images)}
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        self._constant = set(map(_storage, [*model.buffers(), *frozen]))
        for name, module in model.named_modules():
            if name in weights:
                module.register_forward_pre_hook(lambda module, inputs, name=name: self._at_work.append(name))
                module.register_forward_hook(lambda module, inputs, output: self._at_work.pop() and None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:  # what torch makes of an operation of several steps
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        storages = {_storage(tensor) for tensor in tensors}
        if storages and storages <= self._known | self._constant:
            made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
            self._held += made
            (self._known if storages & self._known else self._constant).update(map(_storage, made))
        if count is not None:
            operations = count(*args, **kwargs, out_val=out)
            found = [self._layers[storage] for storage in storages if storage in self._layers] + self._at_work[-1:]
            if found:
                self.forward[found[0]] = self.forward.get(found[0], 0) + operations
                if storages & self._known:
                    self.of_images.add(found[0])
            else:
                self.other += operations
        return out


def _scaled(weight: Tensor | None, inputs: Tensor) -> Tensor:
    return inputs if weight is None else inputs * weight.view(-1, *[1] * (inputs.ndim - 2))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class FlopsMeter:
    """Counts the operations of training steps as masks change.

    Args:
        flops: of the dense network, for one image.
        masks: of the network.
        passes: forward-backward passes of a step that perturbs; others take one.
    """

    def __init__(self, flops: Flops, masks: Masks, passes: int):
        self.flops, self.masks, self.passes = flops, masks, passes
        self._version = -1
        # One entry for each version of the masks: living weights by layer, images times passes, and images that needed
        # dense gradients.
        self._counted: list[tuple[Tensor, int, int]] = []

    def step(self, images: int, dense_gradients: bool, perturbs: bool = True) -> None:
        """Count a training step on so many images. Does not wait for the device."""
        if self._version != self.masks.version:
            self._version = self.masks.version
            self._counted.append((self.masks.alive_counts(), 0, 0))
        alive, total, dense = self._counted[-1]
        passes = self.passes if perturbs else 1
        self._counted[-1] = (alive, total + images * passes, dense + images * dense_gradients)

    def state_dict(self) -> dict:
        """Return what was counted since the last `read`. Waits for the device."""
        counted = [(alive.tolist(), total, dense) for alive, total, dense in self._counted]
        return {"counted": counted, "times_passes": True, "current": self._version == self.masks.version}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned; the masks have to be those of that time."""
        passes = 1 if state.get("times_passes") else self.passes  # once images were counted, and all steps alike
        self._counted = [(torch.tensor(alive), passes * total, dense) for alive, total, dense in state["counted"]]
        self._version = self.masks.version if state["current"] else -1

    def read(self) -> float:
        """Return the operations of the steps since the last `read`. Waits for the device."""
        operations = 0.0
        for alive, total, dense in self._counted:
            weights = self.masks.weights
            density = {name: n / w.numel() for n, (name, w) in zip(alive.tolist(), weights.items(), strict=True)}
            operations += (total - dense) * self.flops.train(density)
            operations += dense * self.flops.train(density, dense_gradients=True)
        self._counted = [(alive, 0, 0) for alive, _, _ in self._counted[-1:]]
        return operations


def summary_table(flops: Flops, masks: Masks) -> str:
    """Return a text table: shape, weights, density and forward operations of each prunable layer, and the sums."""
    density, weights = masks.density(), masks.weights
    rows = [("layer", "shape", "weights", "density", "MFLOPs dense", "MFLOPs now")]
    for name, weight in weights.items():
        shape, count = "x".join(map(str, weight.shape)), flops.forward.get(name, 0) / 1e6
        figures = f"{weight.numel():,}", f"{density[name]:.4f}", f"{count:.3f}", f"{density[name] * count:.3f}"
        rows.append((name, shape, *figures))
    total, dense = sum(w.numel() for w in weights.values()), flops.inference(dict.fromkeys(density, 1.0)) / 1e6
    now = flops.inference(density) / 1e6
    rows.append(("all", "", f"{total:,}", f"{1 - masks.sparsity():.4f}", f"{dense:.3f}", f"{now:.3f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    align = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust]
    lines = ("  ".join(a(cell, w) for a, cell, w in zip(align, row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
