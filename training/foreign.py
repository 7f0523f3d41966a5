"""Weights that other programs have trained: plain state_dicts, which fit where names and shapes do."""

import re
import warnings
import zipfile
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.external import PUBLISHED_INPUTS
from training.exported import is_safetensors
from utils.errors import UsageError
from utils.files import load_whole

WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
)  # names under which programs save a state_dict among other things
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile and Lightning
# Names of a ResNet in torchvision, and of its usual copies for small images, and what they are called in models/resnet.py.
RESNET = (
    (r"^conv1\.", "stem.0."), (r"^bn1\.", "stem.1."), (r"^layer(\d)\.", r"stage\1."),
    (r"\.downsample\.", ".shortcut."), (r"^(fc|linear)\.", "classifier."),
)  # fmt: skip


def read_state_dict(path: Path) -> dict[str, Tensor] | None:
    """Read the state_dict in a file of torch.save or safetensors, on the CPU, or return None where there is none.

    It may lie among other things.
    """
    try:
        if is_safetensors(path):
            from safetensors.torch import load_file

            content: object = load_file(path)
        elif zipfile.is_zipfile(path):
            content = load_whole(path)
        else:  # as torch wrote before version 1.6
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about foreign pickles, which are refused
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # neither has a closed list of what damaged and foreign files raise
        return None
    if isinstance(content, Mapping):
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        return None
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()):
        return None
    return dict(content)


def fitting(model: nn.Module, weights: dict[str, Tensor], source: object) -> dict[str, Tensor]:
    """Return weights as a model's load_state_dict takes them.

    Args:
        model: of which they have to be all weights and statistics, by name and shape.
        weights: see `read_state_dict`; those of a ResNet may have torchvision's names, and all names may begin with what
            wrappers of networks add.
        source: their file, for the sentence.

    Raises:
        UsageError: they do not fit; it names the first differences.
    """
    wanted, found = model.state_dict(), {}
    for name, tensor in _without_prefixes(weights, wanted).items():
        renamed = name if name in wanted else _resnet_name(name)
        if renamed in wanted:
            found[renamed] = tensor
        elif not name.endswith(".num_batches_tracked"):  # which networks here mostly do not count
            found[name] = tensor
    differences = [  # torchvision has the scale of inputs outside of the state, and off where it is not told otherwise
        f"{name} is {_shape(found[name])} there and {_shape(tensor)} here" if name in found else f"{name} is not there"
        for name, tensor in wanted.items()
        if (name not in found and name not in PUBLISHED_INPUTS) or found.get(name, tensor).shape != tensor.shape
    ] + [f"{name} is not in this network" for name in found if name not in wanted]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UsageError(
            f"the weights in '{source}' do not fit this network: {'; '.join(differences[:3])}{more}: give their --arch, "
            "--depth and --width, and data of as many classes and channels"
        )
    wanted.update(found)  # which keeps the versions of its layers
    return wanted


def _without_prefixes(weights: dict[str, Tensor], wanted: Container[str]) -> dict[str, Tensor]:
    """Take off what all names begin with, one prefix after the other, until one of them is wanted."""
    while not any(name in wanted or _resnet_name(name) in wanted for name in weights):
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in weights)), "")
        if not prefix:
            break
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _resnet_name(name: str) -> str:
    for theirs, ours in RESNET:
        name = re.sub(theirs, ours, name)
    return name


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
