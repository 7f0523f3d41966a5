"""What tests of whole runs share: a run in a process of its own, what it needs, and what is the same in two of them."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.step import TrainingStep
from utils.precision import what_compilation_lacks

ROOT = Path(__file__).parent.parent
SPARSE_SAM = "--optmzr sgd-sam --sam-v2 --prune-method random --sparsity 0.9"
TIMES = ("seconds", "images_per_second")
DIGITS = "--dataset digits --depth 8 --width 0.5 --batch-size 256"
NEEDS_COMPILER = pytest.mark.skipif(bool(what_compilation_lacks(torch.device("cpu"))), reason="no C++ compiler")


def same(left, right):
    """Equal to the last bit, but for what a clock says."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - set(TIMES):
            same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right or left != left


def before_step(number, action):
    """TrainingStep.__call__ that first calls action(state) at a global step."""
    original = TrainingStep.__call__

    def call(step, *arguments):
        if step.state.global_step == number:
            action(step.state)
        return original(step, *arguments)

    return call


def child(flags, directory, **options):
    command = [sys.executable, "main_prune_train.py", *flags.split(), "--output-dir", str(directory)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def wait_for(path, process):
    """Until a process has written a file."""
    deadline = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rows(directory):
    with open(directory / "metrics.csv") as file:
        return list(csv.DictReader(file))


def scalars(directory):
    """{tag: [(step, value)]}, as TensorBoard shows them."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
