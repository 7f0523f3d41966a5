"""Networks that do what networks may do: keep what they computed, add biases themselves, convert, bound, tie and mix."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prune import Pruner
from prune.channels import channel_groups
from prune.compact import compact
from prune.flops import count_flops


def sample(per_class):
    g = torch.Generator().manual_seed(1)
    return torch.randn(2 * per_class, 3, 6, 6, generator=g), torch.arange(2 * per_class) % 2


class OwnBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight) + self.bias


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.maps = []

    def forward(self, x):
        self.maps = [F.relu(self.a(x))]
        return self.b(self.maps[0].mean((2, 3)))


class Converts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(108, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(F.relu(self.a(x.flatten(1))).float())


class LogSoftmax(Converts):
    def forward(self, x):
        return F.log_softmax(self.b(F.relu(self.a(x.flatten(1)))), 1)


def flat(*layers):
    return nn.Sequential(nn.Flatten(), *layers)


NETWORKS = {
    "own bias": lambda: flat(OwnBias(108, 32), nn.ReLU(), nn.Linear(32, 2)),
    "keeps activations": Keeps,
    "weight norm": lambda: flat(torch.nn.utils.weight_norm(nn.Linear(108, 8)), nn.Linear(8, 8), nn.Linear(8, 2)),
    "spectral norm": lambda: flat(torch.nn.utils.spectral_norm(nn.Linear(108, 8)), nn.Linear(8, 8), nn.Linear(8, 2)),
    "converts to float32": Converts,
    "bounded": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardtanh(), nn.Flatten(), nn.Linear(288, 2)),
    "ends in a function of softmax": lambda: LogSoftmax(),
    "ends in softmax": lambda: flat(nn.Linear(108, 32), nn.ReLU(), nn.Linear(32, 4), nn.Softmax(1)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_masks_paths_flops_and_compaction_work(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    pruner = Pruner(model, "random", 0.5, warn=lambda words: None)
    model(sample(1)[0]).sum().backward()  # so that what is kept was computed
    pruner.choose_masks(sample)
    figures = pruner.figures()
    assert 0.5 <= figures["effective_sparsity"] < 0.8
    assert sum(count_flops(model, (3, 6, 6)).forward.values()) > 0
    images = sample(2)[0]
    torch.testing.assert_close(compact(model, pruner.masks).eval()(images), model.eval()(images))


def test_attention_with_normalisation_of_its_own_has_no_figures_of_paths():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.head = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            x = x.flatten(1, 2)  # [images, 18 tokens, 6]
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()
            mixed = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1) @ self.v(x)
            return self.head(mixed.mean(1))

    pruner = Pruner(Attention(), "random", 0.5)
    pruner.choose_masks(sample)
    assert pruner.figures() == {}


def test_units_of_every_size_are_as_likely_at_random():
    """64 x 10 in blocks of four outputs: the last blocks have two. Of 400 draws each the densities are within 0.01."""
    model, kept = nn.Sequential(nn.Linear(64, 10), nn.Linear(10, 10)), torch.zeros(10, 64)
    for seed in range(400):
        pruner = Pruner(model, "random", 0.9, distribution="uniform", pattern="4x1", seed=seed)
        pruner.choose_masks()
        kept += pruner.masks.masks["0"] / 400
    for block in (kept[:4], kept[4:8], kept[8:]):
        assert block.mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_units_in_half_precision_rank_by_their_norm(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(256, 64, 3), nn.Conv2d(64, 4, 3))
    with torch.no_grad():
        model[0].weight.mul_(torch.linspace(1, 2, 64).view(-1, 1, 1, 1))
    model.to(dtype)
    norms = model[0].weight.double().flatten(1).norm(dim=1)
    pruner = Pruner(model, "magnitude", 0.5, distribution="uniform", pattern="1x99999")
    pruner.choose_masks()
    alive = pruner.masks.masks["0"].flatten(1).any(1)
    assert torch.equal(alive, norms >= norms.sort().values[32])


def test_one_memory_in_two_parameters_is_refused_unless_dense():
    encoder, decoder = nn.Linear(8, 4), nn.Linear(4, 8)
    decoder.weight = nn.Parameter(encoder.weight.detach().t())
    model = nn.Sequential(encoder, decoder, nn.Linear(8, 2))
    with pytest.raises(ValueError, match="the weights of 0, 1 are the same memory in several parameters"):
        Pruner(model, "random", 0.5)
    Pruner(model, "random", 0.1, dense_layers=["0", "1"])


def test_channels_that_a_layer_mixes_with_others_stay():
    class Partial(nn.Conv2d):
        def forward(self, x, gate):
            return super().forward(x * torch.sigmoid(gate.mean(1, keepdim=True)))

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
            self.partial, self.b = Partial(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            a, gate = F.relu(self.a(x)), F.relu(self.gate(x))
            return self.head((self.partial(a, gate) + self.b(a)).mean((2, 3)))

    read = {name for group in channel_groups(Gated()) for name in group.writers}
    assert not read & {"a", "gate"}


def test_a_pool_over_channels_leaves_none():
    model = nn.Sequential(nn.Conv1d(1, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10))
    assert channel_groups(model) == []


def test_a_mean_over_other_dimensions_than_pixels_leaves_no_channels():
    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv3d(1, 8, 3), nn.Linear(8, 10)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    assert channel_groups(Volume()) == []


def test_tickets_that_kept_no_weights_say_what_is_missing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    pruner = Pruner(model, "lth", 0.5, total_steps=10, lth_rewind=5)
    pruner.choose_masks()
    with pytest.raises(
        RuntimeError, match=r"no weights of step 5 to go back to: call update_masks\(step\) after every step"
    ):
        pruner.next_round(10)


@pytest.mark.parametrize("layer", [nn.utils.parametrizations.weight_norm(nn.Linear(12, 3)), nn.BatchNorm1d(12)])
def test_a_network_without_a_layer_to_prune_trains_dense_and_says_so_to_a_method(layer):
    model = nn.Sequential(nn.Flatten(), layer)
    pruner = Pruner(model)
    pruner.choose_masks(lambda k: (torch.randn(k, 3, 4), torch.zeros(k)))
    assert pruner.masks.sparsity() == 0
    assert pruner.describe() == "sparsity 0.0000: 0 of 0 convolution and linear weights are zero"
    for options in ({"sparsity": 0.5}, {"layer_sparsity": {"a": 0.5}}, {"pattern": "2:4"}):
        with pytest.raises(ValueError, match="no convolution or linear layer here whose weight can be pruned"):
            Pruner(model, "random", **options)
