"""Run in two processes by test_sam_sharded.py: SAM on sharded parameters against SAM in one process."""

import copy
import json
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sam import SAM

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "rho": 0.3}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def split(model):
    return parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 5, generator=g).double(), torch.randn(8, 3, generator=g).double()) for _ in range(10)]


def step(model, optimizer, batch, mine, way):
    inputs, targets = (t[mine] for t in batch)
    backward = lambda: (model(inputs) - targets).square().mean().backward()  # noqa: E731
    optimizer.zero_grad()
    if way == "attach":
        backward()
        return optimizer.step()
    if not optimizer.v2:
        backward()
    optimizer.first_step(zero_grad=True)
    backward()
    return optimizer.second_step()


def difference(model, other):
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return max((a - b).abs().max().item() for a, b in zip(full, other.parameters(), strict=True))


def train(kind, way="hand", **options):
    """Ten steps, sharded and not; the norm of the last perturbation too."""
    rank, results = dist.get_rank(), []
    mine = slice(4 * rank, 4 * rank + 4) if kind is shard else slice(None)
    model, other = kind(network()), network()
    optimizer, reference = (SAM(m.parameters(), torch.optim.SGD, **OPTIONS, **options) for m in (model, other))
    if way == "attach":
        optimizer.attach(model)
        reference.attach(other)
    for number, batch in enumerate(batches()):
        if way == "attach" and number % 3 == 0:  # an evaluation gathers weights, which perturbing makes stale
            model.eval()
            with torch.no_grad():
                model(batch[0])
            model.train()
        step(model, optimizer, batch, mine, way)
        step(other, reference, batch, slice(None), way)
        results.append(difference(model, other))
    if optimizer.v2:
        for o in (optimizer, reference):
            o.first_step()
        for p in other.parameters():
            p.grad = p.detach().clone()
        for p in model.parameters():
            p.grad = p.detach().clone()
        stats = [torch.stack(o.perturbation_stats()) for o in (optimizer, reference)]
        results.append((stats[0] - stats[1]).abs().max().item())
        for o in (optimizer, reference):
            o.restore()
    return max(results)


def checkpoint(full):
    """The memory of a run goes through torch.distributed.checkpoint's functions, and the run goes on bit for bit."""
    options = StateDictOptions(full_state_dict=full)
    model, resumed_model = shard(network()), shard(network())
    optimizer, resumed = (SAM(m.parameters(), torch.optim.SGD, **OPTIONS) for m in (model, resumed_model))
    data = batches()
    for batch in data[:4]:
        step(model, optimizer, batch, slice(None), "hand")
    weights = copy.deepcopy(get_model_state_dict(model, options=options))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    set_model_state_dict(resumed_model, weights, options=options)
    set_optimizer_state_dict(resumed_model, resumed, state, options=options)
    for batch in data[4:]:
        step(model, optimizer, batch, slice(None), "hand")
        step(resumed_model, resumed, batch, slice(None), "hand")
    pairs = zip(model.parameters(), resumed_model.parameters(), strict=True)
    return all(torch.equal(p.to_local(), q.to_local()) for p, q in pairs)


def sentence(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def zero():
    model = network()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), SAM, base_optimizer=torch.optim.SGD, lr=0.1)
    model(batches()[0][0]).sum().backward()
    optimizer.step()


def main(store: Path, rank: int) -> None:
    """Write figures and sentences to STORE.json, from the first of two processes."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = {
        "one-step": train(shard),
        "two-step": train(shard, v2=False),
        "adaptive": train(shard, adaptive=True),
        "momentum": train(shard, direction="momentum"),
        "ema": train(shard, direction="ema"),
        "attach": train(shard, "attach"),
        "tensor parallel": train(split),
        "tensor parallel, two-step": train(split, v2=False, adaptive=True),
        "checkpoint": checkpoint(False),
        "full checkpoint": checkpoint(True),
        "random": sentence(lambda: SAM(shard(network()).parameters(), torch.optim.SGD, lr=0.1, direction="random")),
        "zero": sentence(zero),
    }
    for original in (True, False):
        model = FullyShardedDataParallel(network(), use_orig_params=original, device_id=torch.device("cpu"))
        results[f"FSDP1 {original}"] = sentence(lambda m=model: SAM(m.parameters(), torch.optim.SGD, lr=0.1))
    if rank == 0:
        store.with_suffix(".json").write_text(json.dumps(results))
    dist.destroy_process_group()
