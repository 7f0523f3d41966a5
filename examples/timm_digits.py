"""One-step SAM in timm's way of training, with its loss scaler and an average of weights: python examples/timm_digits.py."""

import torch
from minimal import BATCH, digits, network
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn

from sam import SAM


def main(epochs: int = 2) -> nn.Module:
    """Train and return the network."""
    images, labels = (t[:1536] for t in digits())
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9).attach(model)
    schedule = CosineLRScheduler(optimizer, t_initial=epochs)
    average = ModelEmaV3(model, decay=0.9)
    scaler = NativeScaler(device="cpu")
    for epoch in range(epochs):
        model.train()
        for start in range(0, len(images), BATCH):
            batch = slice(start, start + BATCH)
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())  # a skipped step does no harm
            average.update(model)
        schedule.step(epoch + 1)
    return model


if __name__ == "__main__":
    main()
