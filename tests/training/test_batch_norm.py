"""Recalibrated statistics against numpy, and synchronised batch norm against torch's own on all images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from processes import forks
from torch import nn

from training.batch_norm import recalibrated, refuse_other_batch_norm, synchronise
from utils.distributed import ProcessGroup

SIZES = (7, 1, 0)  # images of a batch


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_batch_norm_that_cannot_be_synchronised_is_refused(options):
    refuse_other_batch_norm(nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match="--sync-bn needs batch norm with a scale"):
        refuse_other_batch_norm(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, **options)))


class Pair(ProcessGroup):
    """One of two processes: what the other one adds comes from a list."""

    def add(self, sums):
        return sums.add_(self.others.pop(0))


@pytest.mark.parametrize("sizes", [(3, 9), (0, 4)])
def test_recalibrated_statistics_of_several_processes_are_weighted_by_their_images(sizes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)).double()
    own, other = ([torch.randn(size, 4, 2, 2, dtype=torch.float64)] for size in sizes)
    theirs = recalibrated(model, other)
    group, share = Pair(world=2), sizes[1] / sum(sizes)
    statistics = [getattr(layer, name) for layer in theirs for name in ("running_mean", "running_var")]
    object.__setattr__(group, "others", [sizes[1], *(share * values for values in statistics)])
    found = recalibrated(model, own, group=group)
    alone = recalibrated(model, own) if sizes[0] else model
    for layer, ours, them in zip(found, alone, theirs, strict=True):
        for name in ("running_mean", "running_var"):
            expected = (1 - share) * getattr(ours, name) + share * getattr(them, name)
            torch.testing.assert_close(getattr(layer, name), expected)
    assert group.others == []


def test_a_layer_that_is_used_twice_has_the_mean_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1).double()

        def forward(self, inputs):
            return self.norm(3 * self.norm(input=inputs) + 5)

    model, means, count = Twice(), 0.0, 0
    batches = [torch.randn(size, 1, 2, 2, dtype=torch.float64) + size for size in (4, 8, 2)]
    for batch in batches:
        means += len(batch) * (batch.mean() + 5)  # of the batch, and of what it becomes
        count += 2 * len(batch)
    anew = recalibrated(model, batches)
    torch.testing.assert_close(anew.norm.running_mean, (means / count).view(1))
    assert not anew.norm._forward_pre_hooks


def test_recalibrated_statistics_are_weighted_means_of_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    for layer in (model[1], model[4]):
        layer.num_batches_tracked = None
        layer.running_mean.fill_(7.0)  # what was there does not count
    model.double().train()
    batches = [torch.randn(size, 3, 5, 5, dtype=torch.float64) for size in (8, 8, 3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = recalibrated(model, batches)
    assert model.training
    assert not after.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def conv(layer, images):
        weight, bias = layer.weight.detach().numpy()[:, :, 0, 0], layer.bias.detach().numpy()
        return np.einsum("oc,nchw->nohw", weight, images) + bias[:, None, None]

    first, second = [], []
    for batch in batches:
        hidden = conv(model[0], batch.numpy())
        mean, variance = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3))
        first.append((len(batch), mean, hidden.var((0, 2, 3), ddof=1)))
        hidden = np.maximum((hidden - mean[:, None, None]) / np.sqrt(variance[:, None, None] + 1e-5), 0)
        hidden = conv(model[3], hidden)
        second.append((len(batch), hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), ddof=1)))
    for layer, parts in ((after[1], first), (after[4], second)):
        sizes = np.array([size for size, *_ in parts]) / sum(size for size, *_ in parts)
        np.testing.assert_allclose(layer.running_mean, sizes @ np.stack([m for _, m, _ in parts]), rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, sizes @ np.stack([v for _, _, v in parts]), rtol=1e-12)


def layer_and_batch(size: int) -> tuple[nn.BatchNorm2d, torch.Tensor, torch.Tensor]:
    """Return a layer, a batch of images in float64, and the slope of a loss in the layer's output."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3).double()
    layer.num_batches_tracked = None
    nn.init.normal_(layer.weight)
    images, slope = torch.randn(2, size, 3, 2, 2, dtype=torch.float64)
    return layer, images.requires_grad_(), slope


def normalise_shares(rank: int, directory: Path) -> None:
    """Save, in one of two processes, output, gradients and statistics of its shares of batches by their size."""
    torch.distributed.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=2)
    group, results = ProcessGroup(rank, 2), {}
    for size in SIZES:
        layer, images, slope = layer_and_batch(size)
        synchronise(layer)
        share = group.share(images.detach()).requires_grad_()
        out = layer(share)
        (out * group.share(slope)).sum().backward()
        sums = [group.add(parameter.grad) for parameter in layer.parameters()]
        results[size] = [out.detach(), share.grad, *sums, layer.running_mean, layer.running_var]
    torch.save(results, directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@forks
def test_synchronised_batch_norm_is_batch_norm_of_the_whole_batch(tmp_path):
    torch.multiprocessing.start_processes(normalise_shares, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for size in SIZES:
        layer, images, slope = layer_and_batch(size)
        if size:
            out = layer(images)
            (out * slope).sum().backward()
            expected = [out.detach(), images.grad, *(parameter.grad for parameter in layer.parameters())]
        else:
            expected = [images, images, torch.zeros(3), torch.zeros(3)]
        expected += [layer.running_mean, layer.running_var]
        for number, tensor in enumerate(expected):
            found = torch.cat([first[size][number], second[size][number]]) if number < 2 else first[size][number]
            torch.testing.assert_close(found, tensor.detach().double(), rtol=1e-9, atol=1e-12)
            assert number < 2 or torch.equal(first[size][number], second[size][number])
