"""What becomes of flags where the machine is too small."""

import pytest
import torch

from experiment import build
from experiment.flags import parse, resolve
from models import build_model
from utils.errors import TrainingError


class FullGpu:
    def sample(self, per_class):
        raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--prune-method grasp", "try --score-images 5 "),
        ("--prune-method snip --score-images 3", "try --score-images 1 "),
        ("--prune-method snip --score-images 1", "try a smaller --width "),
        ("--prune-method synflow", "try a smaller --width "),
    ],
)
def test_too_little_memory_for_the_scores_advises_what_they_take(flags, words):
    args = resolve(parse(f"--depth 8 --width 0.25 --sparsity 0.5 {flags}".split())[0])
    pruner = build.pruner(args, build_model("resnet", 8, 10, 0.25), [], total_steps=1000)
    with pytest.raises(TrainingError, match="out of GPU memory: ") as error:
        build.choose_masks(pruner, FullGpu())
    assert words in str(error.value)
