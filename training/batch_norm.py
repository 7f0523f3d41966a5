"""Batch norm beyond torch's: statistics kept and restored, estimated anew, and taken over the images of all processes."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prune.copies import copied
from utils.distributed import ProcessGroup
from utils.precision import Execution


class SavedStatistics:
    """A place to keep a model's buffers, which are batch norm's running statistics, and to restore them from."""

    def __init__(self, model: nn.Module):
        self._buffers = list(model.buffers())
        self._saved = [torch.empty_like(buffer) for buffer in self._buffers]

    def save(self) -> None:
        """Copy the statistics."""
        if self._buffers:
            torch._foreach_copy_(self._saved, self._buffers)

    def restore(self) -> None:
        """Put the copied statistics back."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved)


@torch.no_grad()
def recalibrated(
    model: nn.Module,
    batches: Iterable[Tensor],
    execution: Execution = Execution(),
    group: ProcessGroup = ProcessGroup(),
) -> nn.Module:
    """Return a copy of a model, in evaluation mode, whose statistics are estimated anew from these batches.

    They are the mean of the batches' own, weighted by size: mean and unbiased variance within each batch, as training
    estimates them (Izmailov et al. 2018, section 3.2). A layer that is used several times has the mean of all. This shows
    what accuracy is lost to statistics that lag behind the weights, or that one-step SAM takes at perturbed weights. The
    model itself is left alone.

    Args:
        model: any network.
        batches: inputs float32 [B, C, H, W], of each process its own.
        execution: how the forward passes compute.
        group: the processes.

    Raises:
        ValueError: the model has no batch norm.
    """
    refuse_without_batch_norm(model)
    anew = copied(model).eval()  # without dropout, as the statistics will be used
    synchronise(anew, False)
    layers, seen = batch_norm_layers(anew), 0
    by_layer = dict.fromkeys(layers, 0)

    def weigh(layer: nn.modules.batchnorm._BatchNorm, args: tuple, kwargs: dict) -> None:
        size = len(args[0] if args else kwargs["input"])
        by_layer[layer] += size
        layer.momentum = size / by_layer[layer]  # what comes first replaces what was there

    handles = [layer.train().register_forward_pre_hook(weigh, with_kwargs=True) for layer in layers]
    for inputs in filter(len, batches):  # a process may have no images of the last one
        seen += len(inputs)
        with execution.autocast(inputs.device):
            anew(inputs)
    for handle in handles:
        handle.remove()
    if group.world > 1:
        share = torch.tensor([float(seen)], device=next(anew.parameters()).device)
        share = share / group.add(share.clone())
        for layer in layers:
            for statistics in (layer.running_mean, layer.running_var):
                if statistics is not None:
                    statistics.copy_(group.add(statistics * share))
    return anew.eval()


def batch_norm_layers(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch norm layers of a model."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def refuse_single_values(model: nn.Module, image_shape: tuple[int, int, int], smallest_batch: int) -> None:
    """Raise ValueError where a batch of so many images [C, H, W] leaves batch norm one value per channel."""
    if smallest_batch > 1:  # each image has a value of every channel
        return
    shadow = copied(model).to("meta").train()
    for layer in batch_norm_layers(shadow):
        layer.forward = _same_if_several  # type: ignore[method-assign, assignment]  # itself slow on meta
    try:
        shadow(torch.zeros(smallest_batch, *image_shape, device="meta"))
    except ValueError as error:
        raise ValueError(
            f"{smallest_batch} image of this size cannot be batch-normalised, and a step comes down to that: "
            "change --batch-size or --accumulate, or take larger images"
        ) from error


def _same_if_several(inputs: Tensor) -> Tensor:
    if inputs.numel() == inputs.shape[1]:
        raise ValueError("one value per channel has no variance")
    return inputs


def refuse_without_batch_norm(model: nn.Module, flag: str = "--recalibrate-bn") -> None:
    """Raise ValueError for a network without batch norm, on which a flag has no effect."""
    if not batch_norm_layers(model):
        raise ValueError(f"{flag} has no effect on a network without batch norm: leave it out")


def refuse_other_batch_norm(model: nn.Module) -> None:
    """Raise ValueError for a network with batch norm that `synchronise` would leave alone, or that it cannot do."""
    for layer in batch_norm_layers(model):
        if type(layer) is not nn.BatchNorm2d:
            raise ValueError(
                f"--sync-bn knows BatchNorm2d and not {type(layer).__name__}, which this network has: leave it out"
            )
        if not layer.affine or not layer.track_running_stats or layer.momentum is None:
            raise ValueError(
                "--sync-bn needs batch norm with a scale, running statistics and a momentum, and this network has some "
                "without: leave it out"
            )


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose mean and variance in training are those of the whole batch, over all processes.

    Ioffe and Szegedy 2015, algorithm 1. Torch's SyncBatchNorm is for GPUs alone and wants images in each process. Here
    every process calls it, with no images if it has none: it waits for the others, forward and backward.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise [B, C, H, W] by the statistics of all processes."""
        if not self.training:
            return super().forward(inputs)
        assert self.running_mean is not None
        assert self.running_var is not None
        x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))  # sums in bf16 or fp16 would not do
        count = x.new_tensor([x.numel() / self.num_features])
        sums = _AddOverProcesses.apply(torch.cat([x.sum((0, 2, 3)), count]))
        total = sums[-1].detach().clamp_min(1)
        mean = sums[:-1] / total
        centred = x - mean[:, None, None]
        variance = _AddOverProcesses.apply(centred.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            # None for a part of a batch that is empty everywhere.
            weight = self.momentum * (sums[-1] > 0).to(self.running_mean.dtype)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            unbiased = variance * (total / (total - 1).clamp_min(1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(inputs.dtype)


def synchronise(model: nn.Module, wanted: bool = True) -> None:
    """Make all batch norm of a model, in place, take its statistics over all processes, or again over this one alone."""
    before, after = (nn.BatchNorm2d, SyncBatchNorm2d) if wanted else (SyncBatchNorm2d, nn.BatchNorm2d)
    for module in model.modules():
        if type(module) is before:
            module.__class__ = after  # parameters, which an optimizer holds, stay what and where they are


class _AddOverProcesses(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return _AddOverProcesses.forward(None, gradient)
