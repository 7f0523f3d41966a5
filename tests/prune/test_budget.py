"""What works where a sparsity leaves a layer empty."""

import re

import pytest
import torch
from torch import nn

from prune import EmptyLayerError, Pruner


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.mul_(0.05)  # the last that a global ranking by size keeps
    return model


def masks(**options):
    pruner = Pruner(network(), **options)
    pruner.choose_masks()
    return pruner


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magnitude", "distribution": "global"},
        {"method": "magnitude", "distribution": "global", "dense_layers": ["0"]},
        {"method": "magnitude", "distribution": "global", "pattern": "kernel"},
        {"method": "random", "distribution": "uniform"},
    ],
)
def test_the_sparsity_that_the_error_names_is_the_highest_that_works(options):
    sparsity = 0.999 if options["method"] == "random" else 0.8
    with pytest.raises(EmptyLayerError, match="take sparsity=.*, the highest that works here") as error:
        masks(sparsity=sparsity, **options)
    highest = float(re.search(r"take sparsity=([\d.]+)", str(error.value))[1])
    assert 0 < highest < sparsity
    assert min(masks(sparsity=highest, **options).masks.alive().values()) > 0
    units = 9 if "pattern" in options else 1
    with pytest.raises(EmptyLayerError):
        masks(sparsity=highest + 1e-4 + units / 3376, **options)


def test_erk_is_named_where_the_method_has_it_and_it_works():
    options = {"method": "magnitude", "sparsity": 0.8}
    with pytest.raises(EmptyLayerError, match=", or distribution=erk"):
        masks(distribution="global", **options)
    assert min(masks(distribution="erk", **options).masks.alive().values()) > 0
    with pytest.raises(EmptyLayerError) as error:
        masks(method="random", sparsity=0.999)
    assert "distribution=erk" not in str(error.value)


def test_without_the_scores_no_sparsity_is_made_up():
    pruner = Pruner(network(), "lth", 0.8, "global", total_steps=10, lth_rounds=1)
    pruner.choose_masks()
    with pytest.raises(EmptyLayerError, match="lower the sparsity, or distribution=erk"):
        pruner.next_round(10)


def test_a_layer_that_a_file_empties_is_named_with_the_file():
    with pytest.raises(EmptyLayerError, match="layer '0' without a weight: give it a lower one"):
        Pruner(network(), "magnitude", layer_sparsity={"0": 0.9999})
