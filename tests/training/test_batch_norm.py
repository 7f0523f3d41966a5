"""Recalibrated statistics against numpy."""

import numpy as np
import torch
from torch import nn

from training.batch_norm import recalibrated


def test_statistics_are_the_weighted_means_of_the_batches_and_the_model_stays():
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
