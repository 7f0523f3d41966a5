"""An exported network is small, comes back bit for bit, and is refused where it is damaged."""

import pytest
import torch
from torch import nn

from models import build_model
from prune import Pruner
from training.checkpoint import load_checkpoint
from training.exported import pack, unpack
from utils.errors import UsageError

safetensors = pytest.importorskip("safetensors.torch")

from training.exported import exported_bytes  # noqa: E402

ABOUT = {"args": {"arch": "resnet"}, "data": {"classes": ["a", "ß"], "mean": [0.1]}, "metrics": {"epoch": 3}}


def sparse(model, sparsity, pattern="unstructured", **options):
    """Return a network and random masks of it."""
    pruner = Pruner(model, "random", sparsity, pattern=pattern, warn=lambda words: None, **options)
    pruner.choose_masks()
    return model, pruner.masks


def assert_same(state, masks, other_state, other_masks):
    for one, other in ((state, other_state), (masks, other_masks)):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype
            assert torch.equal(tensor, other[name])


@pytest.mark.parametrize(
    ("sparsity", "pattern"),
    [(0.0, "unstructured"), (0.5, "channel"), (0.5, "2:4"), (0.9, "unstructured"), (0.98, "4x1")],
)
def test_an_exported_network_comes_back_bit_for_bit(tmp_path, sparsity, pattern):
    model = build_model("resnet", 8, 10, 0.5).to(memory_format=torch.channels_last)
    _, masks = sparse(model, sparsity, pattern, **({"distribution": "uniform"} if pattern != "2:4" else {}))
    path = tmp_path / "network.safetensors"
    path.write_bytes(exported_bytes(model, masks, ABOUT))
    found = load_checkpoint(path)
    assert_same(model.state_dict(), masks.state_dict(), found["state"]["model"], found["state"]["pruner"]["masks"])
    assert (found["args"], found["data"], found["state"]["rows"]) == (ABOUT["args"], ABOUT["data"], [{"epoch": 3}])


def test_living_zeros_and_dense_layers_come_back_with_their_masks():
    state = {"a.weight": torch.randn(3, 5), "b.weight": torch.randn(64, 4), "c.weight": torch.randn(6)}
    masks = {"a.weight": torch.arange(15).view(3, 5) % 4 != 0, "b.weight": torch.ones(64, 4, dtype=torch.bool)}
    state["a.weight"] *= masks["a.weight"]
    state["a.weight"][0, 1] = state["b.weight"][0, 0] = 0.0
    tensors = pack(state, masks)
    assert tensors.keys() == {
        "a.weight.values", "a.weight.bitmask", "b.weight.values", "b.weight.bitmask", "c.weight"
    }  # fmt: skip
    assert_same(state, masks, *unpack(tensors, {"a.weight": [3, 5], "b.weight": [64, 4]}))
    state["b.weight"][0, 0] = 1.0  # its zeros tell its mask again, and a bitmask would make it larger
    tensors = pack(state, masks)
    assert tensors.keys() == {"a.weight.values", "a.weight.bitmask", "b.weight", "c.weight"}
    assert_same(state, masks, *unpack(tensors, {"a.weight": [3, 5], "b.weight": [64, 4]}))


def test_weights_that_layers_share_and_projections_of_attention_come_back(tmp_path):
    torch.manual_seed(0)
    attention, shared = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
    model = nn.Sequential(attention, shared, nn.Linear(8, 8))
    model[2].weight = shared.weight
    _, masks = sparse(model, 0.5)
    assert {"0.in_proj", "0.out_proj", "1"} == masks.masks.keys()
    path = tmp_path / "network.safetensors"
    path.write_bytes(exported_bytes(model, masks, ABOUT))
    found = load_checkpoint(path)["state"]
    assert_same(model.state_dict(), masks.state_dict(), found["model"], found["pruner"]["masks"])


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_a_network_of_90_percent_zeros_takes_less_than_16_percent_of_its_floats(distribution):
    model = build_model("resnet", 20, 10)
    content = exported_bytes(*sparse(model, 0.9, distribution=distribution), ABOUT)
    assert len(content) <= 0.16 * sum(4 * tensor.numel() for tensor in model.state_dict().values())


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "network.safetensors"
    path.write_bytes(exported_bytes(*sparse(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 3)), 0.7), ABOUT))
    return path


def test_a_truncated_exported_network_is_refused(exported):
    content = exported.read_bytes()
    for length in range(9, len(content), 97):
        exported.write_bytes(content[:length])
        with pytest.raises(UsageError, match="not a whole exported network") as error:
            load_checkpoint(exported)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0.weight.values", lambda values: values[:1]),
        ("0.weight.values", lambda values: torch.cat([values, values])),
        ("0.weight.bitmask", lambda bits: bits[:-1]),
        ("0.weight.bitmask", lambda bits: bits.float()),
        ("0.weight.bitmask", lambda bits: bits | 255),
        ("0.weight.values", None),
        ("masks", '{"0": {"weight": "0.weight", "shape": [64]}}'),
        ("masks", '{"0": {"weight": "0.weight", "shape": [-32, 64]}}'),
        ("masks", '{"0": {"weight": "0.weight", "shape": "wide"}}'),
        ("masks", '{"0": {"weight": "other", "shape": [32, 64]}}'),
        ("masks", '{"0": [32, 64]}'),
        ("masks", "[1]"),
        ("masks", "{"),
        ("args", "[]"),
        ("args", None),
        ("metrics", "3"),
    ],
)
def test_an_exported_network_whose_parts_do_not_fit_is_refused(exported, name, change):
    with safetensors.safe_open(exported, "pt") as file:
        metadata, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if change is None:
        (metadata if name in metadata else tensors).pop(name)
    elif name in metadata:
        metadata[name] = change
    else:
        tensors[name] = change(tensors[name])
    exported.write_bytes(safetensors.save(tensors, metadata))
    with pytest.raises(UsageError, match="not a whole exported network"):
        load_checkpoint(exported)


def test_a_safetensors_file_of_another_program_is_no_checkpoint(tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors.save({"weight": torch.zeros(2)}, {"format": "pt"}))
    with pytest.raises(UsageError, match="is a safetensors file, and no network that"):
        load_checkpoint(path)
