"""Learning rates by formula, and optimizers by name."""

import math

import pytest
import torch
from torch import nn

from sam import SAM
from training.optim import OPTIMIZERS, build_optimizer, learning_rate, radius


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    rate = [learning_rate(step, 0.4, "cosine", 100, warmup_steps=10) for step in range(100)]
    assert rate[:10] == pytest.approx([0.4 * k / 11 for k in range(1, 11)])
    assert rate[10:] == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 90)) for k in range(90)])
    assert learning_rate(100, 0.4, "cosine", 100, warmup_steps=10) == pytest.approx(0)


def test_a_step_schedule_falls_to_a_tenth_at_half_and_at_three_quarters():
    rate = [learning_rate(step, 0.1, "step", 8) for step in range(8)]
    assert rate == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'cosin': choose one of cosine, step, constant"):
        learning_rate(0, 0.1, "cosin", 8, warmup_steps=2)
    with pytest.raises(ValueError, match="unknown schedule 'cosine': choose one of constant, lr, sqrt"):
        radius(0, 0.1, "cosine", 8, 2, since=0.5)


def test_a_constant_learning_rate_stays():
    assert {learning_rate(step, 0.1, "constant", 8) for step in range(8)} == {0.1}


def test_the_radius_follows_its_schedule():
    def over(schedule, **window):
        return [radius(step, -0.4, schedule, 8, 2, learning_rate(step, 1.0, "step", 8), **window) for step in range(8)]

    assert over("constant") == [-0.4] * 8
    assert over("lr") == pytest.approx([-0.4] * 4 + [-0.04] * 2 + [-0.004] * 2)
    assert over("sqrt") == pytest.approx([-0.4 / math.sqrt(epoch) for epoch in (1, 1, 2, 2, 3, 3, 4, 4)])
    assert over("constant", since=0.25, until=0.75) == [0] * 2 + [-0.4] * 4 + [0] * 2
    assert over("constant", every=3) == [-0.4, 0, 0, -0.4, 0, 0, -0.4, 0]
    assert over("constant", since=0.5, every=3) == [0] * 6 + [-0.4, 0]


def test_a_share_of_the_schedule_that_is_a_step_begins_with_that_step():
    for steps in (10, 30, 70, 1000):
        for tenths in range(1, 10):
            perturbing = [radius(step, 1.0, "constant", steps, 1, since=tenths / 10) for step in range(steps)]
            assert perturbing.index(1.0) == steps * tenths // 10


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_reach_the_optimizer(name):
    model = nn.Linear(2, 2)
    options = {"momentum": 0.8, "nesterov": True} if name.startswith("sgd") else {}
    sam = {"rho": 0.7, "v2": True, "adaptive": True, "direction": "ema"} if not OPTIMIZERS[name].rival else {"rho": 0.7}
    sam |= (
        {"sparsity": 0.5, "total_steps": 9}
        if name == "sgd-safe"
        else {"sparsities": [0.5]}
        if name == "sgd-cram"
        else {}
    )
    optimizer = build_optimizer(name, model, lr=0.3, weight_decay=0.02, **sam, **options)
    base = getattr(optimizer, "base_optimizer", optimizer)
    assert (
        type(base) is {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name.split("-")[0]]
    )
    expected = {"lr": 0.3, "weight_decay": 0.02, **options}
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected
    assert isinstance(optimizer, SAM) == OPTIMIZERS[name].sam
    if OPTIMIZERS[name].rival:
        assert (optimizer.v2, optimizer.param_groups[0]["rho"]) == (False, 0.7)
    elif isinstance(optimizer, SAM):
        assert (optimizer.v2, optimizer.direction) == (True, "ema")
        assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["adaptive"]) == (0.7, True)


def test_sam_and_its_base_have_the_same_defaults():
    for name in ("sgd", "adam", "adamw"):
        plain, sam = OPTIMIZERS[name], OPTIMIZERS[f"{name}-sam"]
        assert (plain.lr, plain.weight_decay, plain.momentum) == (sam.lr, sam.weight_decay, sam.momentum)
