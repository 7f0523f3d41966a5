"""Residual networks (He et al. 2016), with projection shortcuts.

Depth 6n+2 is the CIFAR network of section 4.2: three stages of 16, 32 and 64 channels. Depths 18, 34 and 50 are the
ImageNet networks of table 1, four stages of 64 to 512 channels. 50 is 6n+2 as well, with n = 8; here it means the
bottleneck network of that name. Each has one of two stems: for small images one 3x3 convolution of stride 1, as in section
4.2, or that of table 1, a 7x7 convolution and a max pool of stride 2 each.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Projection, conv_bn_relu, init_weights, scale, stage

STEMS = ("cifar", "imagenet")
IMAGENET_FROM = 64  # pixels of the smaller side, from which `auto` is the stem for ImageNet


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 projection where the shape changes (He et al. 2016, option B)."""

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution on a quarter of the channels between two 1x1 convolutions, and a shortcut as above.

    The stride is the 3x3 convolution's, as implementations have it; in the paper it is the first one's.
    """

    expansion = 4

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        inner = out_channels // self.expansion
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(Projection(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """Three or four stages, the i-th of `counts[i]` blocks on `channels[i]` channels; all but the first halve H, W."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        counts: list[int],
        channels: list[int],
        num_classes: int,
        in_channels: int = 3,
        stem: str = "cifar",
    ):
        super().__init__()
        widths = [block.expansion * inner for inner in channels]
        if stem == "imagenet":
            self.stem = conv_bn_relu(in_channels, channels[0], kernel_size=7, stride=2)
            self.stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        else:
            self.stem = conv_bn_relu(in_channels, channels[0])
        self.stage1 = stage(block, counts[0], channels[0], widths[0], stride=1)
        self.stage2 = stage(block, counts[1], widths[0], widths[1], stride=2)
        self.stage3 = stage(block, counts[2], widths[1], widths[2], stride=2)
        self.stage4 = nn.Identity() if len(counts) == 3 else stage(block, counts[3], widths[2], widths[3], stride=2)
        self.classifier = nn.Linear(widths[-1], num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


IMAGENET: dict[int, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
}


def pick_stem(stem: str, image_size: tuple[int, int]) -> str:
    """Return what `auto` comes to for images of this height and width; another stem is returned as it is."""
    return stem if stem != "auto" else "imagenet" if min(image_size) >= IMAGENET_FROM else "cifar"


def build(depth: int, num_classes: int, width: float, in_channels: int, stem: str = "cifar") -> nn.Module:
    if depth in IMAGENET:
        block, counts = IMAGENET[depth]
        channels = scale([64, 128, 256, 512], width)
    elif depth >= 8 and depth % 6 == 2:
        block, counts = BasicBlock, [(depth - 2) // 6] * 3
        channels = scale([16, 32, 64], width)
    else:
        raise ValueError(f"a ResNet has depth 6n+2 (20, 32, 44, 56, 110) or 18, 34, 50, not {depth}")
    return ResNet(block, counts, channels, num_classes, in_channels, stem)
