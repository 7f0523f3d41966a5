"""The examples train as the plain loop does, step by step: the same weights. Skipped without their framework."""

import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sam import SAM

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch):
    """A function that imports an example by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def plain_loop(minimal, epochs, accumulate=1, clip=None, gamma=None, rates=None, rho=0.05):
    """The documented loop, first_step and second_step."""
    model = minimal.network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1, momentum=0.9)
    images, labels = (t[:1536] for t in minimal.digits())
    size = minimal.BATCH * accumulate
    for epoch in range(epochs):
        if rates:
            optimizer.param_groups[0]["lr"] = rates[epoch]
        for start in range(0, len(images), size):
            optimizer.zero_grad()
            optimizer.first_step(zero_grad=True)
            for micro in range(start, min(start + size, len(images)), minimal.BATCH):
                batch = slice(micro, micro + minimal.BATCH)
                (nn.functional.cross_entropy(model(images[batch]), labels[batch]) / accumulate).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.second_step()
        if gamma:
            optimizer.param_groups[0]["lr"] *= gamma
    return model


def assert_trained_as_the_plain_loop(model, minimal, **loop):
    sam, sgd = plain_loop(minimal, 2, **loop), plain_loop(minimal, 2, **loop, rho=0.0)
    for p, q, w in zip(model.parameters(), sam.parameters(), sgd.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(w, q, rtol=1e-4, atol=1e-5)


def test_the_minimal_example_learns_and_is_sparse(example, capsys):
    model, accuracy = example("minimal").main()
    assert accuracy > 0.9
    weights = [model[0].weight, model[2].weight]
    zero = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zero == pytest.approx(0.9, abs=2e-3)
    assert "sparsity 0.9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "needs", "loop"),
    [
        ("lightning_digits", "lightning", {"accumulate": 2, "clip": 1.0, "gamma": 0.5}),
        ("accelerate_digits", "accelerate", {"accumulate": 2, "clip": 1.0}),
        ("huggingface_digits", "transformers", {"accumulate": 2, "clip": 1.0}),
        ("timm_digits", "timm", {"clip": 1.0, "rates": [0.1, 0.05]}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_example_trains_as_the_plain_loop(example, name, needs, loop):
    pytest.importorskip(needs)
    assert_trained_as_the_plain_loop(example(name).main(epochs=2), example("minimal"), **loop)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_the_sharded_example_trains_as_the_plain_loop(example, tmp_path):
    """In two forks of this process, with what torchrun would tell them."""
    minimal, sharded = example("minimal"), example("fsdp2_digits")

    def run(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
        sys.argv[1:] = [str(tmp_path / "weights.pt")]
        sharded.main()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    model = minimal.network()
    model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_trained_as_the_plain_loop(model, minimal)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 60
