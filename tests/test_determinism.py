"""The same flags give the same bits, for every optimizer and every method."""

import itertools

import pytest
from running import same

from prune import METHODS
from prune.methods import SCORE_ROUNDS
from training.optim import OPTIMIZERS

VIT = "--arch vit --depth 1 --width 0.34"
RIVALS = [f"--optmzr {name} {VIT}" for name, optimizer in OPTIMIZERS.items() if optimizer.rival]  # take `final` alone
OTHERS = [f"--optmzr {name}" for name, optimizer in OPTIMIZERS.items() if not optimizer.rival]
OTHERS += [
    f"--optmzr {name} --sam-v2 {more}" for name in OPTIMIZERS if name.endswith("-sam") for more in ("", "--adaptive")
]
SPARSE = [name for name in METHODS if name != "none"]
assert len(SPARSE) >= len(OTHERS)  # each is in a pair


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*zip(SPARSE, itertools.cycle(OTHERS), strict=False), *(("final", rival) for rival in RIVALS)],
)
def test_two_runs_are_bit_for_bit_the_same(train, trained, name, optimizer):
    method, flags = METHODS[name], f"{optimizer} --prune-method {name} --sparsity 0.5 --epochs 1"
    if method.has_interval:
        flags += " --update-interval 3"
    if SCORE_ROUNDS in method.options:
        flags += " --score-rounds 3"
    if method.tickets:
        flags += " --lth-rounds 2"
    if method.pretrained:
        flags += f" --pretrained {trained.directory}/checkpoint.pt"
    runs = [train(flags, run) for run in ("first", "second")]
    assert [run.code for run in runs] == [0, 0], runs[0].err
    same(*(run.checkpoint()["state"] for run in runs))
