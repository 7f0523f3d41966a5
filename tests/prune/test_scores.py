"""Which weights each score keeps, against references written out here."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_network import CLASSES, Tiny, build, global_reference, kept, layers, sample, split, train
from torch import nn

from models import build_model
from prune import METHODS, Pruner
from prune.scores import Scored, grasp, synflow


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


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].score])
def test_scoring_changes_neither_weights_nor_statistics_nor_gradients(method):
    model, fresh = Tiny(), Tiny()
    mask = Pruner(model, method, 0.5, total_steps=8000, steps_per_epoch=10)
    mask.choose_masks(sample)
    for (name, now), before in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        alive = mask.masks.masks.get(name.removesuffix(".weight"), torch.ones_like(now))
        assert torch.equal(now, before * alive.to(now.dtype)), name
    assert all(p.grad is None for p in model.parameters())
    assert model.training


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


def test_iterative_snip_brings_no_weight_back_where_living_ones_score_0():
    torch.manual_seed(0)
    widths = (10, 7, 13, 31, 2)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())][:-1]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[2].bias[:6] = -9  # these units are never at work: their weights have no gradient
    pruner = Pruner(model, "iter-snip", 0.4, "uniform", score_rounds=40)
    living = []

    def images(per_class):  # asked for in each round, when what the last one pruned is 0
        living.append([layer.weight != 0 for layer in model[::2]])
        return torch.randn(2 * per_class, 10), torch.arange(2).repeat(per_class)

    pruner.choose_masks(images)
    living.append([layer.weight != 0 for layer in model[::2]])
    assert sum(int(alive.sum()) for alive in living[-2]) > sum(int(alive.sum()) for alive in living[-1])
    for before, after in itertools.pairwise(living):
        assert not any((now & ~then).any() for then, now in zip(before, after, strict=True))


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


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False), nn.RMSNorm([3, 3])]
)
def test_synflow_is_refused_with_normalisation_by_the_input(norm):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(
        ValueError, match=f"no meaning for a network with {type(norm).__name__}, which normalises by the input"
    ):
        Pruner(model, "synflow", 0.5).choose_masks(lambda k: (torch.randn(2, 1, 5, 5), torch.arange(2)))


def test_synflow_is_refused_where_a_network_converts_to_float32():
    class Converts(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1).float())

    with pytest.raises(ValueError, match="synflow computes in float64, in which this network does not"):
        Pruner(nn.Sequential(Converts(4, 4), nn.Linear(4, 2)), "synflow", 0.5).choose_masks(
            lambda k: (torch.randn(2, 1, 2, 2), torch.arange(2))
        )


def test_synflow_is_refused_where_flow_is_not_conserved():
    mask = Pruner(build_model("vit", 1, 10), "synflow", 0.5)
    with pytest.raises(ValueError, match="synflow has no meaning for a network with LayerNorm"):
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


@pytest.mark.parametrize("method", ["snip", "iter-snip", "force", "grasp", "synflow"])
def test_frozen_layers_are_scored_as_others_and_unused_ones_go_first(method):
    whole, frozen = Tiny(), Tiny()
    frozen.linear.requires_grad_(False)
    masks = [Pruner(model, method, 0.5) for model in (whole, frozen)]
    for mask in masks:
        mask.choose_masks(sample)
    for name, expected in masks[0].masks.masks.items():
        assert torch.equal(masks[1].masks.masks[name], expected)
    assert not frozen.linear.weight.requires_grad
    unused = Tiny()
    unused.spare = nn.Linear(3, 3).double()
    mask = Pruner(unused, method, 0.5, warn=lambda words: None)
    mask.choose_masks(sample)
    if method != "grasp":  # whose scores have both signs
        assert not mask.masks.masks["spare"].any()
