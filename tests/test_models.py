"""Networks against published parameter counts."""

import pytest
import torch

from models import build_model


@pytest.mark.parametrize(
    ("depth", "classes", "width", "parameters"),
    [(20, 10, 1, 272_474), (32, 10, 2, 1_860_522), (32, 100, 2, 1_872_132)],
)
def test_cifar_resnets_have_the_published_number_of_parameters(depth, classes, width, parameters):
    assert sum(p.numel() for p in build_model("resnet", depth, classes, width).parameters()) == parameters


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_the_layers_on_the_longest_path(depth):
    model = build_model("resnet", depth, 10)
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    projections = [n for n, _ in model.named_modules() if n.endswith("shortcut.0")]
    assert len(layers) - len(projections) == depth
    assert len(projections) == 2


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3), (64, 3)])
def test_any_input_size_and_channel_count(size, channels):
    model = build_model("resnet", 20, 7, in_channels=channels)
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return build_model("resnet", 20, 10).state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


@pytest.mark.parametrize("depth", [-4, 0, 2, 21])
def test_impossible_depths_are_refused(depth):
    with pytest.raises(ValueError, match="6n\\+2"):
        build_model("resnet", depth, 10)


def test_unknown_architectures_and_empty_widths_are_refused():
    with pytest.raises(ValueError, match="choose one of"):
        build_model("alexnet", 20, 10)
    with pytest.raises(ValueError, match="width"):
        build_model("resnet", 20, 10, width=0.01)
