"""Which weights live. Knows torch and nothing else of the project; `Pruner` is what a training loop sees."""

from prune.methods import METHODS
from prune.patterns import EmptyLayerError
from prune.pruner import Options, Pruner
from prune.schedules import Timing

__all__ = ["METHODS", "EmptyLayerError", "Options", "Pruner", "Timing"]
