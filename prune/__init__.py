"""Which weights live. Knows torch and nothing else of the project; `Sparsity` is what a training loop sees."""

from prune.methods import METHODS
from prune.patterns import EmptyLayerError
from prune.schedules import Timing
from prune.sparsity import Options, Sparsity

__all__ = ["METHODS", "EmptyLayerError", "Options", "Sparsity", "Timing"]
