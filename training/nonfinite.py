"""Steps whose gradient is not finite are left out, as if their batch had never been; loss scaling of fp16 needs the same."""

import torch
from torch import Tensor, nn

from training.batch_norm import SavedStatistics


class NonFiniteGuard:
    """Stands between the gradient and the optimizer's step, and leaves steps out.

    In fp16 the loss is scaled so that small gradients do not vanish, and a step that overflows is left out while the scale
    comes down (Micikevicius et al., "Mixed Precision Training", ICLR 2018). With `skip`, any step without a finite loss
    and gradient is left out; without it a loss that is not finite still shows in the sums, since no scale can help.

    A skipped step leaves weights, masks, the optimizer's memory and batch norm's statistics as they were. One-step SAM
    along `previous` or `random` does not perturb in the next step, because the buffer of its gradient held the weights. A
    guard that may skip steps waits for the device once a step; one that may not does nothing.

    Attributes:
        active: whether steps may be left out.
        hides_losses: whether a loss that is not finite is left out too.
        skipped: whether the last step was left out.
        skipped_steps: number of steps left out.
    """

    def __init__(self, model: nn.Module | None = None, fp16: bool = False, skip: bool = False, device: str = "cpu"):
        self.scaler = torch.amp.GradScaler(device, enabled=fp16)
        self.active, self.hides_losses = fp16 or skip, skip
        self.skipped, self.skipped_steps = False, 0
        self._statistics = SavedStatistics(model) if model is not None and self.active else None

    def begin(self) -> None:
        """Keep batch norm's statistics; before the first forward pass of a step."""
        if self._statistics:
            self._statistics.save()

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss, scaled in fp16."""
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale."""
        self.scaler.unscale_(optimizer)

    def accepts(self, optimizer: torch.optim.Optimizer, sums: Tensor) -> bool:
        """Return whether the optimizer is to step: where steps may be left out, only if loss and gradient are finite."""
        if self.active:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            finite = torch.isfinite(nn.utils.get_total_norm(grads)) & torch.isfinite(sums[0])
            self.skipped = not finite.item()
            self.skipped_steps += self.skipped
        return not self.skipped

    def end(self, sums: Tensor) -> Tensor:
        """End a step. Return its sums: zeros for a step that was left out and is no reason to stop."""
        if self.scaler.is_enabled():
            self.scaler.update()
        if not self.skipped:
            return sums
        if self._statistics:
            self._statistics.restore()
        zeros = torch.zeros_like(sums)
        return zeros if self.hides_losses else torch.where(torch.isfinite(sums[0]), zeros, sums)

    @property
    def searching(self) -> bool:
        """Whether steps may be left out because the scale is still too large. Waits for the device."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def state_dict(self) -> dict:
        """Return the scale and the number of steps left out."""
        return {"scaler": self.scaler.state_dict(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned."""
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped_steps = state["skipped_steps"]
