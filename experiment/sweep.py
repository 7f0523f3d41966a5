"""Train all runs of a sweep: python -m experiment.sweep SCRIPT DIRECTORY [ARGUMENT ...] < GRID.

The sweep is named like SCRIPT, the arguments are the script's, and relative paths start from DIRECTORY; experiment/grid.py
says what a grid is. Launched again, a sweep skips the runs that have a result and resumes the others.

Runs are forks of this process, which has imported by then what a run imports. So it starts no threads and leaves CUDA
alone, and it imports torch inside functions: when that happens, OMP_NUM_THREADS has to be set.
"""

import contextlib
import fcntl
import importlib
import json
import math
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

from experiment.grid import absolute_paths, check_flags, read_grid, refuse, refuse_foreign

PROGRAM = Path(__file__).parents[1] / "main_prune_train.py"
IMPORTED_BY_RUNS = ("main_prune_train", "sklearn.datasets", "torchvision.datasets")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FORK = multiprocessing.get_context("fork")
PREEMPTED = 75  # a run's exit code where a signal ended it, with a checkpoint to go on from
SLURM_JOB = '#!/bin/sh\nexec "$SWEEP_PYTHON" -m experiment.sweep --slurm-job "$SWEEP_LEFT"\n'
OPTIONS = """
options; every other argument goes to main_prune_train.py:
  --dry-run   print the command of each run and how many there are
  --estimate  measure training steps for at most two minutes and print how long the sweep would take on this machine
  --slurm     submit the runs as an array of Slurm jobs, JOBS of them at a time; scripts/sweep_slurm.sh says more
  --help      show this text"""


