"""The optimizers by name, and learning rate and radius as functions of the step."""

import inspect
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sam import SAM
from training.rivals import SAFE, CrAM

NORMALISATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
SCHEDULES, RHO_SCHEDULES = ("cosine", "step", "constant"), ("constant", "lr", "sqrt")


@dataclass(frozen=True)
class Optimizer:
    """One optimizer, with the settings that a researcher would start from on CIFAR.

    Attributes:
        base: the base optimizer.
        sam: whether SAM goes around it.
        lr, weight_decay: defaults.
        momentum: default; None where there is none to set.
        rho: default of SAM's.
        rival: what goes around the base optimizer in SAM's place.
    """

    base: type[torch.optim.Optimizer]
    sam: bool
    lr: float
    weight_decay: float
    momentum: float | None = None
    rho: float = 0.05
    rival: type[CrAM] | type[SAFE] | None = None

    @property
    def fine_tuning_lr(self) -> float:
        """Return the default learning rate for trained weights, which the usual one would undo."""
        return self.lr / 10


def _with_and_without_sam(name: str, base: type[torch.optim.Optimizer], **defaults: Any) -> dict[str, Optimizer]:
    """Return two optimizers of the same settings: otherwise no comparison between them means anything."""
    return {name: Optimizer(base, sam=False, **defaults), f"{name}-sam": Optimizer(base, sam=True, **defaults)}


OPTIMIZERS = {
    **_with_and_without_sam("sgd", torch.optim.SGD, lr=0.1, weight_decay=5e-4, momentum=0.9),
    **_with_and_without_sam("adam", torch.optim.Adam, lr=1e-3, weight_decay=5e-4),
    **_with_and_without_sam("adamw", torch.optim.AdamW, lr=1e-3, weight_decay=1e-2),
    "sgd-cram": Optimizer(torch.optim.SGD, True, lr=0.1, weight_decay=5e-4, momentum=0.9, rho=0.2, rival=CrAM),
    "sgd-safe": Optimizer(torch.optim.SGD, True, lr=0.1, weight_decay=5e-4, momentum=0.9, rho=0.1, rival=SAFE),
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
    direction: str = "previous",
    seed: int = 0,
    norm_decay: bool = True,
    **rival: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer over all parameters of a model.

    Args:
        name: a key of OPTIMIZERS.
        model: what it optimizes.
        lr, weight_decay: of every optimizer.
        momentum, nesterov: of SGD.
        rho, v2, adaptive, direction, seed: of SAM, see `sam.SAM`.
        norm_decay: decay normalisation, biases and other vectors and scalars too.
        **rival: of CrAM and SAFE, see there.
    """
    kind = OPTIMIZERS[name]
    options: dict = {"lr": lr, "weight_decay": weight_decay}
    if kind.momentum is not None:
        options |= {"momentum": momentum, "nesterov": nesterov}
    parameters = list(model.parameters())
    if parameters[0].device.type in ("cpu", "cuda"):
        options["fused"] = True  # one kernel: half the time of the default on the CPU
    if parameters[0].device.type == "cuda" and "capturable" in inspect.signature(kind.base).parameters:
        options["capturable"] = True  # as a part of a CUDA graph
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # before there is one
    if kind.rival:
        assert rho is not None
        return kind.rival(model, kind.base, rho, seed=seed, **rival, **options)
    groups: list = parameters
    if not norm_decay:
        normal = {
            p for module in model.modules() if isinstance(module, NORMALISATION) for p in module.parameters(False)
        }
        decayed = [p for p in parameters if p.ndim > 1 and p not in normal]
        others = [p for p in parameters if p.ndim < 2 or p in normal]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    if kind.sam:
        assert rho is not None
        return SAM(groups, kind.base, rho, adaptive, v2, direction, seed=seed, **options)
    return kind.base(groups, **options)


def passes_per_step(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of forward-backward passes of a training step that perturbs; others take one."""
    return 2 if isinstance(optimizer, SAM) and not optimizer.v2 else 1


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_radius(optimizer: torch.optim.Optimizer, rho: float) -> None:
    """Set the radius of all parameter groups, where SAM gave them one."""
    for group in optimizer.param_groups:
        if "rho" in group:
            group["rho"] = rho


def learning_rate(step: int, lr: float, schedule: str, total_steps: int, warmup_steps: int = 0) -> float:
    """Return the learning rate of a schedule step, counted from 0.

    Args:
        step: place in the schedule.
        lr: the rate that the schedule starts from.
        schedule: `cosine` falls to zero at total_steps (Loshchilov and Hutter 2017); `step` is a tenth from 50% of
            total_steps on and a hundredth from 75% on; `constant` stays.
        total_steps: of the schedule.
        warmup_steps: steps over which the rate first rises linearly; `cosine` falls over the rest.

    Raises:
        ValueError: an unknown schedule.
    """
    refuse_unknown(schedule, SCHEDULES)
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
    if schedule == "step":
        return lr * 0.1 ** ((2 * step >= total_steps) + (4 * step >= 3 * total_steps))
    return lr


def radius(
    step: int,
    rho: float,
    schedule: str,
    total_steps: int,
    steps_per_epoch: int,
    relative_lr: float = 1.0,
    since: float = 0.0,
    until: float = 1.0,
    every: int = 1,
) -> float:
    """Return SAM's signed radius at a schedule step, counted from 0; it is 0 in steps that do not perturb.

    Args:
        step: place in the schedule.
        rho: the radius that the schedule starts from.
        schedule: `constant` stays; `lr` is rho * relative_lr; `sqrt` is rho * sqrt(1 / (1 + epoch)), where the epoch is a
            whole number and the first one is 0 (Ji et al. 2024, Remark 1).
        total_steps: of the schedule.
        steps_per_epoch: of each of its epochs.
        relative_lr: the learning rate of this step over the one that its own schedule starts from.
        since, until: steps perturb from this share of the schedule on, and up to this one, which is not in it any more.
        every: of these steps only those perturb whose number is a multiple of this one.

    Raises:
        ValueError: an unknown schedule.
    """
    refuse_unknown(schedule, RHO_SCHEDULES)
    if not since <= step / total_steps < until or step % every:
        return 0.0
    if schedule == "lr":
        return rho * relative_lr
    if schedule == "sqrt":
        return rho * math.sqrt(1 / (1 + step // steps_per_epoch))
    return rho


def refuse_unknown(schedule: str, known: tuple[str, ...]) -> None:
    """Raise ValueError for a schedule that does not exist."""
    if schedule not in known:
        raise ValueError(f"unknown schedule '{schedule}': choose one of {', '.join(known)}")
