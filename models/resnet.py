"""Residual networks for small images (He et al. 2016, section 4.2), with projection shortcuts."""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 projection where the shape changes (He et al. 2016, option B)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels times `width`, `blocks` basic blocks each: depth 6 * blocks + 2."""

    def __init__(self, blocks: int, num_classes: int, width: float = 1, in_channels: int = 3):
        super().__init__()
        channels = [round(16 * width), round(32 * width), round(64 * width)]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
        )
        self.stage1 = _stage(blocks, channels[0], channels[0], stride=1)
        self.stage2 = _stage(blocks, channels[0], channels[1], stride=2)
        self.stage3 = _stage(blocks, channels[1], channels[2], stride=2)
        self.classifier = nn.Linear(channels[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride), *rest)


def build(depth: int, num_classes: int, width: float, in_channels: int) -> nn.Module:
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"a CIFAR ResNet has depth 6n+2 (20, 32, 44, 56, 110), not {depth}")
    if round(16 * width) < 1:
        raise ValueError(f"width {width:g} leaves the stem without a channel: use at least 1/16")
    return CifarResNet((depth - 2) // 6, num_classes, width, in_channels)
