"""The training step, the loop around it, and evaluation."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagedata.loaders import EvalLoader, TrainLoader
from prune.flops import FlopsMeter
from training.checkpoint import TrainState
from training.logger import Logger
from training.optim import Perturbation
from utils.distributed import ProcessGroup
from utils.errors import Preempted, TrainingError
from utils.precision import Execution
from utils.signals import CheckpointSchedule, Interruption


@dataclass(frozen=True)
class Recipe:
    """What stays the same from step to step.

    Attributes:
        objective: see build_objective.
        execution: how evaluation computes.
        perturbation: what the optimizer does to the weights around the backward pass that counts.
        update: update_weights, as it is or from CUDA graphs.
        lr_at: the learning rate of a step.
        total_steps: steps of the whole schedule.
        accumulate: micro-batches that a batch is cut into; the gradient is that of the whole batch's mean loss, with
            batch norm in each by itself.
        clip_grad: largest norm of the gradient, or None.
        log_interval: steps from one logged step to the next.
        group: the processes that share each batch.
    """

    objective: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    execution: Execution
    perturbation: Perturbation
    update: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    lr_at: Callable[[int], float]
    total_steps: int
    accumulate: int = 1
    clip_grad: float | None = None
    log_interval: int = 50
    group: ProcessGroup = field(default_factory=ProcessGroup)


def build_objective(
    model: nn.Module, execution: Execution, micro_batch: int, smooth_eps: float = 0.0
) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """What is differentiated: a function of inputs, targets and the size of the whole batch they are part of.

    It returns the part's share of the batch's mean loss, and [sum of losses, number of correct predictions].

    Args:
        micro_batch: the size to compile for.
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


