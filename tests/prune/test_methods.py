"""The sparse-training methods against references written out here, on networks small enough to follow."""

import copy
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from models import build_model
from prune import METHODS, Pruner
from prune.schedules import Timing
from prune.scores import Scored, grasp, synflow
from sam import SAM

CLASSES = 4


class Tiny(nn.Module):
    """A convolution, a linear layer, batch norm after each, and a classifier; scores in float64."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, CLASSES)
        self.double()

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.classifier(torch.tanh(self.norm(self.linear(x))))


def sample(per_class):
    g = torch.Generator().manual_seed(5)
    labels = (torch.arange(CLASSES * per_class) % CLASSES)[torch.randperm(CLASSES * per_class, generator=g)]
    return torch.randn(len(labels), 4, 5, 5, generator=g, dtype=torch.float64), labels


def layers(model):
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def dead(model):
    weights = layers(model)
    return sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())


def train(model, pruner, optimizer, steps, start=0, on_step=lambda step: None):
    inputs, labels = sample(8)
    for step in range(start, steps):
        optimizer.zero_grad()
        if isinstance(optimizer, SAM):
            optimizer.first_step()
            woken = pruner.pattern.name == "channel" and pruner.grows_by_gradient(step)
            for name, mask in () if woken else pruner.masks.masks.items():
                assert (layers(model)[name][mask == 0] == 0).all()  # in the perturbed forward pass too
        F.cross_entropy(model(inputs), labels).backward()
        pruner.mask_gradients(step)
        optimizer.step()
        pruner.update_masks(step)
        on_step(step)


def build(method, sparsity=0.5, steps=20, optimizer="sam", seed=0, interval=3, **kwargs):
    model = Tiny(seed)
    if optimizer == "sam":
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
        holders = [optimizer, optimizer.base_optimizer]
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        holders = [optimizer]
    if METHODS[method].has_interval:
        kwargs["update_interval"] = interval
    mask = Pruner(model, method, sparsity, total_steps=steps, optimizers=holders, **kwargs)
    mask.choose_masks(sample)
    return model, mask, optimizer


SPARSE = [name for name in METHODS if name != "none"]
MOVING = ["set", "rigl", "mest"]


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("distribution", ["erk", "uniform", "global"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1", "kernel", "channel", "fan-in"])
def test_every_combination_reaches_its_sparsity_or_says_why_not(method, distribution, pattern):
    fixed = pattern == "2:4"
    flags = {"pattern": pattern, "distribution": None if fixed else distribution}
    impossible = not fixed and distribution not in METHODS[method].distributions
    reallocates = METHODS[method].update is not None and METHODS[method].update.reallocates
    impossible |= (fixed and METHODS[method].moves) or (pattern in ("channel", "fan-in") and reallocates)
    impossible |= (pattern, method) == ("channel", "force")
    if impossible:
        words = "choose|take 2:4 with gmp|part of several|keep a constant fan-in|take iter-snip"
        with pytest.raises(ValueError, match=words):
            build(method, None if fixed else 0.5, **flags)
        return
    model, mask, optimizer = build(method, None if fixed else 0.5, **flags)
    step, end = 0, 20 if METHODS[method].update or METHODS[method].tickets else 2
    while step < end:
        train(model, mask, optimizer, end, step)
        step = mask.next_round(end)
    unit = {
        "unstructured": 1,
        "2:4": 1,
        "4x1": 4,
        "kernel": 9,
        "channel": 16 * 9 + 16,  # the most that goes with one
        "fan-in": 16,  # one weight of each output
    }
    total = sum(w.numel() for w in layers(model).values())
    assert abs(mask.masks.sparsity() - 0.5) * total <= len(layers(model)) * unit[pattern]
    for name, w in layers(model).items():
        zero = mask.masks.masks[name] == 0
        assert (w[zero] == 0).all()
        if pattern == "2:4":
            groups = zero.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1)
            assert (groups == 2).all()
        elif pattern == "fan-in":
            assert len(set(zero.flatten(1).sum(1).tolist())) == 1
        elif pattern == "channel":
            pixels = zero.view(*zero.shape[:2], -1)
            assert torch.equal(
                pixels, (pixels.all((1, 2))[:, None] | pixels.all((0, 2)))[..., None].expand(pixels.shape)
            )
        elif pattern == "kernel" and w.ndim == 4:
            assert (zero.all((2, 3)) == zero.any((2, 3))).all()
        elif pattern == "4x1":
            blocks = zero.flatten(1).unflatten(0, (-1, 4))
            assert (blocks.all(1) == blocks.any(1)).all()


@pytest.mark.parametrize("method", ["magnitude", "oneshot", "gmp", "lth"])
def test_units_of_magnitudes_rank_by_their_l2_norm(method):
    model = nn.Sequential(nn.Linear(4, 6, bias=False))
    with torch.no_grad():  # an even filter of mean 0.5 against one of mean 0.3 and a larger norm, three times
        even, peak = torch.full((4,), 0.5), torch.tensor([1.2, 0.0, 0.0, 0.0])
        model[0].weight.copy_(torch.stack([even, peak, even, peak, even, peak]))
    options = {"lth": {"lth_rounds": 1}, "gmp": {"update_interval": 1}}.get(method, {})
    pruner = Pruner(model, method, 0.5, pattern="1x4", distribution="uniform", total_steps=4, **options)
    pruner.choose_masks()
    for step in range(4):
        pruner.update_masks(step)
    pruner.next_round(4)
    assert pruner.masks.masks["0"].amax(1).tolist() == [0, 1, 0, 1, 0, 1]


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


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from(["magnitude", "gmp", "lth"]),
    group=st.integers(2, 9).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    sizes=st.tuples(*[st.integers(1, 23)] * 3),
)
@example(method="magnitude", group=(2, 4), sizes=(3, 7, 5))
def test_every_group_of_every_layer_keeps_n_of_m_whatever_the_sizes(method, group, sizes):
    (n, m), (inputs, hidden, outputs) = group, sizes
    model = nn.Sequential(
        nn.Conv2d(inputs, hidden, (1, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, outputs)
    )
    options = {"lth": {"lth_rounds": 2}, "gmp": {"update_interval": 1}}.get(method, {})
    pruner = Pruner(model, method, pattern=f"{n}:{m}", total_steps=4, **options)
    pruner.choose_masks()
    for step in range(4):
        pruner.update_masks(step)
    while pruner.next_round(4) == 0:
        pass
    for mask in pruner.masks.masks.values():
        for part in mask.movedim(1, -1).flatten(0, -2).split(m, dim=1):
            assert (part.sum(1) == min(n, math.ceil(n * part.shape[1] / m))).all()


@pytest.mark.parametrize("method", [name for name in SPARSE if METHODS[name].score])
def test_scoring_changes_neither_weights_nor_statistics_nor_gradients(method):
    model, fresh = Tiny(), Tiny()
    mask = Pruner(model, method, 0.5, total_steps=8000, steps_per_epoch=10)
    mask.choose_masks(sample)
    for (name, now), before in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        alive = mask.masks.masks.get(name.removesuffix(".weight"), torch.ones_like(now))
        assert torch.equal(now, before * alive.to(now.dtype)), name
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def global_reference(scores, keep):
    """The `keep` highest of all scores, as one flat boolean in the order of the layers."""
    flat = torch.cat([s.flatten() for s in scores])
    alive = torch.zeros(len(flat), dtype=torch.bool)
    alive[flat.argsort(descending=True)[:keep]] = True
    return alive


def split(flat, like):
    return [part.view(w.shape) for part, w in zip(flat.split([w.numel() for w in like]), like, strict=True)]


def kept(mask):
    return torch.cat([m.flatten().bool() for m in mask.masks.masks.values()])


def test_snip_keeps_the_weights_whose_removal_changes_the_loss_most():
    _, mask, _ = build("snip", 0.6)
    fresh = Tiny()
    inputs, labels = sample(10)
    F.cross_entropy(fresh(inputs), labels).backward()
    scores = [(w.grad * w).abs() for w in layers(fresh).values()]
    total = sum(s.numel() for s in scores)
    assert torch.equal(kept(mask), global_reference(scores, round(0.4 * total)))


@pytest.mark.parametrize("method", ["iter-snip", "force"])
def test_snip_in_rounds_scores_the_pruned_network_and_force_lets_weights_come_back(method):
    model, mask, _ = build(method, 0.9, score_rounds=4)
    inputs, labels = sample(10)
    start = [w.detach().clone() for w in layers(Tiny()).values()]
    total, alive, ever_pruned = sum(w.numel() for w in start), None, 0
    for number in range(1, 5):
        pruned = Tiny()
        with torch.no_grad():
            for w, part in zip(layers(pruned).values(), split(alive, start) if number > 1 else (), strict=number > 1):
                w *= part
        F.cross_entropy(pruned(inputs), labels).backward()
        values = start if method == "force" else [w.detach() for w in layers(pruned).values()]
        scores = [(w.grad * v).abs() for w, v in zip(layers(pruned).values(), values, strict=True)]
        before, alive = alive, global_reference(scores, round(total * 0.1 ** (number / 4)))
        ever_pruned += 0 if before is None else int((alive & ~before).sum())
    assert torch.equal(kept(mask), alive)
    assert (ever_pruned > 0) == (method == "force")
    for w, before, part in zip(layers(model).values(), start, split(alive, start), strict=True):
        assert torch.equal(w, before * part)


def test_grasp_drops_the_highest_of_minus_w_times_hessian_gradient():
    _, mask, _ = build("grasp", 0.6)
    fresh = Tiny()
    inputs, labels = sample(10)
    weights = list(layers(fresh).values())

    def gradient():
        return torch.autograd.grad(F.cross_entropy(fresh(inputs) / 200, labels), weights)

    # H g as the difference of gradients along g: no second derivative is taken.
    along, size = gradient(), 1e-4
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for w, g in zip(weights, along, strict=True):
                w += sign * size * g
        sides.append(gradient())
        with torch.no_grad():
            for w, g in zip(weights, along, strict=True):
                w -= sign * size * g
    curved = [(up - down) / (2 * size) for up, down in zip(*sides, strict=True)]
    scores = [-w.detach() * hg for w, hg in zip(weights, curved, strict=True)]
    total = sum(s.numel() for s in scores)
    highest = global_reference(scores, total - round(0.4 * total))
    assert torch.equal(kept(mask), ~highest)


def test_grasp_in_parts_has_the_scores_of_one_batch():
    class WithoutNorm(nn.Module):  # which would make a part depend on its other images
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.classifier = nn.Conv2d(4, 6, 3), nn.Linear(6, CLASSES)
            self.double()

        def forward(self, x):
            WithoutNorm.largest = max(WithoutNorm.largest, len(x))
            return self.classifier(torch.tanh(self.conv(x)).mean((2, 3)))

    WithoutNorm.largest = 0
    model = WithoutNorm()
    options = {"score_images": 60}
    scores = grasp(Scored(model, layers(model), torch.Generator(), sample, options=options))
    assert WithoutNorm.largest == 80  # 240 images in three parts
    inputs, labels = sample(60)
    weights = list(layers(model).values())
    grads = torch.autograd.grad(F.cross_entropy(model(inputs) / 200, labels), weights, create_graph=True)
    curved = torch.autograd.grad(sum((g.detach() * g).sum() for g in grads), weights)
    for score, w, hg in zip(scores.values(), weights, curved, strict=True):
        torch.testing.assert_close(score, (w * hg).detach(), rtol=1e-10, atol=0)


def test_synflow_is_refused_where_flow_is_not_conserved():
    mask = Pruner(build_model("vit", 1, 10), "synflow", 0.5)
    with pytest.raises(ValueError, match="synflow has no meaning for a network with layer normalisation"):
        mask.choose_masks(lambda k: (torch.randn(10 * k, 3, 8, 8), torch.arange(10).repeat(k)))


def test_synflow_conserves_flow_and_prunes_in_a_hundred_rounds():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Linear(8, 3, bias=False)
    )
    net = net.double()
    weights = layers(net)
    scores = synflow(Scored(net, weights, torch.Generator(), lambda k: (torch.randn(k, 6), torch.zeros(k))))
    for before, after in itertools.pairwise(scores.values()):
        torch.testing.assert_close(before.sum(1), after.sum(0), rtol=1e-12, atol=0)  # through every hidden unit
    assert len({round(s.sum().item(), 6) for s in scores.values()}) == 1  # and through every layer: R itself
    product = weights["3"].abs() @ weights["2"].abs() @ weights["0"].abs()
    assert scores["0"].sum().item() == pytest.approx(product.sum().item())
    # The whole method by its definition.
    reference = copy.deepcopy(net)
    w = {n: p.detach().abs() for n, p in layers(reference).items()}
    total = sum(p.numel() for p in w.values())
    for k in range(1, 101):
        a, b, c = w["0"], w["2"], w["3"]
        ones = torch.ones(6, dtype=torch.float64)
        down = (c.sum(0) @ b, c.sum(0), torch.ones(3, dtype=torch.float64))
        up = (ones, a @ ones, b @ (a @ ones))
        s = [w_ * torch.outer(d, u) for w_, d, u in zip((a, b, c), down, up, strict=True)]
        alive = global_reference(s, round(total * 0.1 ** (k / 100)))
        for name, part in zip(w, alive.split([x.numel() for x in s]), strict=True):
            w[name] = w[name] * part.view(w[name].shape)
    mask = Pruner(net, "synflow", 0.9)
    mask.choose_masks(lambda k: (torch.randn(k, 6), torch.zeros(k)))
    assert torch.equal(kept(mask), torch.cat([(x != 0).flatten() for x in w.values()]))


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


@pytest.mark.parametrize(
    ("method", "options", "interval", "moved"),
    [
        ("set", {}, 30, [0.3] * 24),  # each epoch
        ("mest", {}, 150, [0.2] * 17 + [0.1] * 6),  # each five epochs
        ("mest", {"mest_soft": True}, 150, [0.5] * 17 + [0.25] * 6),
        ("rigl", {}, 100, None),
        ("gmp", {}, 100, None),
    ],
)
def test_a_method_changes_masks_when_and_as_much_as_its_paper_says(method, options, interval, moved):
    epochs = 160 if method == "mest" else 200
    pruner = Pruner(Tiny(), method, 0.5, total_steps=30 * epochs, steps_per_epoch=30, **options)
    assert pruner.timing == Timing(30 * epochs, interval, 0.75)
    if moved:
        due = [step for step in range(30 * epochs) if pruner.due(step)][: len(moved)]
        update = METHODS[method].update
        assert [pruner.options["drop_fraction"] * update.decay(pruner.timing.fraction(step)) for step in due] == moved


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


def test_gmp_follows_the_cubic_schedule_and_ends_exactly():
    model, mask, optimizer = build("gmp", 0.8, steps=40, interval=4)
    total = sum(w.numel() for w in layers(model).values())
    reached = []
    train(model, mask, optimizer, 40, on_step=lambda step: reached.append(mask.masks.sparsity()))
    for step, value in enumerate(reached):
        last = 30 if step + 1 >= 30 else (step + 1) // 4 * 4
        expected = 0.8 - 0.8 * (1 - last / 30) ** 3
        assert value == pytest.approx(1 - round((1 - expected) * total) / total, abs=1e-12), step
    assert dead(model) == pytest.approx(0.8, abs=1 / total)
    assert mask.ever_alive_fraction() == 1


CHANGING = ["set", "rigl", "mest", "gmp", "dsr", "snfs", "granet"]


@pytest.mark.parametrize("method", CHANGING)
def test_a_usual_interval_is_shortened_to_twenty_changes_and_said(method):
    said = []
    pruner = Pruner(Tiny(), method, 0.5, total_steps=120, steps_per_epoch=60, warn=said.append)
    (sentence,) = said
    assert sentence.startswith("masks change every 4 steps, 22 times before they stay, from step 90 of 120 on; every ")
    assert [step + 1 for step in range(120) if pruner.due(step)] == [*range(4, 90, 4), 90]
    long = Pruner(Tiny(), method, 0.5, total_steps=10**6, steps_per_epoch=500, warn=said.append)
    assert len(said) == 1
    assert not long.due(98)


@pytest.mark.parametrize("method", CHANGING)
@pytest.mark.parametrize("interval", [15, 100, "1e"])
def test_an_interval_without_a_change_is_refused_by_a_sentence_with_one_that_works(method, interval):
    def pruner(interval):
        return Pruner(Tiny(), method, 0.5, total_steps=20, steps_per_epoch=20, update_interval=interval)

    with pytest.raises(ValueError, match="masks would never change before they stay, from step 15 of 20 on") as error:
        pruner(interval)
    works, changes = map(
        int, re.search(r"take update_interval=(\d+), which gives (\d+) changes", str(error.value)).groups()
    )
    assert sum(pruner(works).due(step) for step in range(14)) == changes
    assert changes == 14


def test_an_interval_in_epochs_is_that_many_steps():
    for interval, first in (("1e", 30), ("0.5e", 15), ("2e", 60), (7, 7)):
        pruner = Pruner(Tiny(), "rigl", 0.5, total_steps=1000, steps_per_epoch=30, update_interval=interval)
        assert next(step + 1 for step in range(1000) if pruner.due(step)) == first


def test_lottery_tickets_go_back_to_the_weights_of_the_rewind_step():
    model, mask, optimizer = build("lth", 0.8, steps=20, lth_rounds=3, lth_rewind=5)
    rewound = {}

    def look(step):
        if step == 4:
            rewound.update({n: t.clone() for n, t in model.state_dict().items()})

    train(model, mask, optimizer, 20, on_step=look)
    total = sum(w.numel() for w in layers(model).values())
    alive = torch.ones(total, dtype=torch.bool)
    for number in (1, 2, 3):
        trained = [w.detach().abs() for w in layers(model).values()]
        alive = global_reference(trained, round(total * 0.2 ** (number / 3)))
        assert mask.next_round(20) == 5
        assert torch.equal(kept(mask), alive)
        for name, tensor in model.state_dict().items():
            m = mask.masks.masks.get(name.removesuffix(".weight"), torch.ones_like(tensor))
            assert torch.equal(tensor, rewound[name] * m.to(tensor.dtype)), name
        assert all(not t.any() for o in mask.optimizers for s in o.state.values() for t in s.values())
        train(model, mask, optimizer, 20, start=5)
    assert mask.next_round(20) == 20
    assert dead(model) == pytest.approx(0.8, abs=1 / total)


def test_learning_rate_rewinding_prunes_the_trained_weights_and_keeps_them():
    model, mask, optimizer = build("lth", 0.8, steps=10, lth_rounds=2, lth_rewind=5, lth_keep_weights=True)
    train(model, mask, optimizer, 10)
    for number in (1, 2):
        trained = [w.detach().clone() for w in layers(model).values()]
        alive = global_reference([w.abs() for w in trained], round(kept(mask).numel() * 0.2 ** (number / 2)))
        assert mask.next_round(10) == 5
        for w, before, part in zip(layers(model).values(), trained, split(alive, trained), strict=True):
            assert torch.equal(w, before * part)
        assert all(not t.any() for o in mask.optimizers for s in o.state.values() for t in s.values())
        train(model, mask, optimizer, 10, start=5)
    assert mask.next_round(10) == 10
    assert not mask.state_dict()["rewound"]


def test_lamp_ranks_trained_weights_by_their_square_over_those_not_smaller():
    model, mask, optimizer = build("lamp", 0.9, steps=4, lth_rounds=1)
    train(model, mask, optimizer, 4)
    with torch.no_grad():
        model.linear.weight[0, :3] = model.linear.weight[0, 3]  # equal ones: the earlier counts as larger
    scores = []
    for w in layers(model).values():
        flat = w.detach().flatten().abs().tolist()
        rank = sorted(range(len(flat)), key=lambda i: (flat[i], -i))  # ascending, as the paper numbers them
        score = torch.zeros(len(flat), dtype=torch.float64)
        for place, index in enumerate(rank):
            score[index] = flat[index] ** 2 / math.fsum(flat[j] ** 2 for j in rank[place:])
        assert score.max() == 1
        scores.append(score)
    assert mask.next_round(4) == 0
    assert torch.equal(kept(mask), global_reference(scores, round(0.1 * kept(mask).numel())))
    assert min(mask.masks.alive().values()) > 0


@pytest.mark.parametrize(
    "method", ["set", "rigl", "mest", "gmp", "lth", "lamp", "dsr", "snfs", "granet", "acdc", "final"]
)
def test_a_method_resumes_bit_for_bit(method):
    options = {"lth": {"lth_rounds": 1, "lth_rewind": 2}, "mest": {"mest_soft": True}}
    options = options.get(method, options["lth"] if METHODS[method].tickets else {})
    runs = []
    for resume in (False, True):
        model, mask, optimizer = build(method, 0.7, interval=4, **options)
        train(model, mask, optimizer, 10)
        if resume:
            saved = copy.deepcopy((model.state_dict(), mask.state_dict(), optimizer.state_dict()))
            model, mask, optimizer = build(method, 0.7, interval=4, seed=0, **options)
            model.load_state_dict(saved[0])
            mask.load_state_dict(saved[1])
            optimizer.load_state_dict(saved[2])
        train(model, mask, optimizer, 20, start=10)
        start = mask.next_round(20)
        train(model, mask, optimizer, 20, start=start)
        runs.append((model, mask))
    for (name, a), b in zip(runs[0][0].state_dict().items(), runs[1][0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert runs[0][1].ever_alive_fraction() == runs[1][1].ever_alive_fraction()


def test_sparsity_by_layer_is_reached_and_unnamed_layers_stay_dense():
    model, mask, _ = build("magnitude", None, layer_sparsity={"conv": 0.75, "classifier": 0.5})
    assert mask.masks.density() == {"conv": 0.25, "linear": 1.0, "classifier": 0.5}
    model, mask, optimizer = build("gmp", None, layer_sparsity={"conv": 0.75, "classifier": 0.5})
    train(model, mask, optimizer, 20)
    assert mask.masks.density() == {"conv": 0.25, "linear": 1.0, "classifier": 0.5}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"layer_sparsity": {"clasifier": 0.5}}, "the nearest name is 'classifier'"),
        ({"layer_sparsity": {"conv": 1.5}}, "sparsity of layer 'conv' has to be"),
        ({"layer_sparsity": {"conv": 0.5}, "sparsity": 0.6}, "the sparsity by layer fixes the sparsity at 0.5"),
        ({"layer_sparsity": {"conv": 0.5}, "distribution": "erk"}, "leaves nothing to distribute"),
        ({"layer_sparsity": {}}, "every layer is to stay dense"),
        ({"pattern": "2:4", "dense_layers": ["*"]}, "every layer is to stay dense"),
        (
            {"layer_sparsity": {"conv": 0.5, "classifier": 0.999}},
            "0.999 leaves layer 'classifier' without a weight: give",
        ),
        ({"method": "gmp", "layer_sparsity": {"linear": 0.9999}}, "0.9999 leaves layer 'linear' without a weight"),
        ({"method": "gmp", "layer_sparsity": {"conv": 0.95}, "pattern": "1x36"}, "without a unit of 36 weights"),
        ({"layer_sparsity": {"conv": 0.5}, "pattern": "channel"}, "part of several layers, which lose it together"),
        ({"pattern": "channel", "sparsity": 0.5, "dense_layers": ["linear"]}, "no channel can be taken out"),
        ({"pattern": "2:4", "sparsity": 0.9}, "pattern 2:4 fixes the sparsity at 0.5"),
        ({"pattern": "2:4", "distribution": "erk"}, "leaves nothing to distribute"),
        ({"pattern": "2:4", "method": "rigl"}, "take 2:4 with gmp"),
        ({"pattern": "fan-in", "sparsity": 0.5, "method": "dsr"}, "cannot keep a constant fan-in"),
        ({"pattern": "4:2", "sparsity": 0.5}, "unknown pattern '4:2'"),
        ({"pattern": "0x1", "sparsity": 0.5}, "unknown pattern '0x1'"),
        (
            {"pattern": "circle", "sparsity": 0.5},
            "choose unstructured, fan-in, kernel, channel, blocks such as 4x1, or N:M",
        ),
        ({"method": "synflow", "sparsity": 0.5, "distribution": "erk"}, "choose global"),
        ({"method": "lth", "sparsity": 0.5, "lth_rewind": 20}, "cannot rewind to step 20"),
        ({"pattern": "1x36", "sparsity": 0.97}, "take a finer pattern"),
        ({"pattern": "channel", "sparsity": 0.97}, "at most 0.9[0-9]+ is possible, or take another pattern"),
        ({"method": "rigl", "sparsity": 0.5, "interval": "1x"}, "or epochs such as 1e, not '1x'"),
        ({"method": "rigl", "sparsity": 0.5, "interval": "0e"}, "or epochs such as 1e, not '0e'"),
        ({"method": "rigl", "sparsity": 0.5, "interval": "1e"}, "give steps_per_epoch, or update_interval as a number"),
        ({"method": "rigl", "sparsity": 0.5, "steps": 1}, "they stay from step 1 of 1 on; train for longer"),
        ({"method": "rigl", "sparsity": 0.5, "drop_fraction": 2}, "drop_fraction has to be above 0 and below 1, not 2"),
        (
            {"method": "rigl", "sparsity": 0.5, "drop_fractoin": 0.2},
            "it has update_interval, stop_update, drop_fraction",
        ),
        ({"method": "random", "sparsity": 0.5, "lth_rounds": 2}, "'random' has no option lth_rounds: it has none"),
    ],
)
def test_impossible_combinations_say_what_would_work(kwargs, words):
    with pytest.raises(ValueError, match=words) as error:
        build(**{"method": "magnitude", "sparsity": None} | kwargs)
    assert "\n" not in str(error.value)
