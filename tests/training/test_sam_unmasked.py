"""SAM whose perturbation reaches pruned weights, against the rule written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imagedata.loaders import Batch
from prune import Pruner
from training.optim import build_optimizer
from training.state import TrainState
from training.step import TrainingStep, build_objective
from utils.precision import Execution

LR, MOMENTUM, RHO = 0.05, 0.9, 0.3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)).double()


def batches(count):
    g = torch.Generator().manual_seed(1)
    options = {"generator": g, "dtype": torch.float64}
    return [(torch.randn(8, 2, 5, 5, **options), torch.rand(8, 5, **options)) for _ in range(count)]


def training(v2, method="random", **options):
    model = network()
    optimizer = build_optimizer("sgd-sam", model, lr=LR, weight_decay=0.0, momentum=MOMENTUM, rho=RHO, v2=v2)
    pruner = Pruner(model, method, 0.7, total_steps=40, optimizers=[optimizer], **options)
    pruner.choose_masks()
    state = TrainState(model, optimizer, pruner)
    objective = build_objective(model, Execution(), 8)
    return model, pruner, TrainingStep(state, objective, lambda step: LR, sam_unmasked=True)


@pytest.mark.parametrize("v2", [True, False])
def test_pruned_weights_move_in_the_forward_pass_and_are_zero_after_it(v2):
    model, pruner, step = training(v2)
    reference = network()
    parameters = dict(reference.named_parameters())
    masks = {f"{name}.weight": mask for name, mask in pruner.masks.masks.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name] *= mask
    momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
    previous = None

    def gradient(inputs, targets):
        loss = F.cross_entropy(reference(inputs), targets, reduction="sum") / len(inputs)
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    for inputs, targets in batches(4):
        step(Batch(inputs, targets, 8))
        along = previous if v2 else gradient(inputs, targets)
        start = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            if along is not None:
                norm = sum(g.square().sum() for g in along.values()).sqrt()  # of pruned weights too
                for name, p in parameters.items():
                    p += RHO * along[name] / (norm + 1e-12)
                for name, mask in masks.items():
                    assert parameters[name][mask == 0].any()
        previous = gradient(inputs, targets)
        with torch.no_grad():
            for name, p in parameters.items():
                momentum[name].mul_(MOMENTUM).add_(previous[name] * masks.get(name, 1))
                p.copy_((start[name] - LR * momentum[name]) * masks.get(name, 1))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, parameters[name], rtol=1e-10, atol=1e-12)
            assert name not in masks or not p[masks[name] == 0].any()


def test_masks_still_change_by_the_whole_gradient():
    _, pruner, step = training(True, "rigl", update_interval=2)
    for number, (inputs, targets) in enumerate(batches(2)):
        before = {name: mask.clone() for name, mask in pruner.masks.masks.items()}
        step(Batch(inputs, targets, 8))
        changed = any((before[name] != mask).any() for name, mask in pruner.masks.masks.items())
        assert changed == (number == 1)
    assert pruner.masks.sparsity() == pytest.approx(0.7, abs=0.01)
