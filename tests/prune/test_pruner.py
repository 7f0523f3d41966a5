"""Masks, distributions and methods against formulas and counts written out here."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from models import build_model
from prune import EmptyLayerError, Pruner
from prune.masks import Masks
from prune.methods import METHODS, SCORE_ROUNDS, Method
from prune.scores import magnitude


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("resnet", 20, 10)


def layers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def pruned(model: nn.Module, seed: int = 0, **kwargs) -> Pruner:
    pruner = Pruner(model, **kwargs, seed=seed)
    pruner.choose_masks()
    return pruner


@pytest.mark.parametrize("method", ["random", "magnitude"])
@pytest.mark.parametrize("distribution", ["erk", "uniform", "balanced"])
@pytest.mark.parametrize("asked", [0.0, 0.5, 0.9, 0.95, 0.98, 0.123456])
def test_the_asked_sparsity_is_reached_exactly(method, distribution, asked):
    model = resnet()
    pruner = pruned(model, method=method, sparsity=asked, distribution=distribution)
    alive = sum(int(w.count_nonzero()) for w in layers(model).values())
    total = sum(w.numel() for w in layers(model).values())
    assert total == 270_896
    assert alive == round((1 - asked) * total)
    assert pruner.masks.sparsity() == 1 - alive / total
    prunable = {f"{name}.weight" for name in layers(model)}
    for (name, p), fresh in zip(model.named_parameters(), resnet().parameters(), strict=True):
        assert name in prunable or torch.equal(p, fresh), name


def test_uniform_gives_every_layer_the_same_density_to_within_a_weight():
    model = resnet()
    pruned(model, method="random", sparsity=0.9, distribution="uniform")
    for w in layers(model).values():
        assert abs(int(w.count_nonzero()) - 0.1 * w.numel()) < 1


@pytest.mark.parametrize("asked", [0.5, 0.9, 0.98])
def test_erk_follows_its_formula_to_within_a_weight(asked):
    model = resnet()
    shapes = {name: tuple(w.shape) for name, w in layers(model).items()}
    pruned(model, method="random", sparsity=asked, distribution="erk")
    # Density min(1, epsilon * (n_in + n_out + k_h + k_w) / (n_in n_out k_h k_w)), epsilon by bisection on the total.
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    kept = lambda epsilon: sum(min(1, epsilon * raw[n]) * math.prod(shapes[n]) for n in shapes)  # noqa: E731
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < (1 - asked) * 270_896 else (low, middle)
    for name, w in layers(model).items():
        assert abs(int(w.count_nonzero()) - min(1, low * raw[name]) * w.numel()) < 1.01, name


@pytest.mark.parametrize("asked", [0.5, 0.9, 0.98])
def test_balanced_gives_every_layer_the_same_number_of_weights_or_all(asked):
    model = resnet()
    pruned(model, method="random", sparsity=asked, distribution="balanced")
    sizes = [w.numel() for w in layers(model).values()]
    low, high = 0.0, float(max(sizes))  # weights of a layer that is not dense, by bisection on the total
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(min(size, middle) for size in sizes)
        low, high = (middle, high) if kept < (1 - asked) * 270_896 else (low, middle)
    for name, w in layers(model).items():
        assert abs(int(w.count_nonzero()) - min(w.numel(), low)) < 1.01, name


def test_magnitude_keeps_the_largest_weights_of_each_layer():
    model, fresh = resnet(), resnet()
    pruned(model, method="magnitude", sparsity=0.9)
    for w, before in zip(layers(model).values(), layers(fresh).values(), strict=True):
        alive = w != 0
        assert torch.equal(w[alive], before[alive])
        if alive.any() and not alive.all():
            assert before[alive].abs().min() >= before[~alive].abs().max()


def test_global_magnitude_keeps_the_largest_weights_of_the_network():
    model, fresh = resnet(), resnet()
    pruned(model, method="magnitude", sparsity=0.7, distribution="global")
    before = np.concatenate([w.detach().abs().numpy().ravel() for w in layers(fresh).values()])
    after = np.concatenate([w.detach().numpy().ravel() for w in layers(model).values()])
    expected = np.zeros(len(before), bool)
    expected[np.argsort(-before, kind="stable")[: round(0.3 * 270_896)]] = True
    assert ((after != 0) == expected).all()


@pytest.mark.parametrize(
    ("network", "sparsity"),
    [
        (("resnet", 20, 1), 0.98),
        (("vgg", 16, 0.25), 0.98),
        (("wideresnet", 10, 1), 0.98),
        (("mobilenet", 28, 0.5), 0.9),
    ],
)
def test_global_magnitude_keeps_the_classifier_alive(network, sparsity):
    torch.manual_seed(0)
    arch, depth, width = network
    pruner = pruned(build_model(arch, depth, 10, width), method="magnitude", sparsity=sparsity, distribution="global")
    density = pruner.masks.density()
    assert density["classifier"] > (1 - sparsity) / 4
    assert min(density.values()) > 0


def test_ties_go_to_the_earlier_weight():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.init.ones_(model[0].weight)
    pruned(model, method="magnitude", sparsity=0.5)
    assert model[0].weight.flatten().tolist() == [1.0] * 8 + [0.0] * 8


def test_random_masks_follow_from_the_seed_and_not_from_the_weights():
    alive = []
    for model_seed, seed in ((0, 0), (1, 0), (0, 1)):
        model = resnet(model_seed)
        pruned(model, seed, method="random", sparsity=0.9)
        alive.append(torch.cat([(w != 0).flatten() for w in layers(model).values()]))
    assert torch.equal(alive[0], alive[1])
    overlap = (alive[0] & alive[2]).sum() / alive[0].sum()
    assert overlap < 0.3  # chance, and the layers that erk leaves dense


def test_dense_layers_stay_whole_and_the_others_make_up_for_them():
    model = resnet()
    pruner = pruned(model, method="random", sparsity=0.9, dense_layers=["stem", "shortcut", "classifier", "stage1.0.*"])
    whole = {name for name, w in layers(model).items() if w.count_nonzero() == w.numel()}
    named = {"stem.0", "stage2.0.shortcut.0", "stage3.0.shortcut.0", "classifier", "stage1.0.conv1", "stage1.0.conv2"}
    assert whole >= named
    assert sum(int(w.count_nonzero()) for w in layers(model).values()) == round(0.1 * 270_896)
    line = pruner.describe()
    assert "0.9000" in line
    assert "6 layers (8,240 weights) stay dense, the others have 0.9282 (stem: stem.0; shortcut: stage2.0" in line


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, attention, and names of its own: classifier.0 is not the last layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.classifier = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        x = self.depthwise(self.grouped(self.first(x))).flatten(2).transpose(1, 2)
        return self.classifier(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_stem_and_classifier_are_the_first_convolution_and_the_last_layer():
    pruner = Pruner(Grouped(), "random", 0.2, dense_layers=["stem", "classifier", "depthwise", "*.in_proj"])
    assert pruner.dense_layers == {
        "stem": ["first"], "classifier": ["classifier.2"], "depthwise": ["depthwise"], "*.in_proj": ["attention.in_proj"],
    }  # fmt: skip
    linear = Pruner(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), "random", 0.2, dense_layers=["stem"])
    assert linear.budget.dense == {"0"}


@pytest.mark.parametrize("pattern", ["unstructured", "kernel", "1x9999", "4x1", "2:4"])
@pytest.mark.parametrize(
    "method", ["random uniform", "random erk", "random balanced", "snip global", "rigl erk", "gmp uniform"]
)
def test_grouped_convolutions_and_attention_are_pruned_by_every_pattern(method, pattern):
    torch.manual_seed(0)
    (name, distribution), model = method.split(), Grouped()
    if pattern == "2:4" and name == "rigl":
        pytest.skip("refused: it moves weights one by one")
    options = {"update_interval": 1} if name in ("rigl", "gmp") else {}
    budget = {} if pattern == "2:4" else {"sparsity": 0.5, "distribution": distribution}
    pruner = Pruner(model, name, pattern=pattern, total_steps=8, warn=lambda text: None, **budget, **options)
    pruner.choose_masks(lambda k: (torch.randn(10 * k, 3, 9, 9), torch.arange(10).repeat(k)))
    for step in range(8):
        model.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 3, 9, 9)), torch.arange(8)).backward()
        pruner.mask_gradients(step)
        pruner.update_masks(step)
        pruner.check_layers()
    total = sum(w.numel() for w in pruner.masks.weights.values())
    if pattern == "2:4":  # a depthwise filter has one input and stays whole
        kept = dict.fromkeys(pruner.masks.masks, 0.5) | {"depthwise": 1, "first": 2 / 3}
        assert pruner.masks.density() == pytest.approx(kept)
    else:
        unit = {"unstructured": 1, "4x1": 4, "kernel": 9, "1x9999": 144}[pattern]
        assert abs(pruner.masks.sparsity() - 0.5) * total <= 6 * unit / 2
    assert (pruner.masks.weights["attention.in_proj"] == 0).sum() > 0


class Depthwise(nn.Module):
    """Two convolutions that see one channel each, under names of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 8, 1)  # one channel of one: no depthwise convolution
        self.second = nn.Conv2d(8, 8, 3, groups=8)
        self.third = nn.Conv2d(8, 16, 3, groups=8)

    def forward(self, x):
        return self.third(self.second(self.first(x))).mean((2, 3))


