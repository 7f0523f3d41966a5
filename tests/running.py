"""What tests of whole runs share: a hook into a run, what it wrote, and what is the same in two of them."""

import csv
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.state import TrainState
from training.step import TrainingStep
from utils.precision import what_compilation_lacks

ROOT = Path(__file__).parent.parent
SPARSE_SAM = "--optmzr sgd-sam --sam-v2 --prune-method random --sparsity 0.9"
FINISHED = f"{SPARSE_SAM} --epochs 3"  # of the fixtures trained and finished
TIMES = ("seconds", "images_per_second")
DATA = "--dataset digits --train-images 570 --batch-size 96 --log-interval 2"  # six steps an epoch, the last with 90 images
DIGITS = f"{DATA} --depth 8 --width 0.25"
SMALL = """
from torch import nn

def build(num_classes, in_channels, image_size):
    layers = [nn.Conv2d(in_channels, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, num_classes))
"""  # a file with a network that compiles soon
NEEDS_COMPILER = pytest.mark.skipif(bool(what_compilation_lacks(torch.device("cpu"))), reason="no C++ compiler")

Action = Callable[[TrainState], object]


def same(left, right):
    """Assert that two values are equal to the last bit, except times."""
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


@contextmanager
def before_step(numbers: int | Container[int], action: Action) -> Iterator[None]:
    """Call action(state) before the steps that have these global steps, in every run of the block."""
    original, wanted = TrainingStep.__call__, {numbers} if isinstance(numbers, int) else numbers

    def call(step, *arguments):
        if step.state.global_step in wanted:
            action(step.state)
        return original(step, *arguments)

    TrainingStep.__call__ = call
    try:
        yield
    finally:
        TrainingStep.__call__ = original


def interrupt(state: TrainState) -> None:
    """End a run at once, as a second Ctrl-C does: with what it has written, and no further checkpoint."""
    raise KeyboardInterrupt


def rows(directory):
    """Return the rows of metrics.csv."""
    with open(directory / "metrics.csv") as file:
        return list(csv.DictReader(file))


def scalars(directory):
    """Return {tag: [(step, value)]}, as TensorBoard shows them."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
