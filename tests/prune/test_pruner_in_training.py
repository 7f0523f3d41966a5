"""Masks that are chosen or changed while an optimizer is at work, whatever it remembers and wherever SAM holds the weights."""

import itertools

import pytest
import torch
from torch import nn

from prune import Pruner
from sam import SAM


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    ("how", "direction"),
    [*itertools.product(["attach", "train", "by hand"], ["previous", "momentum", "ema"]), ("no SAM", None)],
)
def test_masks_that_are_chosen_during_training_hold_from_then_on(how, base, direction):
    """In the weights that a forward pass sees, and in what optimizers remember."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
    options = {"lr": 0.05, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.01}
    if how == "no SAM":
        optimizer = base(model.parameters(), **options)
    else:
        optimizer = SAM(model.parameters(), base, rho=0.5, direction=direction, **options)
    if how == "attach":
        optimizer.attach(model)
    pruner = Pruner(model, "oneshot", 0.7, "erk", optimizers=[optimizer])
    for step in range(8):
        if how == "train":
            optimizer.train()
        if step == 4:
            pruner.choose_masks()
            for weight, mask in pruner.masks.pairs():
                remembered = [v for v in optimizer.state[weight].values() if getattr(v, "shape", None) == weight.shape]
                assert remembered
                assert all((v[mask == 0] == 0).all() for v in remembered)
        optimizer.zero_grad()
        if how == "by hand":
            optimizer.first_step()
        nn.functional.cross_entropy(model(torch.randn(8, 10)), torch.randint(0, 2, (8,))).backward()
        assert all((weight[mask == 0] == 0).all() for weight, mask in pruner.masks.pairs())
        pruner.mask_gradients()
        optimizer.step()
        pruner.mask_weights()
    if how == "train":
        optimizer.eval()
    assert sum(int(model[layer].weight.count_nonzero()) for layer in (0, 2)) == round(0.3 * 384)


@pytest.mark.parametrize("method", ["lamp", "lth"])
@pytest.mark.parametrize("how", ["attach", "by hand"])
def test_a_round_begins_with_its_weights_where_a_step_was_left_unfinished(method, how):
    """A loss for the log that was computed in training mode, or a step that a GradScaler skipped, leaves w + e."""
    ends = []
    for unfinished in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
        if how == "attach":
            optimizer.attach(model)
        options = {"lth_rounds": 1} if method == "lth" else {}
        pruner = Pruner(
            model, method, 0.7, "uniform" if method == "lth" else None, total_steps=4, optimizers=[optimizer], **options
        )
        pruner.choose_masks()
        for step in range(4):
            optimizer.zero_grad()
            if how == "by hand":
                optimizer.first_step()
            nn.functional.cross_entropy(model(torch.randn(8, 10)), torch.randint(0, 2, (8,))).backward()
            optimizer.step()
            pruner.update_masks(step)
        if unfinished and how == "attach":
            model(torch.randn(8, 10))
        elif unfinished:
            optimizer.first_step()
        pruner.next_round(4)
        optimizer.restore()
        assert all((weight[mask == 0] == 0).all() for weight, mask in pruner.masks.pairs())
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert all(p.count_nonzero() for p in ends[0])


@pytest.mark.parametrize("v2", [True, False])
def test_masks_that_are_applied_in_the_middle_of_a_step_leave_the_perturbation(v2):
    ends = []
    for masked in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, v2=v2)
        pruner = Pruner(model, "random", 0.7, optimizers=[optimizer])
        pruner.choose_masks()
        for _ in range(3):
            inputs, targets = torch.randn(8, 10), torch.randint(0, 2, (8,))
            for half in (optimizer.first_step, optimizer.second_step):
                if not v2 or half == optimizer.second_step:
                    nn.functional.cross_entropy(model(inputs), targets).backward()
                pruner.mask_gradients()
                half(zero_grad=True)
                if masked:
                    pruner.mask_weights()
            pruner.mask_weights()
        ends.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)


def test_an_optimizer_that_moves_dead_weights_leaves_none_alive_where_sam_holds_the_perturbed_ones():
    class Restless(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    torch._foreach_add_(group["params"], 0.1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = SAM(model.parameters(), Restless, rho=0.5, lr=0.1)
    pruner = Pruner(model, "random", 0.7, optimizers=[optimizer])
    pruner.choose_masks()
    optimizer.train()
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 10)), torch.randint(0, 2, (8,))).backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.mask_weights()
    optimizer.eval()
    assert sum(int(model[layer].weight.count_nonzero()) for layer in (0, 2)) == round(0.3 * 384)


@pytest.mark.parametrize(
    ("method", "options"),
    [("gmp", {"update_interval": 5}), ("rigl", {"update_interval": 5}), ("final", {}), ("lth", {"lth_rewind": 3})],
)
def test_weights_that_sam_perturbs_are_pruned_as_they_are_without_the_perturbation(method, options):
    """optimizer.train() leaves them at w + e: the same as where the caller brings w back around each change."""
    ends = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2)).double()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
        pruner = Pruner(model, method, 0.8, total_steps=20, optimizers=[optimizer], **options)
        pruner.choose_masks()
        optimizer.train()
        step = 0
        while step < 20:
            optimizer.zero_grad()
            g = torch.Generator().manual_seed(step)
            inputs, targets = (
                torch.randn(8, 10, generator=g, dtype=torch.float64),
                torch.randint(0, 2, (8,), generator=g),
            )
            nn.functional.cross_entropy(model(inputs), targets).backward()
            pruner.mask_gradients(step)
            optimizer.step()
            pruner.mask_weights()
            if by_hand:
                optimizer.eval()
            pruner.update_masks(step)
            step += 1
            if step == 20:
                step = pruner.next_round(step)
            if by_hand:
                optimizer.train()
        optimizer.eval()
        ends.append([p.detach().clone() for p in model.parameters()])
        assert sum(int(p.count_nonzero()) for p in ends[-1]) == 34 + round(0.2 * 384)
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
