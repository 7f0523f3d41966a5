"""CrAM+ and SAFE: what others add to two-step SAM so that a dense network can be pruned.

Both are SAM with hooks around the base optimizer's step, so that the training step is that of SAM. Both prune by the rule of
a run (its pattern and distribution), and leave the weights dense: `--prune-method final` prunes them after the last step.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prune import Pruner
from prune.masks import prunable_weights
from sam import SAM

Masks = dict[str, Tensor]
Largest = Callable[
    [Mapping[str, Tensor], float], Masks
]  # from weights by layer, and a sparsity, to masks of the largest


class CrAM(SAM):
    """CrAM+ (Peste et al., ICLR 2023): a step with the gradient at w and the one at compressed, perturbed weights.

        g = gradient at w;  h = gradient at C(w + rho g), of the same batch, zero where C pruned
        w <- base optimizer's step from w with g + h

    C keeps the largest weights. Its sparsity is drawn anew for each step. Unlike SAM's, the perturbation is not divided by
    the gradient's norm.

    Args:
        model: what it optimizes.
        base_optimizer: see SAM.
        rho: length of the perturbation in units of the gradient; not 0.
        sparsities: to draw from, each as likely.
        largest: what C keeps; None ranks all convolution and linear weights together.
        seed: of the draws.
        **base_kwargs: passed to the base optimizer.

    Raises:
        ValueError: a sparsity that the network cannot have.
    """

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: type[torch.optim.Optimizer],
        rho: float = 0.2,
        sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
        largest: Largest | None = None,
        seed: int = 0,
        **base_kwargs: Any,
    ):
        super().__init__(model.parameters(), base_optimizer, rho, v2=False, norm_over="none", seed=seed, **base_kwargs)
        self._weights, self._largest = prunable_weights(model), largest or Pruner(model).largest
        self._sparsities, self._seed = list(sparsities), seed
        for sparsity in self._sparsities:
            self._largest(self._weights, sparsity)  # an impossible one is known before training
        self._at_w: list[tuple[Tensor, Tensor]] = []  # parameters and their gradients at w
        self._kept: Masks = {}
        self.param_groups[0]["cram_step"] = 0  # saved with the other options
        self.base_optimizer.register_step_pre_hook(lambda *_: self._end_step())

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the weights from w to C(w + rho g); g are the gradients at hand."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._at_w = [(p, p.grad.clone()) for p in parameters]
        super().first_step(zero_grad)
        step = self.param_groups[0]["cram_step"]
        self._kept = self._largest(self._weights, random.Random(f"{self._seed} {step}").choice(self._sparsities))
        restored = set(parameters)  # by the step; a frozen weight stays as it is
        for name, mask in self._kept.items():
            if self._weights[name] in restored:
                self._weights[name].mul_(mask)
        self._shared.versions = self._versions()  # written to here, and by nobody else

    @torch.no_grad()
    def complete_gradients(self) -> None:
        """Make of h the g + h that the base optimizer steps with: to be called before gradients are clipped or checked.

        `step()` does so where it has not been done.
        """
        for name, mask in self._kept.items():
            gradient = self._weights[name].grad
            if gradient is not None:
                gradient.mul_(mask)
        for p, at_w in self._at_w:
            p.grad = at_w if p.grad is None else p.grad.add_(at_w)
        self._at_w, self._kept = [], {}

    def _end_step(self) -> None:
        self.complete_gradients()
        self.param_groups[0]["cram_step"] += 1


class SAFE(SAM):
    """SAFE (Lee et al., ICML 2025): two-step SAM that is drawn towards a sparse point, by ADMM.

        w <- base optimizer's step with (SAM's gradient) + l_t (w - z + u)    l_t = l (1 - cos(pi t / steps)) / 2
        every K-th step:  z <- P(w + u),  u <- w + u - z                      P keeps the largest weights

    z begins as P(w), and the dual u as 0. Only convolution and linear weights have them.

    Args:
        model: what it optimizes.
        base_optimizer, rho: see SAM; with a rho of 0 this is ADMM.
        sparsity: of P.
        strength: l, that the pull rises to.
        interval: K.
        largest: what P keeps; None ranks all convolution and linear weights together.
        total_steps: of the training.
        **base_kwargs: passed to the base optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: type[torch.optim.Optimizer],
        rho: float = 0.1,
        sparsity: float = 0.95,
        strength: float = 1e-3,
        interval: int = 32,
        largest: Largest | None = None,
        *,
        total_steps: int,
        **base_kwargs: Any,
    ):
        super().__init__(model.parameters(), base_optimizer, rho, v2=False, **base_kwargs)
        self._weights, self._largest, self._sparsity = (
            prunable_weights(model),
            largest or Pruner(model).largest,
            sparsity,
        )
        self._strength, self._interval, self._total_steps = strength, interval, total_steps
        self.param_groups[0]["safe_step"] = 0  # saved with the other options, as z and u are with the momentum
        for name, split in self._project({name: w.detach() for name, w in self._weights.items()}).items():
            self.state[self._weights[name]].update(safe_split=split, safe_dual=torch.zeros_like(split))
        self.base_optimizer.register_step_pre_hook(lambda *_: self._pull())
        self.base_optimizer.register_step_post_hook(lambda *_: self._update_duals())

    def _project(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the nearest sparse point, of the layers that are not dense."""
        return {name: weights[name] * mask for name, mask in self._largest(weights, self._sparsity).items()}

    def _split(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return weight, z and u of each layer that has them."""
        states = {name: (w, self.state[w]) for name, w in self._weights.items() if "safe_split" in self.state[w]}
        return {name: (w.detach(), state["safe_split"], state["safe_dual"]) for name, (w, state) in states.items()}

    @torch.no_grad()
    def _pull(self) -> None:
        step = self.param_groups[0]["safe_step"]
        strength = self._strength * 0.5 * (1 - math.cos(math.pi * step / self._total_steps))
        for name, (w, split, dual) in self._split().items():
            gradient = self._weights[name].grad
            if gradient is not None:
                gradient.add_(w - split + dual, alpha=strength)

    @torch.no_grad()
    def _update_duals(self) -> None:
        self.param_groups[0]["safe_step"] += 1
        if self.param_groups[0]["safe_step"] % self._interval:
            return
        layers = self._split()
        sums = {name: w + dual for name, (w, _, dual) in layers.items()}
        for name, projected in self._project(sums).items():
            _, split, dual = layers[name]
            split.copy_(projected)
            dual.copy_(sums[name] - projected)
