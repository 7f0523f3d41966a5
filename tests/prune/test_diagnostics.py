"""What the masks have become: overlaps, and the weights that no path leads through, counted by hand."""

import math

import pytest
import torch
from tiny_network import build, kept, train
from torch import nn

from models import build_model
from prune import Pruner
from prune.paths import weights_on_paths


class Chain(nn.Module):
    """A convolution, a largest value of each four places, and two linear layers; biases do not count."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2)
        self.hidden, self.classifier = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.classifier(torch.relu(self.hidden(self.pool(torch.relu(self.conv(x))).mean((2, 3)))))


def chain_masks():
    conv, hidden, classifier = torch.ones(4, 1, 3, 3), torch.ones(5, 4), torch.ones(3, 5)
    conv[0] = 0  # nothing comes into channel 0, and so 5 weights of the hidden layer have nothing to read
    hidden[:, 1] = 0  # nothing reads channel 1: 9 weights lead nowhere
    hidden[2] = 0  # nothing comes into unit 2, which 3 weights read
    classifier[:, 3] = 0  # nothing reads unit 3
    return {"conv": conv, "hidden": hidden, "classifier": classifier}


def test_weights_on_paths_are_those_found_by_following_every_path():
    masks = chain_masks()
    used = weights_on_paths(Chain(), masks, (1, 4, 4))
    into = {"conv": masks["conv"].flatten(1).any(1)}
    for conv in range(4):
        for hidden in range(5):
            path = into["conv"][conv] and masks["hidden"][hidden, conv] and masks["classifier"][:, hidden].any()
            assert bool(used["hidden"][hidden, conv]) == bool(path)
        onward = any(masks["hidden"][h, conv] and masks["classifier"][:, h].any() for h in range(5))
        assert used["conv"][conv].all() == used["conv"][conv].any() == bool(onward and into["conv"][conv])
    expected = masks["classifier"].clone()
    expected[:, 2] = 0
    assert torch.equal(used["classifier"], expected.bool())


def test_effective_sparsity_and_idle_units_are_counted_and_a_near_collapse_is_told():
    said, model = [], Chain()
    pruner = Pruner(model, "oneshot", 0.3, warn=said.append)
    pruner.choose_masks(lambda k: (torch.randn(k, 1, 4, 4), torch.zeros(k)))
    pruner.masks.set(chain_masks())
    figures = pruner.figures()
    alive = 18 + 6 + 9  # filters 2 and 3; three hidden units of two inputs each; three outputs of these
    assert figures == {"effective_sparsity": pytest.approx(1 - alive / (36 + 20 + 15)), "dead_units": 2 + 2}
    assert said == []
    masks = chain_masks()
    masks["conv"][2] = 0
    masks["classifier"][:, 1:] = 0
    pruner.masks.set(masks)
    figures = pruner.figures()
    assert figures["effective_sparsity"] == pytest.approx(1 - (9 + 1 + 3) / 71)
    pruner.figures()
    (sentence,) = said
    assert sentence.startswith(
        "only 39% of the living weights lie on a path from the input to the output: the sparsity is 0.8"
    )
    assert "7 filters and outputs are cut off" in sentence


def test_filters_of_transposed_convolutions_are_counted_along_their_outputs():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 6, 1, groups=2), nn.Flatten(), nn.Linear(6, 2, bias=False)
    )
    pruner = Pruner(model, "oneshot", 0.3)
    pruner.choose_masks(lambda k: (torch.randn(k, 2, 1, 1), torch.zeros(k)))
    transposed = torch.ones(4, 3, 1, 1)  # output 3 g + o of group g reads inputs 2 g and 2 g + 1, at [input, o]
    transposed[:2, 1] = 0  # output 1
    transposed[2, 0] = 0  # output 3 has its other input left
    pruner.masks.set({"0": torch.ones(4, 2, 1, 1), "1": transposed, "3": torch.ones(2, 6)})
    assert pruner.describe().endswith("; 1 of 10 filters have no weight")
    assert pruner.figures() == {"effective_sparsity": pytest.approx(1 - (8 + 9 + 10) / (8 + 12 + 12)), "dead_units": 1}


def test_overlaps_are_those_with_the_first_masks_and_those_before_the_last_change():
    model, mask, optimizer = build("rigl", 0.7, steps=40, interval=4)
    first = before = kept(mask)
    assert [mask.figures()[name] for name in ("overlap_with_first", "overlap_with_last")] == [1, 1]
    seen = [first]
    train(model, mask, optimizer, 12, on_step=lambda step: seen.append(kept(mask)))
    before, now = seen[11], seen[12]
    figures = mask.figures()
    for name, other in (("overlap_with_first", first), ("overlap_with_last", before)):
        assert figures[name] == pytest.approx((other & now).sum().item() / (other | now).sum().item())
    again = build("rigl", 0.7, steps=40, interval=4)[1]
    again.load_state_dict(mask.state_dict())
    assert again.figures() == figures
    assert figures["effective_sparsity"] >= mask.masks.sparsity()


def test_a_network_with_layer_normalisation_has_no_effective_sparsity():
    pruner = Pruner(build_model("vit", 1, 10, 0.34), "random", 0.5)
    pruner.choose_masks(lambda k: (torch.randn(10 * k, 3, 8, 8), torch.arange(10).repeat(k)))
    assert pruner.figures() == {}


def test_every_weight_of_a_dense_network_lies_on_a_path():
    for arch, depth in (("resnet", 8), ("vgg", 16), ("mobilenet", 28)):
        model = build_model(arch, depth, 10, 0.125)
        used = weights_on_paths(model, {}, (3, 32, 32))
        assert all(part.all() for part in used.values()), arch
        assert not math.isnan(sum(p.sum().item() for p in model.parameters()))
