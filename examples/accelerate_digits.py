"""One-step SAM in Accelerate, with accumulation and clipping: accelerate launch examples/accelerate_digits.py."""

import torch
from accelerate import Accelerator
from minimal import BATCH, digits, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sam import SAM


def main(epochs: int = 2, accumulate: int = 2) -> nn.Module:
    """Train and return the network."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, cpu=True)
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9).attach(model)
    loader = DataLoader(TensorDataset(*(t[:1536] for t in digits())), BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
