"""The one object through which a training loop keeps a network sparse."""

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import compress

import torch
from torch import Tensor, nn

from prune import diagnostics
from prune.budget import Budget, highest_sparsity
from prune.compact import compact, expand
from prune.connectivity import Connectivity
from prune.masks import (
    Masks,
    computed_weights,
    depthwise_layers,
    layers_by_position,
    listed,
    memory_of,
    prunable_weights,
    recomputed_weights,
    select_layers,
)
from prune.methods import METHODS, Value, complete_options, refuse_pattern
from prune.patterns import Channels, Counts, NofM, find_pattern
from prune.regrowth import LastValues
from prune.rounds import Rounds
from prune.schedules import Timing, interval_steps
from prune.scores import POOLED_BY_NORM, REVIVING, Scored, magnitude
from prune.updates import MaskChange, PruneAndRegrow, UpdateInputs

Sample = Callable[[int], tuple[Tensor, Tensor]]
ROUNDING = 0.005  # of a sparsity, to units of a pattern


# Patterns that treat inputs and outputs alike: the weight of a transposed convolution is [in, out, ...].
EITHER_WAY = ("unstructured", "kernel", "channel")


class Pruner:
    """Chooses the masks of a network, applies them at the right moments of a training step, and remembers them.

    In a training loop:

        pruner = Pruner(model, "rigl", 0.9, total_steps=1000, optimizers=[optimizer])
        pruner.choose_masks()                        # once, on fresh weights
        for step, (inputs, targets) in enumerate(batches):
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            pruner.mask_gradients(step)              # before clipping
            optimizer.step()
            pruner.mask_weights()
            pruner.update_masks(step)                # if it is time

    Args:
        model: the network; its convolution and linear weights are prunable, nothing else.
        method: a key of METHODS.
        sparsity: fraction of all prunable weights that is zero in the end, in [0, 1); with an N:M pattern it may be None.
        distribution: how layers share it; None for the method's default.
        layer_sparsity: instead of both, the sparsity of each layer by name; layers that are not named stay dense.
        pattern: which weights live and die together, see `patterns.find_pattern`.
        dense_layers: patterns of layer names that stay dense (see `masks.select_layers`). They count: the other layers
            make up for them, except with an N:M pattern, which leaves the others no choice.
        total_steps: of the training; needed where masks change during it.
        steps_per_epoch: needed where an update_interval is in epochs.
        seed: of random masks and random growth.
        optimizers: what they remember of weights that die or come alive is zeroed (momentum, SAM's memory).
        warn: is called with a sentence about what a user should know and need not mend.
        **options: of the method, such as drop_fraction=0.3; see METHODS[method].options.

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
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        warn: Callable[[str], None] = warnings.warn,
        **options: Value,
    ):
        if method not in METHODS:
            raise ValueError(f"unknown pruning method '{method}': choose one of {', '.join(METHODS)}")
        self.model, self.method, self.seed, self.optimizers = model, METHODS[method], seed, list(optimizers)
        self.warn = warn
        self.masks = Masks.of(model)
        shapes = {name: tuple(weight.shape) for name, weight in self.masks.weights.items()}
        depthwise = depthwise_layers(model) & shapes.keys()
        self.dense_layers = select_layers(list(shapes), list(dense_layers), depthwise, layers_by_position(model))
        dense = {name for matches in self.dense_layers.values() for name in matches}
        self.pattern = find_pattern(pattern, model, dense)
        complete = complete_options(method, options)
        interval = complete.pop("update_interval", None)
        self.options = {name: value for name, value in complete.items() if not isinstance(value, str)}
        choices = self.method.distributions
        if distribution not in (None, *choices):
            raise ValueError(
                f"pruning method '{method}' has no {distribution} distribution: choose {' or '.join(choices)}"
            )
        if method == "none":
            if sparsity or layer_sparsity:
                raise ValueError("pruning method 'none' keeps every weight: name another one to reach a sparsity")
            sparsity = 0.0
        elif sparsity is None and layer_sparsity is None and not isinstance(self.pattern, NofM):
            raise ValueError(f"pruning method '{method}' needs a sparsity")
        self.budget = Budget(shapes, self.pattern, sparsity, distribution, choices[0], layer_sparsity, dense)
        refuse_pattern(method, self.pattern, self.options, by_layer=layer_sparsity is not None)
        if method != "none":
            self._look_at_layers()
        if self.options.get("granet_start", 0.0) > self.budget.sparsity:
            warn(
                f"masks begin at their final sparsity of {self.budget.sparsity:.4g}, below granet_start, and only move"
            )
            self.options["granet_start"] = self.budget.sparsity
        self._rounds = Rounds.of(model, self.options, total_steps) if self.method.tickets else None
        self.timing: Timing | None = None  # when masks change, if they do
        if self.method.update:
            if total_steps is None:
                raise ValueError(f"pruning method '{method}' changes masks during training and needs total_steps")
            self.timing = self._timing(total_steps, steps_per_epoch, interval, usual="update_interval" not in options)
        self._connectivity = Connectivity(model, depthwise, warn)
        self._compacted = False  # another network is trained in place of the model
        self.ever_alive: dict[str, Tensor] = {}
        self._targets: dict[str, int] = {}  # living units of each layer or group, where masks move at a constant budget
        self._last_values: LastValues | None = None  # of channels, where they come and go
        self._postponed = False
        self._gradients: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}  # of these, where an update goes by an average
        self._memory: dict[str, Tensor] = {}  # what an update leaves for the next one
        self._first: dict[str, Tensor] = {}  # masks, where they move
        self._overlap = torch.ones(())  # of the masks before and after the last change
        self._settled = not self.method.update  # masks came to their last change

    def _timing(self, total_steps: int, steps_per_epoch: int | None, interval: Value | None, usual: bool) -> Timing:
        """Return when masks change; `usual` says that the interval is the method's own, and may be shortened."""
        timing = Timing.until(self.options.get("stop_update", 1.0), total_steps)
        if interval is None:
            return timing
        return timing.every(interval_steps(interval, steps_per_epoch), usual=usual, warn=self.warn)

    def _look_at_layers(self) -> None:
        """Warn of layers whose zeros are none, and raise ValueError for those that the pattern or the method cannot serve."""
        if computed := computed_weights(self.model):
            self.warn(
                f"the weights of {listed(computed)} are computed from others: they stay dense, and are not counted"
            )
        sparse = {name: weight for name, weight in self.masks.weights.items() if name not in self.budget.dense}
        places = {name: memory_of(weight) for name, weight in self.masks.weights.items()}
        if tied := [name for name in sparse if list(places.values()).count(places[name]) > 1]:
            raise ValueError(
                f"the weights of {listed(tied)} are the same memory in several parameters, of which a mask would reach one: give "
                "the layers one parameter, or keep them dense by name"
            )
        if recomputed := [name for name in recomputed_weights(self.model) if name in sparse]:
            self.warn(
                f"{listed(recomputed)} compute with other weights than those that masks hold, as weight standardisation "
                "does: they are counted as sparse, and compute without a zero"
            )
        transposed = [
            n for n, module in self.model.named_modules() if n in sparse and getattr(module, "transposed", False)
        ]
        if transposed and self.pattern.name not in EITHER_WAY:
            raise ValueError(
                f"{listed(transposed)} are transposed convolutions, for which there is no pattern '{self.pattern.name}': keep "
                "them dense by name, or take unstructured or kernel"
            )
        frozen = [name for name, weight in sparse.items() if not weight.requires_grad]
        if frozen and self.method.moves:
            raise ValueError(
                f"the weights of {listed(frozen)} are frozen, and what moving masks drop there would not grow again: keep "
                "these layers dense by name, or take a method whose masks stay"
            )

    def choose_masks(self, sample: Sample | None = None) -> None:
        """Score the weights, choose the masks, and zero what they drop and what optimizers remember of it.

        Args:
            sample: see `scores.Scored`; for methods that look at images, and where a layer may come out empty.

        Raises:
            EmptyLayerError: see `check_layers`.
        """
        if sample is not None:
            inputs, _ = sample(1)
            self._connectivity.input_shape = tuple(inputs.shape[1:]) if inputs.is_floating_point() else None
        with self._unperturbed():
            self._set_first_masks(sample)
            self._forget(self.masks.pairs())
        if self.method.moves:
            assert not isinstance(self.pattern, NofM)
            alive = self.pattern.pool(self.masks.masks)
            self._targets = {name: int((units > 0).sum()) for name, units in alive.items()}
            self.ever_alive = {name: mask.clone() for name, mask in self.masks.masks.items()}
            self._first = {name: mask.clone() for name, mask in self.masks.masks.items()}
        self._remember_weights(-1)
        self._wake(0)

    def _set_first_masks(self, sample: Sample | None) -> None:
        if self.method.update and isinstance(self.pattern, Channels):
            self._last_values = LastValues(self.model, self.masks, self.pattern)
        rounds = int(self.options.get("score_rounds", 1)) if self.method.score else 0
        scores: dict[str, Tensor] = {}
        initial = {name: p.detach().clone() for name, p in (self.masks.weights | self.masks.others).items()}
        for number in range(1, rounds + 1):
            # Each round keeps the same fraction of what the last one kept (SynFlow, algorithm 1; exponential decay in FORCE);
            # with one it is the target.
            wanted = 1 - (1 - self.budget.sparsity) ** (number / rounds)
            score = self.method.score
            assert score is not None
            scored = self._scored(-1, sample)
            scored.initial = initial
            scores = score(scored)
            if number > 1 and score not in REVIVING:  # nor where living weights score 0 as well
                # Below all others, and next to nothing where the pattern pools it with what lives in the same channel.
                pooled = score in POOLED_BY_NORM or isinstance(self.pattern, Channels)
                lowest = -torch.finfo(torch.float32).tiny if pooled else -math.inf
                dead = {name: mask == 0 for name, mask in self.masks.masks.items()}
                scores = {n: s.masked_fill(dead[n], lowest) if n in dead else s for n, s in scores.items()}
            with torch.no_grad():  # what was pruned in an earlier round may live again
                torch._foreach_copy_([self.masks.parameter(name) for name in initial], list(initial.values()))
            self.masks.set(self.pattern.keep(scores, self._first_counts(wanted), square=score in POOLED_BY_NORM))
        if not self.method.score and (self.method.update or self.method.tickets):
            # Masks of ones, so that none has to be made during training.
            self.masks.set(self.pattern.keep(magnitude(self._scored(-1)), self.budget.counts(0.0)))
        self.check_layers(scores if rounds == 1 else None)

    def largest(self, weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """Return boolean masks of the largest weights at a sparsity, of the layers that are not dense; nothing changes."""
        scores = {name: weight.detach().abs() for name, weight in weights.items()}
        masks = self.pattern.keep(scores, self.budget.counts(sparsity), square=True)
        return {name: mask for name, mask in masks.items() if name in weights}

    def mask_gradients(self, step: int | None = None) -> None:
        """Zero the gradients of dead weights.

        Args:
            step: the one at hand, counted from 0. Where masks change after it by gradients, these are kept first. None
                for gradients that masks do not go by.
        """
        if step is not None:
            self.keep_gradients(step)
        if not self._compacted:
            self.masks.apply_to_gradients()

    def keep_gradients(self, step: int) -> None:
        """Keep the gradients as they are, if masks change after this step by them; `mask_gradients(step)` does so too."""
        if self.keeps_gradients(step):
            if not self._gradients:  # they stay where they are, as a CUDA graph wants it
                self._gradients = {name: torch.zeros_like(mask) for name, mask in self.masks.masks.items()}
            for name, kept in self._gradients.items():
                gradient = self.masks.weights[name].grad
                kept.zero_() if gradient is None else kept.copy_(gradient)

    def mask_weights(self) -> None:
        """Zero the dead weights, which an optimizer may have moved."""
        if not self._compacted:
            with self._unperturbed():
                self.masks.apply_to_weights()

    def compact(self) -> nn.Module:
        """Return the network without its dead channels, to be trained in place of the whole one.

        From now on masks only tell what is dead in the whole network: the smaller one needs none.

        Raises:
            ValueError: masks change during training, no channel is dead, or other weights are dead too.
        """
        if self.method.update or self.method.tickets:
            raise ValueError(
                "masks change during training, and what was taken out cannot come back: compact it after that"
            )
        small = compact(self.model, self.masks)
        left = sum(weight.numel() for weight in prunable_weights(small).values())
        if left == sum(weight.numel() for weight in self.masks.weights.values()):
            raise ValueError("these masks leave no channel dead")
        if left != sum(self.masks.alive().values()):
            raise ValueError("beside channels these masks drop other weights, which would come alive")
        self._compacted = True
        return small

    def whole(self, model: nn.Module) -> nn.Module:
        """Return the whole network with the weights of the one that `compact` returned; the model itself without one."""
        if not self._compacted:
            return model
        expand(model.state_dict(), self.model, self.masks)
        return self.model.train(model.training)

    def update_masks(self, step: int, skipped: bool = False) -> None:
        """Change the masks if it is time.

        Where layers compete for weights one may come out empty: `check_layers` tells, and waits for the device.

        Args:
            step: the one just taken, counted from 0.
            skipped: the optimizer left it out. Masks change after the next one, or now if there is none.
        """
        due, self._postponed = self.due(step), False
        if not skipped:
            self._smooth_gradients(step)
        if due:
            assert self.timing is not None
            self._postponed = skipped and step + 1 < self.timing.total_steps
            if not self._postponed:
                self._update(step, skipped)
        self._remember_weights(step)
        self._wake(step + 1)

    def _update(self, step: int, skipped: bool) -> None:
        assert self.method.update is not None
        assert self.timing is not None
        if self.method.update.reads_gradients:
            if not self._gradients:
                raise RuntimeError("masks change by the step's gradients: call mask_gradients(step) after backward()")
            if skipped:  # those of a step that is left out; nothing grows at the end
                torch._foreach_zero_(list(self._gradients.values()))
        with self._unperturbed():
            inputs = UpdateInputs(
                self._scored(step), self.masks.masks, self.pattern, self.timing.fraction(step), self.timing.number(step),
                self._targets, self.budget.sparsity, self.budget.counts, self._memory,
            )  # fmt: skip
            self._change_masks(self.method.update(inputs))
        self._settled = inputs.fraction >= 1

    @contextmanager
    def _unperturbed(self) -> Iterator[None]:
        """Bring back the weights that a SAM holds at w + e: scores are of w, and so is what masks zero."""
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                if hasattr(optimizer, "unperturbed"):  # of `sam.SAM`
                    stack.enter_context(optimizer.unperturbed())
            yield

    @property
    def has_next_round(self) -> bool:
        """Whether a training that has come to its end begins once more, with masks that it led to."""
        return self._rounds is not None and self._rounds.number < self._rounds.count

    def next_round(self, step: int) -> int:
        """Return the step to go on with at the end of training: the same one to stop, or the one that a round begins at.

        Raises:
            EmptyLayerError: see `check_layers`.
        """
        rounds, score = self._rounds, self.method.tickets
        if rounds is None or not self.has_next_round:
            return step
        assert score is not None
        rounds.number += 1
        with self._unperturbed():
            counts = self.budget.counts(rounds.sparsity(self.budget.sparsity))
            masks = self.pattern.keep(score(self._scored(step)), counts, square=score in POOLED_BY_NORM)
            rounds.restore()
            self.masks.set(masks)
            self.check_layers()
            for optimizer in self.optimizers:
                for state in optimizer.state.values():
                    for tensor in state.values():
                        if isinstance(tensor, Tensor):
                            tensor.zero_()
        return rounds.rewind

    def same_sparsity(self, one: float, other: float) -> bool:
        """Return whether two sparsities of this training are equal up to rounding.

        Masks that move by the units of a pattern come out a little sparser or denser each time.
        """
        steady = self.method.moves and not isinstance(self.method.update, PruneAndRegrow)
        return abs(one - other) <= (ROUNDING if steady else 0)

    def due(self, step: int) -> bool:
        """Return whether masks change after a step."""
        if self.method.update is None or self.timing is None:
            return False
        return self._postponed or self.timing.due(step)

    def keeps_gradients(self, step: int) -> bool:
        """Return whether the change of masks after a step, or the average that a later one goes by, reads its gradients."""
        update = self.method.update
        if update is None or not update.reads_gradients:
            return False
        return self.due(step) or (update.smoothing > 0 and self.timing is not None and step < self.timing.last)

    def grows_by_gradient(self, step: int) -> bool:
        """Return whether a step computes the gradients of dead weights, for a change of masks."""
        update = self.method.update
        return update is not None and update.reads_dead_gradients and self.keeps_gradients(step)

    def check_layers(self, scores: dict[str, Tensor] | None = None) -> None:
        """Warn of layers without a weight. Waits for the device.

        Args:
            scores: that alone led to the masks: with them an error can name the highest sparsity that works.

        Raises:
            EmptyLayerError: no path of living weights leads from the input to the output, or a layer is empty and
                `choose_masks` had no sample to tell whether other layers lead around it.
        """
        filters_stay = self._settled and not isinstance(self.pattern, Channels)
        self._connectivity.check(self.masks, lambda: self._ways_out(scores), warn_of_filters=filters_stay)

    def figures(self) -> dict[str, float]:
        """Return what the masks have become, by name: see `diagnostics`. Waits for the device.

        Overlaps, with the masks that training began with and with those before the last change, are there where masks move;
        the others where some weights are dead and `choose_masks` had a sample.
        """
        figures: dict[str, float] = {}
        if self._first:
            now = [self.masks.masks[name] for name in self._first]
            figures["overlap_with_first"] = diagnostics.overlap(self._first.values(), now).item()
            figures["overlap_with_last"] = self._overlap.item()
        self.check_layers()
        return figures | self._connectivity.figures

    def extra_epochs(self, total_steps: int, steps_per_epoch: int) -> int:
        """Return the number of epochs, begun ones counted, that later rounds add to one training."""
        return self._rounds.extra_epochs(total_steps, steps_per_epoch) if self._rounds else 0

    def ever_alive_fraction(self) -> float:
        """Return the fraction of prunable weights that were alive at any time: the ITOP rate (Liu et al. 2021)."""
        if self.method.tickets or (self.method.update and not self.method.score):
            return 1.0  # it begins dense
        alive = self.masks.alive()
        if self.ever_alive:
            counts = torch.stack([mask.count_nonzero() for mask in self.ever_alive.values()]).tolist()
            alive |= dict(zip(self.ever_alive, counts, strict=True))
        total = sum(weight.numel() for weight in self.masks.weights.values())
        return sum(alive.values()) / total if total else 1.0

    def describe(self) -> str:
        """Return one line: how many weights are zero, of how many, and what stays dense."""
        total = sum(weight.numel() for weight in self.masks.weights.values())
        dead = total - sum(self.masks.alive().values())
        line = f"sparsity {self.masks.sparsity():.4f}: {dead:,} of {total:,} convolution and linear weights are zero"
        dense = sum(self.masks.weights[name].numel() for name in self.budget.dense)
        if dense:
            line += f"; {len(self.budget.dense)} layers ({dense:,} weights) stay dense"
            line += f", the others have {dead / (total - dense):.4f}"
            if self.dense_layers:
                line += f" ({'; '.join(f'{pattern}: {listed(names)}' for pattern, names in self.dense_layers.items())})"
        if isinstance(self.pattern, Channels) and self.masks.masks:
            units = torch.cat(list(self.pattern.pool(self.masks.masks).values()))
            return f"{line}; {int((units == 0).sum()):,} of {len(units):,} channels are gone"
        empty, filters = diagnostics.empty_filters(self.model, self.masks, self.masks.weights)
        if empty:
            line += f"; {empty:,} of {filters:,} filters have no weight"
        return line

    def state_dict(self) -> dict:
        """Return everything that training has to go on with."""
        return {
            "masks": self.masks.state_dict(),
            "targets": self._targets,
            "ever_alive": {name: mask.bool() for name, mask in self.ever_alive.items()},
            "postponed": self._postponed,
            "settled": self._settled,
            "momentum": self._momentum,
            "memory": self._memory,
            "first": {name: mask.bool() for name, mask in self._first.items()},
            "overlap": self._overlap,
            "input_shape": self._connectivity.input_shape,
            "last_values": self._last_values.state_dict() if self._last_values else {},
            "awake": self._last_values is not None and self._last_values.awake,
            **(self._rounds.state_dict() if self._rounds else {}),
        }

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned, around the same network. Raises ValueError for masks of another pattern."""
        if (
            isinstance(self.pattern, Channels)
            and state["masks"]
            and not state["masks"].keys() >= set(self.pattern.written)
        ):
            raise ValueError("its masks are of filters alone, as an earlier version made them, and not of channels")
        with self._unperturbed():
            self.masks.load_state_dict(state["masks"])
        self._targets = dict(state["targets"])
        self._postponed = state.get("postponed", False)
        self._settled = state.get("settled", self._settled)
        self._connectivity.input_shape = state.get("input_shape")
        self.ever_alive = self._like_weights(state["ever_alive"])
        self._first = self._like_weights(state.get("first", {}))
        self._overlap = state.get("overlap", self._overlap)
        self._momentum = self._like_weights(state.get("momentum", {}))
        device = next((weight.device for weight in self.masks.weights.values()), None)
        self._memory = {name: tensor.to(device, copy=True) for name, tensor in state.get("memory", {}).items()}
        if self._rounds:
            self._rounds.load_state_dict(state)
        if state.get("last_values"):
            assert isinstance(self.pattern, Channels)
            self._last_values = LastValues(self.model, self.masks, self.pattern)
            self._last_values.load_state_dict(state["last_values"])
            with self._unperturbed():
                self._last_values.wake(state["awake"])

    def _like_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies in the dtype, layout and device of the weights."""
        weights = self.masks.weights
        return {n: torch.empty_like(weights[n], requires_grad=False).copy_(tensor) for n, tensor in tensors.items()}

    def _scored(self, step: int, sample: Sample | None = None) -> Scored:
        """Return what scores look at after a step (-1: before training)."""
        weights = {name: w for name, w in self.masks.weights.items() if name not in self.budget.dense}
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {step}").getrandbits(63))
        return Scored(self.model, weights, generator, sample, self._momentum or self._gradients, self.options)

    def _first_counts(self, wanted: float) -> Counts:
        """Return the counts of the masks that training begins with: those of a sparsity, or GraNet's own first ones."""
        if "granet_start" not in self.options:
            return self.budget.counts(wanted)
        start, distribution = self.options["granet_start"], self.budget.distribution
        # Random scores do not compare across layers.
        return self.budget.counts(start, "erk" if distribution == "global" else distribution)

    @torch.no_grad()
    def _smooth_gradients(self, step: int) -> None:
        """Add the kept gradients of a step to their average, where there is one."""
        if self.method.update is None or not (self.method.update.smoothing and self.keeps_gradients(step)):
            return
        if not self._gradients:
            raise RuntimeError("masks change by the steps' gradients: call mask_gradients(step) after backward()")
        if not self._momentum:
            self._momentum = {name: torch.zeros_like(kept) for name, kept in self._gradients.items()}
        torch._foreach_mul_(list(self._momentum.values()), self.method.update.smoothing)
        torch._foreach_add_(list(self._momentum.values()), list(self._gradients.values()))

    def _ways_out(self, scores: dict[str, Tensor] | None) -> list[str]:
        """Return what mends masks that are too sparse, in phrases."""
        highest = 0.0
        if scores and self.budget.distribution:

            def works(sparsity: float) -> bool:
                counts = self.budget.counts(sparsity)
                return self._connectivity.connects(
                    self.pattern.keep(scores, counts, square=self.method.score in POOLED_BY_NORM)
                )

            highest = highest_sparsity(works, self.budget.sparsity)
        ways = [f"take sparsity={highest:g}, the highest that works here" if highest else "lower the sparsity"]
        if "erk" in self.method.distributions and self.budget.distribution != "erk":
            ways.append("distribution=erk")
        if self.pattern.name != "unstructured":
            ways.append("take a finer pattern")
        return ways

    @torch.no_grad()
    def _change_masks(self, change: MaskChange) -> None:
        """Put new masks in place and zero what optimizers remember of weights that died or came alive."""
        weights = [self.masks.parameter(name) for name in change.masks]
        masks = [self.masks.mask(name) for name in change.masks]
        channels = self._last_values
        if channels:
            channels.remember()
        before = torch._foreach_mul(masks, 1)
        died: list[Tensor] = []
        if change.survivors:
            self.masks.set(change.survivors)
            died = list(torch._foreach_sub(before, masks))
            if channels:
                channels.mark()
        self.masks.set(change.masks)
        if channels:
            channels.restore_grown()
        changed = torch._foreach_sub(masks, before)  # 1 where a weight came alive, -1 where it died
        torch._foreach_abs_(changed)
        if died:  # some of these are alive again
            torch._foreach_maximum_(changed, died)
        unchanged = torch._foreach_neg(changed)
        torch._foreach_add_(unchanged, 1)
        if channels and channels.awake:  # the optimizer decayed their weights
            torch._foreach_mul_(unchanged, masks)
        self._forget(list(zip(weights, unchanged, strict=True)))
        if self.method.moves:
            counted = [name in self.masks.weights for name in change.masks]
            self._overlap = diagnostics.overlap(compress(before, counted), compress(masks, counted))
        if self.ever_alive:
            torch._foreach_maximum_(list(self.ever_alive.values()), [self.masks.masks[n] for n in self.ever_alive])

    @torch.no_grad()
    def _forget(self, keep: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Zero what optimizers remember of parameters, each with a tensor that is 0 there and 1 elsewhere."""
        for optimizer in self.optimizers:
            remembered = [
                (tensor, kept)
                for parameter, kept in keep
                for tensor in optimizer.state.get(parameter, {}).values()
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape and tensor.is_floating_point()
            ]
            if remembered:
                tensors, keeps = zip(*remembered, strict=True)
                torch._foreach_mul_(list(tensors), list(keeps))

    def _wake(self, step: int) -> None:
        """Wake dead channels for a step whose gradients they grow by."""
        if self._last_values:
            with self._unperturbed():
                self._last_values.wake(self.grows_by_gradient(step))

    def _remember_weights(self, step: int) -> None:
        """Keep the weights that later rounds rewind to, once the first round comes to that step."""
        if self._rounds and self._rounds.remembers(step):
            with self._unperturbed():
                self._rounds.remember()
