"""MobileNetV1 (Howard et al. 2017, table 1) for small images: the stem has stride 1. `width` is the paper's alpha."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from models.common import conv_bn_relu, init_weights, scale

CHANNELS = [64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]  # table 1 gives the last one as 2, which its own sizes contradict


class MobileNet(nn.Module):
    """13 blocks of a 3x3 convolution for each channel and a 1x1 convolution across channels, each normed and rectified.

    With the stem and the classifier that is a depth of 28. `depthwise` names the 3x3 convolutions together.
    """

    def __init__(self, num_classes: int, width: float = 1, in_channels: int = 3):
        super().__init__()
        previous, *channels = scale([32, *CHANNELS], width)
        self.stem = conv_bn_relu(in_channels, previous)
        blocks = []
        for current, stride in zip(channels, STRIDES, strict=True):
            depthwise = conv_bn_relu(previous, previous, stride=stride, groups=previous)
            pointwise = conv_bn_relu(previous, current, kernel_size=1)
            blocks.append(nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise)))
            previous = current
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(previous, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def build(depth: int, num_classes: int, width: float, in_channels: int) -> nn.Module:
    if depth != 28:
        raise ValueError(f"a MobileNet has depth 28, not {depth}")
    return MobileNet(num_classes, width, in_channels)
