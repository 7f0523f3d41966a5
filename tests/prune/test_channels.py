"""Groups of channels: which there are, and how many of them go."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from prune import Pruner
from prune.channels import channel_groups

FAMILIES = {
    "resnet": ("resnet", 20, 1),
    "bottleneck": ("resnet", 50, 0.25),
    "wideresnet": ("wideresnet", 16, 1),
    "vgg": ("vgg", 16, 0.25),
    "mobilenet": ("mobilenet", 28, 0.25),
    "vit": ("vit", 2, 1 / 3),
}


def network(family, seed=0):
    arch, depth, width = FAMILIES[family]
    torch.manual_seed(seed)
    return build_model(arch, depth, 10, width)


def members(group):
    return group.writers, group.readers, group.norms


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("resnet", [16] * 4 + [32] * 4 + [64] * 4),  # each stage: what blocks add to, and the inside of three blocks
        ("bottleneck", [16] * 7 + [64] + [32] * 8 + [128] + [64] * 12 + [256] + [128] * 6 + [512]),
        ("wideresnet", [16] * 3 + [32] * 3 + [64] * 3),
        ("vgg", [16] * 2 + [32] * 2 + [64] * 3 + [128] * 6),
        ("mobilenet", [8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256]),
        ("vit", [256, 256]),  # hidden channels: attention's heads and what layer normalisation mixes stay
    ],
)
def test_each_family_has_its_groups_of_channels(family, sizes):
    assert sorted(group.size for group in channel_groups(network(family))) == sorted(sizes)


def test_a_residual_path_is_one_group_of_all_that_writes_and_reads_it():
    groups = {group.name: members(group) for group in channel_groups(network("resnet"))}
    blocks = ["stage1.0", "stage1.1", "stage1.2"]
    assert groups["stem.0"] == (
        ("stem.0", *(f"{block}.conv2" for block in blocks)),
        (*(f"{block}.conv1" for block in blocks), "stage2.0.conv1", "stage2.0.shortcut.0"),
        ("stem.1", *(f"{block}.bn2" for block in blocks)),
    )
    assert groups["stage1.0.conv1"] == (("stage1.0.conv1",), ("stage1.0.conv2",), ("stage1.0.bn1",))


def test_a_depthwise_convolution_goes_with_the_channels_that_it_filters():
    groups = {group.name: members(group) for group in channel_groups(network("mobilenet"))}
    assert groups["stem.0"][0] == ("stem.0", "blocks.0.depthwise.0")
    assert groups["stem.0"][1] == ("blocks.0.pointwise.0",)


def test_dense_stem_shortcuts_and_classifier_leave_the_inner_channels_alone():
    pruner = Pruner(
        network("resnet"), "random", 0.7, pattern="channel", dense_layers=["stem", "shortcut", "classifier"]
    )
    assert {name.split(".")[-1] for name in pruner.pattern.groups} == {"conv1"}


class Net(nn.Module):
    """Two convolutions with something between them, which `between` says."""

    def __init__(self, between, inputs=8, **layers):
        super().__init__()
        self.first, self.second, self.between = nn.Conv2d(3, 8, 3), nn.Conv2d(inputs, 4, 1), between
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.second(self.between(self, self.first(x))).mean((2, 3))


class Centred(nn.Conv2d):
    """A convolution whose weights are centred over the inputs, so that a dead input counts."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


@pytest.mark.parametrize(
    ("between", "layers"),
    [
        (lambda net, x: x.softmax(1), {}),
        (lambda net, x: net.norm(x), {"norm": nn.GroupNorm(2, 8)}),
        (lambda net, x: net.mix(x), {"mix": nn.Conv2d(8, 8, 3, groups=2)}),
        (lambda net, x: net.wide(x), {"wide": nn.Conv2d(8, 8, 3, groups=8), "inputs": 8}),
        (lambda net, x: torch.cat([x, x], 1), {"inputs": 16}),
        (lambda net, x: x + x.shape[1], {}),
        (lambda net, x: x + net.constant, {"constant": nn.Parameter(torch.ones(8, 1, 1))}),
        (lambda net, x: x.flip(1), {}),
        (lambda net, x: net.after(x.flip(1)), {"after": nn.Conv2d(8, 8, 3, groups=8)}),
        (lambda net, x: x.transpose(2, 3), {}),
        (lambda net, x: net.twice(net.twice(x)), {"twice": nn.Conv2d(8, 8, 1)}),
        (lambda net, x: x * net.gate(x.mean((2, 3))).sigmoid()[..., None, None], {"gate": nn.Linear(8, 8)}),
        (lambda net, x: x + net.first.weight.mean(), {}),
        (lambda net, x: net.own(x), {"own": Centred(8, 8, 1)}),
        (lambda net, x: x + x[0].mean(), {}),
    ],
    ids=[
        "softmax",
        "group norm",
        "groups",
        "depthwise",
        "cat",
        "count",
        "constant",
        "flip",
        "then depthwise",
        "transpose",
        "twice",
        "gate",
        "weight by itself",
        "own convolution",
        "one image",
    ],
)
def test_what_may_mix_channels_keeps_them(between, layers):
    groups = channel_groups(Net(between, **layers))
    assert len(groups) == ("wide" in layers)
    for group in groups:
        assert "wide" in group.writers


