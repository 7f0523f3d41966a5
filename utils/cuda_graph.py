"""The training step as CUDA graphs: a single launch in the place of hundreds."""

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class GraphedUpdate:
    """engine.update_weights, replayed from a graph.

    Each kind of step (with a batch of another size, measured, before masks change by gradients) has a graph of its own.
    A graph knows addresses, not tensors: weights, buffers, masks, and what optimizers remember have to stay where they
    are. Batch and learning rate (the same for all parameter groups) come in by tensors of the graph's own. What is
    returned lasts until the next call.
    """

    WARM_UP = 2  # steps of a kind before it is captured: they compile, pick kernels, and make the optimizer's state

    def __init__(self, update: Callable):
        self.update = update
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple] = {}

    def __call__(
        self, state, recipe, inputs: Tensor, targets: Tensor, measure: bool, batch_size: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        kind = (inputs.shape, measure, state.pruner.keeps_gradients(state.schedule_step))
        self._seen[kind] += 1
        if self._seen[kind] <= self.WARM_UP:
            return self.update(state, recipe, inputs, targets, measure, batch_size)
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(state, recipe, inputs, targets, measure, batch_size)
        graph, static_inputs, static_targets, static_lr, results = self._graphs[kind]
        static_inputs.copy_(inputs)
        static_targets.copy_(targets)
        static_lr.fill_(state.optimizer.param_groups[0]["lr"])
        graph.replay()
        return results

    def _capture(self, state, recipe, inputs: Tensor, targets: Tensor, measure: bool, batch_size: int) -> tuple:
        """Logger a step without running it."""
        inputs, targets, lr = inputs.clone(), targets.clone(), torch.zeros((), device=inputs.device)
        groups = state.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        assert len(set(rates)) == 1, "a graph has one learning rate"
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, *_ in self._graphs.values()), None)  # they never run at the same time
        try:
            for group in groups:
                group["lr"] = lr
            # Other threads, as one that pins the memory of batches to come, may go on with what a capture forbids.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                results = self.update(state, recipe, inputs, targets, measure, batch_size)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        return graph, inputs, targets, lr, results
