"""The training step: SGD, SAM or one-step SAM on a masked network. The algorithm is `TrainingStep.update_weights`."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagedata.loaders import Batch
from sam import SAM
from training.batch_norm import SavedStatistics
from training.optim import passes_per_step, set_learning_rate, set_radius
from training.rivals import CrAM
from training.state import TrainState
from utils.cuda_graph import GraphedUpdate
from utils.distributed import ProcessGroup
from utils.precision import Execution

Objective = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class StepKind(NamedTuple):
    """What one step does differently from another: steps of one kind are one CUDA graph.

    Attributes:
        batch_size: images of the whole batch, over all processes.
        log: whether to measure what is only logged.
        keep_gradients: see Pruner.keeps_gradients, which the step asks itself.
        perturbs: whether SAM's radius is not 0.
    """

    batch_size: int
    log: bool
    keep_gradients: bool
    perturbs: bool


class StepResult(NamedTuple):
    """What a step computed, on the device.

    Attributes:
        sums: float32 [2], the sum of losses and the number of correct predictions, at the weights of the gradient. A
            prediction of a mixture counts by the share of the predicted class.
        logged: scalars by name.
    """

    sums: Tensor
    logged: dict[str, Tensor]


class AtWeights(NamedTuple):
    """What a pass at the unperturbed weights found, for a step that is logged.

    Attributes:
        sums: see StepResult.
        gradients: of each parameter.
    """

    sums: Tensor
    gradients: list[Tensor | None]


class TrainingStep:
    """One training step of any optimizer with any sparse-training method.

    Args:
        state: what it changes.
        objective: see `build_objective`.
        lr_at: the learning rate of a schedule step.
        accumulate: micro-batches that a batch is cut into. The gradient is that of the whole batch's mean loss; batch norm
            normalises each micro-batch by itself.
        clip_grad: largest norm of the gradient, or None.
        sam_local: two-step SAM perturbs each process along the gradient of its own images (m-sharpness, Foret et al. 2021,
            section 4.1).
        sam_unmasked: SAM perturbs pruned weights too, along their gradients, as the code of S2-SAM does: they move in the
            forward pass and are zero after it. The norm of the perturbation is then over all weights.
        group: the processes that share each batch.
        graphed: replay the step from CUDA graphs.
        rho_at: the radius of SAM at a schedule step, 0 where it does not perturb. None leaves the optimizer's own.
        rho_varies: rho_at has more values than one and 0: graphs read it anew in each step.
        measure_ascent: at logged steps that perturb, measure what takes the loss and the gradient at w. One-step SAM runs a
            further pass for it, of which nothing stays.
        seed: of what the network itself draws at random, such as dropout.
    """

    def __init__(
        self,
        state: TrainState,
        objective: Objective,
        lr_at: Callable[[int], float],
        accumulate: int = 1,
        clip_grad: float | None = None,
        sam_local: bool = False,
        sam_unmasked: bool = False,
        group: ProcessGroup = ProcessGroup(),
        graphed: bool = False,
        rho_at: Callable[[int], float] | None = None,
        rho_varies: bool = False,
        measure_ascent: bool = True,
        seed: int = 0,
    ):
        own_rho = state.optimizer.param_groups[0].get("rho", 0.0)
        self.rho_at, self.seed = rho_at or (lambda step: own_rho), seed
        self.state, self.objective, self.lr_at = state, objective, lr_at
        self.accumulate, self.clip_grad, self.sam_local, self.group = accumulate, clip_grad, sam_local, group
        self.sam_unmasked, self.measure_ascent = sam_unmasked, measure_ascent
        if sam_unmasked:  # SAM keeps the whole gradient, and its base optimizer sees the masked one
            assert isinstance(state.optimizer, SAM)
            assert state.optimizer.base_optimizer is not None
            state.optimizer.base_optimizer.register_step_pre_hook(lambda *_: state.pruner.mask_gradients())
        self._statistics = SavedStatistics(state.model)
        self._update: Callable[[Tensor, Tensor, StepKind], StepResult] = self.update_weights
        if graphed:
            changing = ("lr", "rho") if rho_varies else ("lr",)
            self._update = GraphedUpdate(self.update_weights, state.optimizer, changing)

    def __call__(self, batch: Batch, log: bool = False) -> StepResult:
        """Take a step on a batch: set the rates, move the weights, and change the masks if it is time."""
        state = self.state
        set_learning_rate(state.optimizer, self.lr_at(state.schedule_step))
        set_radius(state.optimizer, self.rho_at(state.schedule_step))
        keep_gradients = state.pruner.keeps_gradients(state.schedule_step)
        kind = StepKind(batch.size, log, keep_gradients, self.perturbs(state.schedule_step))
        state.guard.begin()
        # Dropout follows from the step alone, so that a resumed run goes on with it.
        torch.manual_seed(random.Random(f"{self.seed} {state.global_step} {self.group.rank}").getrandbits(63))
        sums, logged = self._update(batch.inputs, batch.targets, kind)
        sums = state.guard.end(sums)
        state.pruner.update_masks(state.schedule_step, state.guard.skipped)
        state.schedule_step += 1
        state.global_step += 1
        state.passes += passes_per_step(state.optimizer) if kind.perturbs else 1
        return StepResult(sums, logged)

    def perturbs(self, step: int) -> bool:
        """Return whether a schedule step perturbs the weights: two-step SAM then takes two passes, else one."""
        return self.rho_at(step) != 0

    def update_weights(self, inputs: Tensor, targets: Tensor, kind: StepKind) -> StepResult:
        """Move the weights by one step of SGD, SAM or one-step SAM. Does not wait for the device.

        Args:
            inputs: float32 [B, C, H, W], this process's part of the batch.
            targets: float32 [B, num_classes], distributions over the classes.
            kind: see StepKind.
        """
        optimizer, pruner, guard = self.state.optimizer, self.state.pruner, self.state.guard
        if isinstance(optimizer, SAM) and not (optimizer.v2 or kind.perturbs):
            optimizer = optimizer.base_optimizer  # two-step SAM does not perturb in this step: one pass
        sam = optimizer if isinstance(optimizer, SAM) else None
        two_step = sam is not None and not sam.v2
        at_w = None  # for the log

        if two_step:  # the gradient at w, of the same batch
            sums = self._backward(inputs, targets, kind, add_gradients=not self.sam_local)
            if not self.sam_unmasked:
                pruner.mask_gradients()
            at_w = self._record_at_weights(sums, kind)
        elif sam and kind.log and kind.perturbs and self.measure_ascent:
            at_w = self._look_at_weights(inputs, targets, kind)
        if sam:  # w -> w + e; one-step SAM: along what the last step left, and where rho is 0 nowhere
            sam.first_step(zero_grad=True)
        sums = self._backward(inputs, targets, kind, keep_statistics=two_step)  # the gradient at w + e
        guard.unscale(optimizer)
        pruner.keep_gradients(self.state.schedule_step)
        if not self.sam_unmasked:
            pruner.mask_gradients()
        logged = self._measure(sums, at_w, kind) if kind.log else {}
        if isinstance(optimizer, CrAM):
            optimizer.complete_gradients()
        if kind.log:
            logged["gradient_norm"] = gradient_norm(self.state.model)
        if self.clip_grad:
            nn.utils.clip_grad_norm_(self.state.model.parameters(), self.clip_grad)
        if guard.accepts(optimizer, sums):  # always, except where steps that are not finite are left out
            optimizer.step()  # SAM: back to w, then the base optimizer's step; one-step SAM keeps the gradient
        elif sam:
            sam.restore()
        pruner.mask_weights()
        return StepResult(sums, logged)

    def _backward(
        self, inputs: Tensor, targets: Tensor, kind: StepKind, add_gradients: bool = True, keep_statistics: bool = False
    ) -> Tensor:
        """Compute the gradient of the batch's mean loss, in micro-batches and over all processes.

        Args:
            inputs, targets, kind: see `update_weights`.
            add_gradients: add up the gradients of all processes.
            keep_statistics: leave batch norm's running statistics as they are: SAM's second pass is at other weights.

        Returns:
            float32 [2], see StepResult.
        """
        self.state.optimizer.zero_grad()
        if keep_statistics:
            self._statistics.save()
        sums = torch.zeros(2, device=inputs.device)
        for x, y in zip(inputs.tensor_split(self.accumulate), targets.tensor_split(self.accumulate), strict=True):
            if len(x) or self.group.synchronised:  # a process may have no images of an epoch's last batch
                loss, part = self.objective(x, y, kind.batch_size)
                self.state.guard.scale(loss).backward()
                sums += part
        sums = self.group.reduce(self.state.model, sums, add_gradients)
        if keep_statistics:
            self._statistics.restore()
        return sums

    def _record_at_weights(self, sums: Tensor, kind: StepKind) -> AtWeights | None:
        """Return sums and gradients at w, for a step that logs them; others need their memory."""
        if kind.log and self.measure_ascent:
            return AtWeights(sums, get_gradients(self.state.model))
        return None

    def _look_at_weights(self, inputs: Tensor, targets: Tensor, kind: StepKind) -> AtWeights | None:
        """Run a pass at w for the log alone: gradients and batch norm's statistics are as before."""
        # Dropout of the step is the same whether or not it is logged, except inside a CUDA graph.
        device = inputs.device
        eager = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        with torch.random.fork_rng(devices=[device] if eager else []):
            sums = self._backward(inputs, targets, kind, keep_statistics=True)
        if not self.sam_unmasked:
            self.state.pruner.mask_gradients()
        found = self._record_at_weights(sums, kind)
        self.state.optimizer.zero_grad()
        return found

    def _measure(self, sums: Tensor, at_w: AtWeights | None, kind: StepKind) -> dict[str, Tensor]:
        """Return what is only logged of SAM's perturbation e: its norm, and where it led. Gradients are those at w + e.

        Args:
            sums: at w + e.
            at_w: the same at w, where it is known.
            kind: see StepKind.
        """
        logged: dict[str, Tensor] = {}
        sam = self.state.optimizer
        if not (isinstance(sam, SAM) and kind.perturbs):
            return logged
        logged["perturbation_norm"], logged["cos_e_gradient_at_perturbed"] = sam.perturbation_stats()
        if at_w:
            logged["ascent"] = (sums[0] - at_w.sums[0]) / kind.batch_size
            gradients = get_gradients(self.state.model)
            set_gradients(self.state.model, at_w.gradients)
            logged["cos_e_gradient_at_w"] = sam.perturbation_stats()[1]
            set_gradients(self.state.model, gradients)
        return logged


def build_objective(model: nn.Module, execution: Execution, micro_batch: int, smooth_eps: float = 0.0) -> Objective:
    """Return the function that is differentiated.

    It maps inputs, targets and the size of the whole batch they are part of to their part of the batch's mean loss, and
    to [sum of losses, number of correct predictions].

    Args:
        model: from inputs to logits.
        execution: its precision, and whether to compile the function.
        micro_batch: the number of images to compile for.
        smooth_eps: label smoothing.
    """

    def objective(inputs: Tensor, targets: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        with execution.autocast(inputs.device):
            logits = model(inputs)
        logits = logits.to(targets.dtype)
        loss = F.cross_entropy(logits, targets, label_smoothing=smooth_eps, reduction="sum")
        correct = targets.gather(1, logits.argmax(1, keepdim=True)).sum()
        return loss / batch_size, torch.stack([loss.detach(), correct])

    return execution.compile(objective, micro_batch)


def get_gradients(model: nn.Module) -> list[Tensor | None]:
    """Return the gradient of each parameter."""
    return [p.grad for p in model.parameters()]


def set_gradients(model: nn.Module, gradients: list[Tensor | None]) -> None:
    """Give each parameter a gradient, or none."""
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the 2-norm of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
