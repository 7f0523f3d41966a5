"""Batch norm's running statistics, estimated anew at the weights as they are, and networks that batch norm cannot train.

SAM.v2's statistics come from perturbed weights, and every optimizer's lag behind by some ten steps.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.sync_batch_norm import synchronise
from utils.precision import Execution


@torch.no_grad()
def recalibrated(model: nn.Module, batches: Iterable[Tensor], execution: Execution = Execution()) -> nn.Module:
    """A copy of a model, in evaluation mode, whose statistics are the mean of those of these batches, weighted by size.

    Mean and (unbiased) variance within each batch, as training estimates them (Izmailov et al. 2018, section 3.2). The
    model itself is left alone, so that training goes on from it as if nothing had been measured.

    Args:
        batches: inputs float32 [B, C, H, W].

    Raises:
        ValueError: the model has no batch norm.
    """
    refuse_without_batch_norm(model)
    copied = copy.deepcopy(model).train()
    synchronise(copied, False)
    layers, seen = batch_norm_layers(copied), 0
    for inputs in filter(len, batches):  # a process may have no share of the last one
        seen += len(inputs)
        for layer in layers:
            layer.momentum = len(inputs) / seen  # the first batch replaces what was there
        with execution.autocast(inputs.device):
            copied(inputs)
    return copied.eval()


def batch_norm_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def refuse_single_values(model: nn.Module, image_shape: tuple[int, int, int], smallest_batch: int) -> None:
    """Raise ValueError where a batch of so many images [C, H, W] leaves batch norm one value a channel."""
    shadow = copy.deepcopy(model).to("meta").train()
    try:
        shadow(torch.zeros(smallest_batch, *image_shape, device="meta"))
    except ValueError as error:
        raise ValueError(
            f"{smallest_batch} image of this size cannot be batch-normalised, and a step comes down to that: "
            "change --batch-size or --accumulate, or take larger images"
        ) from error


def refuse_without_batch_norm(model: nn.Module, flag: str = "--recalibrate-bn") -> None:
    if not batch_norm_layers(model):
        raise ValueError(f"{flag} has no effect on a network without batch norm: leave it out")
