"""Epochs and evaluation: what happens around the training steps."""

import math
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagedata.loaders import EvalLoader, TrainLoader
from prune.flops import FlopsMeter
from sam import SAM
from training.checkpoint import CheckpointWriter
from training.logger import Logger
from training.state import PartialEpoch, TrainState
from training.step import TrainingStep
from utils.distributed import ProcessGroup
from utils.errors import Preempted, TrainingError
from utils.precision import Execution
from utils.signals import Interruption


@dataclass
class Run:
    """The parts of a training, as experiment/build.py puts them together.

    Attributes:
        state: all that changes.
        step: what changes it.
        loader: training batches by schedule step.
        evaluators: images by split name.
        meter: counts operations.
        logger: writes and prints what is known.
        checkpoints: writes checkpoints: when they are due, after the last epoch and any that is the best on held-out
            images, and when a signal came. None to write none.
        total_steps: of the schedule.
        log_interval: steps between two logged steps; the last step of an epoch is logged too.
        execution: how evaluation computes.
        group: the processes that share the training.
        eval_every: evaluate after every epoch whose number is a multiple of this one, and after the last one of a round.
        interruption: what a signal leaves here is looked at after every step or, in several processes, every logged step.
    """

    state: TrainState
    step: TrainingStep
    loader: TrainLoader
    evaluators: dict[str, EvalLoader]
    meter: FlopsMeter
    logger: Logger
    checkpoints: CheckpointWriter | None
    total_steps: int
    log_interval: int = 50
    execution: Execution = field(default_factory=Execution)
    group: ProcessGroup = field(default_factory=ProcessGroup)
    eval_every: int = 1
    interruption: Interruption = field(default_factory=Interruption)


def fit(run: Run) -> None:
    """Train to the end of the schedule, in as many rounds as the method wants.

    Raises:
        Preempted: a signal came.
        TrainingError: the loss is no longer finite.
        EmptyLayerError: the masks came to leave no path through the network.
    """
    state = run.state
    while True:
        while state.schedule_step < run.total_steps:
            run_epoch(run)
        step = state.pruner.next_round(state.schedule_step)
        if step == state.schedule_step:
            return
        state.schedule_step = step


def run_epoch(run: Run) -> None:
    """Train to the end of an epoch, evaluate and write a checkpoint if they are due, and record."""
    state = run.state
    began, earlier = time.perf_counter(), state.partial.seconds if state.partial else 0.0
    row = train_epoch(run)
    ended = state.schedule_step >= run.total_steps
    for name, evaluator in run.evaluators.items():
        row[f"{name}_loss"], row[f"{name}_top1"] = None, None
        if row["epoch"] % run.eval_every and not ended:
            continue
        row[f"{name}_loss"], row[f"{name}_top1"] = evaluate(state.model, evaluator, run.execution, run.group)
        if not math.isfinite(row[f"{name}_loss"]):
            raise TrainingError(
                _advice(state, f"the {name} loss is {row[f'{name}_loss']}", state.global_step, row["lr"])
            )
    row["sparsity"] = state.pruner.masks.sparsity()
    row["images_per_second"] = row.pop("images_per_second")  # in the order of metrics.csv
    row["seconds"] = earlier + time.perf_counter() - began
    state.rows.append(row)
    run.group.check_same(state.state_dict())
    run.logger.log_epoch(state, run.meter.flops)  # on disk before the checkpoint that goes on after it
    signal = pending_signal(run)
    if run.checkpoints and (
        ended or signal or run.checkpoints.schedule.due_after_epoch(len(state.rows)) or state.is_best()
    ):
        run.checkpoints.save(state)
    run.logger.write_row(state)
    if not ended:
        exit_if_signalled(run, signal)


def train_epoch(run: Run) -> dict:
    """Train to the end of an epoch, from its beginning or from where a checkpoint was written in the middle of it.

    Returns:
        The training columns of a row of metrics.csv.
    """
    began, state = time.perf_counter(), run.state
    state.model.train()
    epoch = EpochTotals(run)
    state.partial = None
    with run.logger.progress_bar(len(state.rows) + 1, epoch.steps, epoch.done) as bar:
        for position in range(epoch.done, epoch.steps):
            batch = run.loader.batch(state.schedule_step)
            step = state.schedule_step
            run.meter.step(batch.size, state.pruner.grows_by_gradient(step), run.step.perturbs(step))
            log = (state.global_step + 1) % run.log_interval == 0 or position + 1 == epoch.steps
            sums, logged = run.step(batch, log)
            epoch.add(position, sums, batch.size)
            if run.logger.first_step_of_process(sums, began) and epoch.steps - epoch.done > 1:
                epoch.leave_out_of_speed(batch.size)  # compilation is not what images/s are about
            if log:
                epoch.check_finite(position + 1)
                if not state.guard.skipped:
                    run.logger.log_step(sums[0] / batch.size, {"lr": epoch.lrs[-1], **logged}, state.global_step)
            bar.update()
            if position + 1 < epoch.steps and should_pause(run):
                pause(run, epoch.partial(position + 1))
    return epoch.finish()