def train_step(
    state: TrainState,
    recipe: Recipe,
    inputs: Tensor,
    targets: Tensor,
    measure: bool,
    batch_size: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of any optimizer with any sparse-training method.

    Args:
        inputs: float32 [B, C, H, W], this process's share of the batch.
        targets: distributions over the classes, float32 [B, num_classes].
        measure: also return what is only logged.
        batch_size: images of the whole batch (B).

    Returns:
        [sum of losses, number of correct predictions] at the weights the gradient was taken at; scalars to log.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.lr_at(state.schedule_step)
    batch_size = len(inputs) if batch_size is None else batch_size
    results = recipe.update(state, recipe, inputs, targets, measure, batch_size)
    state.schedule_step = state.pruner.after_step(state.schedule_step, state.guard.skipped)
    state.global_step += 1
    return results


def update_weights(
    state: TrainState, recipe: Recipe, inputs: Tensor, targets: Tensor, measure: bool, batch_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a step does on the device, from a batch to the moved weights: always the same, so that a graph can hold it."""
    model, optimizer, guard = state.model, state.optimizer, state.guard

    def backward(share_gradients: bool = True) -> Tensor:
        optimizer.zero_grad()
        sums = torch.zeros(2, device=inputs.device)
        parts = zip(inputs.tensor_split(recipe.accumulate), targets.tensor_split(recipe.accumulate), strict=True)
        for x, y in parts:
            if len(x) or recipe.group.synchronised:  # a process may have no share of an epoch's last batch
                loss, part = recipe.objective(x, y, batch_size)
                guard.scale(loss).backward()
                sums += part
        return recipe.group.reduce(model, sums, share_gradients)

    guard.begin()
    recipe.perturbation.perturb(backward)
    sums = backward()
    guard.unscale(optimizer)
    state.pruner.after_backward(state.schedule_step)
    measured = {"gradient_norm": gradient_norm(model), **recipe.perturbation.measure()} if measure else {}
    if recipe.clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
    guard.step(optimizer, sums)
    recipe.perturbation.restore()
    state.pruner.mask_weights()
    return guard.end(sums), measured


def fit(
    state: TrainState,
    recipe: Recipe,
    loader: TrainLoader,
    evaluators: dict[str, EvalLoader],
    meter: FlopsMeter,
    logger: Logger,
    save: Callable[[TrainState], None],
    schedule: CheckpointSchedule,
    interruption: Interruption,
) -> None:
    """Train to the end of the schedule, as often as the method wants; after every epoch evaluate and logger.

    Args:
        save: writes a checkpoint: when it is due, after the last epoch and any that is the best on held-out images, and
            when there is an interruption.
        schedule: when it is due.
        interruption: asked after every step, or, by several processes together, after every logged one.

    Raises:
        Preempted: there was an interruption.
        TrainingError: the loss is no longer finite.
        EmptyLayerError: the masks came to leave a layer empty.
    """
    while True:
        while state.schedule_step < recipe.total_steps:
            began = time.perf_counter()
            earlier = state.partial.get("seconds", 0.0)

            def pause(partial: Callable[[], dict], began: float = began, earlier: float = earlier) -> None:
                if should_pause(interruption.signal or schedule.due_in_epoch(), state, recipe, loader.device):
                    told = pending_signal(interruption, recipe, loader.device)
                    state.partial = partial() | {"seconds": earlier + time.perf_counter() - began}
                    save(state)
                    schedule.saved()
                    exit_if_signalled(told, state, recipe)

            row = train_epoch(state, recipe, loader, meter, logger, pause)
            for name, evaluator in evaluators.items():
                row[f"{name}_loss"], row[f"{name}_top1"] = evaluate(
                    state.model, evaluator, recipe.execution, recipe.group
                )
                if not math.isfinite(row[f"{name}_loss"]):
                    raise TrainingError(
                        _stopped(f"the {name} loss is {row[f'{name}_loss']}", state.global_step, row["lr"])
                    )
            row["sparsity"] = state.pruner.masks.sparsity()
            row["images_per_second"] = row.pop("images_per_second")  # in the order of metrics.csv
            row["seconds"] = earlier + time.perf_counter() - began
            state.rows.append(row)
            recipe.group.check_same(state.state_dict())
            logger.events(state, meter)  # on disk before the checkpoint that goes on after them
            ended = state.schedule_step >= recipe.total_steps
            told = pending_signal(interruption, recipe, loader.device)
            if ended or told or schedule.due_after_epoch(len(state.rows)) or is_best(state.rows):
                save(state)
                schedule.saved()
            logger.row(state)
            if not ended:
                exit_if_signalled(told, state, recipe)
        step = state.pruner.next_round(state.schedule_step)
        if step == state.schedule_step:
            return
        state.schedule_step = step


def train_epoch(
    state: TrainState,
    recipe: Recipe,
    loader: TrainLoader,
    meter: FlopsMeter,
    logger: Logger,
    pause: Callable[[Callable[[], dict]], None] = lambda partial: None,
) -> dict:
    """Train to the next multiple of the steps of an epoch, or on from `state.partial`.

    Args:
        pause: called after every step but the last with a function that returns the epoch so far: what `state.partial`
            has to be for another process to go on in the middle of it.

    Returns:
        The training columns of a row of metrics.csv.
    """
    began = time.perf_counter()
    state.model.train()
    before = state.partial
    done = len(before["sums"]) if before else 0
    steps = done + loader.steps_per_epoch - state.schedule_step % loader.steps_per_epoch
    sums = torch.zeros(steps, 2, device=loader.device)
    if before:
        sums[:done] = before["sums"].to(loader.device)
        meter.load_state_dict(before["meter"])
    images = earlier = before.get("images", 0)
    counted = before.get("counted", 0)  # without those of skipped steps
    lrs, untimed = [0.0] * done, 0
    with logger.progress_bar(len(state.rows) + 1, steps, done) as bar:
        for position in range(done, steps):
            inputs, targets = loader.batch(state.schedule_step)
            size = loader.batch_size(state.schedule_step)
            images += size
            meter.step(size, state.pruner.grows_by_gradient(state.schedule_step))
            measure = (state.global_step + 1) % recipe.log_interval == 0
            sums[position], measured = train_step(state, recipe, inputs, targets, measure, size)
            counted += 0 if state.guard.skipped else size
            lrs.append(state.optimizer.param_groups[0]["lr"])
            if logger.first_step_of_process(sums[position], began) and steps - done > 1:
                began, untimed = time.perf_counter(), size  # compilation is not what images/s are about
            if measure:
                _check_finite(sums[: position + 1, 0], lrs, state)
                if not state.guard.skipped:
                    loss = sums[position, 0] / size
                    logger.scalars("train", {"loss": loss, "lr": lrs[-1], **measured}, state.global_step)
            bar.update()
            if position + 1 < steps:
                pause(partial(_epoch_so_far, sums[: position + 1], images, counted, lrs, state, meter))
    _check_finite(sums[:, 0], lrs, state)
    if not counted and not state.guard.searching:
        raise TrainingError(
            f"no step of an epoch had a finite loss and gradient, and all were skipped, up to step {state.global_step:,} with "
            f"learning rate {lrs[-1]:g}: lower --lr, or clip with --clip-grad; the last checkpoint, if there is one, is kept"
        )
    loss, top1 = (sums.double().sum(0) / counted).tolist()  # waits for the device; NaN where nothing was trained on
    seconds = time.perf_counter() - began
    state.training_flops += meter.read()
    state.pruner.refuse_empty_layers()
    state.images += images
    state.partial = {}
    return {
        "epoch": len(state.rows) + 1,
        "lr": lrs[-1],
        "train_loss": loss,
        "train_top1": 100 * top1,
        "images_per_second": (images - earlier - untimed) / seconds,
    }


def _epoch_so_far(
    sums: Tensor, images: int, counted: int, lrs: list[float], state: TrainState, meter: FlopsMeter
) -> dict:
    _check_finite(sums[:, 0], lrs, state)  # nothing that is spoilt is ever saved
    return {"sums": sums.cpu(), "images": images, "counted": counted, "meter": meter.state_dict()}


def should_pause(wanted: object, state: TrainState, recipe: Recipe, device: torch.device) -> bool:
    """Whether to pause: several processes ask each other at logged steps alone, since to ask is to wait."""
    if recipe.group.world == 1:
        return bool(wanted)
    return state.global_step % recipe.log_interval == 0 and recipe.group.any(bool(wanted), device)


def pending_signal(interruption: Interruption, recipe: Recipe, device: torch.device) -> str | None:
    """The signal that a process has had, the same for all. One that comes later waits until they ask each other again."""
    signal = interruption.signal
    return signal or "a signal to another process" if recipe.group.any(signal is not None, device) else None


def exit_if_signalled(told: str | None, state: TrainState, recipe: Recipe) -> None:
    if told:
        recipe.group.wait()  # the first process may be writing still, and would be ended when another is gone
        raise Preempted(f"ended by {told} after step {state.global_step:,} with a checkpoint: go on by --resume auto")


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: EvalLoader, execution: Execution, group: ProcessGroup = ProcessGroup()
) -> tuple[float, float]:
    """Mean cross-entropy (nats, without label smoothing) and top-1 accuracy (percent) over the shares of all processes."""
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=loader.labels.device)
    for inputs, labels in loader if len(loader) else ():
        with execution.autocast(inputs.device):
            logits = model(inputs)
        logits = logits.float()
        sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()])
    model.train(training)
    sums = group.add(torch.cat([sums, sums.new_tensor([len(loader)])]))
    loss, correct, _ = (sums / sums[2]).tolist()
    return loss, 100 * correct


def is_best(rows: list[dict]) -> bool:
    """Whether the last epoch is the best so far on held-out images, if there are any.

    A sparser network is better than a denser one, whatever that reached: the target is what a run is for.
    """
    if "val_top1" not in rows[-1]:
        return False
    *earlier, last = ((row["sparsity"], row["val_top1"]) for row in rows)
    return all(last > row for row in earlier)


def gradient_norm(model: nn.Module) -> Tensor:
    """2-norm of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def _check_finite(losses: Tensor, lrs: list[float], state: TrainState) -> None:
    """Read the losses of an epoch so far. Weights are looked at too: a last step may have spoilt them."""
    norm = nn.utils.get_total_norm([p.detach() for p in state.model.parameters()])
    *values, norm = torch.cat([losses, norm[None]]).tolist()  # waits once
    wrong = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
    if wrong is not None:
        step = state.global_step - len(values) + wrong + 1
        raise TrainingError(_stopped(f"the loss is {values[wrong]}", step, lrs[wrong]))
    if not math.isfinite(norm):
        raise TrainingError(_stopped("the weights are no longer finite", state.global_step, lrs[-1]))


def _stopped(what: str, step: int, lr: float) -> str:
    return (
        f"{what} at step {step:,} with learning rate {lr:g}: lower --lr, clip with --clip-grad, or "
        "leave such steps out by --nonfinite skip; the last checkpoint, if there is one, is kept"
    )
