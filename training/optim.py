"""The optimizers by name, how each perturbs within a training step, and the learning rate as a function of the step."""

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune import Pruner
from sam import SAM, flatten_parameters


@dataclass(frozen=True)
class Optimizer:
    """A base optimizer, whether SAM goes around it, and what a researcher would set for CIFAR."""

    base: type[torch.optim.Optimizer]
    sam: bool
    lr: float
    weight_decay: float
    momentum: float | None = None  # None: it has none to set


def _with_and_without_sam(name: str, base: type[torch.optim.Optimizer], **defaults) -> dict[str, Optimizer]:
    """The same settings for both, or no comparison between them means anything."""
    return {name: Optimizer(base, sam=False, **defaults), f"{name}-sam": Optimizer(base, sam=True, **defaults)}


OPTIMIZERS = {
    **_with_and_without_sam("sgd", torch.optim.SGD, lr=0.1, weight_decay=5e-4, momentum=0.9),
    **_with_and_without_sam("adam", torch.optim.Adam, lr=1e-3, weight_decay=5e-4),
    **_with_and_without_sam("adamw", torch.optim.AdamW, lr=1e-3, weight_decay=1e-2),
}


def build_optimizer(
    name: str,
    model: nn.Module,
    lr: float,
    weight_decay: float,
    momentum: float | None = None,
    nesterov: bool = False,
    rho: float | None = None,
    v2: bool = False,
    adaptive: bool = False,
) -> torch.optim.Optimizer:
    """Build an optimizer over all parameters of a model. momentum and nesterov are SGD's; rho, v2, adaptive SAM's.

    The model stays where it is from now on: SAM has its parameters moved into one piece of memory.
    """
    kind = OPTIMIZERS[name]
    options = {"lr": lr, "weight_decay": weight_decay}
    if kind.momentum is not None:
        options |= {"momentum": momentum, "nesterov": nesterov}
    parameters = list(model.parameters())
    if parameters[0].device.type in ("cpu", "cuda"):
        options["fused"] = True  # one kernel: half the time of the default on the CPU
    if parameters[0].device.type == "cuda" and "capturable" in inspect.signature(kind.base).parameters:
        options["capturable"] = True  # as a part of a CUDA graph
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # before there is one
    if kind.sam:
        flatten_parameters(parameters)
        return SAM(parameters, kind.base, rho=rho, adaptive=adaptive, v2=v2, **options)
    return kind.base(parameters, **options)


def state_holders(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that remember something of each weight: SAM has a state beside its base optimizer's."""
    return [optimizer, optimizer.base_optimizer] if isinstance(optimizer, SAM) else [optimizer]


@dataclass(frozen=True)
class Perturbation:
    """What an optimizer does to the weights around the backward pass that counts.

    Attributes:
        perturb: called before that pass with a function that computes the gradient: of the batch, or (False) of this
            process's share.
        restore: called after the optimizer's step.
        measure: called between the two; scalars to log.
        passes: forward-backward passes a step.
    """

    perturb: Callable[[Callable[[bool], object]], None]
    restore: Callable[[], None]
    measure: Callable[[], dict[str, Tensor]]
    passes: int = 1


def perturbation_of(
    optimizer: torch.optim.Optimizer, model: nn.Module, pruner: Pruner, local: bool = False
) -> Perturbation:
    """None for a plain optimizer, along the kept gradient for one-step SAM, along this batch's for two-step SAM.

    Args:
        local: two-step SAM perturbs each process along the gradient of its own share (m-sharpness, Foret et al. 2021,
            section 4.1).
    """
    if not isinstance(optimizer, SAM):
        return Perturbation(perturb=lambda backward: None, restore=lambda: None, measure=dict)

    def measure() -> dict[str, Tensor]:
        norm, cosine = optimizer.perturbation_stats()
        return {"perturbation_norm": norm, "alignment": cosine}

    if optimizer.v2:
        return Perturbation(lambda backward: optimizer.first_step(zero_grad=True), optimizer.restore, measure)

    # Batch norm's statistics after the first pass: the second, at w + e, is not to move them.
    statistics = list(model.buffers())
    saved = [torch.empty_like(buffer) for buffer in statistics]

    def perturb(backward: Callable[[bool], object]) -> None:
        backward(not local)
        pruner.mask_gradients()
        optimizer.first_step(zero_grad=True)
        if saved:
            torch._foreach_copy_(saved, statistics)

    def restore() -> None:
        optimizer.restore()
        if saved:
            torch._foreach_copy_(statistics, saved)

    return Perturbation(perturb, restore, measure, passes=2)


def learning_rate(step: int, lr: float, schedule: str, total_steps: int, warmup_steps: int = 0) -> float:
    """The learning rate of a step, counted from 0.

    Args:
        schedule: `cosine` to zero at total_steps (Loshchilov and Hutter 2017), `step`: a tenth from 50% and a hundredth
            from 75% of total_steps on, or `constant`.
        warmup_steps: steps over which it first rises linearly; `cosine` has the rest for its way down.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
    if schedule == "step":
        return lr * 0.1 ** ((2 * step >= total_steps) + (4 * step >= 3 * total_steps))
    return lr
