"""The training step and the loop, through their public doors."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from imagedata.images import Images, channel_statistics
from imagedata.loaders import Augmentation, EvalLoader, Normalize, TrainLoader
from models import build_model
from prune import METHODS, Pruner, Timing
from prune.flops import FlopsMeter, count_flops
from training.checkpoint import TrainState
from training.loop import Recipe, build_objective, evaluate, train_step, update_weights
from training.optim import OPTIMIZERS, build_optimizer, perturbation_of, state_holders
from utils.precision import Execution

ARMS = [(name, v2) for name in OPTIMIZERS for v2 in ((True, False) if name.endswith("-sam") else (False,))]


def build(name="sgd", v2=False, sparsity=None, seed=0, **recipe):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)).double()
    mask = Pruner(model, "random" if sparsity else "none", sparsity)
    mask.before_training()
    momentum = 0.9 if name.startswith("sgd") else None
    optimizer = build_optimizer(name, model, lr=9.0, weight_decay=0.01, momentum=momentum, rho=0.3, v2=v2)
    state = TrainState(model, optimizer, mask)
    return state, Recipe(
        build_objective(model, Execution(), 8 // recipe.get("accumulate", 1), recipe.pop("smooth_eps", 0.0)),
        Execution(),
        perturbation_of(optimizer, model, mask),
        update_weights,
        **{"lr_at": lambda step: 0.05, "total_steps": 9} | recipe,
    )


def batch(seed=1, count=8):
    g = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, 5, generator=g, dtype=torch.float64)
    return torch.randn(count, 2, 5, 5, generator=g, dtype=torch.float64), targets / targets.sum(1, keepdim=True)


def run(steps=3, **kwargs):
    state, recipe = build(**kwargs)
    out = [train_step(state, recipe, *batch(seed), measure=True) for seed in range(steps)]
    return state, out


def same(left, right, exact=False):
    for p, q in zip(left.model.parameters(), right.model.parameters(), strict=True):
        if exact:
            assert torch.equal(p, q)
        else:
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_plain_sgd_is_the_loop_everyone_writes():
    state, out = run()
    reference, _ = build()
    optimizer = torch.optim.SGD(reference.model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for seed in range(3):
        x, y = batch(seed)
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
    state, recipe = build(name=name, v2=v2, sparsity=0.7)
    layer = state.model[0]
    dead = layer.weight == 0
    assert dead.any()
    seen = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(module.weight.detach().clone()))
    for seed in range(4):
        train_step(state, recipe, *batch(seed), measure=False)
        assert (layer.weight[dead] == 0).all()
    assert len(seen) == (8 if name.endswith("-sam") and not v2 else 4)
    assert all((w[dead] == 0).all() for w in seen)
    if name.endswith("-sam"):
        assert not torch.equal(seen[-1], seen[-2])


@pytest.mark.parametrize(("name", "v2"), ARMS)
def test_after_a_step_the_weights_are_not_perturbed(name, v2):
    state, recipe = build(name=name, v2=v2, lr_at=lambda step: 0.0)
    start = [p.detach().clone() for p in state.model.parameters()]
    for seed in range(3):
        train_step(state, recipe, *batch(seed), measure=False)
        assert all(torch.equal(p, w) for p, w in zip(state.model.parameters(), start, strict=True))


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


@pytest.mark.parametrize("pattern", ["unstructured", "channel", "2x1"])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.pretrained])
def test_no_step_waits_for_the_device_whatever_it_does_to_the_masks(method, pattern):
    torch.manual_seed(0)
    model = build_model("resnet", 8, 5, width=0.5)
    optimizer = build_optimizer("sgd-sam", model, lr=0.1, weight_decay=0.01, momentum=0.9, rho=0.1, v2=True)
    options = {} if method == "none" else {"sparsity": 0.2, "pattern": pattern}
    if "erk" in METHODS[method].distributions and method != "none":
        options["distribution"] = "erk"  # no layer comes out empty
    pruner = Pruner(model, method, **options, timing=Timing(16, interval=2), optimizers=state_holders(optimizer))
    images = Images(torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8), torch.arange(40) % 5)
    normalize = Normalize(**channel_statistics(images), device=torch.device("cpu"))
    augmentation = Augmentation(40, 20, seed=0, pad=1, flip=True)
    loader = TrainLoader(images, augmentation, 5, normalize, torch.device("cpu"), 0, Execution())
    pruner.before_training(loader.sample)
    state = TrainState(model, optimizer, pruner)
    meter = FlopsMeter(count_flops(model, (3, 8, 8)), pruner, passes=1)
    recipe = Recipe(
        build_objective(model, Execution(), 20),
        Execution(),
        perturbation_of(optimizer, model, pruner),
        update_weights,
        lambda step: 0.05,
        16,
        clip_grad=1.0,
    )
    versions = set()
    with Waits() as waits:
        for step in range(12):
            meter.step(20, pruner.grows_by_gradient(step))
            train_step(state, recipe, *loader.batch(step), measure=step % 3 == 0)
            versions.add(pruner.masks.version)
    assert waits.seen == []
    assert len(versions) == (7 if METHODS[method].update else 1)


def test_clipping_bounds_the_gradient_after_the_mask():
    state, recipe = build(sparsity=0.7, clip_grad=1e-3, lr_at=lambda step: 1.0)
    state.optimizer.param_groups[0].update(momentum=0.0, weight_decay=0.0)
    before = [p.detach().clone() for p in state.model.parameters()]
    train_step(state, recipe, *batch(), measure=False)
    moved = sum((p - w).square().sum() for p, w in zip(state.model.parameters(), before, strict=True)).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_what_is_measured_is_of_this_step():
    _, out = run(steps=3, name="sgd-sam", v2=True)
    assert [m["perturbation_norm"].item() for _, m in out] == pytest.approx([0, 0.3, 0.3], rel=1e-5)
    assert out[0][1]["alignment"].item() == 0
    assert all(-1 <= m["alignment"].item() <= 1 for _, m in out)
    state, recipe = build()
    assert train_step(state, recipe, *batch(), measure=False)[1] == {}


def test_label_smoothing_mixes_in_the_uniform_distribution():
    smoothed, _ = run(smooth_eps=0.2)
    reference, recipe = build()
    for seed in range(3):
        x, y = batch(seed)
        train_step(reference, recipe, x, 0.8 * y + 0.2 / 5, measure=False)
    same(smoothed, reference)


def test_evaluate_counts_every_image_once_in_eval_mode():
    torch.manual_seed(0)
    pixels = torch.randint(256, (23, 4, 4, 1), dtype=torch.uint8)
    images = Images(pixels, torch.arange(23) % 3)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
    statistics = model[1].running_mean.clone()
    normalize = Normalize(**channel_statistics(images), device=torch.device("cpu"))
    loss, top1 = evaluate(model, EvalLoader(images, 5, normalize, torch.device("cpu")), Execution())
    assert model.training
    assert torch.equal(model[1].running_mean, statistics)
    model.eval()
    logits = model(normalize(pixels)).double()
    expected = -logits.log_softmax(1)[torch.arange(23), images.labels].mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert top1 == pytest.approx(100 * (logits.argmax(1) == images.labels).double().mean().item())
