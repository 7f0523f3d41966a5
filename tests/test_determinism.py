"""The same flags give the same bits, for every optimizer and every method."""

import pytest
from running import same

from prune import METHODS
from prune.methods import SCORE_ROUNDS
from training.optim import OPTIMIZERS

FINAL = " --prune-method final --sparsity 0.5"
OPTIMIZER_FLAGS = [f"--optmzr {name}{FINAL if optimizer.rival else ''}" for name, optimizer in OPTIMIZERS.items()]
OPTIMIZER_FLAGS += [
    f"--optmzr {name} --sam-v2 {more}" for name in OPTIMIZERS if name.endswith("-sam") for more in ("", "--adaptive")
]


def assert_deterministic(train, flags):
    runs = [train(f"{flags} --epochs 1", name) for name in ("first", "second")]
    assert [run.code for run in runs] == [0, 0], runs[0].err
    same(*(run.checkpoint()["state"] for run in runs))


@pytest.mark.parametrize("flags", OPTIMIZER_FLAGS)
def test_two_runs_of_an_optimizer_are_bit_for_bit_the_same(train, flags):
    assert_deterministic(train, f"--arch vit --depth 1 --width 0.34 {flags}")  # methods train the convolutions


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_two_runs_of_a_method_are_bit_for_bit_the_same(train, trained, name):
    method, flags = METHODS[name], f"--optmzr sgd-sam --sam-v2 --prune-method {name} --sparsity 0.5"
    if method.has_interval:
        flags += " --update-interval 3"
    if SCORE_ROUNDS in method.options:
        flags += " --score-rounds 3"
    if method.tickets:
        flags += " --lth-rounds 2"
    if method.pretrained:
        flags += f" --pretrained {trained.directory}/checkpoint.pt"
    assert_deterministic(train, flags)
