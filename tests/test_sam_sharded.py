"""SAM on parameters that two processes share: FSDP2, tensor parallel, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What tests/sharded.py has measured."""
    store = tmp_path_factory.mktemp("sharded") / "store"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "sharded.py"), str(store)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(2)]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1] + outputs[1][1]
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.parametrize(
    "case",
    ["one-step", "two-step", "adaptive", "momentum", "ema", "attach", "tensor parallel", "tensor parallel, two-step"],
)
def test_sharded_training_is_that_of_one_process_to_rounding(results, case):
    assert results[case] < 1e-13


@pytest.mark.parametrize("case", ["checkpoint", "full checkpoint"])
def test_a_distributed_checkpoint_holds_the_memory(results, case):
    assert results[case]


@pytest.mark.parametrize("original", [True, False])
def test_the_local_shards_of_fsdp1_are_refused(results, original):
    assert "fully_shard" in results[f"FSDP1 {original}"]


def test_a_zero_optimizer_around_sam_and_random_shards_are_refused(results):
    assert "first half" in results["zero"]
    assert "sharded" in results["random"]
