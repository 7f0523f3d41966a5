"""Measure what bf16 costs in accuracy, in pairs of runs that differ in nothing else.

Trains with each seed in fp32 and in bf16, and prints the mean difference in test accuracy with its 95% interval.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from experiment.flags import flag, parse
from utils.device import pick_device
from utils.errors import UsageError
from utils.precision import has_bf16
from utils.signals import SIGNALS
from utils.statistics import student_interval

RECIPE = Path(__file__).parent.parent / "main_prune_train.py"


def run_recipe(flags: list[str]) -> int:
    """Run main_prune_train.py in a process of its own and return its exit code."""
    return run_passing_signals([sys.executable, str(RECIPE), *flags])


def run_passing_signals(command: list[str]) -> int:
    """Run a command, pass on the signals that end a training, and return the command's exit code."""
    with subprocess.Popen(command) as process:
        before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in SIGNALS}
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command; flags that it does not know are the recipe's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bf16_accuracy",
        description=__doc__,
        epilog="All other flags go to main_prune_train.py. Launched again, the command goes on where it was interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="two or more (0 1 2 3 4)")
    parser.add_argument("--device", default="auto", help="where to train (%(default)s)")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/precision"), help="directory of the runs (%(default)s)"
    )
    return parser


def main(argv: list[str] | None = None, run: Callable[[list[str]], int] = run_recipe) -> int:
    """Run the command line.

    Args:
        argv: flags; those of the process by default.
        run: trains by flags of main_prune_train.py and returns its exit code.

    Returns:
        0, 2 for bad input, or the exit code of a training that did not finish.
    """
    parser = build_parser()
    args, flags = parser.parse_known_args(argv)
    try:
        device = pick_device(args.device)
        taken = sorted(parse(flags)[1] & {"seed", "precision", "resume", "evaluate"})
    except UsageError as error:
        parser.error(str(error))
    if taken:
        parser.error(f"{flag(taken[0])} is set by this command: leave it out; --seeds names the seeds")
    seeds = sorted(set(args.seeds))
    if len(seeds) < 2:
        parser.error("--seeds has to name two or more: an interval needs a spread")
    if not has_bf16(device):
        print(f"note: {device} has no bf16 of its own; torch emulates it there, which is slow", file=sys.stderr)
    accuracy: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for seed in seeds:
        for precision, values in accuracy.items():
            directory = args.output_dir / f"{precision}-seed{seed}"
            own = ["--device", args.device, "--precision", precision, "--seed", str(seed)]
            code = run([*flags, *own, "--output-dir", str(directory), "--resume", "auto"])
            if code:
                return code
            values.append(json.loads((directory / "result.json").read_text())["test_top1"])
    print()
    print_differences(seeds, accuracy["fp32"], accuracy["bf16"])
    return 0


def print_differences(seeds: list[int], fp32: list[float], bf16: list[float]) -> None:
    """Print each pair of accuracies, then the mean difference with its interval."""
    differences = [after - before for before, after in zip(fp32, bf16, strict=True)]
    for seed, before, after, difference in zip(seeds, fp32, bf16, differences, strict=True):
        print(f"seed {seed}: fp32 {before:.2f}%, bf16 {after:.2f}%, difference {difference:+.2f}")
    center, low, high = student_interval(differences)
    print(f"bf16 minus fp32: {center:+.2f} points, 95% interval {low:+.2f} to {high:+.2f}")


if __name__ == "__main__":
    sys.exit(main())
