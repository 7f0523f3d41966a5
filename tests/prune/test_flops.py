"""FLOPs against published figures and the arithmetic of convolutions."""

import pytest
import torch
import torchvision
from torch import nn

from prune import Pruner
from prune.flops import FlopsMeter, count_flops, summary_table
from prune.masks import prunable_weights


def densities(model, sparsity):
    mask = Pruner(model, "random", sparsity, "erk")
    return {
        layer: count / mask.masks.weights[layer].numel() for (layer,), count in mask.budget.counts(sparsity).items()
    }


def test_erk_on_resnet50_has_the_published_flops():
    """Evci et al. 2020, table in figure 2: 0.42 of the dense network's at 80% and 0.24 at 90% sparsity."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    flops = count_flops(model, (3, 224, 224))
    dense = flops.inference(dict.fromkeys(flops.forward, 1.0))
    assert dense / 2 == pytest.approx(4.09e9, rel=2e-3)  # multiply-adds, as torchvision gives them
    for sparsity, published in ((0.8, 0.42), (0.9, 0.24)):
        assert flops.inference(densities(model, sparsity)) / dense == pytest.approx(published, abs=0.01)


def test_flops_of_a_small_network_are_those_counted_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(36, 10),
    )
    flops = count_flops(model, (3, 8, 8))
    expected = {"0": 2 * 64 * 8 * 27, "3": 2 * 9 * 4 * 72, "5": 2 * 360}
    assert flops.forward == expected
    assert flops.training == {"0": 2 * expected["0"], "3": 3 * expected["3"], "5": 3 * expected["5"]}
    assert flops.other_forward == 0
    assert flops.dense_training == sum(flops.training.values())
    half = {"0": 1.0, "3": 0.5, "5": 0.5}
    assert flops.inference(half) == expected["0"] + (expected["3"] + expected["5"]) / 2
    assert flops.train(half) == 2 * expected["0"] + 1.5 * (expected["3"] + expected["5"])
    assert flops.train(half, dense_gradients=True) == 2 * expected["0"] + 2 * (expected["3"] + expected["5"])


def test_a_layer_that_sees_images_normalised_by_buffers_has_no_input_gradient():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.rand(3, 1, 1))
            self.register_buffer("deviation", torch.rand(3, 1, 1))
            self.register_buffer("shift", torch.rand(4))
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = self.first((x - self.mean) * (1 / self.deviation))
            return nn.functional.conv2d(x, self.second.weight, self.shift)

    flops = count_flops(Normalised(), (3, 8, 8))
    assert flops.forward == {"first": 2 * 36 * 4 * 27, "second": 2 * 16 * 4 * 36}
    assert flops.training == {"first": 2 * flops.forward["first"], "second": 3 * flops.forward["second"]}


def test_frozen_layers_have_no_weight_gradient_and_after_frozen_ones_alone_no_input_gradient():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), *(nn.Conv2d(4, 4, 1) for _ in range(3)))
    for frozen in (model[0], model[1], model[4]):
        frozen.requires_grad_(False)
    flops = count_flops(model, (3, 2, 2))
    assert flops.forward == {"0": 96} | dict.fromkeys("345", 128)
    assert flops.training == {"0": 96, "3": 2 * 128, "4": 2 * 128, "5": 3 * 128}


def test_a_layer_whose_weight_another_shares_is_charged_for_both():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), first, second)
    assert count_flops(model, (3, 2, 2)).forward == {"1": 2 * 72, "2": 2 * 2 * 36}


def test_flops_of_depthwise_convolutions_and_attention_are_those_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    flops = count_flops(model, (3, 4, 4))
    assert flops.forward == {"0": 2 * 16 * 8 * 3, "1": 2 * 16 * 8 * 9}
    assert flops.dense_training == 2 * flops.forward["0"] + 3 * flops.forward["1"]

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, x):  # [batch, 5 tokens, 4 channels]
            q = self.project(x)[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q)

    flops = count_flops(Attention(), (5, 4))
    assert flops.other_forward == 2 * (2 * 5 * 5 * 4)
    assert flops.dense_training == 2 * flops.forward["project"] + 3 * flops.other_forward


def test_operations_belong_to_the_layer_whose_weight_they_read():
    """Attention by torch's own module, and a layer whose weight is used without a call of it."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 3)

        def forward(self, x):  # [batch, 5 tokens, 8 channels]
            x, _ = self.attention(x, x, x, need_weights=False)
            return nn.functional.linear(x, self.last.weight, self.last.bias)

    flops = count_flops(Network(), (5, 8))
    layers = {"attention.in_proj": 2 * 5 * 8 * 24, "attention.out_proj": 2 * 5 * 8 * 8, "last": 2 * 5 * 8 * 3}
    assert flops.forward == layers
    assert flops.training == {name: (2 if name == "attention.in_proj" else 3) * n for name, n in layers.items()}
    assert flops.other_forward == 2 * (2 * 5 * 5 * 8)


def test_transformers_of_torchvision_are_counted_layer_by_layer():
    """To the multiply-adds that torchvision gives, attention included."""
    for build, published in ((torchvision.models.vit_b_16, 17.56e9), (torchvision.models.swin_t, 4.49e9)):
        with torch.device("meta"):
            model = build()
        flops = count_flops(model, (3, 224, 224))
        assert flops.forward.keys() == prunable_weights(model).keys()
        assert flops.inference(dict.fromkeys(flops.forward, 1.0)) / 2 == pytest.approx(published, rel=0.01)


def test_a_meter_follows_the_masks_and_the_passes():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    mask = Pruner(model, "gmp", 0.5, "uniform", total_steps=4, update_interval=1, stop_update=1.0)
    mask.choose_masks()
    meter = FlopsMeter(count_flops(model, (10,)), mask.masks, passes=2)
    dense = 200 * (2 + 3)
    for step, alive in enumerate((1.0, 1 - 0.5 * (1 - 0.75**3), 1 - 0.5 * (1 - 0.5**3), 1 - 0.5 * (1 - 0.25**3))):
        share = round(200 * alive) / 200
        meter.step(7, dense_gradients=False)
        assert meter.read() == pytest.approx(7 * 2 * dense * share, rel=0.02)
        mask.update_masks(step)
    meter.step(1, False)
    meter.step(1, False)
    assert meter.read() == pytest.approx(2 * 2 * dense * 0.5)
    assert meter.read() == 0
    meter.step(1, False)
    meter.step(1, False, perturbs=False)
    state = meter.state_dict()
    assert meter.read() == pytest.approx(3 * dense * 0.5)
    meter.load_state_dict(state)
    assert meter.read() == pytest.approx(3 * dense * 0.5)
    older = {"counted": [(alive, 2, 0) for alive, _, _ in state["counted"]], "current": True}  # two images, not passes
    meter.load_state_dict(older)
    assert meter.read() == pytest.approx(4 * dense * 0.5)


def test_the_summary_adds_up_its_layers():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    mask = Pruner(model, "random", 0.5, "uniform")
    mask.choose_masks()
    lines = summary_table(count_flops(model, (10,)), mask.masks).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "1", "all"]
    assert lines[1].split()[1:4] == ["10x10", "100", "0.5000"]
    assert lines[3].split()[1:3] == ["200", "0.5000"]
