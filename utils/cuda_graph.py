"""A training update as CUDA graphs: one launch instead of hundreds."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Kind = TypeVar("Kind", bound=Hashable)
Result = TypeVar("Result")


class GraphedUpdate(Generic[Kind, Result]):
    """A function of inputs, targets and a kind of step that moves an optimizer's weights, replayed from CUDA graphs.

    Each kind of step, and each shape of the inputs, has a graph of its own. A graph knows addresses, not tensors: weights,
    buffers, masks, and what optimizers remember have to stay where they are. Inputs, targets and options of the optimizer
    that change from step to step (the same for all parameter groups) are copied into tensors of the graph's own. What is
    returned lasts until the next call.

    Args:
        update: the function; it does the same whenever inputs' shape and kind are the same.
        optimizer: the one that it steps.
        changing: names of options of its parameter groups. Others are the same in all steps of a kind.
    """

    WARM_UP = 2  # steps of a kind before it is captured: they compile, pick kernels, and make the optimizer's state

    def __init__(
        self,
        update: Callable[[Tensor, Tensor, Kind], Result],
        optimizer: torch.optim.Optimizer,
        changing: Sequence[str] = ("lr",),
    ):
        self._update, self._optimizer, self._changing = update, optimizer, changing
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Captured[Result]] = {}

    def __call__(self, inputs: Tensor, targets: Tensor, kind: Kind) -> Result:
        """Run the update: as it is for the first steps of a kind, then from its graph."""
        key = (inputs.shape, kind)
        self._seen[key] += 1
        if self._seen[key] <= self.WARM_UP:
            return self._update(inputs, targets, kind)
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs, targets, kind)
        captured = self._graphs[key]
        captured.inputs.copy_(inputs)
        captured.targets.copy_(targets)
        for name, option in captured.options.items():
            option.fill_(self._optimizer.param_groups[0][name])
        captured.graph.replay()
        return captured.result

    def _capture(self, inputs: Tensor, targets: Tensor, kind: Kind) -> "_Captured[Result]":
        """Record an update without running it."""
        inputs, targets, groups = inputs.clone(), targets.clone(), self._optimizer.param_groups
        options = {name: torch.zeros((), device=inputs.device) for name in self._changing}
        numbers = [{name: group[name] for name in options} for group in groups]
        assert all(number == numbers[0] for number in numbers), "a graph has one learning rate and one radius"
        graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in self._graphs.values()), None)  # they never run at the same time
        try:
            for group in groups:
                group.update(options)
            # Other threads, such as one that pins the memory of later batches, may do what a capture forbids.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = self._update(inputs, targets, kind)
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group.update(number)
        return _Captured(graph, inputs, targets, options, result)


@dataclass
class _Captured(Generic[Result]):
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    targets: Tensor
    options: dict[str, Tensor]
    result: Result
