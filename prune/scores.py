"""What a weight is worth: functions of (weights, generator) that return one score a weight; the highest stay alive."""

from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[dict[str, Tensor], torch.Generator], dict[str, Tensor]]


def random(weights: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Independent uniform scores, drawn on the CPU so that a seed means the same on every device."""
    return {
        name: torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        for name, weight in weights.items()
    }


def magnitude(weights: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """|w| (Han et al. 2015)."""
    return {name: weight.detach().abs() for name, weight in weights.items()}
