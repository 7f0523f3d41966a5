"""The smaller network computes what the masked one does, and trains as it does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from prune import Pruner
from prune.compact import compact, compacted_size, expand
from prune.flops import count_flops
from sam import SAM

FAMILIES = {
    "resnet": ("resnet", 20, 1, 0.7),
    "bottleneck": ("resnet", 50, 0.25, 0.7),
    "wideresnet": ("wideresnet", 16, 1, 0.7),
    "vgg": ("vgg", 16, 0.25, 0.7),
    "mobilenet": ("mobilenet", 28, 0.25, 0.7),
    "vit": ("vit", 2, 1 / 3, 0.4),
}


def masked(family, method="random", distribution="uniform"):
    """Return a network in float64 whose batch norm has seen images, and its pruner."""
    arch, depth, width, sparsity = FAMILIES[family]
    torch.manual_seed(0)
    model = build_model(arch, depth, 10, width).double().to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    model(images())
    pruner = Pruner(model, method, sparsity, distribution, pattern="channel")
    pruner.choose_masks()
    return model, pruner


def images(seed=0):
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_small_network_computes_the_same_and_so_do_its_statistics(family):
    model, pruner = masked(family)
    small = compact(model, pruner.masks)
    for network in (model, small):
        network.train()
    for seed in range(3):
        torch.testing.assert_close(small(images(seed)), model(images(seed)), rtol=1e-10, atol=1e-12)
    for network in (model, small):
        network.eval()
    torch.testing.assert_close(small(images(7)), model(images(7)), rtol=1e-10, atol=1e-12)
    assert sum(p.numel() for p in small.parameters()) < (0.65 if family == "vit" else 0.35) * sum(
        p.numel() for p in model.parameters()
    )
    assert not any((p == 0).all() for name, p in small.named_parameters() if not name.endswith("bias"))
    again = build_model(*FAMILIES[family][:2], 10, FAMILIES[family][2]).double()
    other = Pruner(again)
    other.masks.load_state_dict(pruner.masks.state_dict())
    expand(small.state_dict(), again, other.masks)
    torch.testing.assert_close(again.eval()(images(7)), model(images(7)), rtol=1e-10, atol=1e-12)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.001),
    "two-step SAM": lambda p: SAM(p, torch.optim.SGD, rho=0.1, v2=False, lr=0.1, momentum=0.9),
    "one-step SAM": lambda p: SAM(p, torch.optim.SGD, rho=0.1, v2=True, lr=0.1, momentum=0.9),
    "adaptive SAM": lambda p: SAM(p, torch.optim.SGD, rho=0.5, v2=False, adaptive=True, lr=0.1, momentum=0.9),
}


def trained(model, pruner, make, steps=5):
    """Return the losses and gradient norms of a few steps; pruner None for a network without masks."""
    optimizer, labels, seen = make(model.parameters()), torch.arange(6) % 10, []

    def backward(step):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images(step)), labels)
        loss.backward()
        if pruner:
            pruner.mask_gradients(step)
        return loss

    model.train()
    for step in range(steps):
        if isinstance(optimizer, SAM):
            if not optimizer.v2:
                backward(step)
            optimizer.first_step(zero_grad=True)
        loss = backward(step)
        seen += [loss.item(), nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()]
        optimizer.step()
        if pruner:
            pruner.mask_weights()
    return seen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_small_network_trains_like_the_masked_one(optimizer):
    model, pruner = masked("resnet")
    small = compact(model, pruner.masks)
    ours = trained(small, None, OPTIMIZERS[optimizer])
    assert ours == pytest.approx(trained(model, pruner, OPTIMIZERS[optimizer]), rel=1e-9)
    model.eval()
    torch.testing.assert_close(small.eval()(images(9)), model(images(9)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", ["mobilenet", "vit", "wideresnet"])
def test_every_kind_of_layer_trains_like_the_masked_one(family):
    model, pruner = masked(family)
    ours = trained(compact(model, pruner.masks), None, OPTIMIZERS["sgd"], steps=3)
    assert ours == pytest.approx(trained(model, pruner, OPTIMIZERS["sgd"], steps=3), rel=1e-9)


def test_the_whole_network_has_the_weights_that_the_small_one_was_trained_to():
    model, pruner = masked("wideresnet")
    small = pruner.compact()
    untouched = copy.deepcopy(model.state_dict())
    trained(small, None, OPTIMIZERS["sgd"], steps=2)
    pruner.mask_weights()
    assert all(torch.equal(untouched[name], tensor) for name, tensor in model.state_dict().items())
    whole = pruner.whole(small.eval())
    assert whole is model
    assert not whole.training
    torch.testing.assert_close(whole(images(9)), small(images(9)))
    alive = sum(p.numel() for name, p in small.named_parameters())
    assert alive - 10 <= sum(int(p.count_nonzero()) for p in whole.parameters()) <= alive


@pytest.mark.parametrize("method", ["gmp", "rigl", "lth"])
def test_masks_that_change_are_not_compacted(method):
    pruner = Pruner(build_model("resnet", 8, 10), method, 0.5, pattern="channel", total_steps=200)
    with pytest.raises(ValueError, match="what was taken out cannot come back"):
        pruner.compact()
    assert pruner.whole(pruner.model) is pruner.model


def test_a_network_whose_other_weights_would_come_alive_is_not_trained_compacted():
    pruner = Pruner(build_model("resnet", 8, 10), "random", 0.9)
    pruner.choose_masks()
    with pytest.raises(ValueError, match="leave no channel dead"):
        pruner.compact()
    _, pruner = masked("resnet")
    mask = pruner.masks.masks["stem.0"]
    mask[mask.nonzero()[0].tolist()] = 0
    with pytest.raises(ValueError, match="other weights, which would come alive"):
        pruner.compact()


def test_other_zeros_stay_where_they_are():
    model = build_model("resnet", 8, 10)
    pruner = Pruner(model, "random", 0.9)
    pruner.choose_masks()
    small = compact(model, pruner.masks)
    for (name, p), q in zip(model.named_parameters(), small.named_parameters(), strict=True):
        assert name == q[0]
        assert torch.equal(p, q[1])
        assert p is not q[1]


def test_a_group_without_a_living_channel_keeps_one_that_is_zero():
    model, pruner = masked("resnet")
    group = pruner.pattern.groups["stage2.1.conv1"]
    alive = {name: torch.ones(g.size, dtype=torch.bool) for name, g in pruner.pattern.groups.items()}
    alive[group.name][:] = False
    pruner.masks.set(pruner.pattern.spread(alive))
    small = compact(model, pruner.masks)
    assert small.get_submodule("stage2.1.conv1").weight.shape[0] == 1
    for training in (True, False):
        torch.testing.assert_close(small.train(training)(images()), model.train(training)(images()))


def test_flattened_maps_lose_all_pixels_of_a_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(7), nn.Flatten(), nn.Linear(8 * 4, 5)).double()
    pruner = Pruner(model, "random", 0.5, pattern="channel")
    pruner.choose_masks()
    small = compact(model, pruner.masks)
    assert small[4].in_features == 4 * small[0].out_channels == 16
    torch.testing.assert_close(small(images()), model(images()))


def test_a_network_whose_channels_cannot_be_followed_is_copied_whole():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.first(x)
            return self.second(x if x.sum() > 0 else -x)

    model = Asks()
    pruner = Pruner(model, "random", 0.5)
    pruner.choose_masks()
    x = torch.randn(5, 4)
    assert torch.equal(compact(model, pruner.masks)(x), model(x))


@pytest.mark.parametrize("family", ["resnet", "mobilenet"])
def test_sizes_are_those_of_both_sides_of_every_layer(family):
    model, pruner = masked(family)
    model.float()
    size = compacted_size(model, pruner.masks, (3, 32, 32), count_flops(model, (3, 32, 32)))
    small = compact(model, pruner.masks)
    assert size["parameters_compacted"] == sum(p.numel() for p in small.parameters())
    fresh = 10  # biases of the classifier, which are zero
    assert size["parameters_compacted"] == sum(int(p.count_nonzero()) for p in model.parameters()) + fresh
    flops = count_flops(model, (3, 32, 32))
    assert size["flops_compacted"] == pytest.approx(flops.inference(pruner.masks.density()), rel=1e-9)
    modules = dict(small.named_modules())
    if family == "mobilenet":  # at 16x16 pixels, after the first stride
        depthwise = modules["blocks.1.depthwise.0"]
        assert depthwise.groups == depthwise.in_channels == depthwise.out_channels < 16
        assert count_flops(small, (3, 32, 32)).forward["blocks.1.depthwise.0"] == 2 * 9 * 16**2 * depthwise.groups


def test_a_sparse_network_without_a_dead_channel_has_the_size_of_the_whole():
    model = build_model("resnet", 8, 10, 0.5)
    pruner = Pruner(model, "random", 0.5)
    pruner.choose_masks()
    flops, whole = count_flops(model, (3, 32, 32)), sum(p.numel() for p in model.parameters())
    size = compacted_size(model, pruner.masks, (3, 32, 32), flops)
    assert size == {"parameters_compacted": whole, "flops_compacted": sum(flops.forward.values())}
    small = compact(model, pruner.masks)
    assert (sum(p.numel() for p in small.parameters()), count_flops(small, (3, 32, 32))) == (whole, flops)


def test_weights_keep_their_memory_layout_and_copies_share_nothing():
    model, pruner = masked("vgg")
    before = copy.deepcopy(model.state_dict())
    small = compact(model, pruner.masks)
    assert small.get_submodule("stage1.0.0").weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for p in small.parameters():
            p.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_expanding_keeps_buffers_that_have_no_channels():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    model.register_buffer("seen", torch.tensor([False, True, True]))
    pruner = Pruner(model, "random", 0.5, pattern="channel")
    pruner.choose_masks()
    state = compact(model, pruner.masks).state_dict()
    model.seen.zero_()
    expand(state, model, pruner.masks)
    assert model.seen.tolist() == [False, True, True]