@pytest.mark.parametrize("method", ["magnitude", "gmp"])
def test_depthwise_filters_without_a_weight_are_counted_and_told_and_can_be_kept(method):
    said = []
    model = Depthwise()
    with torch.no_grad():
        model.second.weight[:3] *= 1e-6  # filters that no ranking keeps
    options = {"update_interval": 1} if method == "gmp" else {}
    pruner = Pruner(model, method, 0.5, "uniform", total_steps=8, warn=said.append, **options)
    pruner.choose_masks(lambda k: (torch.randn(k, 1, 9, 9), torch.zeros(k)))
    for step in range(8):
        pruner.update_masks(step)
        pruner.check_layers()
    empty = sum(int((w.flatten(1).abs().amax(1) == 0).sum()) for w in (model.second.weight, model.third.weight))
    assert empty >= 3
    (sentence,) = (words for words in said if "depthwise filters" in words)
    assert sentence.startswith(f"{empty} of 24 depthwise filters have no weight")
    assert f"; {empty + int((model.first.weight == 0).sum())} of 32 filters have no weight" in pruner.describe()
    kept = Pruner(Depthwise(), "random", 0.01, dense_layers=["depthwise"])
    assert kept.budget.dense == {"second", "third"}
    saved, told = pruner.state_dict(), []  # a resumed run that has no change of masks before it tells it, too
    again = Pruner(model, method, 0.5, "uniform", total_steps=8, warn=told.append, **options)
    again.load_state_dict(saved)
    again.check_layers()
    assert [words for words in told if "depthwise filters" in words] == [sentence]


