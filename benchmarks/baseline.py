"""The loop that everyone writes, as the benchmark's baseline: eager float32, PIL transforms, SAM tensor by tensor.

It takes torch's defaults, which on CUDA are TF32 in convolutions.
"""

import contextlib
import os
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.loop import random_images
from imagedata.images import Images
from models import build_model


class Pictures(torch.utils.data.Dataset):
    """Gives images one by one through PIL, as torchvision's data sets do."""

    def __init__(self, images: Images):
        self.pixels, self.labels = images.pixels.numpy(), images.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.pixels.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class PerTensorSAM(torch.optim.SGD):
    """One-step SAM in the common way: loops over the parameters, and keeps each of e, w and g."""

    def __init__(self, params: list[Tensor], rho: float, **options: Any):
        super().__init__(params, **options)
        self.rho = rho
        self.kept: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        """Perturb along the kept gradient."""
        params = [p for group in self.param_groups for p in group["params"] if p in self.kept]
        if not params:
            return
        norm = torch.norm(torch.stack([self.kept[p]["g"].norm(p=2) for p in params]), p=2)
        scale = self.rho / (norm + 1e-12)
        for p in params:
            self.kept[p]["w"] = p.clone()
            self.kept[p]["e"] = self.kept[p]["g"] * scale
            p.add_(self.kept[p]["e"])

    @torch.no_grad()
    def second_step(self) -> None:
        """Restore, keep the gradient and step."""
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.kept.setdefault(p, {})
                if "w" in kept:
                    p.copy_(kept["w"])
                kept["g"] = p.grad.clone()
        self.step()

    def floats(self) -> int:
        """Return how many numbers are kept between steps."""
        own = sum(tensor.numel() for kept in self.kept.values() for tensor in kept.values())
        return own + sum(t.numel() for state in self.state.values() for t in state.values() if isinstance(t, Tensor))


class UsualLoop:
    """A training loop with one-step SAM, one step after the other.

    Args:
        images: what to train on; None for the same batch over and over, without a data pipeline.
    """

    def __init__(self, model: nn.Module, device: torch.device, batch_size: int, images: Images | None):
        self.model, self.device = model.to(device), device
        self.optimizer = PerTensorSAM(list(model.parameters()), 0.05, lr=0.1, momentum=0.9, weight_decay=5e-4)
        self._same = torch.randn(batch_size, 3, 32, 32, device=device), torch.randint(10, (batch_size,), device=device)
        self._loader = None
        if images is not None:
            self._loader = DataLoader(
                Pictures(images), batch_size, shuffle=True, drop_last=True, num_workers=len(os.sched_getaffinity(0)),
                persistent_workers=True, pin_memory=device.type == "cuda",
            )  # fmt: skip
            self._batches = iter(self._loader)

    def _batch(self) -> tuple[Tensor, Tensor]:
        if self._loader is None:
            return self._same
        try:
            inputs, labels = next(self._batches)
        except StopIteration:
            self._batches = iter(self._loader)
            inputs, labels = next(self._batches)
        return inputs.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def run(self, steps: int) -> None:
        """Train for so many steps."""
        self.model.train()
        total_loss, correct = 0.0, 0
        for _ in range(steps):
            inputs, labels = self._batch()
            self.optimizer.zero_grad()
            self.optimizer.first_step()
            logits = self.model(inputs)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            self.optimizer.second_step()
            total_loss += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()


def serve(pipe: Connection, device_text: str, batch_size: int, count: int, depth: int) -> None:
    """Run steps when asked, with data or without, in a process of its own that nothing of this project has tuned.

    Args:
        count: random images to train on, made here: sent, they would have to fit the machine's shared memory.
        depth: layers of the ResNet.
    """
    images = random_images(count)
    device = torch.device(device_text)
    torch.manual_seed(0)
    loops = {
        with_data: UsualLoop(build_model("resnet", depth, 10), device, batch_size, images if with_data else None)
        for with_data in (True, False)
    }
    with contextlib.suppress(EOFError):  # nobody asks any more
        while asked := pipe.recv():
            with_data, steps = asked
            loops[with_data].run(steps)
            pipe.send(steps)