@dataclass
class Sweep:
    """The runs of a sweep, and how to train them.

    Attributes:
        output: has a directory for each run.
        runs: flags of each run by its name, which is that of its directory.
        jobs: runs at a time.
        gpus: numbers of the GPUs to spread them over; each run sees all GPUs where there are none.
        after: commands for the end.
        program: a Python script, which is run with the flags of each run.
    """

    output: Path
    runs: dict[str, list[str]]
    jobs: int = 1
    gpus: list[str] = field(default_factory=list)
    after: list[list[str]] = field(default_factory=list)
    program: Path = PROGRAM

    def file(self, run: str, kind: str) -> Path:
        """Return the path of a file about a run: its command, log, or mark of failure."""
        return self.output / ".sweep" / f"{run}.{kind}"

    def finished(self, run: str) -> bool:
        """Return whether a run has a result, and did not fail after it, in what it was to measure."""
        try:
            result = json.loads((self.output / run / "result.json").read_text())
        except (OSError, ValueError):  # absent, or torn
            return False
        return isinstance(result, dict) and "error" not in result and not self.file(run, "failed").exists()

    def flags(self, run: str) -> list[str]:
        """Return all flags of a run."""
        return [*self.runs[run], "--output-dir", str(self.output / run), "--resume", "auto"]

    def commands(self) -> str:
        """Return the commands of all runs, a line each."""
        return "\n".join(shlex.join(["python", PROGRAM.name, *self.flags(run)]) for run in self.runs)

    def train(self) -> int:
        """Train the runs that are not finished; return the exit code."""
        lock = self.lock()
        left = self.left()
        finished = len(self.runs) - len(left)
        print(f"{self.output}: {len(self.runs)} runs, {finished} of them finished already", flush=True)
        if self.train_runs(left):
            print("interrupted: launch again to go on", file=sys.stderr)
            return 130
        lock.close()
        failed = self.report()
        any_result = any((self.output / run / "result.json").exists() for run in self.runs)
        for command in self.after if any_result else []:
            words = [word.replace("{OUTPUT_DIR}", str(self.output)) for word in command]
            words[0] = sys.executable if words[0] == "python" else words[0]
            if subprocess.run(words, check=False).returncode:
                return 1
        return 1 if failed else 0

    def lock(self) -> TextIO:
        """Keep other sweeps out of the output directory, until the file is closed here and in all runs, which inherit it."""
        try:
            (self.output / ".sweep").mkdir(parents=True, exist_ok=True)
            file = open(self.output / ".sweep" / "lock", "w")  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse(f"a sweep is at work in '{self.output}': wait for it, end it, or give another OUTPUT_DIR")
        except OSError as error:
            refuse(f"OUTPUT_DIR: cannot write to '{self.output}' ({error.strerror})")
        return file

    def left(self) -> list[str]:
        """Write down the flags of all runs; return those that are not finished."""
        from utils.files import write_text_atomically  # here: it imports torch

        for run, flags in self.runs.items():
            command = self.file(run, "command")
            if (self.output / run).exists() and command.exists() and read_flags(command) != flags:
                refuse(f"'{self.output / run}' was begun with other flags: give another OUTPUT_DIR, or delete it")
        for run, flags in self.runs.items():
            command = self.file(run, "command")
            if not command.exists() or read_flags(command) != flags:
                try:
                    write_text_atomically(command, json.dumps(flags))  # what a run was begun with is never torn
                except OSError as error:
                    refuse(f"OUTPUT_DIR: cannot write to '{command.parent}' ({error.strerror})")
        return [run for run in self.runs if not self.finished(run)]

    def train_runs(self, left: list[str], until: float = math.inf) -> bool:
        """Train runs, `jobs` at a time; return whether a signal ended that.

        Args:
            left: the runs that are not finished.
            until: reading of time.monotonic() at which runs are told to end, with a checkpoint, and none is started.
        """
        told = 0
        running: dict[int, BaseProcess] = {}
        progress = Progress(len(self.runs), done=len(self.runs) - len(left))
        with noted_signals() as signals:
            while True:
                came = len(signals) + (time.monotonic() >= until)
                while not came and len(running) < self.jobs:
                    run = self.next_run(left, {process.name for process in running.values()})
                    if run is None:
                        break
                    slot = next(slot for slot in range(self.jobs) if slot not in running)
                    running[slot] = FORK.Process(target=self.child, args=(run, slot, signals), name=run)
                    running[slot].start()
                if not running:
                    break
                progress.show(len(running))
                wait([process.sentinel for process in running.values()], timeout=0.3)
                if (came := len(signals) + (time.monotonic() >= until)) > told:
                    for process in running.values():
                        process.terminate()
                    told = came
                for slot, process in list(running.items()):
                    if process.exitcode is not None:
                        del running[slot]
                        progress.failed += self.settle(process.name, process.exitcode or 0)
                        progress.done += self.finished(process.name)
            progress.show(0, end="\n")
        return bool(signals)

    def next_run(self, left: list[str], running: set[str]) -> str | None:
        """Return the run to start next, taken from the list of those left, or None where there is none to start now."""
        return left.pop(0) if left else None

    def settle(self, run: str, code: int) -> bool:
        """Take note of a run that ended with this code, with a mark for tables if it failed; return whether it did."""
        if code == 0:  # also where another job of an array, submitted twice, was refused meanwhile
            self.file(run, "failed").unlink(missing_ok=True)
        if code in (0, PREEMPTED):
            return False
        self.file(run, "failed").touch()
        if code < 0:
            with open(self.file(run, "log"), "a") as log:
                print(f"ended by {signal.Signals(-code).name}", file=log)
        return True

    def child(self, run: str, slot: int, signals: list[int]) -> None:
        """Turn this process, a fork of the sweep's, into a run."""
        os.setpgid(0, 0)  # Ctrl-C on a terminal is for the sweep, which passes it on
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        if signals:  # which came while this process began
            sys.exit(PREEMPTED)
        self.train_here(run)

    def train_here(self, run: str) -> None:
        """Train a run in this process, as `python PROGRAM FLAGS >>LOG 2>&1` would; it raises SystemExit like that."""
        self.file(run, "failed").unlink(missing_ok=True)
        sys.stdout = sys.stderr = open(self.file(run, "log"), "a", buffering=1)  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        sys.argv[1:] = self.flags(run)
        runpy.run_path(str(self.program), run_name="__main__")

    def report(self) -> int:
        """Print which runs are not finished; return how many."""
        failed = [run for run in self.runs if not self.finished(run)]
        self.show_failed(failed)
        print(f"{len(self.runs) - len(failed)} of {len(self.runs)} runs finished, {len(failed)} failed", flush=True)
        return len(failed)

    def show_failed(self, runs: list[str]) -> None:
        """Print which runs failed, and how their logs end."""
        for run in runs:
            log = self.file(run, "log")
            print(f"failed: {run} ({log})", file=sys.stderr)
            for line in log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []:
                print(f"    {line}", file=sys.stderr)

    def submit(self, name: str) -> int:
        """Submit the runs that are not finished to Slurm as jobs of an array; return the exit code."""
        if not shutil.which("sbatch"):
            refuse("there is no sbatch here: leave --slurm out to train on this machine")
        with self.lock():
            left = self.left()
        if not left:
            return self.report()
        with tempfile.NamedTemporaryFile("w", prefix="left.", dir=self.output / ".sweep", delete=False) as file:
            json.dump([str(self.output), {run: self.runs[run] for run in left}], file)
        command = ["sbatch", "--requeue", "--export=ALL", "--open-mode=append", f"--job-name={name}"]
        command += [f"--array=0-{len(left) - 1}%{self.jobs}", f"--output={self.output}/.sweep/slurm-%A_%a.log"]
        environment = os.environ | {"SWEEP_PYTHON": sys.executable, "SWEEP_LEFT": file.name}
        return subprocess.run(command, input=SLURM_JOB, text=True, env=environment, check=False).returncode