def test_a_shared_weight_keeps_its_channels():
    model = Net(lambda net, x: net.third(x), third=nn.Conv2d(8, 8, 1), fourth=nn.Conv2d(8, 8, 1))
    assert len(channel_groups(model)) == 2
    model.third.weight = model.fourth.weight
    assert channel_groups(model) == []


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1),
        lambda x: torch.flatten(F.max_pool2d(x, 3), 1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: F.relu(x).mean((2, 3)),
        nn.Sequential(nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    ],
)
def test_channels_are_followed_through_flattened_maps(flat):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.flat = nn.Conv2d(3, 5, 1), flat
            with torch.no_grad():
                inputs = flat(self.conv(torch.ones(1, 3, 6, 6))).shape[1]
            self.classifier = nn.Linear(inputs, 4)

        def forward(self, x):
            return self.classifier(self.flat(self.conv(x)))

    (group,) = channel_groups(Flat())
    assert members(group) == (("conv",), ("classifier",), ())


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(6, 8), nn.Conv1d(8, 8, 1, groups=8), nn.Linear(8, 4)],
        [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)],
        [nn.Conv2d(3, 4, 1), nn.Flatten(1, 2), nn.Linear(4, 2)],
    ],
    ids=["depthwise over tokens", "norm over tokens", "flattened in part"],
)
def test_what_lies_along_another_dimension_is_not_taken_for_channels(layers):
    assert channel_groups(nn.Sequential(*layers)) == []


def test_flattening_some_dimensions_by_keyword_ends_the_channels():
    assert channel_groups(Net(lambda net, x: net.linear(x.flatten(1, end_dim=2)), linear=nn.Linear(8, 8))) == []


def test_a_network_that_reads_other_channels_in_evaluation_is_refused():
    model = Net(lambda net, x: x if net.training else net.extra(x), extra=nn.Conv2d(8, 8, 1)).eval()
    with pytest.raises(ValueError, match="other channels in training than in evaluation"):
        channel_groups(model)
    assert not any(module.training for module in model.modules())


def test_masks_of_filters_alone_are_not_taken_for_those_of_channels():
    pruner = Pruner(network("resnet"), "random", 0.5, pattern="channel")
    pruner.choose_masks()
    state = pruner.state_dict()
    state["masks"] = {name: mask for name, mask in state["masks"].items() if name in pruner.masks.weights}
    with pytest.raises(ValueError, match="filters alone"):
        Pruner(network("resnet"), "random", 0.5, pattern="channel").load_state_dict(state)


def test_a_linear_layer_on_flattened_maps_goes_with_its_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert [members(group) for group in channel_groups(model)] == [(("0",), ("2",), ()), (("2",), ("4",), ("3",))]


def test_a_network_that_cannot_be_traced_is_refused():
    model = Net(lambda net, x: x if x.sum() > 0 else -x)
    with pytest.raises(ValueError, match="torch.fx cannot trace it .*take another pattern"):
        Pruner(model, "random", 0.5, pattern="channel")


METHODS_AT_ONCE = [
    ("random", "erk"),
    ("random", "uniform"),
    ("random", "balanced"),
    ("magnitude", "global"),
    ("synflow", "global"),
]


