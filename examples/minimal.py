"""One-step SAM on a sparse network, sam.py and prune on scikit-learn's digits: python examples/minimal.py."""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # not needed where sam and prune are installed
from prune import Pruner
from sam import SAM

BATCH = 128


def digits() -> tuple[Tensor, Tensor]:
    """Return 1797 images of 64 values in [0, 1] and their labels, in a random order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def network() -> nn.Module:
    """Return a perceptron with the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def main(epochs: int = 20, sparsity: float = 0.9) -> tuple[nn.Module, float]:
    """Train with RigL's masks. Return the network and its accuracy on images that it was not trained on."""
    images, labels = digits()
    train, test = slice(0, 1536), slice(1536, None)
    steps = epochs * (1536 // BATCH)

    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9).attach(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pruner = Pruner(model, "rigl", sparsity, total_steps=steps, optimizers=[optimizer], update_interval=10)
    pruner.choose_masks()

    for step in range(steps):
        batch = slice(step * BATCH % 1536, step * BATCH % 1536 + BATCH)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch])  # at w + e
        loss.backward()
        pruner.mask_gradients(step)
        optimizer.step()  # back to w, then SGD's step; the gradient is the next step's direction
        pruner.mask_weights()
        pruner.update_masks(step)
        schedule.step()

    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    print(f"{pruner.describe()}\naccuracy {accuracy:.3f}")
    return model, accuracy


if __name__ == "__main__":
    main()
