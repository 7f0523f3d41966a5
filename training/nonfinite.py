"""Steps whose gradient is not finite: left out, as if their batch had never been; and loss scaling, whose rule that is."""

import torch
from torch import Tensor, nn


class NonFiniteGuard:
    """What stands between the gradient and the optimizer's step.

    In fp16 the loss is scaled so that small gradients do not vanish, and a step that overflows is left out while the scale
    comes down (Micikevicius et al., "Mixed Precision Training", ICLR 2018). With `skip` any step without a finite loss and
    gradient is; without it a loss that is not finite, which no scale can help, still shows in the sums. A skipped step
    leaves weights, masks, the optimizer's memory and batch norm's statistics as they were; one-step SAM forgets the gradient
    that it perturbed along, as the weights lay in its memory. A guard that leaves steps out waits for the device once a
    step; another one does nothing.

    Attributes:
        active: whether steps may be left out.
        hides_losses: whether a loss that is not finite is left out too.
        skipped: whether the last one was.
        skipped_steps: how many were.
    """

    def __init__(self, model: nn.Module | None = None, fp16: bool = False, skip: bool = False, device: str = "cpu"):
        self.scaler = torch.amp.GradScaler(device, enabled=fp16)
        self.active, self.hides_losses = fp16 or skip, skip
        self.skipped, self.skipped_steps = False, 0
        self._statistics = list(model.buffers()) if self.active else []
        self._saved = [torch.empty_like(buffer) for buffer in self._statistics]

    def begin(self) -> None:
        """Before the first forward pass of a step."""
        if self._statistics:
            torch._foreach_copy_(self._saved, self._statistics)

    def scale(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, sums: Tensor) -> None:
        """Let the optimizer step, if loss and gradient are finite or nobody asked for that."""
        if self.active:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            finite = torch.isfinite(nn.utils.get_total_norm(grads)) & torch.isfinite(sums[0])
            self.skipped = not finite.item()
            self.skipped_steps += self.skipped
        if not self.skipped:
            optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()

    def end(self, sums: Tensor) -> Tensor:
        """After the weights are where they belong: a step's sums, zeros for one that was left out and no reason to stop."""
        if not self.skipped:
            return sums
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._saved)
        zeros = torch.zeros_like(sums)
        return zeros if self.hides_losses else torch.where(torch.isfinite(sums[0]), zeros, sums)

    @property
    def searching(self) -> bool:
        """Whether steps may be left out for a scale that is still too large. Waits for the device."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def state_dict(self) -> dict:
        return {"scaler": self.scaler.state_dict(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict) -> None:
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped_steps = state["skipped_steps"]
