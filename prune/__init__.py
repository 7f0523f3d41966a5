"""Which weights live. Knows torch and nothing else of the project; `Sparsity` is what a training loop sees."""

from prune.methods import METHODS
from prune.sparsity import Sparsity

__all__ = ["METHODS", "Sparsity"]
