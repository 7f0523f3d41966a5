"""CrAM+ and SAFE through the training step, against their rules written out in float64."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imagedata.loaders import Batch
from prune import Pruner
from training.nonfinite import NonFiniteGuard
from training.optim import build_optimizer, passes_per_step
from training.state import TrainState
from training.step import TrainingStep, build_objective
from utils.precision import Execution

LR, MOMENTUM, DECAY = 0.05, 0.9, 0.01


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)]
    return nn.Sequential(*layers).double()


def batches(count):
    g = torch.Generator().manual_seed(1)
    options = {"generator": g, "dtype": torch.float64}
    return [(torch.randn(8, 2, 5, 5, **options), torch.rand(8, 5, **options).softmax(1)) for _ in range(count)]


def training(
    name, pattern="unstructured", skip=False, rho=0.1, frozen="", spoilt=lambda: False, clip_grad=0.0, **rival
):
    model = network()
    if frozen:
        model.get_submodule(frozen).requires_grad_(False)
    if pattern != "unstructured":
        rival["largest"] = Pruner(model, "final", 0.5, pattern=pattern, total_steps=9).largest
    if name == "sgd-safe":
        rival.setdefault("total_steps", 100)
    optimizer = build_optimizer(name, model, LR, DECAY, MOMENTUM, rho=rho, **rival)
    pruner = Pruner(model, optimizers=[optimizer])
    state = TrainState(model, optimizer, pruner, NonFiniteGuard(model, skip=skip))
    objective = build_objective(model, Execution(), 8)

    def spoil(*batch):
        loss, part = objective(*batch)
        return (loss * math.inf if spoilt() else loss), part

    return model, optimizer, TrainingStep(state, spoil, lambda step: LR, clip_grad=clip_grad)


class Reference:
    """SGD with momentum and weight decay on a network of its own, and what both rules need beside it."""

    def __init__(self):
        self.model = network()
        self.parameters = list(self.model.parameters())
        self.weights = [self.model[0].weight, self.model[4].weight]
        self.momentum = [torch.zeros_like(p) for p in self.parameters]

    def gradient(self, inputs, targets, keep_statistics=False):
        saved = {name: tensor.clone() for name, tensor in self.model[1].state_dict().items()}
        loss = F.cross_entropy(self.model(inputs), targets)
        gradients = dict(zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True))
        if keep_statistics:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                getattr(self.model[1], name).copy_(saved[name])
        return gradients

    def step(self, gradients):
        with torch.no_grad():
            for p, buffer in zip(self.parameters, self.momentum, strict=True):
                buffer.mul_(MOMENTUM).add_(gradients[p] + DECAY * p)
                p -= LR * buffer


def largest(tensors, sparsity):
    """Which of all values are the largest, one boolean tensor each."""
    flat = torch.cat([t.abs().flatten() for t in tensors])
    threshold = flat.sort(descending=True).values[round((1 - sparsity) * len(flat)) - 1]
    return [t.abs() >= threshold for t in tensors]


def assert_same(model, reference):
    for (name, value), expected in zip(model.state_dict().items(), reference.model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12, msg=name)


def test_cram_steps_with_the_gradients_at_w_and_at_compressed_perturbed_weights():
    model, optimizer, take = training("sgd-cram", rho=0.4, sparsities=(0.3, 0.8), seed=3)
    reference, drawn = Reference(), set()
    for number, (inputs, targets) in enumerate(batches(6)):
        logged = take(Batch(inputs, targets, 8), log=True).logged
        at_w = reference.gradient(inputs, targets)
        start = {p: p.detach().clone() for p in reference.parameters}
        sparsity = random.Random(f"3 {number}").choice([0.3, 0.8])
        drawn.add(sparsity)
        with torch.no_grad():
            for p in reference.parameters:
                p += 0.4 * at_w[p]  # not divided by a norm
            kept = dict(zip(reference.weights, largest(reference.weights, sparsity), strict=True))
            for p, alive in kept.items():
                p *= alive
        compressed = reference.gradient(inputs, targets, keep_statistics=True)
        with torch.no_grad():
            for p in reference.parameters:
                p.copy_(start[p])
        gradients = {p: at_w[p] + compressed[p] * kept.get(p, 1) for p in reference.parameters}
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        assert logged["gradient_norm"].item() == pytest.approx(norm, rel=1e-6)  # of what is clipped
        reference.step(gradients)
        assert_same(model, reference)
    assert drawn == {0.3, 0.8}
    assert passes_per_step(optimizer) == 2
    assert all(p.count_nonzero() == p.numel() for p in reference.weights)  # still dense


def test_safe_is_sam_drawn_towards_a_sparse_point_that_follows_the_weights():
    options = {"sparsity": 0.7, "strength": 0.5, "interval": 2, "total_steps": 9}
    model, _, take = training("sgd-safe", rho=0.3, **options)
    reference = Reference()
    duals = [torch.zeros_like(w) for w in reference.weights]
    splits = [w.detach() * a for w, a in zip(reference.weights, largest(reference.weights, 0.7), strict=True)]
    for number, (inputs, targets) in enumerate(batches(7)):
        take(Batch(inputs, targets, 8))
        at_w = reference.gradient(inputs, targets)
        start = {p: p.detach().clone() for p in reference.parameters}
        norm = sum(g.square().sum() for g in at_w.values()).sqrt()
        with torch.no_grad():
            for p in reference.parameters:
                p += 0.3 * at_w[p] / (norm + 1e-12)
        gradients = reference.gradient(inputs, targets, keep_statistics=True)
        with torch.no_grad():
            for p in reference.parameters:
                p.copy_(start[p])
            strength = 0.5 * 0.5 * (1 - math.cos(math.pi * number / 9))
            for w, z, u in zip(reference.weights, splits, duals, strict=True):
                gradients[w] = gradients[w] + strength * (w - z + u)
        reference.step(gradients)
        if number % 2:
            sums = [w.detach() + u for w, u in zip(reference.weights, duals, strict=True)]
            splits = [s * alive for s, alive in zip(sums, largest(sums, 0.7), strict=True)]
            duals = [s - z for s, z in zip(sums, splits, strict=True)]
        assert_same(model, reference)


def test_safe_brings_the_weights_near_to_the_sparse_set():
    distances = []
    for strength in (1e-9, 0.3):
        model, _, take = training("sgd-safe", rho=0.05, sparsity=0.7, strength=strength, interval=4, total_steps=60)
        for inputs, targets in batches(6) * 10:
            take(Batch(inputs, targets, 8))
        weights = [model[0].weight.detach(), model[4].weight.detach()]
        dead = torch.cat([w[~alive] for w, alive in zip(weights, largest(weights, 0.7), strict=True)])
        distances.append(dead.norm() / torch.cat([w.flatten() for w in weights]).norm())
    assert distances[1] < 0.6 * distances[0]


@pytest.mark.parametrize("pattern", ["channel", "1:2"])
def test_cram_prunes_by_the_pattern_of_the_run(pattern):
    model, _, take = training("sgd-cram", pattern, sparsities=(0.5,))
    seen = []
    model[4].register_forward_pre_hook(lambda module, inputs: seen.append(module.weight.detach() != 0))
    (batch,) = batches(1)
    take(Batch(*batch, 8))
    _, compressed = seen
    if pattern == "channel":
        rows, columns = compressed.any(1), compressed.any(0)
        assert not rows.all() or not columns.all()
        assert torch.equal(compressed, rows[:, None] & columns)
    else:
        assert (compressed.unflatten(1, (-1, 2)).sum(2) == 1).all()


@pytest.mark.parametrize("name", ["sgd-cram", "sgd-safe"])
def test_a_skipped_step_of_a_rival_leaves_everything_as_it_was(name):
    model, optimizer, take = training(name, skip=True)
    (inputs, targets), (others, labels) = batches(2)
    take(Batch(inputs, targets, 8))
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    (key,) = (key for key in optimizer.param_groups[0] if key.endswith("_step"))
    taken = optimizer.param_groups[0][key]
    take(Batch(others * math.nan, labels, 8))
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert taken == optimizer.param_groups[0][key] == 1
    take(Batch(others, labels, 8))
    assert not torch.equal(model[0].weight, saved["0.weight"])


@pytest.mark.parametrize("name", ["sgd-cram", "sgd-safe"])
def test_frozen_weights_stay_as_they_are(name):
    model, _, take = training(name, frozen="0")
    before = model[0].weight.clone()
    for inputs, targets in batches(3):
        take(Batch(inputs, targets, 8))
    assert torch.equal(model[0].weight, before)
    assert before.all()


def test_cram_clips_the_gradient_that_it_steps_with():
    model, optimizer, take = training("sgd-cram", rho=0.4, clip_grad=0.01)
    for group in optimizer.param_groups:
        group.update(momentum=0.0, weight_decay=0.0)
    for inputs, targets in batches(3):
        before = [p.detach().clone() for p in model.parameters()]
        take(Batch(inputs, targets, 8))
        moved = torch.nn.utils.get_total_norm([p.detach() - q for p, q in zip(model.parameters(), before, strict=True)])
        assert moved.item() == pytest.approx(LR * 0.01, rel=1e-4)


def test_a_step_of_cram_is_left_out_if_its_first_pass_is_not_finite():
    passes = iter([False, False, True, False, False, False])
    model, _, take = training("sgd-cram", skip=True, spoilt=lambda: next(passes))
    for number, (inputs, targets) in enumerate(batches(3)):
        before = [p.detach().clone() for p in model.parameters()]
        take(Batch(inputs, targets, 8))
        same = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert all(same) if number == 1 else not any(same)
        assert all(p.isfinite().all() for p in model.parameters())
