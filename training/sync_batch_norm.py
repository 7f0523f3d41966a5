"""Batch norm over the images of all processes. Torch's SyncBatchNorm is for GPUs alone, and wants images in each process."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class AddUp(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return AddUp.forward(None, gradient)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose mean and variance in training are those of the whole batch (Ioffe and Szegedy 2015, algorithm 1).

    Every process has to call it, with no images if it has none: it waits for the others, forward and backward.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return super().forward(inputs)
        x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))  # sums in bf16 or fp16 would not do
        count = x.new_tensor([x.numel() / self.num_features])
        sums = AddUp.apply(torch.cat([x.sum((0, 2, 3)), count]))
        total = sums[-1].detach().clamp_min(1)
        mean = sums[:-1] / total
        centred = x - mean[:, None, None]
        variance = AddUp.apply(centred.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            # None for a part of a batch that is empty everywhere.
            weight = self.momentum * (sums[-1] > 0).to(self.running_mean.dtype)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            unbiased = variance * (total / (total - 1).clamp_min(1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(inputs.dtype)


def synchronise(model: nn.Module, wanted: bool = True) -> None:
    """Have all batch norm of a model, in place, look at the images of all processes, or again at this one's alone."""
    before, after = (nn.BatchNorm2d, SyncBatchNorm2d) if wanted else (SyncBatchNorm2d, nn.BatchNorm2d)
    for module in model.modules():
        if type(module) is before:
            module.__class__ = after  # parameters, which an optimizer holds, stay what and where they are
