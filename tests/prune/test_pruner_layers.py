"""Which layers a Pruner takes: those that compute their weights, are frozen, or have their outputs elsewhere are told or refused."""

import copy
import threading

import pytest
import torch
from torch import nn

from prune import Pruner


def test_weights_that_are_computed_from_others_are_named():
    torch.manual_seed(0)
    layers = [nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 5)]
    weight_norm = nn.utils.parametrizations.weight_norm
    model, said = nn.Sequential(weight_norm(layers[0]), nn.ReLU(), layers[1], weight_norm(layers[2])), []
    pruner = Pruner(model, "random", 0.9, warn=said.append)
    assert list(pruner.masks.weights) == ["2"]
    assert said == ["the weights of 0, 3 are computed from others: they stay dense, and are not counted"]


def test_looking_for_weights_takes_no_step_of_spectral_norm():
    torch.manual_seed(0)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(20, 20))
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    before = copy.deepcopy(dict(model.named_buffers()))
    assert before
    for pattern in ("unstructured", "channel"):
        pruner = Pruner(model, "random", 0.1, pattern=pattern, warn=lambda sentence: None)
        pruner.choose_masks()
        assert list(pruner.masks.weights) == ["2", "4"]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x))


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight), self.bias)


class Other(nn.Conv2d):
    """Takes other inputs, gives other outputs, and cannot be copied once it holds a lock."""

    def forward(self, pair):
        x, mask = pair
        return super().forward(x), mask


def test_layers_that_try_the_probe_are_neither_named_nor_changed_nor_in_the_way():
    torch.manual_seed(0)
    model, said = nn.Sequential(Noisy(4, 4), Cosine(4, 4), Other(3, 4, 3), Other(3, 4, 3), Standardised(1, 4, 3)), []
    model[3].lock = threading.Lock()
    state = torch.get_rng_state()
    Pruner(model, "random", 0.5, warn=said.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert [sentence.split(" compute with")[0] for sentence in said] == ["4"]
    said.clear()
    Pruner(model, "random", 0.1, dense_layers=["4"], warn=said.append)
    Pruner(model, "random", layer_sparsity={"0": 0.5}, warn=said.append)
    assert said == []


def test_layers_that_compute_with_other_weights_than_those_that_masks_hold_are_named():
    state, said = torch.get_rng_state(), []
    model = nn.Sequential(
        Standardised(3, 8, 3), Standardised(8, 8, 3, groups=2), Padded(8, 4, 3), nn.Flatten(), Scaled(9, 2)
    )
    torch.set_rng_state(state)
    model.to(memory_format=torch.channels_last)
    pruner = Pruner(model, "random", 0.5, warn=said.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert [sentence.split(" compute with")[0] for sentence in said] == ["0, 1"]
    assert list(pruner.masks.weights) == ["0", "1", "2", "4"]


@pytest.mark.parametrize("method", ["set", "rigl", "mest", "dsr", "snfs", "granet"])
def test_moving_masks_refuse_frozen_layers_unless_they_are_dense(method):
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="the weights of 0 are frozen"):
        Pruner(model, method, 0.3, total_steps=20, steps_per_epoch=4)
    Pruner(model, method, 0.1, dense_layers=["0"], total_steps=20, steps_per_epoch=4)
    if method not in ("dsr", "snfs"):
        Pruner(model, method, layer_sparsity={"2": 0.5}, total_steps=20, steps_per_epoch=4)
    Pruner(model, "random", 0.5)
    Pruner(model, "gmp", 0.5, total_steps=20)


@pytest.mark.parametrize("pattern", ["fan-in", "2:4", "4x1"])
def test_patterns_along_inputs_or_outputs_refuse_transposed_convolutions_unless_they_are_dense(pattern):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    sparsity = None if pattern == "2:4" else 0.5
    with pytest.raises(ValueError, match="1 are transposed convolutions"):
        Pruner(model, "magnitude", sparsity, pattern=pattern)
    Pruner(model, "magnitude", sparsity, pattern=pattern, dense_layers=["1"]).choose_masks()
    if pattern != "2:4":
        Pruner(model, "magnitude", layer_sparsity={"0": 0.5}, pattern=pattern).choose_masks()
        Pruner(model, "none", pattern=pattern)
    with pytest.raises(ValueError, match="unknown pattern 'circle'"):
        Pruner(model, "magnitude", 0.5, pattern="circle")
    for other in ("unstructured", "kernel"):
        Pruner(model, "magnitude", 0.5, pattern=other).choose_masks()
