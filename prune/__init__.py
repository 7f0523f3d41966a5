"""Which weights live, and what that costs. Imports nothing of the project; `Pruner` is what a training loop sees."""

from prune.budget import BudgetError, EmptyLayerError
from prune.methods import METHODS, Option
from prune.pruner import Pruner

__all__ = ["METHODS", "BudgetError", "EmptyLayerError", "Option", "Pruner"]
