"""SAM on parameters that two processes share: FSDP2, tensor parallel, and what is refused."""

import json
import multiprocessing

import pytest
import torch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What tests/sharded.py has measured."""
    import sharded  # here: a second and a half

    store = tmp_path_factory.mktemp("sharded") / "store"
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")  # a fork spares the imports
    processes = [context.Process(target=sharded.main, args=(store, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    return json.loads(store.with_suffix(".json").read_text())


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
