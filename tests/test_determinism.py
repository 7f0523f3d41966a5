"""The same flags give the same bits, for every optimizer and every method."""

import pytest
from running import same

from prune import METHODS
from training.optim import OPTIMIZERS

OPTIMIZER_FLAGS = [f"--optmzr {name}" for name in OPTIMIZERS]
OPTIMIZER_FLAGS += [
    f"--optmzr {name} --sam-v2 {more}" for name in OPTIMIZERS if name.endswith("-sam") for more in ("", "--adaptive")
]
METHOD_FLAGS = [f"--optmzr sgd-sam --sam-v2 --prune-method {name} --sparsity 0.5" for name in METHODS if name != "none"]


@pytest.mark.parametrize("flags", [*OPTIMIZER_FLAGS, *METHOD_FLAGS])
def test_two_runs_are_bit_for_bit_the_same(train, flags):
    flags += " --epochs 2 --width 0.25"
    if any(f"--prune-method {name} " in flags and METHODS[name].update for name in METHODS):
        flags += " --update-interval 3"
    if "oneshot" in flags:
        flags += f" --pretrained {train('--epochs 1 --width 0.25', 'dense').directory}/checkpoint.pt"
    runs = [train(flags, name) for name in ("first", "second")]
    assert [run.code for run in runs] == [0, 0], runs[0].err
    same(*(run.checkpoint()["state"] for run in runs))
