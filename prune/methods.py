"""The sparse-training methods: a table whose entries combine scores, distributions, mask updates and options."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prune import scores
from prune.patterns import Channels, FanIn, NofM, Pattern
from prune.schedules import alternating, at_end, constant, cosine, cubic, parse_interval, steps
from prune.scores import Score
from prune.updates import (
    DropAndGrow,
    MagnitudePruning,
    MomentumRedistribution,
    PruneAndRegrow,
    ThresholdReallocation,
    Update,
)

Value = float | int | bool | str


@dataclass(frozen=True)
class Option:
    """One number or switch of a method.

    What is declared here is a keyword of `Pruner` and a flag of the command line, with its check, default and help:
    `drop_fraction` is `--drop-fraction`.

    Attributes:
        name: in the code.
        default: its type is the option's type; False makes a switch. A method may have another one.
        help: one line for the command line, without the default.
        least, above, below, most: bounds of a number, the first and last of them allowed values.
        metavar: what stands for the value in the help.
        parse: makes the value of a text, or raises ValueError, where a number will not do.
        shown: the default in words; its value where this is empty.
        late: the default depends on the length of training, which only the Pruner knows.
    """

    name: str
    default: Value
    help: str
    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    metavar: str | None = None
    parse: Callable[[str], Value] | None = None
    shown: str = ""
    late: bool = False

    @property
    def default_shown(self) -> str:
        """Return the default in words."""
        return self.shown or ("off" if self.default is False else str(self.default))

    def check(self, value: Value) -> None:
        """Raise ValueError for a value outside the bounds."""
        if self.parse:
            try:
                self.parse(str(value))
            except ValueError as error:
                raise ValueError(f"{self.name} {error}") from error
            return
        if isinstance(value, str):
            raise ValueError(f"{self.name} has to be a number, not '{value}'")
        if not math.isfinite(value):
            raise ValueError(f"{self.name} has to be a finite number, not {value:g}")
        if type(self.default) is int and value != int(value):
            raise ValueError(f"{self.name} has to be a whole number, not {value:g}")
        fits = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )
        if not fits:
            bounds = {"at least": self.least, "above": self.above, "below": self.below, "at most": self.most}
            named = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
            raise ValueError(f"{self.name} has to be {named}, not {value:g}")


UPDATE_INTERVAL = Option(
    "update_interval", 100, "steps between two changes of the masks, or epochs such as 1e", metavar="N",
    parse=parse_interval, shown="100; set and snfs 1e; mest and acdc 5e; granet 1000", late=True,
)  # fmt: skip
STOP_UPDATE = Option(
    "stop_update", 0.75, "fraction of training after which the masks stay", above=0, most=1, metavar="FRACTION",
    shown="0.75; acdc 0.85",
)  # fmt: skip
DROP_FRACTION = Option(
    "drop_fraction",
    0.3,
    "fraction of a layer's living weights that moves at first",
    above=0,
    below=1,
    metavar="F",
    shown="0.3; mest 0.2, and 0.5 with --mest-soft; dsr 0.14; snfs and granet 0.5",
)
SCORE_IMAGES = Option("score_images", 10, "images of each class that the scores look at", above=0, metavar="N")
MEST_LAMBDA = Option("mest_lambda", 1.0, "weight of the gradient in |w| + L |g|", least=0, metavar="L")
MEST_SOFT = Option("mest_soft", False, "grow above the target and drop back at the next change (EM&S)")
GRANET_START = Option(
    "granet_start", 0.5, "sparsity of the random masks it begins with; 0 begins dense", least=0, below=1, metavar="S"
)
GRANET_UNTIL = Option(
    "granet_until",
    0.5,
    "fraction of training after which it only drops and regrows",
    above=0,
    most=1,
    metavar="FRACTION",
)
SCORE_ROUNDS = Option(
    "score_rounds", 60, "how often it scores and prunes before training, each time the same fraction", above=0,
    metavar="N", shown="60; synflow 100",
)  # fmt: skip
LTH_ROUNDS = Option("lth_rounds", 3, "how often it prunes", above=0, metavar="N")
LTH_REWIND = Option(
    "lth_rewind", 0, "the step it goes back to: weights and schedule, or only the schedule", least=0, metavar="STEP"
)
LTH_KEEP_WEIGHTS = Option(
    "lth_keep_weights", False, "keep the trained weights, and go back only in the schedule (learning-rate rewinding)"
)


@dataclass(frozen=True)
class Method:
    """One way to a sparse network.

    Attributes:
        paper: where it comes from.
        score: ranks the weights before training; None starts dense.
        distributions: how layers may share the sparsity, the default first. `global` ranks the weights of all layers
            together and needs a score that compares across layers.
        update: changes the masks during training.
        tickets: trains in rounds, each with fewer weights: those that score highest at the end of the one before.
        pretrained: prunes trained weights and needs them.
        options: what can be set beside the sparsity.
        own_defaults: a function from the options that were given to the defaults that are not those of the options.
    """

    paper: str
    score: Score | None = None
    distributions: tuple[str, ...] = ("erk", "uniform", "balanced")
    update: Update | None = None
    tickets: Score | None = None
    pretrained: bool = False
    options: tuple[Option, ...] = ()
    own_defaults: Callable[[Mapping[str, Value]], Mapping[str, Value]] = lambda given: {}

    def complete(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """Return the value of every option: the one that was given, or its default."""
        return {option.name: option.default for option in self.options} | {**self.own_defaults(given)} | {**given}

    @property
    def has_interval(self) -> bool:
        """Whether masks change at an interval that can be set."""
        return UPDATE_INTERVAL in self.options

    @property
    def moves(self) -> bool:
        """Whether weights die and grow one by one."""
        return self.update is not None and self.update.moves


ANY = ("global", "erk", "uniform", "balanced")
TIMING = (UPDATE_INTERVAL, STOP_UPDATE)
MOVING = (*TIMING, DROP_FRACTION)

METHODS = {
    "none": Method("dense training", distributions=("global",)),
    # at initialisation
    "random": Method("Liu et al. 2022", scores.random),
    "magnitude": Method("Frankle et al. 2021", scores.magnitude, ("erk", "uniform", "balanced", "global")),
    "snip": Method("Lee et al. 2019", scores.snip, ANY, options=(SCORE_IMAGES,)),
    "grasp": Method("Wang et al. 2020", scores.grasp, ANY, options=(SCORE_IMAGES,)),
    "iter-snip": Method("de Jorge et al. 2021", scores.snip, ANY, options=(SCORE_IMAGES, SCORE_ROUNDS)),
    "force": Method("de Jorge et al. 2021", scores.force, ANY, options=(SCORE_IMAGES, SCORE_ROUNDS)),
    "synflow": Method(
        "Tanaka et al. 2020", scores.synflow, ("global",), options=(SCORE_ROUNDS,),
        own_defaults=lambda given: {"score_rounds": 100},
    ),
    # dynamic, at a constant budget
    "set": Method(
        "Mocanu et al. 2018", scores.random,
        update=DropAndGrow(scores.magnitude, scores.random, constant), options=MOVING,
        own_defaults=lambda given: {"update_interval": "1e"},
    ),
    "rigl": Method(
        "Evci et al. 2020", scores.random,
        update=DropAndGrow(scores.magnitude, scores.gradient, cosine, regrown_from_zero=False), options=MOVING,
    ),
    "mest": Method(
        "Yuan et al. 2021", scores.random,
        update=DropAndGrow(scores.magnitude_gradient, scores.random, steps), options=(*MOVING, MEST_LAMBDA, MEST_SOFT),
        own_defaults=lambda given: {
            "update_interval": "5e", "drop_fraction": 0.5 if given.get("mest_soft") else 0.2,
        },
    ),
    # dynamic, across layers
    "dsr": Method(
        "Mostafa and Wang 2019", scores.random, ("uniform", "erk", "balanced"), update=ThresholdReallocation(), options=MOVING,
        own_defaults=lambda given: {"drop_fraction": 0.14},
    ),
    "snfs": Method(
        "Dettmers and Zettlemoyer 2019", scores.random, ("uniform", "erk", "balanced"), update=MomentumRedistribution(cosine, 0.9),
        options=MOVING, own_defaults=lambda given: {"update_interval": "1e", "drop_fraction": 0.5},
    ),
    # dense to sparse
    "gmp": Method(
        "Zhu and Gupta 2018", None, ("uniform", "erk", "balanced", "global"), update=MagnitudePruning(cubic), options=TIMING
    ),
    "granet": Method(
        "Liu et al. 2021", scores.random, ANY, update=PruneAndRegrow(cosine), options=(*MOVING, GRANET_START, GRANET_UNTIL),
        own_defaults=lambda given: {"update_interval": 1000, "drop_fraction": 0.5},
    ),
    "acdc": Method(
        "Peste et al. 2021", None, ANY, update=MagnitudePruning(alternating), options=TIMING,
        own_defaults=lambda given: {"update_interval": "5e", "stop_update": 0.85},
    ),
    "final": Method("Han et al. 2015", None, ANY, update=MagnitudePruning(at_end)),
    "lth": Method(
        "Frankle et al. 2020", None, ANY, tickets=scores.magnitude, options=(LTH_ROUNDS, LTH_REWIND, LTH_KEEP_WEIGHTS)
    ),
    "lamp": Method("Lee et al. 2021", None, ("global",), tickets=scores.lamp, options=(LTH_ROUNDS, LTH_REWIND)),
    "oneshot": Method("Han et al. 2015", scores.magnitude, ANY, pretrained=True),
}  # fmt: skip


def complete_options(name: str, given: Mapping[str, Value]) -> dict[str, Value]:
    """Return the options of a method: those given, and the defaults of the others.

    Raises:
        ValueError: one that the method does not have, or a value outside its bounds.
    """
    method = METHODS[name]
    known = {option.name: option for option in method.options}
    for option, value in given.items():
        if option not in known:
            can = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"pruning method '{name}' has no option {option}: {can}")
        known[option].check(value)
    return method.complete(given)


def refuse_pattern(name: str, pattern: Pattern, options: Mapping[str, float], by_layer: bool) -> None:
    """Raise ValueError for a pattern, or a sparsity of its own for each layer, that a method cannot keep."""
    method = METHODS[name]
    if method.moves and isinstance(pattern, NofM):
        raise ValueError(
            f"'{name}' moves weights one by one and cannot keep {pattern.name}: take {pattern.name} with gmp"
        )
    if method.score is scores.force and isinstance(pattern, Channels):
        raise ValueError(
            f"'{name}' lets what was pruned come back by its gradient, which a channel without weights does not have: take "
            "iter-snip, or another pattern"
        )
    if method.update is not None and method.update.reallocates:
        moves = f"'{name}' moves weights from layer to layer"
        if by_layer:
            raise ValueError(f"{moves}: leave layer_sparsity out, or take set or rigl")
        if isinstance(pattern, Channels):
            raise ValueError(f"{moves}, and a channel is part of several: take another pattern, or set or rigl")
        if isinstance(pattern, FanIn):
            raise ValueError(f"{moves} and cannot keep a constant fan-in: take another pattern, or set or rigl")
    if options.get("mest_soft") and isinstance(pattern, FanIn):
        raise ValueError(
            "mest_soft drops from a layer as a whole and cannot keep a constant fan-in: leave one of them out"
        )
