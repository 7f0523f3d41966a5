"""What bf16 costs in accuracy, in pairs of runs that differ in nothing else: python -m benchmarks.bf16_accuracy.

Trains with each seed in fp32 and in bf16 and gives the mean difference in test accuracy with its 95% interval. A device
that does not compute in bf16 rounds to it in software instead, at about the speed of fp32: inputs, weights and outputs
of every layer and, as autograd goes back through the same roundings, their gradients.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from unittest.mock import patch

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor
from torch.overrides import TorchFunctionMode

import main_prune_train
from utils.device import pick_device
from utils.errors import UsageError
from utils.precision import Execution, has_bf16


class Rounding(TorchFunctionMode):
    """Float32 arithmetic on operands rounded to bf16, its results rounded again, where autocast computes in bf16."""

    MULTIPLIES = (F.conv2d, F.linear)  # all operands in bf16, sums in float32
    KEEPS = (F.batch_norm, F.adaptive_avg_pool2d, torch.add, Tensor.add, Tensor.__add__)  # bf16 comes in and goes out

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.MULTIPLIES:
            args = [rounded(a) if isinstance(a, Tensor) else a for a in args]
        out = func(*args, **(kwargs or {}))
        return rounded(out) if func in self.MULTIPLIES + self.KEEPS else out


def rounded(tensor: Tensor) -> Tensor:
    """To bf16 and back; gradients too."""
    return tensor.bfloat16().to(tensor.dtype)


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t."""
    count = len(differences)
    return mean(differences), float(student.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bf16_accuracy",
        description=__doc__.split("\n\n")[0],
        epilog="all other flags go to main_prune_train.py; launched again it goes on where it was interrupted",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="two or more (0 1 2 3 4)")
    parser.add_argument("--device", default="auto", help="(%(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/precision"), help="(%(default)s)")
    args, flags = parser.parse_known_args(argv)
    try:
        simulated = not has_bf16(pick_device(args.device))
    except UsageError as error:
        parser.error(str(error))
    if len(set(args.seeds)) < 2:
        parser.error("--seeds has to name two or more: an interval needs a spread")
    accuracy, seeds = {"fp32": [], "bf16": []}, sorted(set(args.seeds))
    for seed in seeds:
        for precision, values in accuracy.items():
            directory = args.output_dir / f"{precision}-seed{seed}"
            command = [*flags, "--device", args.device, "--precision", precision, "--seed", str(seed)]
            command += ["--output-dir", str(directory), "--resume", "auto"]
            if precision == "bf16" and simulated:
                with patch.object(Execution, "autocast", lambda self, device: Rounding()):
                    code = main_prune_train.main(command)
            else:
                code = main_prune_train.main(command)
            if code:
                return code
            values.append(json.loads((directory / "result.json").read_text())["test_top1"])
    differences = [b - a for a, b in zip(accuracy["fp32"], accuracy["bf16"], strict=True)]
    centre, half = interval(differences)
    print()
    for seed, *pair in zip(seeds, *accuracy.values(), differences, strict=True):
        print(f"seed {seed}: fp32 {pair[0]:.2f}%, bf16 {pair[1]:.2f}%, difference {pair[2]:+.2f}")
    how = "bf16, rounded in software" if simulated else "bf16"
    print(f"{how}, minus fp32: {centre:+.2f} points, 95% interval {centre - half:+.2f} to {centre + half:+.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
