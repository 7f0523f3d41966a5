"""Learning rates by formula, and optimizers by name."""

import math

import pytest
import torch
from torch import nn

from sam import SAM
from training.optim import OPTIMIZERS, build_optimizer, learning_rate


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    rate = [learning_rate(step, 0.4, "cosine", 100, warmup_steps=10) for step in range(100)]
    assert rate[:10] == pytest.approx([0.4 * k / 11 for k in range(1, 11)])
    assert rate[10:] == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 90)) for k in range(90)])
    assert learning_rate(100, 0.4, "cosine", 100, warmup_steps=10) == pytest.approx(0)


def test_a_step_schedule_falls_to_a_tenth_at_half_and_at_three_quarters():
    rate = [learning_rate(step, 0.1, "step", 8) for step in range(8)]
    assert rate == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_a_constant_learning_rate_stays():
    assert {learning_rate(step, 0.1, "constant", 8) for step in range(8)} == {0.1}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_reach_the_optimizer(name):
    model = nn.Linear(2, 2)
    options = {"momentum": 0.8, "nesterov": True} if name.startswith("sgd") else {}
    optimizer = build_optimizer(name, model, lr=0.3, weight_decay=0.02, rho=0.7, v2=True, adaptive=True, **options)
    base = getattr(optimizer, "base_optimizer", optimizer)
    assert (
        type(base) is {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name.split("-")[0]]
    )
    expected = {"lr": 0.3, "weight_decay": 0.02, **options}
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected
    assert isinstance(optimizer, SAM) == name.endswith("-sam")
    if isinstance(optimizer, SAM):
        assert optimizer.v2
        assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["adaptive"]) == (0.7, True)


def test_sam_and_its_base_have_the_same_defaults():
    for name in ("sgd", "adam", "adamw"):
        plain, sam = OPTIMIZERS[name], OPTIMIZERS[f"{name}-sam"]
        assert (plain.lr, plain.weight_decay, plain.momentum) == (sam.lr, sam.weight_decay, sam.momentum)
