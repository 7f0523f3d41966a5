"""One-step SAM in the Trainer of Hugging Face's transformers: python examples/huggingface_digits.py."""

import tempfile

import torch
from minimal import BATCH, digits, network
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from sam import SAM


class Digits(Dataset):
    """Images and labels by the names of the model's arguments."""

    def __init__(self) -> None:
        self.images, self.labels = (t[:1536] for t in digits())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"images": self.images[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    """A network that returns its loss, as a Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, images: Tensor, labels: Tensor) -> dict:
        """Return the loss and the logits."""
        logits = self.body(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main(epochs: int = 2, accumulate: int = 2) -> nn.Module:
    """Train with accumulation and clipping. Return the network."""
    model = Classifier()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9).attach(model)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=epochs, per_device_train_batch_size=BATCH, use_cpu=True,
        gradient_accumulation_steps=accumulate, max_grad_norm=1.0, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(model, arguments, train_dataset=Digits(), optimizers=(optimizer, schedule))
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)  # the order of the other examples
    trainer.train()
    return model.body


if __name__ == "__main__":
    main()
