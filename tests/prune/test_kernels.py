"""Layers that skip zeros compute what dense ones do."""

import pytest
import torch
from torch import nn

from models import build_model
from prune import Pruner
from prune.compact import compact
from prune.kernels import GatheredLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
def test_a_gathered_layer_computes_what_the_dense_one_does(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(12, 7, bias)
    alive = torch.rand(7, 12) < 0.3
    alive[0] = alive[-1] = False  # outputs that nothing leads to
    alive[3] = True
    with torch.no_grad():
        layer.weight.mul_(alive)
        layer.weight[3, 3] = 0  # alive, and zero by chance
    x = torch.randn(shape)
    torch.testing.assert_close(GatheredLinear(layer, alive.float())(x), layer(x))


def test_a_gathered_layer_holds_only_living_weights():
    layer, alive = nn.Linear(100, 100), torch.zeros(100, 100)
    alive[:, ::10] = 1
    with torch.no_grad():
        layer.weight.mul_(alive)
    tensors = GatheredLinear(layer, alive).state_dict()
    assert tensors["values"].numel() == tensors["inputs"].numel() == 1000


def test_compact_for_images_replaces_layers_only_where_that_is_faster():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 4))
    pruner = Pruner(model, "random", layer_sparsity={"0": 0.995, "2": 0.01})  # 200 times fewer products, and no fewer
    pruner.choose_masks()
    images = torch.randn(64, 2048)
    small = compact(model, pruner.masks, images)
    assert isinstance(small[0], GatheredLinear)
    assert isinstance(model[0], nn.Linear)
    assert not small.training
    torch.testing.assert_close(small(images), model.eval()(images))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(small(images).float(), model(images).float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("pattern", ["unstructured", "fan-in", "channel", "2:4"])
def test_compact_for_images_computes_the_same_network_whatever_the_pattern(pattern):
    torch.manual_seed(0)
    model = build_model("vit", 2, 10, 1 / 3).eval()
    budget = {"2:4": {}, "channel": {"sparsity": 0.4}}.get(pattern, {"sparsity": 0.95, "distribution": "uniform"})
    pruner = Pruner(model, "magnitude", pattern=pattern, **budget)
    pruner.choose_masks()
    images = torch.randn(4, 3, 16, 16)
    small = compact(model, pruner.masks, images)
    torch.testing.assert_close(small(images), model(images), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(small(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_network_that_reads_its_layers_weights_keeps_its_layers():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(
        256, 4, 4096, dropout=0.0, batch_first=True
    ).eval()  # in one kernel, at inference
    pruner = Pruner(model, "random", layer_sparsity={"linear1": 0.995, "linear2": 0.995})
    pruner.choose_masks()
    tokens = torch.randn(4, 16, 256)
    small = compact(model, pruner.masks, tokens)
    assert type(small.linear1) is nn.Linear
    with torch.inference_mode():
        torch.testing.assert_close(small(tokens), model(tokens))


def test_a_network_that_is_one_linear_layer_stays_one():
    torch.manual_seed(0)
    model = nn.Linear(2048, 2048)
    pruner = Pruner(model, "random", 0.995)  # where another form would be faster
    pruner.choose_masks()
    x = torch.randn(1, 2048)
    torch.testing.assert_close(compact(model, pruner.masks, x)(x), model(x))
