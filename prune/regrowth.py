"""What channels come back with: the values that they died with."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prune.masks import Masks
from prune.patterns import Channels


class LastValues:
    """The values that channels had when they were last alive; those they were drawn with, if they never were.

    A channel all of whose weights are 0 has no gradient and would stay at 0 for ever. So one that grows gets the filters,
    biases, scale, shift and running statistics back that it died with, as in CHEX (Hou et al. 2022). The weights that read
    it start at 0, so that growing changes nothing that the network computes.

    For one step dead channels may be awake: they have these values, and what reads them stays 0. The network computes the
    same, and the gradient of what reads them tells which are worth growing; beside channels that are 0 it would be 0.

    Args:
        model: the network, before its first masks.
        masks: its masks.
        pattern: its channels.

    Attributes:
        awake: whether dead channels are.
    """

    def __init__(self, model: nn.Module, masks: Masks, pattern: Channels):
        self._masks, self._pattern, self.awake = masks, pattern, False
        self._values = {name: masks.parameter(name).detach().clone() for name in pattern.written}
        modules = dict(model.named_modules())
        self._statistics = {  # buffer by name, and the group that it is of
            f"{norm}.{kind}": (buffer, group.name)
            for group in pattern.groups.values()
            for norm in group.norms
            for kind, buffer in modules[norm].named_buffers(recurse=False)
            if buffer.shape == (group.size,)
        }
        self._kept = {name: buffer.clone() for name, (buffer, _) in self._statistics.items()}
        self._before: dict[str, Tensor] = {}

    def _alive(self) -> dict[str, Tensor]:
        """Return which channels live: bool [channels] by group."""
        return {name: share > 0 for name, share in self._pattern.pool(self._masks.masks).items()}

    @torch.no_grad()
    def remember(self) -> None:
        """Keep the values of what is alive, before masks change."""
        for name, kept in self._values.items():
            torch.where(self._masks.mask(name) > 0, self._masks.parameter(name), kept, out=kept)
        self.mark()
        for name, (buffer, group) in self._statistics.items():
            torch.where(self._before[group], buffer, self._kept[name], out=self._kept[name])

    def mark(self) -> None:
        """Note which channels live: those that do so besides when masks are set next have grown."""
        self._before = self._alive()

    def restore_grown(self) -> None:
        """Give channels that have grown since they were marked what they died with."""
        self._restore({name: now & ~self._before[name] for name, now in self._alive().items()})

    def wake(self, awake: bool = True) -> None:
        """Give all dead channels what they died with, if they are to be awake; masking weights puts them to sleep again."""
        self.awake = awake
        if awake:
            self._restore({name: ~alive for name, alive in self._alive().items()})

    @torch.no_grad()
    def _restore(self, channels: Mapping[str, Tensor]) -> None:
        for name, where in self._pattern.computing(channels, self._alive()).items():
            parameter = self._masks.parameter(name)
            parameter.copy_(torch.where(where, self._values[name], parameter))
        for name, (buffer, group) in self._statistics.items():
            buffer.copy_(torch.where(channels[group], self._kept[name], buffer))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the values by name."""
        return self._values | self._kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        for name, kept in (self._values | self._kept).items():
            kept.copy_(state[name])