def test_masks_that_others_put_in_place_are_the_ones_looked_at():
    pruner = Pruner(Depthwise())
    pruner.masks.set({"second": torch.zeros_like(pruner.masks.weights["second"])})
    loaded, other = Pruner(pruner.model), Masks.of(pruner.model)
    other.set(pruner.masks.state_dict())
    loaded.masks = other
    with pytest.raises(EmptyLayerError, match="layer 'second' without a weight"):
        loaded.check_layers()


def test_the_method_none_changes_nothing():
    model, fresh = resnet(), resnet()
    pruner = pruned(model)
    pruner.mask_gradients(0)
    pruner.update_masks(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert pruner.masks.sparsity() == 0


def test_dead_weights_get_no_gradient_and_stay_zero():
    model = resnet().to(memory_format=torch.channels_last)
    pruner = pruned(model, method="random", sparsity=0.9)
    model.classifier.weight.requires_grad_(False)  # a layer without a gradient does no harm
    dead = {name: w == 0 for name, w in layers(model).items()}
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    pruner.mask_gradients(0)
    for name, w in layers(model).items():
        if w.grad is not None:
            assert (w.grad[dead[name]] == 0).all()
            assert (w.grad[~dead[name]] != 0).any()
    with torch.no_grad():
        for w in layers(model).values():
            w += 1
    pruner.mask_weights()
    pruner.update_masks(7)
    for name, w in layers(model).items():
        assert torch.equal(w == 0, dead[name])


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 2))])
def test_masks_of_another_network_are_refused(model):
    state = pruned(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), method="random", sparsity=0.5).state_dict()
    with pytest.raises(ValueError, match="the mask of '.' is of another network"):
        pruned(model, method="random", sparsity=0.5).load_state_dict(state)


