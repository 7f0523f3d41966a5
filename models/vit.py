"""A vision transformer (Dosovitskiy et al. 2021) for small images: patches of 4x4 pixels, no class token, no dropout.

As in Beyer et al. (2022, "Better plain ViT baselines") positions are fixed sines and cosines, computed for the grid at
hand so that images of any size fit, and the classifier sees the mean over the patches. The default of 192 channels and
3 heads is that of DeiT-Ti (Touvron et al. 2021).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 4
HEAD = 64  # channels of an attention head


class Attention(nn.Module):
    """Self-attention [N, T, C] -> [N, T, C], in heads of 64 channels; four linear layers, which can be pruned.

    Its fused kernels have no second derivative: for one, run under torch.nn.attention.sdpa_kernel(SDPBackend.MATH).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        heads = [layer(x).unflatten(2, (-1, HEAD)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        return self.output(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a hidden layer four times as wide, each on its own normed input and added to it."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = Attention(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """`depth` blocks on patches of `channels` channels, then the mean over the patches."""

    def __init__(self, depth: int, channels: int, num_classes: int, in_channels: int = 3):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels, PATCH, stride=PATCH)
        self.blocks = nn.Sequential(*[Block(channels) for _ in range(depth)])
        self.norm = nn.LayerNorm(channels)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # The patches keep the images' variance, and so do not vanish beside the positions, whose variance is 1/2.
        nn.init.trunc_normal_(self.stem.weight, std=1 / math.sqrt(in_channels * PATCH**2))
        nn.init.constant_(self.stem.get_parameter("bias"), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        # Where the patches do not divide the image, zeros complete the last ones: no pixel is lost.
        x = self.stem(F.pad(x, (0, -width % PATCH, 0, -height % PATCH)))
        # In the weights' dtype, and so in float32 under autocast: what the blocks add is summed in it.
        where = positions(x.shape[2], x.shape[3], x.shape[1], x.device).to(self.stem.weight.dtype)
        x = x.flatten(2).transpose(1, 2) + where
        return self.classifier(self.norm(self.blocks(x)).mean(1))


def positions(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Return sines and cosines of row and column, a quarter of the channels each (Vaswani et al. 2017, in two dimensions).

    Returns:
        A tensor [height * width, channels], row by row.
    """
    quarter = channels // 4
    frequency = 10_000 ** -torch.linspace(0, 1, quarter, device=device)
    row = torch.arange(height, device=device)[:, None, None] * frequency
    column = torch.arange(width, device=device)[None, :, None] * frequency
    waves = [row.sin(), row.cos(), column.sin(), column.cos()]
    return torch.cat([wave.expand(height, width, quarter) for wave in waves], dim=2).flatten(0, 1)


def build(depth: int, num_classes: int, width: float, in_channels: int) -> nn.Module:
    if depth < 1:
        raise ValueError(f"a ViT has a depth of at least 1 block, not {depth}")
    heads = round(3 * width)
    if heads < 1 or abs(3 * width - heads) > 0.05:  # so that 0.33 and 0.67 will do
        raise ValueError(f"the width of a ViT is a multiple of 1/3, which is one head: 0.33, 0.67 or 1, not {width:g}")
    return VisionTransformer(depth, HEAD * heads, num_classes, in_channels)
