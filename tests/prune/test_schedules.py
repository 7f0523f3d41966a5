"""When masks change, and by how much."""

import re

import pytest
from tiny_network import Tiny, build, dead, layers, train

from prune import METHODS, Pruner
from prune.schedules import Timing


@pytest.mark.parametrize(
    ("method", "options", "interval", "moved"),
    [
        ("set", {}, 30, [0.3] * 24),  # each epoch
        ("mest", {}, 150, [0.2] * 17 + [0.1] * 6),  # each five epochs
        ("mest", {"mest_soft": True}, 150, [0.5] * 17 + [0.25] * 6),
        ("rigl", {}, 100, None),
        ("gmp", {}, 100, None),
    ],
)
def test_a_method_changes_masks_when_and_as_much_as_its_paper_says(method, options, interval, moved):
    epochs = 160 if method == "mest" else 200
    pruner = Pruner(Tiny(), method, 0.5, total_steps=30 * epochs, steps_per_epoch=30, **options)
    assert pruner.timing == Timing(30 * epochs, interval, 0.75)
    if moved:
        due = [step for step in range(30 * epochs) if pruner.due(step)][: len(moved)]
        update = METHODS[method].update
        assert [pruner.options["drop_fraction"] * update.decay(pruner.timing.fraction(step)) for step in due] == moved


def test_gmp_follows_the_cubic_schedule_and_ends_exactly():
    model, mask, optimizer = build("gmp", 0.8, steps=40, interval=4)
    total = sum(w.numel() for w in layers(model).values())
    reached = []
    train(model, mask, optimizer, 40, on_step=lambda step: reached.append(mask.masks.sparsity()))
    for step, value in enumerate(reached):
        last = 30 if step + 1 >= 30 else (step + 1) // 4 * 4
        expected = 0.8 - 0.8 * (1 - last / 30) ** 3
        assert value == pytest.approx(1 - round((1 - expected) * total) / total, abs=1e-12), step
    assert dead(model) == pytest.approx(0.8, abs=1 / total)
    assert mask.ever_alive_fraction() == 1


CHANGING = ["set", "rigl", "mest", "gmp", "dsr", "snfs", "granet"]


@pytest.mark.parametrize("method", CHANGING)
def test_a_usual_interval_is_shortened_to_twenty_changes_and_said(method):
    said = []
    pruner = Pruner(Tiny(), method, 0.5, total_steps=120, steps_per_epoch=60, warn=said.append)
    (sentence,) = said
    assert sentence.startswith("masks change every 4 steps, 22 times before they stay, from step 90 of 120 on; every ")
    assert [step + 1 for step in range(120) if pruner.due(step)] == [*range(4, 90, 4), 90]
    long = Pruner(Tiny(), method, 0.5, total_steps=10**6, steps_per_epoch=500, warn=said.append)
    assert len(said) == 1
    assert not long.due(98)


@pytest.mark.parametrize("method", CHANGING)
@pytest.mark.parametrize("interval", [15, 100, "1e"])
def test_an_interval_without_a_change_is_refused_by_a_sentence_with_one_that_works(method, interval):
    def pruner(interval):
        return Pruner(Tiny(), method, 0.5, total_steps=20, steps_per_epoch=20, update_interval=interval)

    with pytest.raises(ValueError, match="masks would never change before they stay, from step 15 of 20 on") as error:
        pruner(interval)
    works, changes = map(
        int, re.search(r"take update_interval=(\d+), which gives (\d+) changes", str(error.value)).groups()
    )
    assert sum(pruner(works).due(step) for step in range(14)) == changes
    assert changes == 14


def test_an_interval_in_epochs_is_that_many_steps():
    for interval, first in (("1e", 30), ("0.5e", 15), ("2e", 60), (7, 7)):
        pruner = Pruner(Tiny(), "rigl", 0.5, total_steps=1000, steps_per_epoch=30, update_interval=interval)
        assert next(step + 1 for step in range(1000) if pruner.due(step)) == first
