"""Masks that move during training, against references written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_network import build, kept, layers, sample, train
from torch import nn

from prune import Pruner

MOVING = ["set", "rigl", "mest"]


@pytest.mark.parametrize("method", ["rigl", "set", "mest"])
def test_moving_units_drop_the_smallest_l2_norm(method):
    model = nn.Sequential(nn.Linear(4, 10, bias=False))
    pruner = Pruner(model, method, 0.5, pattern="1x4", total_steps=30, update_interval=2, drop_fraction=0.5)
    pruner.choose_masks()
    alive = pruner.masks.masks["0"].amax(1).nonzero().flatten()
    with torch.no_grad():
        model[0].weight[alive] = torch.tensor([1.2, 0.0, 0.0, 0.0])
        model[0].weight[alive[:2]] = 0.5
    model[0].weight.grad = 1 - pruner.masks.masks["0"]  # dead ones come before those that were just dropped
    pruner.mask_gradients(1)
    pruner.update_masks(1)
    assert not {*alive[:2].tolist()} & {*model[0].weight.abs().amax(1).nonzero().flatten().tolist()}
    assert (model[0].weight[alive[2:], 0] == 1.2).all()


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_moving_masks_keep_their_budget_start_at_zero_and_clear_memory(method, optimizer):
    model, mask, optimizer = build(method, 0.7, steps=40, optimizer=optimizer, interval=4)
    budget = mask.masks.alive()
    seen = {n: m.bool() for n, m in mask.masks.masks.items()}
    ever = {n: m.bool() for n, m in mask.masks.masks.items()}
    moved = []

    def look(step):
        assert mask.masks.alive() == budget
        for name, w in layers(model).items():
            alive = mask.masks.masks[name].bool()
            assert (w[~alive] == 0).all()
            born, died = alive & ~seen[name], seen[name] & ~alive
            if (step + 1) % 4 or step + 1 > 30:
                assert not born.any()
                assert not died.any()
            assert (w[born] == 0).all()
            for holder in mask.optimizers:
                for tensor in holder.state[w].values():
                    assert (tensor[born | died] == 0).all()
                    assert (tensor[alive & ~born] != 0).any()
            seen[name] = alive
            ever[name] |= alive
            moved.append((step, int(born.sum())))

    train(model, mask, optimizer, 40, on_step=look)
    assert sum(count for _, count in moved) > 0
    total = sum(m.numel() for m in ever.values())
    assert mask.ever_alive_fraction() == pytest.approx(sum(int(m.sum()) for m in ever.values()) / total)
    assert mask.ever_alive_fraction() > 0.3 + 0.01


def test_rigl_drops_the_smallest_and_grows_by_the_dense_gradient():
    model, mask, optimizer = build("rigl", 0.7, steps=40, optimizer="sgd", interval=4)
    train(model, mask, optimizer, 3)
    before = {n: m.bool() for n, m in mask.masks.masks.items()}
    inputs, labels = sample(8)
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    gradients = {n: w.grad.clone() for n, w in layers(model).items()}
    mask.mask_gradients(3)
    optimizer.step()
    moved_weights = {n: w.detach().clone() for n, w in layers(model).items()}
    mask.update_masks(3)
    fraction = 0.3 * 0.5 * (1 + math.cos(math.pi * 4 / 30))  # the last change comes at three quarters of 40 steps
    for name, w in moved_weights.items():
        count = int(before[name].sum())
        k = int(fraction * count)
        order = w.abs().masked_fill(~before[name], -1).flatten().argsort(descending=True, stable=True)
        expected = torch.zeros(w.numel(), dtype=torch.bool)
        expected[order[: count - k]] = True
        grow = gradients[name].abs().flatten().masked_fill(expected, -1).argsort(descending=True, stable=True)
        expected[grow[:k]] = True
        assert torch.equal(mask.masks.masks[name].bool().flatten(), expected), name


def test_mest_weighs_the_gradient_and_soft_mest_is_denser_until_the_last_change():
    kept_by = {}
    for weight in (0.0, 100.0):
        model, mask, optimizer = build("mest", 0.7, steps=40, mest_lambda=weight, optimizer="sgd")
        train(model, mask, optimizer, 3)
        kept_by[weight] = kept(mask)
    assert not torch.equal(kept_by[0.0], kept_by[100.0])

    model, mask, optimizer = build("mest", 0.7, steps=40, interval=5, mest_soft=True)
    target = sum(mask.masks.alive().values())
    counts = []
    train(model, mask, optimizer, 40, on_step=lambda step: counts.append(sum(mask.masks.alive().values())))
    targets = mask.state_dict()["targets"]
    room = {name: w.numel() - targets[name] for name, w in layers(model).items()}
    grown = lambda fraction: sum(min(int(fraction * n), room[name]) for name, n in targets.items())  # noqa: E731
    assert counts[3] == target
    assert counts[4] == target + grown(0.5)  # at a sixth of the way
    assert counts[19] == target + grown(0.5)
    assert counts[24] == target + grown(0.25)  # from three quarters on
    assert counts[29:] == [target] * 11  # the last change, at three quarters of training
    assert targets == mask.masks.alive()


@pytest.mark.parametrize("method", ["rigl", "set", "mest", "granet"])
def test_a_constant_fan_in_is_kept_while_weights_move(method):
    model, mask, optimizer = build(method, 0.75, steps=40, optimizer="sgd", interval=4, pattern="fan-in")
    before, moved = kept(mask), 0
    for step in range(40):
        train(model, mask, optimizer, step + 1, step)
        for layer in mask.masks.masks.values():
            (count,) = set(layer.flatten(1).sum(1).tolist())
            assert count >= 1
        moved += int((kept(mask) & ~before).sum())
        before = kept(mask)
    assert moved > 10


def test_rigl_at_constant_fan_in_drops_by_layer_and_fills_each_output_by_gradient():
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    pruner = Pruner(model, "rigl", 0.5, pattern="fan-in", total_steps=30, update_interval=2, drop_fraction=0.5)
    pruner.choose_masks()
    alive = pruner.masks.masks["0"].bool()
    with torch.no_grad():  # the first output has the smallest weights of the layer
        model[0].weight.copy_(alive * torch.tensor([0.1, 1.0, 1.1, 1.2])[:, None])
    model[0].weight.grad = torch.arange(24.0).view(4, 6)
    pruner.mask_gradients(1)
    pruner.update_masks(1)
    after = pruner.masks.masks["0"].bool()
    moved = int(0.5 * 0.5 * (1 + math.cos(math.pi * 2 / 22)) * 12)
    assert moved > 3
    assert after[0].nonzero().flatten().tolist() == [3, 4, 5]  # all three dropped, and those of the largest gradient
    assert torch.equal(after[2:], alive[2:])
    assert (after.sum(1) == 3).all()


@pytest.mark.parametrize("method", MOVING)
def test_a_weight_that_is_dropped_and_regrown_at_once_keeps_its_value_in_rigl_only(method):
    model = nn.Sequential(nn.Linear(10, 10, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"update_interval": 2, "drop_fraction": 0.9}
    pruner = Pruner(model, method, 0.3, total_steps=40, optimizers=[optimizer], **options)
    pruner.choose_masks()
    for step in range(2):
        model[0].weight.grad = torch.ones(10, 10) + pruner.masks.masks["0"]  # regrowth of what was dropped comes first
        pruner.mask_gradients(step)
        optimizer.step()
        pruner.mask_weights()
        before = model[0].weight.detach().clone()
        alive = pruner.masks.masks["0"].bool()
        momentum = optimizer.state[model[0].weight]["momentum_buffer"]
        pruner.update_masks(step)
    again = alive & pruner.masks.masks["0"].bool()
    kept = again & (model[0].weight == before)
    if method == "rigl":
        assert torch.equal(kept, again)
        assert torch.equal(momentum != 0, again)
    else:
        assert kept.sum() == 70 - 63  # the others are dropped, and many of them come back
        assert again.sum() > kept.sum() + 10
        assert (model[0].weight[again & ~kept] == 0).all()
        assert torch.equal(momentum != 0, kept)
