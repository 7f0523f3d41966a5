"""What a checkpoint of this program holds, by names and kinds, as far as that is not checked where it is used."""

import math

import torch
from torch import Tensor

FORMAT = "sam-sparse-training/2"

# Of every row; a held-out split adds two.
COLUMNS = set("epoch lr train_loss train_top1 test_loss test_top1 sparsity images_per_second seconds".split())


def is_checkpoint(checkpoint: object) -> bool:
    """Whether a loaded file is one: flags are for cli.refuse_impossible, tensors for what loads them."""
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        return False
    args, data, state = (checkpoint.get(part) for part in ("args", "data", "state"))
    if not all(isinstance(part, dict) and all(isinstance(key, str) for key in part) for part in (args, data, state)):
        return False
    numbers, rows, partial = (int, float), state.get("rows"), state.get("partial", {})
    return (
        _all(data.get("classes"), str)
        and isinstance(data.get("fingerprint"), str)
        and _all(data.get("mean"), numbers)
        and _all(data.get("deviation"), numbers)
        and len(data["mean"]) == len(data["deviation"])
        and all(_is_count(state.get(name, 0)) for name in ("schedule_step", "global_step", "images"))
        and _is_count(_get(state.get("guard"), "skipped_steps"))
        and _is_count(_get(state.get("pruner"), "round"))
        and isinstance(state.get("training_flops"), numbers)
        and _all(rows, dict)
        and all(row.keys() == rows[0].keys() >= COLUMNS and _all(list(row.values()), numbers) for row in rows)
        and isinstance(partial, dict)
        and (not partial or _is_part_of_an_epoch(partial))
    )


def _is_part_of_an_epoch(partial: dict) -> bool:
    sums = partial.get("sums")
    return (
        isinstance(sums, Tensor)
        and sums.dtype == torch.float32
        and sums.ndim == 2
        and sums.shape[1] == 2
        and _is_count(partial.get("images"))
        and _is_count(partial.get("counted"))
        and isinstance(partial.get("seconds"), float)
        and 0 <= partial["seconds"] < math.inf
        and isinstance(partial.get("meter"), dict)
        and partial["meter"].keys() == {"counted", "current"}
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**53


def _get(holder: object, name: str) -> object:
    """A dict's entry; 0 where there is none: it came after the checkpoint, or what holds it is refused where it is used."""
    return holder.get(name, 0) if isinstance(holder, dict) else 0


def _all(values: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
