"""Directions, windows and schedules of SAM in the training step, and what it logs, against loops written out in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imagedata.loaders import Batch
from prune import Pruner
from training.nonfinite import NonFiniteGuard
from training.optim import build_optimizer, radius
from training.state import TrainState
from training.step import TrainingStep, build_objective
from utils.precision import Execution

STEPS, PER_EPOCH, RHO, MOMENTUM, DECAY = 12, 3, 0.3, 0.9, 0.01
TWO, ONE = {"v2": False}, {"v2": True}


def lr_at(step):
    return 0.05 * (1 - step / STEPS)


def network(batch_norm=False, dtype=torch.float64):
    torch.manual_seed(0)
    norm = [nn.BatchNorm2d(4)] if batch_norm else []
    return nn.Sequential(nn.Conv2d(2, 4, 3), *norm, nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)).to(dtype)


def batches(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        inputs = torch.randn(8, 2, 5, 5, dtype=torch.float64, generator=g)
        yield Batch(inputs.to(dtype), torch.rand(8, 5, dtype=torch.float64, generator=g).to(dtype), 8)


def training(
    model, v2=True, direction="previous", rho=RHO, schedule="constant", since=0.0, until=1.0, every=1, sparsity=None,
    guard=None, seed=0, **options,
):  # fmt: skip
    optimizer = build_optimizer("sgd-sam", model, 9.0, DECAY, MOMENTUM, rho=9.0, v2=v2, direction=direction, seed=seed)
    pruner = Pruner(model, "random" if sparsity else "none", sparsity, optimizers=[optimizer])
    pruner.choose_masks()
    state = TrainState(model, optimizer, pruner, guard or NonFiniteGuard())
    window = {"since": since, "until": until, "every": every}
    rho_at = lambda step: radius(step, rho, schedule, STEPS, PER_EPOCH, lr_at(step) / 0.05, **window)  # noqa: E731
    objective = build_objective(model, Execution(), 8 // options.get("accumulate", 1))
    return TrainingStep(state, objective, lr_at, rho_at=rho_at, **options)


def by_hand(model, v2=True, direction="previous", rho=RHO, schedule="constant", since=0.0, until=1.0, every=1):
    """Yield what is known of each step: its passes, the ascent, and the cosines of e and the gradients at w and w + e."""
    parameters = list(model.parameters())
    w = nn.utils.parameters_to_vector(parameters).detach()
    buffer, average, previous = (torch.zeros_like(w) for _ in range(3))

    def loss_and_gradient(at, batch):
        nn.utils.vector_to_parameters(at, parameters)
        loss = F.cross_entropy(model(batch.inputs), batch.targets, reduction="sum") / 8
        return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm())) if a.any() else 0.0

    for step, batch in enumerate(batches()):
        perturbs = since * STEPS <= step < until * STEPS and step % every == 0
        factor = {"constant": 1, "lr": 1 - step / STEPS, "sqrt": 1 / math.sqrt(1 + step // PER_EPOCH)}[schedule]
        loss, gradient = loss_and_gradient(w, batch)
        d = {"previous": previous, "momentum": buffer, "ema": average}[direction] if v2 else gradient
        e = (rho * factor * d / (d.norm() + 1e-12)) if perturbs else torch.zeros_like(w)
        there, previous = loss_and_gradient(w + e, batch)
        average = 0.9 * average + 0.1 * previous
        buffer = MOMENTUM * buffer + previous + DECAY * w
        w = w - lr_at(step) * buffer
        found = {"ascent": there - loss, "cos_e_gradient_at_w": cosine(e, gradient), "perturbation_norm": e.norm()}
        found["cos_e_gradient_at_perturbed"] = cosine(e, previous)
        yield (2 if perturbs and not v2 else 1), found if perturbs else {}
    nn.utils.vector_to_parameters(w, parameters)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "options",
    [
        ONE,
        ONE | {"direction": "momentum", "rho": -RHO},
        ONE | {"direction": "ema", "schedule": "lr"},
        ONE | {"schedule": "sqrt"},
        ONE | {"since": 0.5},
        ONE | {"since": 0.25, "until": 0.75, "rho": -RHO},
        TWO,
        TWO | {"rho": -RHO},
        TWO | {"every": 5},
        TWO | {"since": 0.75, "schedule": "sqrt"},
        TWO | {"until": 0.3, "every": 2, "schedule": "lr"},
    ],
    ids=str,
)
def test_a_step_of_sam_and_its_diagnostics_are_those_of_the_loop_by_hand(options):
    model, reference, seen = network(), network(), []
    step = training(model, **options)
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    passes = 0
    for batch, (expected_passes, expected) in zip(batches(), by_hand(reference, **options), strict=True):
        seen.clear()
        logged = step(batch, log=True).logged
        assert len(seen) == (2 if expected else 1)  # one-step SAM too, for what it logs
        passes += expected_passes
        assert logged.keys() - {"gradient_norm"} == expected.keys()
        for name, value in expected.items():
            assert float(logged[name]) == pytest.approx(float(value), abs=2e-6), name
    assert step.state.passes == passes
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [ONE, TWO, TWO | {"every": 3}, ONE | {"since": 0.5}], ids=str)
@pytest.mark.parametrize("sparse", [{}, {"sparsity": 0.6}, {"sparsity": 0.6, "sam_unmasked": True}], ids=str)
def test_whether_steps_are_logged_changes_no_bit(options, sparse):
    ends = []
    for log in (False, True):
        model = network(batch_norm=True, dtype=torch.float32)
        step = training(model, accumulate=2, clip_grad=1.0, **options, **sparse)
        for batch in batches(torch.float32):
            step(batch, log)
        ends.append([*weights(model), *model.buffers(), torch.get_rng_state()])
        assert step.state.passes == STEPS * (2 if options == TWO else 1) + 4 * (options.get("every") == 3)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("options", [ONE, TWO], ids=str)
def test_parts_of_a_batch_and_a_scaled_loss_log_the_same_diagnostics(options):
    logs = []
    for accumulate, fp16 in ((1, False), (3, False), (1, True)):
        model = network(dtype=torch.float32)
        guard = NonFiniteGuard(model, fp16)
        step = training(model, sparsity=0.6, accumulate=accumulate, guard=guard, **options)
        logs.append([step(batch, log=True).logged for batch in batches(torch.float32)])
        assert not guard.skipped_steps
    for other in logs[1:]:
        for expected, found in zip(logs[0], other, strict=True):
            assert expected.keys() == found.keys() > {"ascent", "cos_e_gradient_at_w", "cos_e_gradient_at_perturbed"}
            for name in expected:
                assert float(found[name]) == pytest.approx(float(expected[name]), abs=1e-4), name


def test_gradients_of_pruned_weights_count_in_the_cosine_only_where_they_are_perturbed():
    cosines = {}
    for unmasked in (False, True):
        model = network()
        step = training(model, v2=False, sparsity=0.6, sam_unmasked=unmasked)
        cosines[unmasked] = [float(step(batch, log=True).logged["cos_e_gradient_at_w"]) for batch in batches()]
    assert cosines[False] == pytest.approx([1.0] * STEPS)
    assert cosines[True] == pytest.approx([1.0] * STEPS)


def test_random_directions_follow_the_seed():
    ends = []
    for seed in (0, 0, 1):
        model = network()
        step = training(model, direction="random", sparsity=0.6, seed=seed)
        for batch in batches():
            step(batch)
        ends.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends[:2], strict=True))
    assert not torch.equal(ends[0][0], ends[2][0])


def test_a_state_from_before_passes_were_counted_had_the_same_number_in_all_steps():
    for options, expected in ((ONE, 2), (TWO, 4)):
        step = training(network(), **options)
        for _, batch in zip(range(2), batches(), strict=False):
            step(batch)
        saved = step.state.state_dict()
        assert saved.pop("passes") == expected
        step.state.passes = 0
        step.state.load_state_dict(saved)
        assert step.state.passes == expected
