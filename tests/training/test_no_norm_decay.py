"""--no-norm-decay: only matrices and kernels decay."""

import pytest
import torch
from torch import nn

from training.optim import OPTIMIZERS, build_optimizer


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if not kind.rival])
def test_only_matrices_and_kernels_decay_where_asked(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm([2, 4]))  # whose weight has two dimensions
    for p in model.parameters():
        nn.init.ones_(p)
    sam = {"rho": 0.0} if OPTIMIZERS[name].sam else {}
    optimizer = build_optimizer(name, model, 0.5, 0.1, 0.0, norm_decay=False, **sam)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if sam:
        optimizer.first_step()
    optimizer.step()
    assert (model[0].weight < 1).all()
    assert all((p == 1).all() for p in (model[0].bias, *model[1].parameters(), *model[2].parameters()))
