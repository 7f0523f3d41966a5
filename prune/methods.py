"""The sparse-training methods by name: a table, each entry saying what is scored and how the layers share."""

from dataclasses import dataclass

from prune import scores


@dataclass(frozen=True)
class Method:
    """A way to get a sparse network.

    Attributes:
        score: what the weights are ranked by at initialisation; None leaves them all alive.
        distributions: how the sparsity may be shared out over the layers, the default first. `global` ranks all weights
            of the network together and needs scores that compare across layers.
    """

    score: scores.Score | None
    distributions: tuple[str, ...]


METHODS = {
    "none": Method(score=None, distributions=("uniform",)),
    "random": Method(score=scores.random, distributions=("erk", "uniform")),
    "magnitude": Method(score=scores.magnitude, distributions=("erk", "uniform", "global")),
}
