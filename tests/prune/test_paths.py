"""Layers without a weight: allowed where other layers lead from the input to the output, refused where none do."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from prune import EmptyLayerError, Pruner
from prune.masks import prunable_weights, select_layers
from prune.paths import reaches_output, weights_on_paths

NETWORKS = {"basic": ("resnet", 8, 0.5), "bottleneck": ("resnet", 50, 0.125), "wide": ("wideresnet", 10, 0.5)}


def sample(per_class):
    return torch.randn(10 * per_class, 3, 16, 16), torch.arange(10).repeat(per_class)


def emptied(network, patterns, warn=warnings.warn):
    """A network and its Pruner, whose layers of these names are too small for a ranking by magnitude to keep any weight."""
    torch.manual_seed(0)
    model = build_model(*NETWORKS[network][:2], 10, NETWORKS[network][2])
    weights = prunable_weights(model)
    names = set().union(*select_layers(list(weights), patterns).values())
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(torch.rand_like(weight) + 1)
            if name in names:
                weight.mul_(1e-6)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    sparsity = sum(sizes[name] for name in names) / sum(sizes.values())
    return model, Pruner(model, "magnitude", sparsity, "global", warn=warn), names


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("patterns", [["shortcut"], ["conv1"], ["conv2"], ["stage2.0.conv1", "stage3.0.shortcut*"]])
def test_empty_layers_beside_a_living_path_are_a_warning_that_names_them(network, patterns):
    said = []
    model, pruner, names = emptied(network, patterns, said.append)
    pruner.choose_masks(sample)
    assert {name for name, count in pruner.masks.alive().items() if count == 0} == names
    sentence, *collapse = said  # the other layers of the blocks are cut off with these
    assert len(collapse) == any(pattern.startswith("conv") for pattern in patterns)
    listed = re.fullmatch(r"no weight is left in (.*); other layers still lead from the input to the output", sentence)[
        1
    ]
    first = [name for name in pruner.masks.weights if name in names][:5]
    assert listed.startswith(", ".join(first))
    assert listed.endswith(f" and {len(names) - 5} other layers") == (len(names) > 5)
    inputs, labels = sample(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        nn.functional.cross_entropy(model(inputs), labels).backward()
        pruner.mask_gradients(step)
        optimizer.step()
        pruner.mask_weights()
        pruner.check_layers()
    assert len(said) == 1 + len(collapse)  # once a layer
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("patterns", [["stem*"], ["classifier"], ["stage2.0.*"]])
def test_a_network_without_a_path_is_refused(network, patterns):
    _, pruner, names = emptied(network, patterns)
    first = next(name for name in pruner.masks.weights if name in names)
    with pytest.raises(
        EmptyLayerError, match=f"'{first}' without a weight: no path leads from the input to the output"
    ):
        pruner.choose_masks(sample)


class Shift(nn.Module):
    """Adds what it has learned, which leads on to the output without the input."""

    def __init__(self, value=1.0, size=2):
        super().__init__()
        self.shift = nn.Parameter(torch.full((size,), value))

    def forward(self, x):
        return x + self.shift


@pytest.mark.parametrize("between", [nn.ReLU, Shift])
def test_a_path_that_is_cut_between_layers_is_refused_although_none_is_empty(between):
    model = nn.Sequential(nn.Linear(2, 2), between(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 2.0], [0.1, 0.1]]))  # feeds the first unit
        model[2].weight.copy_(torch.tensor([[0.1, 2.0], [0.1, 2.0]]))  # reads the second
        model[0].bias.fill_(1)
    pruner = Pruner(model, "magnitude", 0.5, "uniform")
    with pytest.raises(EmptyLayerError, match="leaves no path of weights through the network: take sparsity="):
        pruner.choose_masks(lambda k: (torch.randn(k, 2), torch.zeros(k)))


@pytest.mark.parametrize("shift", [-1.0, -0.3, 0.0, 1.0])
def test_a_learned_shift_hides_no_path(shift):
    torch.manual_seed(0)
    figures = []
    for between in (nn.Identity(), Shift(shift, 64)):
        model = nn.Sequential(nn.Linear(20, 64), between, nn.ReLU(), nn.Linear(64, 3))
        with torch.no_grad():
            for weight, seed in ((model[0].weight, 1), (model[3].weight, 2)):
                weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)))
        pruner = Pruner(model, "magnitude", 0.5, "uniform")
        pruner.choose_masks(lambda k: (torch.randn(k, 20), torch.zeros(k)))
        figures.append(pruner.figures())
    assert figures[0] == figures[1]


POOLS = {
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "module": nn.MaxPool2d(2),
    "with a stride": nn.MaxPool2d(2, stride=2, padding=0, ceil_mode=True),
    "adaptive": lambda x: F.adaptive_max_pool2d(x, x.shape[-1] // 2),
    "adaptive module": lambda x: nn.AdaptiveMaxPool2d(x.shape[-1] // 2)(x),
    "average": lambda x: F.avg_pool2d(x, 2),
}


@pytest.mark.parametrize("name", POOLS)
def test_however_the_largest_value_is_taken_all_that_it_may_be_lie_on_paths(name):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))
            self.classifier = nn.Linear(16, 3)

        def forward(self, x):
            for layer in self.layers:
                x = POOLS[name](layer(x).relu())
            return self.classifier(x.flatten(1))

    torch.manual_seed(0)
    pruner = Pruner(Network(), "random", 0.5, "uniform", seed=0)
    pruner.choose_masks(lambda k: (torch.randn(k, 3, 8, 8), torch.zeros(k)))
    assert pruner.figures()["effective_sparsity"] == pytest.approx(0.5177, abs=1e-4)  # some see padding alone


class Tokens(nn.Module):
    """A class token that attends to wide tokens: a softmax of large scores has no slope."""

    def __init__(self, attention):
        super().__init__()
        width = 768
        self.stem, self.kind = nn.Linear(16, width), attention
        self.token = nn.Parameter(torch.ones(1, 1, width))
        if "first" in attention:
            self.mix = nn.MultiheadAttention(width, 12, batch_first=attention == "batch first")
        else:
            self.mix = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        if self.kind == "batch first":
            x = self.mix(x, x, x, need_weights=False)[0]
        elif self.kind == "tokens first":
            x = x.transpose(0, 1)
            x = self.mix(x, x, x)[0].transpose(0, 1)
        else:
            q, k, v = self.mix(x).chunk(3, -1)
            if self.kind == "by hand":
                x = (q @ k.transpose(1, 2)).softmax(-1) @ v
            else:
                x = F.scaled_dot_product_attention(q, k, v)
        return self.head(x[:, 0])


class AttentionPool(nn.Module):
    """Queries and keys from layers, and torch's function for all else: what CLIP's ResNets end in."""

    def __init__(self):
        super().__init__()
        self.stem, self.q, self.k, self.v, self.c = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x):
        x = self.stem(x).transpose(0, 1)
        weights = {
            f"{name}_proj_weight": layer.weight for name, layer in zip("qkv", (self.q, self.k, self.v), strict=True)
        }
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        pooled, _ = F.multi_head_attention_forward(
            x[:1], x, x, 16, 2, None, bias, None, None, False, 0.0, self.c.weight, self.c.bias, use_separate_proj_weight=True,
            **weights,
        )  # fmt: skip
        return pooled[0]


def test_no_weight_before_an_attention_that_is_one_function_is_called_idle():
    model = AttentionPool()
    masks = {name: torch.ones_like(weight) for name, weight in prunable_weights(model).items()}
    assert weights_on_paths(model, masks, (5, 16)) == {}
    assert reaches_output(model, masks, (5, 16))


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return torch.sigmoid(x / self.value)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["parametrization", "hook", "temperature"])
def test_networks_that_divide_by_parameters_have_paths(kind, seed):
    torch.manual_seed(seed)
    norm = {"parametrization": nn.utils.parametrizations.spectral_norm, "hook": nn.utils.spectral_norm}.get(kind)
    layers = [nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)]
    first = norm(layers[0]) if norm else nn.Sequential(layers[0], Temperature())
    model = nn.Sequential(first, nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    masks = {name: torch.ones_like(weight) for name, weight in prunable_weights(model).items()}
    assert reaches_output(model, masks, (12,))


@pytest.mark.parametrize("attention", ["batch first", "tokens first", "by hand", "scaled"])
def test_attention_leads_on_from_all_values(attention):
    torch.manual_seed(0)
    model = Tokens(attention)
    pruner = Pruner(model, "random", 0.1)
    pruner.choose_masks(lambda k: (torch.randn(k, 4, 16), torch.zeros(k)))
    assert "effective_sparsity" not in pruner.figures()
    (projection,) = (mask for mask in pruner.masks.masks.values() if len(mask) == 3 * 768)
    projection[2 * 768 :] = 0  # that of the values: nothing is left that scores could choose from
    assert not reaches_output(model, pruner.masks.masks, (4, 16))


def test_without_a_sample_an_empty_layer_is_refused_and_the_sentence_asks_for_one():
    _, pruner, _ = emptied("basic", ["shortcut"])
    with pytest.raises(EmptyLayerError, match="give choose_masks a sample"):
        pruner.choose_masks()


def test_a_path_through_hundreds_of_sparse_layers_is_found():
    torch.manual_seed(0)
    layers = [nn.Linear(100, 100, bias=False) for _ in range(300)]
    model = nn.Sequential(*layers, nn.Linear(100, 3))
    pruner = Pruner(model, "magnitude", 0.9, "uniform")
    pruner.choose_masks(lambda k: (torch.randn(k, 100), torch.zeros(k)))
    assert pruner.masks.sparsity() == pytest.approx(0.9, abs=1e-3)


def test_a_transformer_whose_blocks_are_empty_lives_by_its_residual_path():
    torch.manual_seed(0)
    said = []
    for layer, fits in (("blocks", True), ("stem", False)):
        model = build_model("vit", 2, 10, 1 / 3)
        weights = prunable_weights(model)
        names = {name for name in weights if name.startswith(layer)}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_((torch.rand_like(weight) + 1) * (1e-6 if name in names else 1))
        share = sum(weights[name].numel() for name in names) / sum(weight.numel() for weight in weights.values())
        pruner = Pruner(model, "oneshot", share, "global", warn=said.append)
        if fits:
            pruner.choose_masks(sample)
        else:
            with pytest.raises(EmptyLayerError, match="'stem' without a weight: no path"):
                pruner.choose_masks(sample)
    assert len(said) == 1


def test_lottery_tickets_train_on_where_a_shortcut_is_empty_and_after_a_resume():
    said = []
    model, _, names = emptied("basic", ["shortcut"])
    sizes = {name: weight.numel() for name, weight in prunable_weights(model).items()}
    sparsity = sum(sizes[name] for name in names) / sum(sizes.values())
    first = Pruner(model, "lth", sparsity, "global", lth_rounds=1, warn=said.append)
    first.choose_masks(sample)
    again = Pruner(model, "lth", sparsity, "global", lth_rounds=1, warn=said.append)
    again.load_state_dict(first.state_dict())
    assert again.next_round(10) == 0
    assert {name for name, count in again.masks.alive().items() if count == 0} == names
    assert len(said) == 1


class Standardised(nn.Conv2d):
    """A convolution by weights of mean 0 and deviation 1 in each filter (Qiao et al. 2019)."""

    def forward(self, x):
        mean, deviation = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (deviation + 1e-5), self.bias)


def test_weights_that_a_layer_standardises_lead_on_as_others_do():
    def network(kind):
        torch.manual_seed(0)
        layers = [kind(3, 8, 3), nn.ReLU(), kind(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 12 * 12, 10)]
        return nn.Sequential(*layers)

    figures = []
    for kind in (Standardised, nn.Conv2d):
        pruner = Pruner(network(kind), "random", 0.9, dense_layers=["0"], warn=lambda words: None)
        pruner.choose_masks(sample)
        figures.append(pruner.figures())
    assert figures[0] == figures[1]
    assert figures[0]["effective_sparsity"] >= 0.9