def test_masks_survive_a_round_trip_through_a_state_dict():
    pruner = pruned(resnet(), method="random", sparsity=0.9)
    other = resnet()
    loaded = Pruner(other, "random", 0.9)
    loaded.load_state_dict(pruner.state_dict())
    assert loaded.masks.alive() == pruner.masks.alive()
    masks = pruner.state_dict()["masks"]
    assert all(m.dtype == torch.bool for m in masks.values())
    assert all((w[~masks[name]] == 0).all() for name, w in layers(other).items())


def test_a_shared_weight_counts_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    pruner = pruned(nn.Sequential(first, second), method="random", sparsity=0.5)
    assert pruner.masks.alive() == {"0": 8}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"method": "lottery", "sparsity": 0.9}, "choose one of none, random, magnitude"),
        ({"method": "random"}, "needs a sparsity"),
        ({"method": "none", "sparsity": 0.9}, "name another one"),
        ({"method": "none", "layer_sparsity": {"classifier": 0.5}}, "name another one"),
        ({"method": "force", "sparsity": 0.9, "score_rounds": "3"}, "score_rounds has to be a number, not '3'"),
        ({"method": "random", "sparsity": 1.0}, "at least 0 and less than 1"),
        ({"method": "random", "sparsity": -0.1}, "at least 0 and less than 1"),
        ({"method": "random", "sparsity": float("nan")}, "at least 0 and less than 1"),
        ({"method": "random", "sparsity": 0.9, "distribution": "global"}, "choose erk or uniform"),
        ({"method": "random", "sparsity": 0.99999}, "at most 0.9998 is possible"),
        ({"method": "force", "sparsity": 0.5, "pattern": "channel"}, "take iter-snip, or another pattern"),
        ({"method": "random", "sparsity": 0.995, "distribution": "erk", "dense_layers": ["stage3.*"]}, "at most 0.2"),
        ({"method": "random", "sparsity": 0.9995, "distribution": "uniform"}, "without a weight"),
        ({"method": "random", "sparsity": 0.98, "distribution": "uniform", "pattern": "1x9999"}, "without a weight"),
        (
            {"method": "random", "sparsity": 0.9999, "pattern": "channel"},
            "too high for channels: each group of them keeps",
        ),
        ({"method": "random", "sparsity": 0.9, "dense_layers": ["steam"]}, "matches 'steam'"),
        ({"method": "random", "sparsity": 0.0, "dense_layers": ["*"]}, "every layer is to stay dense"),
    ],
)
def test_impossible_masks_are_refused_with_one_sentence(kwargs, words):
    with pytest.raises(ValueError, match=words) as error:
        pruned(resnet(), **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["unstructured", "kernel"])
def test_rounds_of_a_score_that_is_pooled_by_its_norm_end_at_the_masks_of_one(monkeypatch, pattern):
    monkeypatch.setitem(METHODS, "slow", Method("in rounds", score=magnitude, options=(SCORE_ROUNDS,)))
    masks = []
    for method, options in (("magnitude", {}), ("slow", {"score_rounds": 4})):
        torch.manual_seed(0)
        model = build_model("resnet", 8, 10, 0.5)
        pruner = Pruner(model, method, 0.6, "uniform", pattern=pattern, **options)
        pruner.choose_masks(lambda k: (torch.randn(10 * k, 3, 8, 8), torch.arange(10).repeat(k)))
        masks.append(pruner.masks.masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


@pytest.mark.parametrize("method", ["iter-snip", "synflow"])
def test_rounds_with_channels_drop_those_without_a_score(method):
    """A living channel has weights that died with channels before it: they may not decide about it."""
    torch.manual_seed(0)
    model = build_model("resnet", 8, 10, 0.5)
    first = model.stage1[0].conv1.weight
    with torch.no_grad():
        first[:4] = 0  # those that a ranking of equals keeps
    pruner = Pruner(model, method, 0.5, pattern="channel", score_rounds=3)
    pruner.choose_masks(lambda k: (torch.randn(10 * k, 3, 8, 8), torch.arange(10).repeat(k)))
    kept = pruner.masks.masks["stage1.0.conv1"].flatten(1).any(1)
    assert not kept[:4].any()
    assert kept.any()