class EpochTotals:
    """What the steps of an epoch add up to, those of an earlier process included.

    Attributes:
        steps: of the epoch.
        done: those of them that an earlier process has taken.
        lrs: learning rate of each step; 0 for those of an earlier process.
    """

    def __init__(self, run: Run):
        self._run, self._state, before = run, run.state, run.state.partial
        self.done = len(before.sums) if before else 0
        per_epoch = run.loader.steps_per_epoch
        self.steps = self.done + per_epoch - run.state.schedule_step % per_epoch
        self._sums = torch.zeros(self.steps, 2, device=run.loader.device)
        if before:
            self._sums[: self.done] = before.sums.to(run.loader.device)
            run.meter.load_state_dict(before.meter)
        self._images = self._earlier_images = before.images if before else 0
        self._counted = before.counted if before else 0  # without those of skipped steps
        self._earlier_seconds = before.seconds if before else 0.0
        self.lrs = [0.0] * self.done
        self._began = self._speed_began = time.perf_counter()
        self._untimed = 0

    def add(self, position: int, sums: Tensor, images: int) -> None:
        """Add a step just taken."""
        self._sums[position] = sums
        self._images += images
        self._counted += 0 if self._state.guard.skipped else images
        self.lrs.append(self._state.optimizer.param_groups[0]["lr"])

    def leave_out_of_speed(self, images: int) -> None:
        """Count images/s from now on, without so many images."""
        self._speed_began, self._untimed = time.perf_counter(), images

    def partial(self, steps: int) -> PartialEpoch:
        """Return the epoch up to so many steps, for another process to go on with. Waits for the device."""
        self.check_finite(steps)  # nothing that is spoilt is ever saved
        seconds = self._earlier_seconds + time.perf_counter() - self._began
        return PartialEpoch(
            self._sums[:steps].cpu(), self._images, self._counted, seconds, self._run.meter.state_dict()
        )

    def finish(self) -> dict:
        """Return the training columns of a row of metrics.csv, and add the epoch to the state. Waits for the device."""
        state = self._state
        self.check_finite(self.steps)
        if not self._counted and not state.guard.searching:
            raise TrainingError(
                f"no step of an epoch had a finite loss and gradient, and all were skipped, up to step "
                f"{state.global_step:,} with learning rate {self.lrs[-1]:g}: lower --lr, or clip with --clip-grad; the last "
                "checkpoint, if there is one, is kept"
            )
        # Waits for the device. NaN where nothing was trained on.
        loss, top1 = (self._sums.double().sum(0) / self._counted).tolist()
        seconds = time.perf_counter() - self._speed_began
        state.training_flops += self._run.meter.read()
        state.pruner.check_layers()
        state.images += self._images
        state.partial = None
        return {
            "epoch": len(state.rows) + 1,
            "lr": self.lrs[-1],
            "train_loss": loss,
            "train_top1": 100 * top1,
            "images_per_second": (self._images - self._earlier_images - self._untimed) / seconds,
        }

    def check_finite(self, steps: int) -> None:
        """Raise TrainingError if a loss of the first steps, or a weight, is not finite. Waits for the device once."""
        state = self._state
        norm = nn.utils.get_total_norm(
            [p.detach() for p in state.model.parameters()]
        )  # a last step may have spoilt them
        *losses, norm = torch.cat([self._sums[:steps, 0], norm[None]]).tolist()
        wrong = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if wrong is not None:
            step = state.global_step - steps + wrong + 1
            raise TrainingError(_advice(state, f"the loss is {losses[wrong]}", step, self.lrs[wrong]))
        if not math.isfinite(norm):
            raise TrainingError(_advice(state, "the weights are no longer finite", state.global_step, self.lrs[-1]))


def should_pause(run: Run) -> bool:
    """Return whether to write a checkpoint in the middle of an epoch, and perhaps to end.

    Several processes ask each other only at logged steps, since to ask is to wait.
    """
    if run.checkpoints is None:
        return False
    wanted = run.interruption.signal is not None or run.checkpoints.schedule.due_in_epoch()
    if run.group.world == 1:
        return wanted
    return run.state.global_step % run.log_interval == 0 and run.group.any(wanted, run.loader.device)


def pause(run: Run, partial: PartialEpoch) -> None:
    """Write a checkpoint in the middle of an epoch; end the run if a signal came."""
    assert run.checkpoints is not None
    signal = pending_signal(run)
    run.state.partial = partial
    run.checkpoints.save(run.state)
    exit_if_signalled(run, signal)


def pending_signal(run: Run) -> str | None:
    """Return the signal that a process has had, the same for all processes.

    One that comes later waits until they ask each other again.
    """
    signal = run.interruption.signal
    return signal or "a signal to another process" if run.group.any(signal is not None, run.loader.device) else None


def exit_if_signalled(run: Run, signal: str | None) -> None:
    """Raise Preempted if there was a signal."""
    if signal:
        run.group.wait()  # the first process may be writing still, and would be ended when another one is gone
        raise Preempted(
            f"ended by {signal} after step {run.state.global_step:,} with a checkpoint: go on by --resume auto"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: EvalLoader, execution: Execution, group: ProcessGroup = ProcessGroup()
) -> tuple[float, float]:
    """Return mean cross-entropy (nats, without label smoothing) and top-1 accuracy (percent), over all processes' images."""
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


def _advice(state: TrainState, what: str, step: int, lr: float) -> str:
    lower = "--lr or --sam-rho" if isinstance(state.optimizer, SAM) else "--lr"
    ways = f"lower {lower}, or clip with --clip-grad"
    if not state.guard.hides_losses:
        ways = f"lower {lower}, clip with --clip-grad, or leave such steps out by --nonfinite skip"
    return f"{what} at step {step:,} with learning rate {lr:g}: {ways}; the last checkpoint, if there is one, is kept"
