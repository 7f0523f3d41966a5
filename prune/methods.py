"""The sparse-training methods by name: a table, each entry combining scores, distributions and what changes when."""

from dataclasses import dataclass

from prune import scores
from prune.schedules import constant, cosine, steps
from prune.scores import Score
from prune.updates import DropAndGrow, GradualPruning


@dataclass(frozen=True)
class Method:
    """A way to a sparse network.

    Attributes:
        paper: where it comes from.
        score: what weights are ranked by before training; None starts dense.
        distributions: how the sparsity may be shared out over layers, the default first. `global` group the weights of
            all layers together and needs scores that compare across them.
        rounds: of scoring before training, each pruning some more.
        update: how masks change during training.
        tickets: train in rounds, each on fewer of the weights that the first began with.
        pretrained: it prunes trained weights and needs them.
        reads_images: the score does.
    """

    paper: str
    score: Score | None = None
    distributions: tuple[str, ...] = ("erk", "uniform")
    rounds: int = 1
    update: DropAndGrow | GradualPruning | None = None
    tickets: bool = False
    pretrained: bool = False
    reads_images: bool = False

    @property
    def moves(self) -> bool:
        """Whether weights move at a constant budget."""
        return isinstance(self.update, DropAndGrow)


ANY = ("global", "erk", "uniform")

METHODS = {
    "none": Method("dense training"),
    # At initialisation
    "random": Method("Liu et al. 2022", scores.random),
    "magnitude": Method("Frankle et al. 2021", scores.magnitude, ("erk", "uniform", "global")),
    "snip": Method("Lee et al. 2019", scores.snip, ANY, reads_images=True),
    "grasp": Method("Wang et al. 2020", scores.grasp, ANY, reads_images=True),
    "synflow": Method("Tanaka et al. 2020", scores.synflow, ("global",), rounds=100),
    # Dynamic, at a constant budget
    "set": Method("Mocanu et al. 2018", scores.random, update=DropAndGrow(scores.magnitude, scores.random, constant)),
    "rigl": Method("Evci et al. 2020", scores.random, update=DropAndGrow(scores.magnitude, scores.gradient, cosine)),
    "mest": Method(
        "Yuan et al. 2021", scores.random, update=DropAndGrow(scores.magnitude_gradient, scores.random, steps)
    ),
    # Dense to sparse
    "gmp": Method("Zhu and Gupta 2018", None, ("uniform", "erk", "global"), update=GradualPruning()),
    "lth": Method("Frankle et al. 2020", None, ANY, tickets=True),
    "oneshot": Method("Han et al. 2015", scores.magnitude, ANY, pretrained=True),
}
