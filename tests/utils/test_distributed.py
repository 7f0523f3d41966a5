"""What each of several processes gets of a batch."""

import torch
from torch import nn

from utils.distributed import ProcessGroup


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
