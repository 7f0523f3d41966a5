"""The one object through which a training loop keeps a network sparse."""

import difflib
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune.budget import distribute
from prune.masks import Masks, prunable_weights, select_layers
from prune.methods import METHODS
from prune.patterns import NofM, find_pattern, refuse_empty
from prune.schedules import Timing
from prune.scores import Scored, magnitude


@dataclass(frozen=True)
class Options:
    """What papers vary.

    Attributes:
        drop_fraction: share of a layer's living weights that `set`, `rigl` and `mest` move at first.
        gradient_share: lambda in the importance |w| + lambda |g| of `mest`.
        soft: `mest` grows before it drops (EM&S, soft memory bound).
        images_per_class: that `snip` and `grasp` look at.
        rounds: how often `lth` prunes.
        rewind: the step whose weights `lth` goes back to.
    """

    drop_fraction: float = 0.3
    gradient_share: float = 1.0
    soft: bool = False
    images_per_class: int = 10
    rounds: int = 3
    rewind: int = 0


class Pruner:
    """Chooses the masks of a network, applies them at the right moments of a training step, and remembers them.

        pruner.before_training(sample)             # once, on fresh weights
        ...
        loss.backward()
        pruner.after_backward(step)                # before clipping and before the optimizer sees the gradients
        optimizer.step()
        pruner.mask_weights()
        step = pruner.after_step(step)             # masks change here; returns the step to go on with
        ...
        step = pruner.next_round(step)             # at the end of the schedule: the step to go back to, if any

    Args:
        model: the network; its convolution and linear weights are prunable, nothing else.
        method: a key of METHODS.
        sparsity: share of all prunable weights that is zero in the end, in [0, 1); with an N:M pattern it may be None.
        distribution: how it is shared out over the layers; None for the method's default.
        layer_sparsity: in the place of both the sparsity of each layer by name; layers that are not named stay dense.
        pattern: which weights live and die together, see `patterns.find_pattern`.
        dense_layers: patterns of layer names that stay dense (see `masks.select_layers`); they count, as weights that the
            other layers have to make up for, except with an N:M pattern, which leaves the others no choice.
        timing: when masks change; for methods that change them.
        options: what papers vary.
        seed: of random masks and random growth.
        optimizers: their state of weights that die or come alive is zeroed (momentum, SAM's memory).

    Raises:
        ValueError: unknown names, a combination that makes no sense, or a sparsity that cannot be reached.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "none",
        sparsity: float | None = None,
        distribution: str | None = None,
        layer_sparsity: dict[str, float] | None = None,
        pattern: str = "unstructured",
        dense_layers: Iterable[str] = (),
        timing: Timing | None = None,
        options: Options = Options(),
        seed: int = 0,
        optimizers: Iterable[torch.optim.Optimizer] = (),
    ):
        if method not in METHODS:
            raise ValueError(f"unknown pruning method '{method}': choose one of {', '.join(METHODS)}")
        self.model, self.method, self.options, self.seed = model, METHODS[method], options, seed
        self.timing, self.optimizers = timing, list(optimizers)
        self.pattern = find_pattern(pattern)
        weights = prunable_weights(model)
        self.masks = Masks(weights)
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self.dense = select_layers(list(weights), list(dense_layers))
        self._layer_sparsity = self._fixed_layers(layer_sparsity)
        self.target = self._target(method, sparsity, pattern)
        self.distribution = self._distribution(method, distribution, pattern)
        if isinstance(self.pattern, NofM) and self.method.moves:
            raise ValueError(f"'{method}' moves weights one by one and cannot keep {pattern}: take {pattern} with gmp")
        if self.method.update and timing is None:
            raise ValueError(f"pruning method '{method}' changes masks during training and needs a timing")
        if self.method.moves and timing.interval >= timing.last:
            raise ValueError(
                f"masks would never move: they stay from step {timing.last} of {timing.total_steps} on and the first change "
                f"would come after {timing.interval}; shorten the update interval, or train for longer"
            )
        if self.method.tickets and timing and options.rewind >= timing.total_steps:
            raise ValueError(f"cannot rewind to step {options.rewind} of a training of {timing.total_steps} steps")
        self.counts(self.target)  # an impossible sparsity is known before anything is written
        self.targets: dict[str, int] = {}  # living units a layer, where masks move at a constant budget
        self.ever_alive: dict[str, Tensor] = {}
        self.round = 0
        self._postponed = False
        self._rewound: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def before_training(self, sample: Callable[[int], tuple[Tensor, Tensor]] | None = None) -> None:
        """Score the weights, choose the masks and zero what they drop.

        Args:
            sample: see `scores.Scored`; for methods that look at data.

        Raises:
            EmptyLayerError: a layer is left empty.
        """
        rounds = self.method.rounds if self.method.score else 0
        for number in range(1, rounds + 1):
            # Each round keeps the same share of what the last one kept (SynFlow, algorithm 1); with one it is the target.
            wanted = 1 - (1 - self.target) ** (number / rounds)
            self.masks.set(self.pattern.keep(self.method.score(self.scored(-1, sample)), self.counts(wanted)))
        if not self.method.score and (self.method.update or self.method.tickets):
            # Masks of ones, so that none has to be made during training.
            self.masks.set(self.pattern.keep(magnitude(self.scored(-1)), self.counts(0.0)))
        self.refuse_empty_layers()
        if self.method.moves:
            alive = {name: self.pattern.pool(mask) > 0 for name, mask in self.masks.masks.items()}
            self.targets = {name: int(units.sum()) for name, units in alive.items()}
            self.ever_alive = {name: mask.clone() for name, mask in self.masks.masks.items()}
        self._remember_weights(-1)

    def grows_by_gradient(self, step: int) -> bool:
        """Whether a step needs the gradients of dead weights too."""
        return self.due(step) and self.method.update.reads_dead_gradients

    def due(self, step: int) -> bool:
        """Whether masks change after a step."""
        return self.method.update is not None and (self._postponed or self.timing.due(step))

    def keeps_gradients(self, step: int) -> bool:
        """Whether `after_backward` keeps a step's gradients for the change of masks after it."""
        return self.due(step) and self.method.update.reads_gradients

    def mask_gradients(self) -> None:
        """Zero the gradients of dead weights, for whoever needs gradients before the pass that counts."""
        self.masks.apply_to_gradients()

    def mask_weights(self) -> None:
        """With the weights just moved: keep the dead at zero."""
        self.masks.apply_to_weights()

    def after_backward(self, step: int) -> None:
        """With the unscaled gradients of a step: let only those of living weights through."""
        if self.keeps_gradients(step):
            if not self._gradients:  # they stay where they are, as a CUDA graph wants it
                self._gradients = {name: torch.zeros_like(mask) for name, mask in self.masks.masks.items()}
            for name, kept in self._gradients.items():
                gradient = self.masks.weights[name].grad
                kept.zero_() if gradient is None else kept.copy_(gradient)
        self.masks.apply_to_gradients()

    def after_step(self, step: int, skipped: bool = False) -> int:
        """With the weights just moved: change masks if it is time. Returns the step to go on with.

        Where the optimizer's step was `skipped`, there are no gradients to go by, and masks change after the next one.
        Where layers compete for weights one may come out empty: `refuse_empty_layers` tells, and waits for the device.
        """
        due, self._postponed = self.due(step), False
        if due and skipped:
            self._postponed = True
        elif due:
            self._change(self.method.update(self, step))
        self._remember_weights(step)
        return step + 1

    def next_round(self, step: int) -> int:
        """With training at its end: the same step to stop, or the earlier one that a lottery ticket goes back to.

        Iterative magnitude pruning (Frankle and Carbin 2019; with rewinding, Frankle et al. 2020, algorithm 1): prune the
        trained weights, take those of step `rewind` in their place, and train again from there.

        Raises:
            EmptyLayerError: a layer is left empty.
        """
        if not self.method.tickets or self.round == self.options.rounds:
            return step
        self.round += 1
        wanted = 1 - (1 - self.target) ** (self.round / self.options.rounds)
        masks = self.pattern.keep(magnitude(self.scored(step)), self.counts(wanted))
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(self._rewound[name])
        self.masks.set(masks)
        self.refuse_empty_layers()
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for tensor in state.values():
                    if isinstance(tensor, Tensor):
                        tensor.zero_()
        return self.options.rewind

    def refuse_empty_layers(self) -> None:
        """Raise EmptyLayerError if any layer has no weight left. Waits for the device."""
        refuse_empty([name for name, count in self.masks.alive().items() if count == 0])

    def extra_epochs(self, total_steps: int, steps_per_epoch: int) -> int:
        """Epochs, begun ones counted, that the rounds of a lottery ticket take beyond one training."""
        a_round = -(-(total_steps - self.options.rewind) // steps_per_epoch)
        return self.options.rounds * a_round if self.method.tickets else 0

    def counts(self, sparsity: float) -> dict[tuple[str, ...], int]:
        """How many weights each group of layers outside `dense` keeps at a sparsity."""
        if self._layer_sparsity is None:
            return distribute(self.distribution, self.shapes, sparsity, self.dense)
        share = sparsity / self.target if self.target else 0.0  # of the way there, for schedules
        sizes = {name: self.masks.weights[name].numel() for name in self._layer_sparsity}
        return {(name,): round((1 - share * self._layer_sparsity[name]) * size) for name, size in sizes.items()}

    def scored(self, step: int, sample: Callable | None = None) -> Scored:
        """What scores look at after a step (-1: before training)."""
        weights = {name: w for name, w in self.masks.weights.items() if name not in self.dense}
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {step}").getrandbits(63))
        options = self.options
        return Scored(
            self.model, weights, generator, sample, options.images_per_class, self._gradients, options.gradient_share
        )

    def ever_alive_share(self) -> float:
        """Share of all prunable weights that were alive at any time: the ITOP rate (Liu et al. 2021)."""
        if self.method.score is None:
            return 1.0  # it begins dense
        alive = self.masks.alive()
        if self.ever_alive:
            counts = torch.stack([mask.count_nonzero() for mask in self.ever_alive.values()]).tolist()
            alive |= dict(zip(self.ever_alive, counts, strict=True))
        return sum(alive.values()) / sum(weight.numel() for weight in self.masks.weights.values())

    def describe(self) -> str:
        """One line: how many weights are zero, of which, and what stays dense."""
        total = sum(weight.numel() for weight in self.masks.weights.values())
        dead = total - sum(self.masks.alive().values())
        line = f"sparsity {dead / total:.4f}: {dead:,} of {total:,} convolution and linear weights are zero"
        dense = sum(self.masks.weights[name].numel() for name in self.dense)
        if dense:
            line += f"; {len(self.dense)} layers ({dense:,} weights) stay dense, the others have {dead / (total - dense):.4f}"
        return line

    def state_dict(self) -> dict:
        return {
            "masks": self.masks.state_dict(),
            "targets": self.targets,
            "ever_alive": {name: mask.bool() for name, mask in self.ever_alive.items()},
            "round": self.round,
            "postponed": self._postponed,
            "rewound": self._rewound,
        }

    def load_state_dict(self, state: dict) -> None:
        self.masks.load_state_dict(state["masks"])
        self.targets, self.round = dict(state["targets"]), state["round"]
        self._postponed = state.get("postponed", False)
        self.ever_alive = {
            name: torch.empty_like(self.masks.weights[name], requires_grad=False).copy_(mask)
            for name, mask in state["ever_alive"].items()
        }
        self._rewound = dict(state["rewound"])

    @torch.no_grad()
    def _change(self, masks: dict[str, Tensor]) -> None:
        """Put new masks in place and clear what optimizers remember of weights that died or came alive."""
        weights = [self.masks.weights[name] for name in masks]
        before = torch._foreach_mul([self.masks.masks[name] for name in masks], 1)
        self.masks.set(masks)
        now = [self.masks.masks[name] for name in masks]
        changed = torch._foreach_sub(now, before)  # 1 where a weight came alive, -1 where it died
        torch._foreach_abs_(changed)
        unchanged = torch._foreach_neg(changed)
        torch._foreach_add_(unchanged, 1)
        for optimizer in self.optimizers:
            remembered = [
                (tensor, keep)
                for weight, keep in zip(weights, unchanged, strict=True)
                for tensor in optimizer.state.get(weight, {}).values()
                if isinstance(tensor, Tensor) and tensor.shape == weight.shape
            ]
            if remembered:
                torch._foreach_mul_(*map(list, zip(*remembered, strict=True)))
        if self.ever_alive:
            torch._foreach_maximum_([self.ever_alive[name] for name in masks], now)

    def _remember_weights(self, step: int) -> None:
        """Before the first round comes to `rewind`, what later rounds go back to."""
        if self.method.tickets and self.round == 0 and step + 1 == self.options.rewind:
            self._rewound = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def _fixed_layers(self, layer_sparsity: dict[str, float] | None) -> dict[str, float] | None:
        """The sparsity of each layer where a file or the pattern leaves no choice."""
        if layer_sparsity is not None:
            if self.pattern.density is not None:
                raise ValueError("an N:M pattern fixes the sparsity of every layer: leave the sparsities by layer out")
            for name, value in layer_sparsity.items():
                if name not in self.shapes:
                    nearest = difflib.get_close_matches(name, self.shapes, 1, cutoff=0)[0]
                    raise ValueError(f"there is no prunable layer '{name}': the nearest name is '{nearest}'")
                if not 0 <= value < 1:
                    raise ValueError(
                        f"the sparsity of layer '{name}' has to be at least 0 and less than 1, not {value:g}"
                    )
            self.dense |= self.shapes.keys() - layer_sparsity.keys()
            return {name: value for name, value in layer_sparsity.items() if name not in self.dense}
        if self.pattern.density is not None:
            return {name: 1 - self.pattern.density for name in self.shapes if name not in self.dense}
        return None

    def _target(self, method: str, sparsity: float | None, pattern: str) -> float:
        if method == "none":
            if sparsity:
                raise ValueError("pruning method 'none' keeps every weight: name another one to reach a sparsity")
            return 0.0
        if self._layer_sparsity is not None:
            sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
            dead = sum(value * sizes[name] for name, value in self._layer_sparsity.items())
            fixed = dead / sum(sizes[name] for name in self._layer_sparsity) if self._layer_sparsity else 0.0
            if sparsity is not None and not self.pattern.density:
                raise ValueError(f"the sparsity by layer leaves no choice of another: leave out {sparsity:g}")
            if sparsity is not None and abs(sparsity - fixed) > 1e-9:
                raise ValueError(
                    f"pattern {pattern} fixes the sparsity at {fixed:g}: leave out {sparsity:g}, or change one of them"
                )
            return fixed  # of the layers that are not dense: what schedules count the way by
        if sparsity is None:
            raise ValueError(f"pruning method '{method}' needs a sparsity")
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity has to be at least 0 and less than 1, not {sparsity:g}")
        return sparsity

    def _distribution(self, method: str, distribution: str | None, pattern: str) -> str | None:
        if self._layer_sparsity is not None:
            if distribution is not None:
                source = f"pattern {pattern}" if self.pattern.density else "the sparsity by layer"
                raise ValueError(f"{source} leaves nothing to distribute: leave out the {distribution} distribution")
            return None
        choices = self.method.distributions
        if distribution not in (None, *choices):
            raise ValueError(
                f"pruning method '{method}' has no {distribution} distribution: choose {' or '.join(choices)}"
            )
        return distribution or choices[0]
