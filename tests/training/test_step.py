"""The training step, through its public doors."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from imagedata.augment import Augmentation, Normalize
from imagedata.images import Images, channel_statistics
from imagedata.loaders import Batch, TrainLoader
from models import build_model
from prune import METHODS, Pruner
from prune.flops import FlopsMeter, count_flops
from training.optim import OPTIMIZERS, build_optimizer
from training.state import TrainState
from training.step import TrainingStep, build_objective
from utils.precision import Execution

ARMS = [(name, v2) for name in OPTIMIZERS for v2 in ((True, False) if name.endswith("-sam") else (False,))]


def build(name="sgd", v2=False, sparsity=None, seed=0, smooth_eps=0.0, lr_at=lambda step: 0.05, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)).double()
    mask = Pruner(model, "random" if sparsity else "none", sparsity)
    mask.choose_masks()
    momentum = 0.9 if name.startswith("sgd") else None
    rival = {"total_steps": 100} if name == "sgd-safe" else {}
    optimizer = build_optimizer(name, model, lr=9.0, weight_decay=0.01, momentum=momentum, rho=0.3, v2=v2, **rival)
    objective = build_objective(model, Execution(), 8 // options.get("accumulate", 1), smooth_eps)
    return TrainingStep(TrainState(model, optimizer, mask), objective, lr_at, **options)


def batch(seed=1, count=8):
    g = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, 5, generator=g, dtype=torch.float64)
    inputs = torch.randn(count, 2, 5, 5, generator=g, dtype=torch.float64)
    return Batch(inputs, targets / targets.sum(1, keepdim=True), count)


def run(steps=3, **kwargs):
    step = build(**kwargs)
    out = [step(batch(seed), log=True) for seed in range(steps)]
    return step.state, out


def same(left, right, exact=False):
    for p, q in zip(left.model.parameters(), right.model.parameters(), strict=True):
        if exact:
            assert torch.equal(p, q)
        else:
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_a_step_of_sgd_is_that_of_the_loop_everyone_writes():
    state, out = run()
    reference = build().state
    optimizer = torch.optim.SGD(reference.model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for seed in range(3):
        x, y, _ = batch(seed)
        optimizer.zero_grad()
        logits = reference.model(x)
        loss = -(y * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in reference.model.parameters()))
        optimizer.step()
        assert out[seed][0][0].item() / 8 == pytest.approx(loss.item(), rel=1e-6)
        assert out[seed][0][1].item() == pytest.approx(y.gather(1, logits.argmax(1, keepdim=True)).sum().item())
        assert out[seed][1]["gradient_norm"].item() == pytest.approx(norm)
    same(state, reference)
    assert (state.schedule_step, state.global_step) == (3, 3)


@pytest.mark.parametrize(("name", "v2"), ARMS)
def test_a_batch_in_parts_gives_the_same_step(name, v2):
    whole, _ = run(name=name, v2=v2)
    for parts in (3, 8):  # 3 parts of 8 images are uneven
        same(whole, run(name=name, v2=v2, accumulate=parts)[0])


@pytest.mark.parametrize(("name", "v2"), ARMS)
def test_dead_weights_are_zero_in_every_forward_pass_and_after_every_step(name, v2):
    step = build(name=name, v2=v2, sparsity=0.7)
    layer = step.state.model[0]
    dead = layer.weight == 0
    assert dead.any()
    seen = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(module.weight.detach().clone()))
    for seed in range(4):
        step(batch(seed))
        assert (layer.weight[dead] == 0).all()
    assert len(seen) == (8 if OPTIMIZERS[name].sam and not v2 else 4)
    assert all((w[dead] == 0).all() for w in seen)
    if OPTIMIZERS[name].sam:
        assert not torch.equal(seen[-1], seen[-2])


@pytest.mark.parametrize(("name", "v2"), ARMS)
def test_after_a_step_the_weights_are_not_perturbed(name, v2):
    step = build(name=name, v2=v2, lr_at=lambda step: 0.0)
    start = [p.detach().clone() for p in step.state.model.parameters()]
    for seed in range(3):
        step(batch(seed))
        assert all(torch.equal(p, w) for p, w in zip(step.state.model.parameters(), start, strict=True))


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
def test_running_statistics_move_once_a_step(v2):
    """Two-step SAM: in the first pass, at w. SAM.v2: at w + e."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = build_optimizer("sgd-sam", model, lr=0.1, weight_decay=0, momentum=0.9, rho=0.5, v2=v2)
    state = TrainState(model, optimizer, Pruner(model))
    step = TrainingStep(state, build_objective(model, Execution(), 16), lambda step: 0.1)
    means = []
    model[1].register_forward_pre_hook(lambda module, inputs: means.append(inputs[0].mean(0).detach()))
    expected = torch.zeros(4)
    for count in range(1, 5):
        means.clear()
        step(Batch(torch.randn(16, 3), torch.full((16, 2), 0.5), 16))
        assert len(means) == (1 if v2 else 2)
        if not v2:
            assert not torch.allclose(means[0], means[1])
        expected = 0.9 * expected + 0.1 * means[0]
        torch.testing.assert_close(model[1].running_mean, expected)
        assert model[1].num_batches_tracked == count