@dataclass
class Progress:
    """A line that says how far a sweep is: in place on a terminal, elsewhere whenever it changes."""

    total: int
    done: int
    failed: int = 0

    def __post_init__(self):
        self.before, self.began, self.last = self.done, time.monotonic(), ""

    def show(self, running: int, end: str = "") -> None:
        """Print the line."""
        line, rest = f"{self.done} done, {running} running, {self.failed} failed of {self.total}", ""
        if ended := self.done + self.failed - self.before:
            seconds = (time.monotonic() - self.began) / ended * (self.total - self.done - self.failed)
            rest = f", {timedelta(seconds=round(seconds))} left"
        if sys.stdout.isatty():
            print(f"\r{line}{rest}\033[K", end=end, flush=True)
        elif line != self.last:
            print(f"{line}{rest}", flush=True)
        self.last = line


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Yield the list of the signals that have come, which do nothing else meanwhile."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number in SIGNALS if before[number] != signal.SIG_IGN]  # as nohup has SIGHUP
    for number in heeded:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def read_flags(path: Path) -> list[str]:
    """Read the flags of a run, also as the runner before this one wrote them: each followed by the character 0x1f."""
    text = os.fsdecode(path.read_bytes())
    return json.loads(text) if text.startswith("[") else text.removesuffix("\x1f").split("\x1f")


def slurm_job(left: Path, program: Path = PROGRAM) -> int:
    """Train the run that a job of an array is for; return its exit code."""
    number = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    output, runs = json.loads(left.read_text())
    if not (number.isdecimal() and int(number) < len(runs)):
        refuse(f"SLURM_ARRAY_TASK_ID says which of {len(runs)} runs this job is for, and is '{number}'")
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    run = list(runs)[int(number)]
    sweep, code = Sweep(Path(output), runs, program=program), 0
    try:
        sweep.train_here(run)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    sweep.settle(run, code)
    return code


def main(argv: list[str], grid_text: str, program: Path = PROGRAM) -> int:
    """Run the command line; return the exit code: 0, 1 if a run has failed, 130 if a signal ended the sweep."""
    script, directory, *arguments = argv
    grid = read_grid(grid_text, Path(script).stem)
    refuse_foreign(grid.settings, "sweep")
    options = {"--dry-run", "--estimate", "--slurm", "--help", "-h"}.intersection(arguments)
    if options & {"--help", "-h"}:
        print(f"usage: bash {script} [ARGUMENT ...]\n\n{grid.help()}\n{OPTIONS}")
        return 0
    extra = list(absolute_paths([argument for argument in arguments if argument not in options], directory))
    arms = grid.expand_arms()
    output = Path(os.path.realpath(os.path.join(directory, grid.value("OUTPUT_DIR"))))
    sweep = Sweep(output, grid.expand_runs(arms, extra), grid.number("JOBS"), grid.numbers("GPUS"), grid.after, program)
    if "--slurm" not in options:  # whose jobs inherit this environment and share out cores of their own
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // sweep.jobs)))
    of_grid = [[*arm.flags, *grid.added_flags(arm.chosen)] for arm in arms.values()]
    sweep.runs = check_flags(sweep.runs, of_grid, extra, trained_here="--slurm" not in options)
    if "--dry-run" in options:
        print(f"{sweep.commands()}\n{len(sweep.runs)} runs")
        return 0
    if "--estimate" in options:
        command = [sys.executable, "-m", "benchmarks.estimate", f"--jobs={sweep.jobs}"]
        command.append(f"--gpus={max(1, len(sweep.gpus))}")
        return subprocess.run(command, input=sweep.commands(), text=True, cwd=PROGRAM.parent, check=False).returncode
    if "--slurm" in options:
        return sweep.submit(Path(script).stem)
    for module in IMPORTED_BY_RUNS:  # once, before the forks
        importlib.import_module(module)
    return sweep.train()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--slurm-job"]:
        sys.exit(slurm_job(Path(sys.argv[2])))
    if len(sys.argv) < 3 or not os.path.isdir(sys.argv[2]) or sys.stdin.isatty():
        refuse("the scripts/sweep_*.sh launch this: python -m experiment.sweep SCRIPT DIRECTORY [ARGUMENT ...] < GRID")
    if {"--dry-run", "--help", "-h"}.intersection(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # head may close the pipe
    with contextlib.suppress(KeyboardInterrupt):  # before the first run
        sys.exit(main(sys.argv[1:], sys.stdin.read()))
    sys.exit(130)
