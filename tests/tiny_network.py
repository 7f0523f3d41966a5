"""A network small enough to follow, and what trains and prunes it in the tests of prune/."""

import torch
import torch.nn.functional as F
from torch import nn

from prune import METHODS, Pruner
from sam import SAM

CLASSES = 4


class Tiny(nn.Module):
    """A convolution, a linear layer, batch norm after each, and a classifier; scores in float64."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, CLASSES)
        self.double()

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.classifier(torch.tanh(self.norm(self.linear(x))))


def sample(per_class):
    g = torch.Generator().manual_seed(5)
    labels = (torch.arange(CLASSES * per_class) % CLASSES)[torch.randperm(CLASSES * per_class, generator=g)]
    return torch.randn(len(labels), 4, 5, 5, generator=g, dtype=torch.float64), labels


def layers(model):
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def dead(model):
    weights = layers(model)
    return sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())


def train(model, pruner, optimizer, steps, start=0, on_step=lambda step: None):
    inputs, labels = sample(8)
    for step in range(start, steps):
        optimizer.zero_grad()
        if isinstance(optimizer, SAM):
            optimizer.first_step()
            woken = pruner.pattern.name == "channel" and pruner.grows_by_gradient(step)
            for name, mask in () if woken else pruner.masks.masks.items():
                assert (layers(model)[name][mask == 0] == 0).all()  # in the perturbed forward pass too
        F.cross_entropy(model(inputs), labels).backward()
        pruner.mask_gradients(step)
        optimizer.step()
        pruner.update_masks(step)
        on_step(step)


def build(method, sparsity=0.5, steps=20, optimizer="sam", seed=0, interval=3, **kwargs):
    model = Tiny(seed)
    if optimizer == "sam":
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
        holders = [optimizer, optimizer.base_optimizer]
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        holders = [optimizer]
    if METHODS[method].has_interval:
        kwargs["update_interval"] = interval
    mask = Pruner(model, method, sparsity, total_steps=steps, optimizers=holders, **kwargs)
    mask.choose_masks(sample)
    return model, mask, optimizer


def global_reference(scores, keep):
    """The `keep` highest of all scores, as one flat boolean in the order of the layers."""
    flat = torch.cat([s.flatten() for s in scores])
    alive = torch.zeros(len(flat), dtype=torch.bool)
    alive[flat.argsort(descending=True)[:keep]] = True
    return alive


def split(flat, like):
    return [part.view(w.shape) for part, w in zip(flat.split([w.numel() for w in like]), like, strict=True)]


def kept(mask):
    return torch.cat([m.flatten().bool() for m in mask.masks.masks.values()])
