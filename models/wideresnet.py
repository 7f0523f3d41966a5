"""Wide residual networks (Zagoruyko & Komodakis 2016), pre-activation, without dropout; `width` is the paper's k.

WRN-28-10 is depth 28 and width 10. Depth 6n+4 counts all convolutions, the three projections with them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Projection, init_weights, scale, stage


class PreActivationBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice (He et al. 2016b), on a shortcut that is projected where channels change.

    The projection takes the activated input, as in the authors' code; the identity takes the input as it is.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = Projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = F.relu(self.bn2(self.conv1(activated)))
        return self.conv2(out) + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels times `width`, `blocks` blocks each: depth 6 * blocks + 4."""

    def __init__(self, blocks: int, num_classes: int, width: float = 1, in_channels: int = 3):
        super().__init__()
        channels = scale([16, 32, 64], width)
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)  # k widens the three stages only
        self.stage1 = stage(PreActivationBlock, blocks, 16, channels[0], stride=1)
        self.stage2 = stage(PreActivationBlock, blocks, channels[0], channels[1], stride=2)
        self.stage3 = stage(PreActivationBlock, blocks, channels[1], channels[2], stride=2)
        self.norm = nn.BatchNorm2d(channels[2])
        self.classifier = nn.Linear(channels[2], num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.classifier(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


def build(depth: int, num_classes: int, width: float, in_channels: int) -> nn.Module:
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"a wide ResNet has depth 6n+4 (16, 22, 28, 40), not {depth}")
    return WideResNet((depth - 4) // 6, num_classes, width, in_channels)
