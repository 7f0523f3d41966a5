"""The quadratic's figures follow closed forms, and what sam.py does there."""

import numpy as np
import pytest
import torch

from analysis.quadratic import largest_curvature, main, resting_distances
from sam import SAM


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("length", [0.1, 1.0, 3.0])
def test_the_largest_curvature_follows_the_conditions_of_jury(length, momentum):
    # k = rho h / |d| = length * x, x = lr h
    limits = {
        "SGD": lambda x: x - 2 * (1 + momentum),
        "two-step SAM": lambda x: x * (1 + length * x) - 2 * (1 + momentum),
        "one-step, previous -": lambda x: x - 2 * (1 + momentum) * (1 - length * x),
        "one-step, momentum - (MSAM)": lambda x: x - 2 * (1 + momentum - length * x),
        "one-step, momentum +": lambda x: max(length * x - (1 - momentum), x - 2 * (1 + momentum + length * x)),
        "one-step, previous +": lambda x: max(
            length * x - 1,
            x - 2 * (1 + momentum) * (1 + length * x),
            x * momentum * length * x - (1 - momentum * length * x) * (1 - momentum) * (1 - length * x),
        ),
    }
    for rule, excess in limits.items():
        found = largest_curvature(rule, length, momentum)
        assert excess(found * (1 - 1e-6)) < 0 < excess(found * (1 + 1e-6)), rule


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("two-step SAM", {"v2": False, "rho": 1.0}),
        ("one-step, previous +", {"rho": 1.0}),
        ("one-step, previous -", {"rho": -1.0}),
        ("one-step, momentum +", {"rho": 1.0, "direction": "momentum"}),
        ("one-step, momentum - (MSAM)", {"rho": -1.0, "direction": "momentum"}),
    ],
)
def test_a_training_by_sam_rests_where_the_picture_says(rule, options):
    curvatures = torch.from_numpy(0.05 * np.geomspace(1.0, 0.1, 4))
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    optimizer = SAM([w], torch.optim.SGD, lr=1.0, momentum=0.9, **options)
    distances = []
    for _ in range(400):
        optimizer.zero_grad()
        if not optimizer.v2:
            (curvatures * w**2 / 2).sum().backward()
        optimizer.first_step(zero_grad=True)
        (curvatures * w**2 / 2).sum().backward()
        optimizer.second_step()
        distances.append(w.detach().norm().item())
    assert resting_distances(rule, np.array([0.05]), 0.9, 4, 400) == pytest.approx(np.mean(distances[-100:]), rel=1e-6)


def test_without_momentum_the_previous_gradient_stays_about_rho_away():
    curvatures = np.array([0.05, 0.1, 0.3])
    previous = resting_distances("one-step, previous +", curvatures, 0.0, 1)
    assert previous == pytest.approx(0.9, abs=0.03)
    assert (resting_distances("two-step SAM", curvatures, 0.0, 1) < 0.6 * curvatures).all()


def test_the_command_draws_and_prints_a_row_per_rule(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--momentum", "0"]) == 0
    assert (tmp_path / "quadratic.png").stat().st_size > 10_000
    row = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| one-step, momentum - (MSAM)")
    )
    assert row.split(" | ")[3] == "0.67"  # 2 / (1 + 2)


def test_a_momentum_of_one_is_refused(capsys):
    assert main(["--momentum", "1"]) == 2
    assert capsys.readouterr().err == "error: --momentum has to be at least 0 and less than 1, not 1\n"
