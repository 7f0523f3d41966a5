"""What a run writes into its directory except checkpoints, and what it prints."""

import csv
import io
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from prune.flops import Flops, FlopsMeter
from training.state import TrainState
from utils.files import write_text_atomically

# TensorBoard sorts groups of charts by name. Accuracy and loss come first, then what a study of SAM or of masks looks at,
# then what it costs; measurements of robustness and sharpness come between them.
ACCURACY, LOSS, STEP, SPARSITY, LAYERS, WORK = (
    "accuracy", "loss", "optimizer", "sparsity", "sparsity_by_layer", "work",
)  # fmt: skip


class Logger:
    """Writes args.json, TensorBoard events, metrics.csv and result.json of one run; shows a bar or one line per epoch.

    Args:
        directory: of the run; exists.
        about: what args.json is to hold beside the git revision and versions.
        rows: of the epochs that are finished already.
        global_step: steps that are finished already; later events of an earlier process are void.
        loss_label: what the training loss is called where it is shown.
        total_epochs: of all rounds.
        writes: False in all processes except the first, where nothing is written or shown.
    """

    def __init__(
        self,
        directory: Path,
        about: dict | None = None,
        rows: list[dict] | None = None,
        global_step: int = 0,
        loss_label: str = "loss",
        total_epochs: int = 1,
        writes: bool = True,
    ):
        self.directory, self.loss_label, self.total_epochs, self.writes = directory, loss_label, total_epochs, writes
        self.terminal = writes and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._awaits_first_step = True
        if not writes:
            return
        known = (about or {}) | {"git": git_revision(), "versions": versions()}
        if global_step and (earlier := earlier_revisions(directory / "args.json", known["git"])):
            known["earlier_git"] = earlier
        write_text_atomically(directory / "args.json", json.dumps(known, indent=2) + "\n")
        threading.excepthook = _quiet_writer
        self.writer = SummaryWriter(directory, purge_step=global_step + 1)
        if rows:
            self._write_metrics(rows)

    def progress_bar(self, epoch: int, steps: int, done: int = 0) -> tqdm:
        """Return a bar over the steps of an epoch, which shows on a terminal and is silent in a file or pipe."""
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc=f"epoch {epoch}/{self.total_epochs}",
            leave=False,
            disable=not self.terminal,
            unit="step",
        )
        return self._bar

    def first_step_of_process(self, outcome: Tensor, began: float) -> bool:
        """Return whether a step is this process's first, having waited for its outcome and said how long it took.

        Args:
            outcome: of the step.
            began: reading of perf_counter when the epoch began.
        """
        if not self._awaits_first_step:
            return False
        outcome.tolist()
        self.say(f"the first step took {time.perf_counter() - began:.1f} s")
        self._awaits_first_step = False
        return True

    def log_step(self, loss: Tensor, values: dict[str, Tensor | float], global_step: int) -> None:
        """Log a step's mean loss and what else was measured to TensorBoard. Waits for the device."""
        if not self.writes:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.loss_label} {float(loss):.3f}")
        self.writer.add_scalar(self._loss_tag("train_batch"), float(loss), global_step)
        self.scalars(STEP, values, global_step)

    def scalars(self, group: str, values: Mapping[str, Tensor | float], global_step: int) -> None:
        """Log scalars to a group of TensorBoard's charts. Waits for the device."""
        if self.writes:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", float(value), global_step)

    def log_epoch(self, state: TrainState, flops: Flops) -> None:
        """Log the last of the finished epochs to TensorBoard; it is on disk when this returns."""
        if not self.writes:
            return
        row, step, pruner = state.rows[-1], state.global_step, state.pruner
        density = pruner.masks.density()
        for split in ("train", "val", "test"):
            if row.get(f"{split}_loss") is not None:
                self.writer.add_scalar(f"{ACCURACY}/{split}", row[f"{split}_top1"], step)
                tag = self._loss_tag(split) if split == "train" else f"{LOSS}/{split}"
                self.writer.add_scalar(tag, row[f"{split}_loss"], step)
        self.writer.add_scalar(f"{SPARSITY}/now", row["sparsity"], step)
        if pruner.method.update or pruner.method.tickets:  # else its charts would be flat lines
            self.writer.add_scalar(f"{SPARSITY}/ever_alive", pruner.ever_alive_fraction(), step)
            self.scalars(SPARSITY, pruner.figures(), step)
            self.scalars(LAYERS, {layer: 1 - value for layer, value in density.items()}, step)
        work = {"images_per_second": row["images_per_second"], "training_flops": state.training_flops}
        self.scalars(WORK, work | {"inference_flops": flops.inference(density)}, step)
        self.writer.flush()

    def write_row(self, state: TrainState) -> None:
        """Write metrics.csv and show the last of the finished epochs."""
        if not self.writes:
            return
        row = state.rows[-1]
        self._write_metrics(state.rows)
        evaluated = [name for name in ("val", "test") if row.get(f"{name}_top1") is not None]
        accuracies = "".join(f"{name} {row[f'{name}_top1']:.2f}%   " for name in evaluated)
        self.say(
            f"epoch {row['epoch']:>{len(str(self.total_epochs))}}/{self.total_epochs}   lr {row['lr']:<8.3g}   "
            f"{self.loss_label} {row['train_loss']:.4f}   train {row['train_top1']:.2f}%   "
            f"{accuracies}{row['images_per_second']:,.0f} images/s"
        )

    @contextmanager
    def writing_result(self, result: dict, flags: dict) -> Iterator[None]:
        """Finish after a block in which the result may grow; after an error in it the result has its words as `error`."""
        try:
            yield
        except Exception as error:
            with suppress(OSError):  # the first error is the one to tell
                self.finish(result | {"error": str(error) or type(error).__name__}, flags)
            raise
        self.finish(result, flags)

    def finish(self, result: dict, flags: dict) -> None:
        """Write result.json and TensorBoard's table of hyper-parameters.

        Args:
            result: see `run_result`.
            flags: hyper-parameters by name.
        """
        if not self.writes:
            return
        for summary in hparams(table_row(result, flags), {f"{ACCURACY}/test": 0.0, f"{LOSS}/test": 0.0}):
            self.writer._get_file_writer().add_summary(summary)  # the metrics' values are those of their charts
        self.writer.close()
        write_text_atomically(self.directory / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if not self.writes:
            return
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _loss_tag(self, name: str) -> str:
        """Return the chart of a training loss: at perturbed weights it does not share one with a loss at the weights."""
        return f"{LOSS}/{name}" + ("" if self.loss_label == "loss" else "_at_perturbed_weights")

    def _write_metrics(self, rows: list[dict]) -> None:
        """Write the file anew each time: never a duplicate, missing or torn row."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomically(self.directory / "metrics.csv", text.getvalue())


def run_result(state: TrainState, meter: FlopsMeter, args: dict, schedule_images: int) -> dict:
    """Return what result.json holds.

    The headline is the last epoch's `test_top1`, which is always evaluated. `val_top1` and `val_loss` of held-out images
    are the last epoch's too: settings are chosen by them. `best_test_top1` is the test accuracy of the epoch that was best
    on the held-out images, or of the last epoch where none are held out. `max_over_epochs_test_top1` was picked on the test
    images and estimates nothing. Both are of evaluated epochs with the sparsity of the last: a denser network is another
    one.

    Args:
        state: at the end of training.
        meter: has counted the training's operations.
        args: the flags, as plain values.
        schedule_images: images of one schedule. `dense_training_flops` is what it would take to train the dense network on
            them with one pass a step, without pruning in rounds.
    """
    rows, last = state.rows, state.rows[-1]
    same = state.pruner.same_sparsity
    alike = [row for row in rows if row["test_top1"] is not None and same(row["sparsity"], last["sparsity"])]
    best = max(alike, key=lambda row: row["val_top1"]) if "val_top1" in last else last
    density = state.pruner.masks.density()
    return {
        "test_top1": last["test_top1"],
        "test_loss": last["test_loss"],
        **{name: last[name] for name in ("val_top1", "val_loss") if name in last},
        "best_test_top1": best["test_top1"],
        "best_epoch": best["epoch"],
        "max_over_epochs_test_top1": max(row["test_top1"] for row in alike),
        "sparsity": last["sparsity"],
        "ever_alive": state.pruner.ever_alive_fraction(),
        **state.pruner.figures(),
        "parameters": sum(p.numel() for p in state.pruner.model.parameters()),
        "nonzero_parameters": sum(int(p.count_nonzero()) for p in state.model.parameters()),
        "inference_flops": meter.flops.inference(density),
        "training_flops": state.training_flops,
        "dense_training_flops": schedule_images * meter.flops.dense_training,
        "passes_per_step": state.passes / state.global_step,
        "epochs": len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "skipped_steps": state.guard.skipped_steps,
        "images_per_second": statistics.median(row["images_per_second"] for row in rows),
        "seed": args["seed"],
        "args": args,
    }


def table_row(result: dict, flags: dict) -> dict[str, str | float]:
    """Return a run's row in TensorBoard's table of hyper-parameters.

    The table shows five columns, the first by name: what studies vary. All flags are behind them, under "training/".
    """
    variant = "" if flags["sam_rho"] is None else " one-step" if flags["sam_v2"] else " two-step"
    variant += "" if flags["sam_direction"] == "previous" else f" {flags['sam_direction']}"
    row: dict[str, str | float] = {  # the same names in all runs, or the table leaves them out
        "optimizer": flags["optmzr"] + variant + (" adaptive" if flags["adaptive"] else ""),
        "prune_method": flags["prune_method"],
        "sam_rho": flags["sam_rho"] or 0.0,
        "seed": str(flags["seed"]),  # a word: which one it is counts, not how large it is
        "sparsity": flags["sparsity"] or round(result["sparsity"], 4),  # a pattern or a file says it where no flag does
    }
    words = {True: "yes", False: "no", None: "none"}
    for name, value in flags.items():
        if value is None or isinstance(value, bool):
            value = words[value]
        elif not isinstance(value, int | float):
            value = str(value).encode(errors="replace").decode()  # a path may have any bytes
        row[f"training/{name}"] = value
    return row


def _quiet_writer(thread: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's thread that cannot write: the next call of the writer raises the same error."""
    if not (issubclass(thread.exc_type, OSError) and type(thread.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(thread)


def versions() -> dict[str, str]:
    """Return the versions of Python and of what computes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "numpy": numpy.__version__,
    }


def earlier_revisions(path: Path, now: str | None) -> list[str | None]:
    """Return the commits that a run which goes on has been trained at, other than this one, by its args.json."""
    try:
        about = json.loads(path.read_text())
        return [commit for commit in (*about.get("earlier_git", ()), about["git"]) if commit != now]
    except (OSError, ValueError, KeyError, TypeError):
        return [None]  # unknown


def git_revision() -> str | None:
    """Return the commit of this program, with "-dirty" where it was changed since; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
