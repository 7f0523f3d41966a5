"""What the convolutional families share: channel counts that follow the width, repeated blocks and initial weights."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN_BLOCK = 16  # channels that oneDNN's kernels take at once with AVX-512, 8 with AVX2


def scale(channels: Sequence[int], width: float) -> list[int]:
    """Multiply channel counts by the width and round them.

    Raises:
        ValueError: a width that leaves the smallest of them without a channel.
    """
    scaled = [round(count * width) for count in channels]
    if min(scaled) < 1:
        raise ValueError(f"width {width:g} leaves a layer without a channel: use at least 1/{min(channels)}")
    return scaled


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the size up to its stride, without a bias as batch norm has one, then norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class Projection(nn.Conv2d):
    """The 1x1 convolution of a shortcut, without a bias as batch norm has one."""

    computes_as_torch = True  # for prune/channels.py

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.device.type == "cpu" and self.in_channels < ONEDNN_BLOCK:
            # With a stride and channels last oneDNN writes past its memory in the weight's gradient, which crashes, hangs
            # or is wrong without a word (seen with torch 2.14.1, AVX2; github.com/uxlfoundation/oneDNN/issues/6035).
            height, width = self.stride
            return F.conv2d(inputs[:, :, ::height, ::width], self.weight)
        return super().forward(inputs)


def stage(
    block: Callable[[int, int, int], nn.Module], count: int, in_channels: int, out_channels: int, stride: int
) -> nn.Sequential:
    """`count` blocks(in_channels, out_channels, stride), of which only the first changes the shape."""
    rest = [block(out_channels, out_channels, 1) for _ in range(count - 1)]
    return nn.Sequential(block(in_channels, out_channels, stride), *rest)


def init_weights(model: nn.Module) -> None:
    """Draw weights from He et al.'s normal distributions, of variance 2 / fan_out or 2 / fan_in (2015, equations 14, 10).

    Convolutions go by fan_out; linear layers by fan_in, since a classifier has few outputs. Biases are 0. All layers come
    from one kind of distribution, so that a ranking of all weights by magnitude empties none for its initialisation.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # A depthwise filter has as many inputs as outputs; torch would count the outputs of all groups together.
            mode: Literal["fan_in", "fan_out"] = "fan_out" if module.groups == 1 else "fan_in"
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
