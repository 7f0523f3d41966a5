"""Networks by name: `build_model(arch, depth, num_classes)`. A new family is one file and one line of ARCHITECTURES."""

from torch import nn

from models import resnet

ARCHITECTURES = {
    "resnet": resnet.build,
}


def build_model(arch: str, depth: int, num_classes: int, width: float = 1, in_channels: int = 3) -> nn.Module:
    """Build an untrained network with random weights from torch's global generator.

    Args:
        arch: a key of ARCHITECTURES.
        depth: number of layers as the family counts them, e.g. 20 for ResNet-20.
        num_classes: size of the output.
        width: factor on every channel count (but not on the input's).
        in_channels: channels of the input images.

    Returns:
        A module from images [N, in_channels, H, W], of any H and W, to logits [N, num_classes].

    Raises:
        ValueError: unknown arch, or a depth or width the family does not have.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture '{arch}': choose one of {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[arch](depth, num_classes, width, in_channels)
