"""One-step SAM in Lightning with automatic optimization: python examples/lightning_digits.py."""

import lightning
import torch
from minimal import BATCH, digits, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sam import SAM


class Digits(lightning.LightningModule):
    """A perceptron; SAM is attached in configure_optimizers, and nothing else knows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch, index):
        """Return the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        """Return SAM around SGD with a schedule."""
        # To the module whose forward is called: training_step calls self.model, not self.
        optimizer = SAM(self.model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9).attach(self.model)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def main(epochs: int = 2, accumulate: int = 2, **options) -> nn.Module:
    """Train with gradients of `accumulate` micro-batches and clipping. Return the network."""
    loader = DataLoader(TensorDataset(*(t[:1536] for t in digits())), BATCH)
    module = Digits()
    trainer = lightning.Trainer(
        max_epochs=epochs, accumulate_grad_batches=accumulate, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", **options,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module.model


if __name__ == "__main__":
    main()