@pytest.mark.parametrize(("method", "distribution"), METHODS_AT_ONCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sparsity_is_reached_to_within_a_channel(family, method, distribution):
    if method == "synflow" and family != "wideresnet":
        pytest.skip("it has no meaning in a ViT, and its hundred rounds take their time elsewhere")
    model = network(family)
    asked = 0.5 if family == "vit" else 0.7
    pruner = Pruner(model, method, asked, distribution, pattern="channel", warn=lambda words: None)
    pruner.choose_masks(lambda k: (torch.randn(10 * k, 3, 8, 8), torch.arange(10).repeat(k)))
    alive = pruner.masks.alive()
    unit = 0  # the most that goes with a channel
    for group in pruner.pattern.groups.values():
        shapes = {name: pruner.masks.weights[name].shape for name in (*group.writers, *group.readers)}
        unit = max(unit, sum(shape.numel() // group.size for shape in shapes.values()))
    total = sum(w.numel() for w in pruner.masks.weights.values())
    assert abs(total - sum(alive.values()) - asked * total) <= unit
    assert min(alive.values()) > 0


def test_uniform_gives_every_group_the_same_share_of_its_channels():
    model = network("vgg")
    pruner = Pruner(model, "random", 0.7, "uniform", pattern="channel")
    kept = {names[0]: count for names, count in pruner.budget.counts(0.7).items()}
    shares = [kept[name] / group.size for name, group in pruner.pattern.groups.items()]
    assert max(abs(share - 0.3**0.5) for share in shares) < 0.5 / 16 + 0.01


@pytest.mark.parametrize("distribution", ["erk", "balanced"])
def test_shares_follow_their_formula_for_the_layers_of_a_group_together(distribution):
    pruner = Pruner(network("vgg"), "random", 0.9, distribution, pattern="channel")
    kept = {names[0]: count for names, count in pruner.budget.counts(0.9).items()}
    ratios = []
    for name, group in pruner.pattern.groups.items():
        shapes = [pruner.masks.weights[layer].shape for layer in (*group.writers, *group.readers)]
        dimensions = sum(map(sum, shapes)) if distribution == "erk" else 1
        raw = dimensions / sum(shape.numel() for shape in shapes)
        if 1 < kept[name] < group.size:
            ratios.append((kept[name] / group.size / raw, 0.5 / group.size / raw))
    assert len(ratios) > 5
    assert max(value - slack for value, slack in ratios) <= min(value + slack for value, slack in ratios)


def test_a_higher_sparsity_never_keeps_more_channels_of_a_group():
    pruner = Pruner(network("resnet"), "random", 0.5, "erk", pattern="channel")
    counts = [pruner.budget.counts(sparsity / 100) for sparsity in range(99)]
    for name in pruner.pattern.groups:
        kept = [count[name,] for count in counts]
        assert kept == sorted(kept, reverse=True)
    assert counts[0] == {(name,): group.size for name, group in pruner.pattern.groups.items()}


@pytest.mark.parametrize(("family", "sparsity"), [("vit", 0.7), ("vgg", 0.9999)])
def test_a_sparsity_that_channels_cannot_reach_is_refused_with_one_that_they_can(family, sparsity):
    with pytest.raises(ValueError, match=r"at most [\d.]+ is possible, or take another pattern") as error:
        Pruner(network(family), "random", sparsity, pattern="channel")
    assert ("layers all of theirs" in str(error.value)) == (family == "vit")
    highest = float(str(error.value).split("at most ")[1].split()[0])
    assert abs(Pruner(network(family), "random", highest, pattern="channel").budget.sparsity - highest) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_a_dead_channel_is_zero_after_its_batch_norm_and_nothing_reads_it(family, training):
    model = network(family)
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.3, 1)
    pruner = Pruner(model, "random", 0.5, "uniform", pattern="channel")
    pruner.choose_masks()
    seen, modules = {}, dict(model.named_modules())
    alive = {name: share > 0 for name, share in pruner.pattern.pool(pruner.masks.masks).items()}
    for group in pruner.pattern.groups.values():
        for name in group.norms or group.writers:
            modules[name].register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
    model.train(training)(torch.randn(4, 3, 32, 32))
    for group in pruner.pattern.groups.values():
        dead = ~alive[group.name]
        assert dead.any()
        assert alive[group.name].any()
        for name in group.norms or group.writers:
            output = seen[name].movedim(-1, 1) if family == "vit" else seen[name]
            assert not output[:, dead].any()
            assert output[:, ~dead].any()
        for name in group.readers:
            assert not modules[name].weight.unflatten(1, (group.size, -1))[:, dead].any()
