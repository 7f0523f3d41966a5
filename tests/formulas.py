"""The update rule of SAM written out in float64, and a small network to try it on."""

import torch
from torch import nn

from sam import SAM

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "fused": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
}


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4))
    return model.to(dtype, memory_format=torch.channels_last)


def batches(count: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 2, 5, 5, generator=g, dtype=dtype), torch.randint(4, (6,), generator=g)) for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def documented_step(model: nn.Module, optimizer: SAM, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The loop of the docstring, and the one of two-step SAM."""
    optimizer.zero_grad()
    if not optimizer.v2:
        loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    optimizer.second_step(zero_grad=True)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


class Reference:
    """The update rule, one parameter at a time, around a base optimizer of its own.

    `rho`, `adaptive`: one value per parameter. `direction`: of one-step SAM; `noise` returns that of `random`.
    """

    def __init__(self, model, base, options, rho, adaptive, v2, direction="previous", beta=0.9, noise=None):
        self.model, self.params = model, list(model.parameters())
        self.base = base(self.params, **options)
        self.rho, self.adaptive, self.v2 = rho, adaptive, v2
        self.direction, self.beta, self.noise = direction, beta, noise
        self.previous = self.average = None

    def gradient(self, batch):
        return torch.autograd.grad(loss_of(self.model, batch), self.params)

    def along(self, batch):
        if not self.v2:
            return self.gradient(batch)
        if self.previous is None:
            return None
        if self.direction == "momentum":
            states = [self.base.state[p] for p in self.params]
            return [s["momentum_buffer"] if "momentum_buffer" in s else s["exp_avg"] for s in states]
        if self.direction == "ema":
            return self.average
        if self.direction == "random":
            return [z * (g != 0) for z, g in zip(self.noise(), self.previous, strict=True)]
        return self.previous

    def step(self, batch):
        along = self.along(batch)
        start = weights(self.model)
        if along is not None:
            t = [p.abs() if a else torch.ones_like(p.abs()) for p, a in zip(start, self.adaptive, strict=True)]
            norm = sum(((tp * g).abs() ** 2).sum() for tp, g in zip(t, along, strict=True)) ** 0.5
            with torch.no_grad():
                for p, tp, g, rho in zip(self.params, t, along, self.rho, strict=True):
                    p += rho * tp**2 * g / (norm + 1e-12)
        gradient = self.gradient(batch)
        with torch.no_grad():
            for p, w, g in zip(self.params, start, gradient, strict=True):
                p.copy_(w)
                p.grad = g.clone()
        self.previous = gradient
        kept = self.average or [torch.zeros_like(g) for g in gradient]
        self.average = [self.beta * m + (1 - self.beta) * g for m, g in zip(kept, gradient, strict=True)]
        self.base.step()
