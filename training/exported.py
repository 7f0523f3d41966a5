"""Exported networks: living weights and bitmasks in one safetensors file, with all that is needed to use them.

A sparse `NAME` is two tensors: `NAME.values` holds the living weights in row-major order and `NAME.bitmask` a bit for each
weight, the lowest bit of each byte first. All other tensors are whole; in a whole weight that has a mask the zeros are
dead. The metadata are texts in JSON: `masks` has name and shape of each weight that has a mask, by layer; args, data and
metrics are what a checkpoint has.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prune.masks import Masks
from utils.errors import DamagedError, UsageError
from utils.packages import require_packages

FORMAT = "sam-sparse-training/export/1"
REQUIREMENTS = "requirements-export.txt"
READ = ("args", "data", "metrics", "masks")  # of the metadata


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors files do: with the length of a header in JSON."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def exported_bytes(model: nn.Module, masks: Masks, about: dict[str, dict]) -> bytes:
    """Return the content of an exported file.

    Args:
        model: the network; dead weights are zero.
        masks: over its weights, and over what goes with channels.
        about: args, data and metrics, as `read_exported` returns them.
    """
    from safetensors.torch import save

    names = {weight: name for name, weight in model.named_parameters()}
    saved = masks.state_dict()
    weights = {layer: names[masks.parameter(layer)] for layer in saved}
    tensors = pack(model.state_dict(), {weights[layer]: mask for layer, mask in saved.items()})
    found = {layer: {"weight": name, "shape": list(saved[layer].shape)} for layer, name in weights.items()}
    metadata = {name: json.dumps(value) for name, value in (about | {"masks": found}).items()}
    return save(tensors, {"format": FORMAT} | metadata)


def read_exported(path: Path) -> dict:
    """Read an exported file as `load_checkpoint` reads a checkpoint, without what only a training needs.

    Raises:
        UsageError: safetensors is not installed, or the file is damaged or another program's.
    """
    require_packages(REQUIREMENTS, "safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise DamagedError(
                    f"'{path}' is a safetensors file, and no network that this version of python -m analysis.export wrote"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        about = {name: json.loads(metadata[name]) for name in READ}
        if not all(isinstance(value, dict) for value in about.values()):
            raise ValueError
        weights = {layer: found["weight"] for layer, found in about["masks"].items()}
        state, alive = unpack(tensors, {found["weight"]: found["shape"] for found in about["masks"].values()})
        masks = {layer: alive[name] for layer, name in weights.items()}
    except OSError as error:
        raise UsageError(f"cannot read '{path}' ({error.strerror or error})") from error
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise DamagedError(
            f"'{path}' is not a whole exported network (truncated or damaged): export it again"
        ) from error
    parts = {"model": state, "pruner": {"masks": masks}, "rows": [about["metrics"]], "partial": None}
    return {"format": FORMAT, "args": about["args"], "data": about["data"], "state": parts}


def pack(state: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file: masked weights as living values and bits, or whole where that is smaller.

    Args:
        state: the network's state_dict; dead weights are zero.
        masks: boolean, by the names of their weights.
    """
    # Cloned, since layers may share a weight and safetensors takes none that do.
    tensors = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    for name, mask in masks.items():
        alive = mask.cpu().contiguous()
        weight = tensors[name]
        bits = torch.from_numpy(np.packbits(alive.numpy(), axis=None, bitorder="little"))
        values = weight[alive]
        if weight.nbytes <= values.nbytes + bits.nbytes and torch.equal(weight != 0, alive):
            continue
        del tensors[name]
        tensors |= {f"{name}.values": values, f"{name}.bitmask": bits}
    return tensors


def unpack(tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state_dict and the masks that `pack` was given.

    Args:
        tensors: of the file.
        shapes: of the masks, by the names of their weights.

    Raises:
        ValueError, LookupError, TypeError, AttributeError or RuntimeError: these are not what it returned.
    """
    state, masks = dict(tensors), {}
    for name, shape in shapes.items():
        if name in state:
            masks[name] = state[name] != 0
            continue
        values, bits = state.pop(f"{name}.values"), state.pop(f"{name}.bitmask")
        count = math.prod(shape)
        if bits.shape != (-(-count // 8),):
            raise ValueError(name)
        unpacked = np.unpackbits(bits.numpy(), count=count, bitorder="little")
        masks[name] = alive = torch.from_numpy(unpacked).bool().view(shape)
        if values.shape != (int(alive.sum()),):
            raise ValueError(name)
        state[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter(alive, values)
    return state, masks
