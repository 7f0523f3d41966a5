"""What each of several processes gets of a batch, and whose end ends them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.distributed import ProcessGroup

ROOT = Path(__file__).parents[2]


def test_shares_make_up_a_batch_and_differ_by_one_image_at_most():
    for size in (0, 1, 2, 7, 128):
        shares = [ProcessGroup(rank, 3).share(torch.arange(size)) for rank in range(3)]
        assert torch.cat(shares).tolist() == list(range(size))
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1


def test_one_process_reduces_nothing():
    model, sums = nn.Linear(2, 2), torch.ones(2)
    assert ProcessGroup().reduce(model, sums) is sums
    assert model.weight.grad is None


# Process 1 of a container launches two processes.
FIRST_PROCESS = """
import os, socket
import torch
from utils.distributed import start

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="none")
children = []
for rank in range(2):
    children.append(os.fork())
    if not children[-1]:
        os.environ["RANK"] = str(rank)
        start(torch.device("cpu")).wait()  # neither ends while the other still connects
        os._exit(0)
print(os.getpid(), [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
NAMESPACE = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc"]


def can_be_process_1():
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.skipif(not can_be_process_1(), reason="has no process namespaces")
def test_a_launcher_may_be_the_first_process_of_a_container():
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", FIRST_PROCESS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "1 [0, 0]\n", done.stderr
