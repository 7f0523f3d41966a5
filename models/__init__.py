"""Networks by name: `build_model(arch, depth, num_classes)`. A new family is one file and one line of ARCHITECTURES.

Networks of torchvision, of timm and of your own are in external.py.

In every family the first convolution (in a transformer the patch embedding) lies in a child called `stem`, projections
on a residual path in children called `shortcut`, and the last linear layer is called `classifier`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from models import external, mobilenet, resnet, vgg, vit, wideresnet


@dataclass(frozen=True)
class Family:
    """A function (depth, num_classes, width, in_channels) -> network, and the depth it gets where none is named."""

    build: Callable[..., nn.Module]
    default_depth: int


ARCHITECTURES = {
    "mobilenet": Family(mobilenet.build, default_depth=28),
    "resnet": Family(resnet.build, default_depth=20),
    "vgg": Family(vgg.build, default_depth=19),
    "vit": Family(vit.build, default_depth=6),
    "wideresnet": Family(wideresnet.build, default_depth=28),
}


def build_model(
    arch: str,
    depth: int | None,
    num_classes: int,
    width: float = 1,
    in_channels: int = 3,
    image_size: tuple[int, int] = (32, 32),
    stem: str = "cifar",
) -> nn.Module:
    """Build an untrained network with random weights from torch's global generator.

    Args:
        arch: a key of ARCHITECTURES, or what `external.build` knows.
        depth: number of layers as the family counts them, e.g. 20 for ResNet-20; None is the family's default.
        num_classes: size of the output.
        width: factor on every channel count (but not on the input's, nor on the stem's of a wide ResNet).
        in_channels: channels of the input images.
        image_size: their height and width, for networks that are made for one size.
        stem: of a ResNet: one of resnet.STEMS, or `auto` for the one that suits the image size.

    Returns:
        A module from images [N, in_channels, H, W], of any H and W from 8 on, to logits [N, num_classes].

    Raises:
        ValueError: unknown arch, or a depth or width the family does not have.
    """
    if external.is_external(arch):
        return _without_counters(external.build(arch, num_classes, in_channels, image_size))
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture '{arch}': choose one of {', '.join(sorted(ARCHITECTURES))}")
    if not 0 < width < math.inf:
        raise ValueError(f"a width is a finite number above 0, not {width:g}")
    family = ARCHITECTURES[arch]
    options = {"stem": resnet.pick_stem(stem, image_size)} if arch == "resnet" else {}
    depth = family.default_depth if depth is None else depth
    return _without_counters(family.build(depth, num_classes, width, in_channels, **options))


def _without_counters(model: nn.Module) -> nn.Module:
    """Return the model without batch norm's counters: of no use at a fixed momentum, and a kernel a layer in each step.

    States that have them, of earlier versions or of other programs, load all the same.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.num_batches_tracked = None
            module.register_load_state_dict_pre_hook(_drop_counter)
    return model


def _drop_counter(module: nn.Module, state: dict, prefix: str, *_: object) -> None:
    state.pop(f"{prefix}num_batches_tracked", None)
