"""One-step SAM on sharded parameters: torchrun --nproc-per-node 2 examples/fsdp2_digits.py."""

import os
import sys

import torch
import torch.distributed as dist
from minimal import BATCH, digits, network
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sam import SAM


def main(epochs: int = 2) -> dict:
    """Train on all processes, each with its part of every batch. Return the whole weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (world,))
    images, labels = (t[:1536].to(device) for t in digits())
    model = network().to(device)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After fully_shard: the optimizer has to have the sharded parameters.
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9).attach(model)
    for _ in range(epochs):
        for start in range(0, len(images), BATCH):
            mine = slice(start + rank * BATCH // world, start + (rank + 1) * BATCH // world)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
            optimizer.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if rank == 0 and sys.argv[1:]:
        torch.save(weights, sys.argv[1])
    dist.destroy_process_group()
    return weights


if __name__ == "__main__":
    main()