class Waits(TorchDispatchMode):
    """Notes the operators for which a host has to wait for the device's values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


METHOD_PATTERNS = [("none", "unstructured"), ("random", "unstructured")]  # to a step all masks that stay are alike
METHOD_PATTERNS += [
    (name, pattern)
    for name, method in METHODS.items()
    if method.update or method.tickets
    for pattern in (("unstructured", "channel", "2x1") if method.update else ("unstructured",))
    if not (pattern == "channel" and method.update.reallocates)
]


@pytest.mark.parametrize(("method", "pattern"), METHOD_PATTERNS)
def test_no_step_waits_for_the_device_whatever_it_does_to_the_masks(method, pattern):
    torch.manual_seed(0)
    model = build_model("resnet", 8, 5, width=0.5)
    optimizer = build_optimizer("sgd-sam", model, lr=0.1, weight_decay=0.01, momentum=0.9, rho=0.1, v2=True)
    options = {} if method == "none" else {"sparsity": 0.2, "pattern": pattern}
    if "erk" in METHODS[method].distributions and method != "none":
        options["distribution"] = "erk"  # no layer comes out empty
    if METHODS[method].has_interval:
        options["update_interval"] = 2
    pruner = Pruner(model, method, **options, total_steps=16, optimizers=[optimizer])
    images = Images(torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8), torch.arange(40) % 5)
    normalize = Normalize(**channel_statistics(images), device=torch.device("cpu"))
    augmentation = Augmentation(40, 20, seed=0, pad=1, flip=True)
    loader = TrainLoader(images, augmentation, 5, normalize, torch.device("cpu"), 0, Execution())
    pruner.choose_masks(loader.sample)
    state = TrainState(model, optimizer, pruner)
    meter = FlopsMeter(count_flops(model, (3, 8, 8)), pruner.masks, passes=1)
    take = TrainingStep(state, build_objective(model, Execution(), 20), lambda step: 0.05, clip_grad=1.0)
    versions = set()
    with Waits() as waits:
        for step in range(12):
            meter.step(20, pruner.grows_by_gradient(step))
            take(loader.batch(step), log=step % 3 == 0)
            versions.add(pruner.masks.version)
    assert waits.seen == []
    assert len(versions) == (7 if METHODS[method].has_interval else 1)


def test_clipping_bounds_the_gradient_after_the_mask():
    step = build(sparsity=0.7, clip_grad=1e-3, lr_at=lambda step: 1.0)
    step.state.optimizer.param_groups[0].update(momentum=0.0, weight_decay=0.0)
    parameters = list(step.state.model.parameters())
    before = [p.detach().clone() for p in parameters]
    step(batch())
    moved = sum((p - w).square().sum() for p, w in zip(parameters, before, strict=True)).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_step_logs_its_own_norms_and_only_where_asked():
    _, out = run(steps=3, name="sgd-sam", v2=True)
    assert [logged["perturbation_norm"].item() for _, logged in out] == pytest.approx([0, 0.3, 0.3], rel=1e-5)
    assert build()(batch()).logged == {}
    without = build(name="sgd-sam", v2=True, measure_ascent=False)(batch(), log=True).logged
    assert without.keys() == out[0].logged.keys() - {"ascent", "cos_e_gradient_at_w"}


def test_label_smoothing_mixes_in_the_uniform_distribution():
    smoothed, _ = run(smooth_eps=0.2)
    reference = build()
    for seed in range(3):
        x, y, size = batch(seed)
        reference(Batch(x, 0.8 * y + 0.2 / 5, size))
    same(smoothed, reference.state)
