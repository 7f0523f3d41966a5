"""Channels that die and come back during training."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from models import build_model
from prune import Pruner
from sam import SAM


def train(model, pruner, optimizer, steps, start=0, look=lambda: None):
    g = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(16, 3, 8, 8, generator=g, dtype=torch.float64), torch.arange(16) % 10
    for step in range(start, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        pruner.mask_gradients(step)
        optimizer.step()
        pruner.mask_weights()
        look()
        pruner.update_masks(step)


def small_network():
    torch.manual_seed(0)
    return build_model("resnet", 8, 10).double()


def moving(method, sam=False, **options):
    model = small_network()
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = torch.optim.SGD(model.parameters(), **settings)
    if sam:
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, **settings)
    pruner = Pruner(
        model, method, 0.7, pattern="channel", total_steps=20, optimizers=[optimizer], update_interval=3, **options
    )
    pruner.choose_masks()
    return model, pruner, optimizer


def alive_channels(pruner):
    return {name: share > 0 for name, share in pruner.pattern.pool(pruner.masks.masks).items()}


@pytest.mark.parametrize("method", ["set", "rigl", "mest"])
def test_moving_channels_keep_their_number_and_forget_the_optimizer_s_memory(method):
    model, pruner, optimizer = moving(method)
    weights, before, moved = pruner.masks.alive(), alive_channels(pruner), 0
    for step in range(20):
        train(model, pruner, optimizer, step + 1, step)
        now = alive_channels(pruner)
        assert pruner.masks.alive() == weights
        grown = {name: now[name] & ~before[name] for name in now}
        moved += sum(int(channels.sum()) for channels in grown.values())
        for name, group in pruner.pattern.groups.items():
            changed = now[name] != before[name]
            for layer in group.norms:
                scale = dict(model.named_modules())[layer].weight
                assert not optimizer.state[scale]["momentum_buffer"][changed].any()
            for layer in group.writers:
                weight = pruner.masks.weights[layer]
                assert not optimizer.state[weight]["momentum_buffer"][changed].any()
                assert weight[grown[name]].flatten(1).any(1).all()
            for layer in group.readers:
                assert not pruner.masks.weights[layer][:, grown[name]].any()
        before = now
    assert moved > 4


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_channels_that_grow_change_nothing_that_the_network_computes(method):
    model, pruner, optimizer = moving(method)
    inputs = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    checked = 0
    for step in range(12):
        before = alive_channels(pruner)
        train(model, pruner, optimizer, step + 1, step)
        grown = {name: now & ~before[name] for name, now in alive_channels(pruner).items()}
        if any(map(torch.any, grown.values())):
            checked += 1
            without = copy.deepcopy(model)  # of the new masks, without the new channels
            twin = Pruner(without, "random", 0.7, pattern="channel")
            twin.masks.set(twin.pattern.spread({n: now & ~grown[n] for n, now in alive_channels(pruner).items()}))
            for training in (False, True):
                torch.testing.assert_close(
                    model.train(training)(inputs), without.train(training)(inputs), rtol=1e-12, atol=1e-12
                )
    assert checked > 2


def test_a_channel_comes_back_with_the_values_that_it_died_with():
    model, pruner, optimizer = moving("set", drop_fraction=0.6)
    modules = dict(model.named_modules())
    last = {name: p.detach().clone() for name, p in small_network().named_parameters()}  # as they were drawn
    statistics, returned = {}, 0
    for step in range(15):
        before = alive_channels(pruner)
        look = functools.partial(last_alive, model, before, pruner, last, statistics)
        train(model, pruner, optimizer, step + 1, step, look)
        now = alive_channels(pruner)
        for name, group in pruner.pattern.groups.items():
            back = now[name] & ~before[name]
            returned += int(back.sum())
            for norm in group.norms:
                assert torch.equal(modules[norm].weight[back], last[f"{norm}.weight"][back])
                for channel in back.nonzero().flatten().tolist():
                    expected = statistics.get((norm, channel), 0.0)
                    assert modules[norm].running_mean[channel] == expected
            for layer in group.writers:
                weight = pruner.masks.weights[layer]
                mask = pruner.masks.masks[layer].bool() & (weight != 0)
                rows = back.view(-1, 1, 1, 1) & mask
                assert torch.equal(weight[rows], last[f"{layer}.weight"][rows])
    assert returned > 10


def last_alive(model, alive, pruner, last, statistics):
    """Note the values of living weights after a step and before the change of masks."""
    modules = dict(model.named_modules())
    for name, group in pruner.pattern.groups.items():
        for norm in group.norms:
            last[f"{norm}.weight"][alive[name]] = modules[norm].weight.detach()[alive[name]]
            for channel in alive[name].nonzero().flatten().tolist():
                statistics[norm, channel] = float(modules[norm].running_mean[channel])
        for layer in group.writers:
            mask = pruner.masks.masks[layer].bool()
            last[f"{layer}.weight"][mask] = pruner.masks.weights[layer].detach()[mask]


def test_rigl_grows_the_channels_whose_readers_have_the_largest_gradient():
    model, pruner, optimizer = moving("rigl", drop_fraction=0.8)
    train(model, pruner, optimizer, 2)
    before = alive_channels(pruner)
    g = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(16, 3, 8, 8, generator=g, dtype=torch.float64), torch.arange(16) % 10
    # The gradient of what reads dead channels, in a network in which these have the values that they were drawn with.
    twin, fresh = copy.deepcopy(model), small_network()
    modules, drawn = dict(twin.named_modules()), dict(fresh.named_modules())
    for name, group in pruner.pattern.groups.items():
        dead = ~before[name]
        with torch.no_grad():
            for layer in (*group.writers, *group.norms):
                modules[layer].weight[dead] = drawn[layer].weight[dead]
    for group in pruner.pattern.groups.values():
        for layer in group.readers:
            with torch.no_grad():
                modules[layer].weight[:, ~before[group.name]] = 0
    F.cross_entropy(twin.train()(inputs), labels).backward()
    train(model, pruner, optimizer, 3, 2)
    grew = 0
    for name, group in pruner.pattern.groups.items():
        squares = sum(modules[layer].weight.grad.movedim(1, 0).flatten(1).square().sum(1) for layer in group.readers)
        came = alive_channels(pruner)[name] & ~before[name]
        stayed_dead = ~alive_channels(pruner)[name] & ~before[name]
        if came.any() and stayed_dead.any():
            grew += 1
            assert squares[came].min() >= squares[stayed_dead].max() * (1 - 1e-9)
            assert squares[came].min() > 0
    assert grew > 1


@pytest.mark.parametrize("method", ["set", "rigl", "mest", "granet", "acdc"])
def test_channels_resume_bit_for_bit(method):
    runs = []
    for resumed_at in (None, 4, 5):  # 5: rigl's dead channels are awake
        model, pruner, optimizer = moving(method)
        if resumed_at:
            train(model, pruner, optimizer, resumed_at)
            saved = copy.deepcopy((model.state_dict(), pruner.state_dict(), optimizer.state_dict()))
            model, pruner, optimizer = moving(method)
            for part, state in zip((model, pruner, optimizer), saved, strict=True):
                part.load_state_dict(state)
        train(model, pruner, optimizer, 20, start=resumed_at or 0)
        runs.append(model.state_dict())
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("method", ["rigl", "granet", "acdc"])
def test_channels_resume_where_sam_holds_the_perturbed_weights(method):
    """To rounding: eval() before saving takes w + e apart."""
    runs = []
    for resumed_at in (None, 4, 5, 8):
        model, pruner, optimizer = moving(method, sam=True)
        optimizer.train()
        if resumed_at:
            train(model, pruner, optimizer, resumed_at)
            optimizer.eval()
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
            model, pruner, optimizer = moving(method, sam=True)
            for part, state in zip((model, optimizer, pruner), saved, strict=True):
                part.load_state_dict(state)
            optimizer.train()
        train(model, pruner, optimizer, 20, start=resumed_at or 0)
        optimizer.eval()
        runs.append(model.state_dict())
    for other in runs[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(runs[0][name], tensor, rtol=0, atol=1e-9)


def test_acdc_brings_channels_back_alive():
    model, pruner, optimizer = moving("acdc")
    seen = []
    for step in range(20):
        train(model, pruner, optimizer, step + 1, step)
        seen.append(pruner.masks.sparsity())
        if len(seen) > 1 and seen[-1] < seen[-2]:  # all channels live again
            group = pruner.pattern.groups["stage2.0.conv1"]
            assert all(pruner.masks.weights[layer].flatten(1).any(1).all() for layer in group.writers)
            train(model, pruner, optimizer, step + 3, step + 1)
            assert all(pruner.masks.weights[layer].movedim(1, 0).flatten(1).any(1).all() for layer in group.readers)
            break
    assert seen[-1] == 0 < max(seen)


def test_gmp_takes_channels_out_by_its_schedule_and_brings_none_back():
    model, pruner, optimizer = moving("gmp")
    before, shares = alive_channels(pruner), []
    for step in range(20):
        train(model, pruner, optimizer, step + 1, step)
        now = alive_channels(pruner)
        assert not any((now[name] & ~before[name]).any() for name in now)
        before = now
        shares.append(pruner.masks.sparsity())
    assert shares[0] == 0
    assert shares[14] == shares[-1] == pytest.approx(0.7, abs=0.01)
    assert pruner.describe().endswith("channels are gone")
