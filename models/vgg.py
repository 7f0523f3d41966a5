"""VGG-16 and VGG-19 (Simonyan & Zisserman 2015, table 1, D and E) as they are used on CIFAR.

That is with batch norm after each convolution, which makes the convolutions' biases superfluous, and with global
average pooling and one linear layer in place of the three that hold most of the ImageNet network's weights.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.common import conv_bn_relu, init_weights, scale

COUNTS = {  # of 3x3 convolutions on 64, 128, 256, 512 and 512 channels; the depth counts ImageNet's 3 linear layers
    16: [2, 2, 3, 3, 3],
    19: [2, 2, 4, 4, 4],
}


class VGG(nn.Module):
    """Five stages, the i-th of `counts[i]` convolutions on `channels[i]` channels; the first convolution is the stem.

    A max pool follows each stage except the last, whose maps are averaged, as in the code of GraSP and S2-SAM.
    """

    def __init__(self, counts: list[int], channels: list[int], num_classes: int, in_channels: int = 3):
        super().__init__()
        self.stem = conv_bn_relu(in_channels, channels[0])
        # Four pools take 32 pixels to two. Rounding up lets smaller images through: one pixel stays one.
        pool = nn.MaxPool2d(2, ceil_mode=True)
        self.stage1 = _stage(counts[0] - 1, channels[0], channels[0]).append(pool)
        self.stage2 = _stage(counts[1], channels[0], channels[1]).append(pool)
        self.stage3 = _stage(counts[2], channels[1], channels[2]).append(pool)
        self.stage4 = _stage(counts[3], channels[2], channels[3]).append(pool)
        self.stage5 = _stage(counts[4], channels[3], channels[4])
        self.classifier = nn.Linear(channels[4], num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage5(self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x))))))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(count: int, in_channels: int, out_channels: int) -> nn.Sequential:
    rest = [conv_bn_relu(out_channels, out_channels) for _ in range(count - 1)]
    return nn.Sequential(conv_bn_relu(in_channels, out_channels), *rest)


def build(depth: int, num_classes: int, width: float, in_channels: int) -> nn.Module:
    if depth not in COUNTS:
        raise ValueError(f"a VGG has depth 16 or 19, not {depth}")
    return VGG(COUNTS[depth], scale([64, 128, 256, 512, 512], width), num_classes, in_channels)
