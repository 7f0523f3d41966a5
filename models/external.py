"""Networks from elsewhere: `torchvision:NAME`, `timm:NAME`, or `FILE.py:FUNCTION` for a network of your own."""

import copy
import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

ImageSize = tuple[int, int]  # height and width in pixels
# What the published GoogLeNet and Inception make of inputs that are normalised by ImageNet's mean and deviation.
PUBLISHED_INPUTS = {
    "input_scale": torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) / 0.5,
    "input_shift": (torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) - 0.5) / 0.5,
}


class NetworkError(ValueError):
    """A network that cannot be had, in a sentence of ours."""


def is_external(arch: str) -> bool:
    """Return whether a network is not one of ARCHITECTURES."""
    return ":" in arch


def is_own_code(arch: str) -> bool:
    """Return whether building a network runs a function that its name chooses."""
    return is_external(arch) and arch.partition(":")[0] not in BUILDERS


def build(arch: str, num_classes: int, in_channels: int, image_size: ImageSize) -> nn.Module:
    """Build a network that is not one of ours, with random weights, and try it on images without data.

    Args:
        arch: `torchvision:NAME`, `timm:NAME`, or `FILE.py:FUNCTION` or `MODULE:FUNCTION` for a function
            (num_classes, in_channels, image_size) -> network.
        num_classes, in_channels: see `models.build_model`.
        image_size: height and width.

    Raises:
        NetworkError: there is no such network, or it does not take such images, or does not give logits.
    """
    place, _, name = arch.rpartition(":")
    make = partial(BUILDERS.get(place) or partial(_own, place), name, num_classes, in_channels, image_size)
    size = f"{image_size[1]}x{image_size[0]} pixels and {in_channels} channel{'s' if in_channels > 1 else ''}"
    try:
        try:
            model = make()
        except NetworkError:
            raise
        except Exception:
            if torch.get_default_device().type != "meta":
                raise
            with torch.device("cpu"):  # it computes with values, which meta tensors lack
                model = make().to("meta")
        _refuse_endless_averages(arch, model)
        logits = _logits_without_data(model, in_channels, image_size)
    except NetworkError:
        raise
    except Exception as error:
        raise NetworkError(
            f"{arch} does not work for images of {size} ({_told(error)}): mend it, or take others"
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, num_classes):
        raise NetworkError(f"{arch} gives {shape} for two images: it has to give a tensor of (2, {num_classes})")
    return model


def load_published_weights(model: nn.Module, arch: str, weights: str) -> None:
    """Load the weights that torchvision publishes, from its cache or, where they are not there, from the network.

    A classifier for other classes stays as it is, and a first convolution for grey images gets the sum over the colours.

    Args:
        model: what `build` made of `arch`.
        arch: `torchvision:NAME`.
        weights: a name of the network's weights, such as DEFAULT or IMAGENET1K_V1.

    Raises:
        NetworkError: there are no such weights, they cannot be had, or they do not fit.
    """
    from torchvision import models as zoo

    name = arch.partition(":")[2]
    published = zoo.get_model_weights(name)
    if weights not in published.__members__:
        raise NetworkError(f"{arch} has no published weights '{weights}': choose {' or '.join(published.__members__)}")
    try:
        state = published[weights].get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise NetworkError(
            f"the weights of {arch} are not in '{torch.hub.get_dir()}/checkpoints' and could not be downloaded ({error}): put "
            f"{published[weights].url} there"
        ) from error
    if hasattr(model, "input_scale"):
        if model.get_buffer("input_scale").shape[0] != 3:
            raise NetworkError(f"the published weights of {arch} scale each colour: take images in colour")
        state |= PUBLISHED_INPUTS
    own = model.state_dict()
    stem, classifier = _first_convolution(model)[0], list(_layers(model))[-1]
    for key in [f"{classifier}.weight", f"{classifier}.bias"]:
        if key in state and state[key].shape != own[key].shape:
            state[key] = own[key]
    if state[f"{stem}.weight"].shape != own[f"{stem}.weight"].shape:
        state[f"{stem}.weight"] = state[f"{stem}.weight"].sum(1, keepdim=True)
    kept = {key: state[key] for key in own if key in state}
    wrong = [key for key in own if key not in kept or kept[key].shape != own[key].shape]
    if wrong:
        raise NetworkError(
            f"the published weights of {arch} do not fit '{wrong[0]}': take images of the size they were trained on"
        )
    with torch.no_grad():
        for key, tensor in kept.items():
            own[key].copy_(tensor)


def _torchvision(name: str, num_classes: int, in_channels: int, image_size: ImageSize) -> nn.Module:
    from torchvision import models as zoo  # here: two seconds

    _refuse_unknown(f"torchvision:{name}", name, zoo.list_models(module=zoo))
    options: dict = {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}  # one output, as every other network has
    if name.startswith("vit_"):
        options["image_size"] = image_size[0]
    if name.startswith("maxvit"):
        options["input_size"] = image_size
    model = zoo.get_model(name, weights=None, **options)
    if name in ("googlenet", "inception_v3"):
        _scale_inputs(model, in_channels)
    if in_channels != 3:
        _replace_first_convolution(model, in_channels)
    return model


def _scale_inputs(model: nn.Module, channels: int) -> None:
    """Let a network scale its inputs by buffers, which are saved with it, and not by a flag that is not."""
    model.register_buffer("input_scale", torch.ones(channels, 1, 1))
    model.register_buffer("input_shift", torch.zeros(channels, 1, 1))
    model._transform_input = partial(_scaled_inputs, model)  # type: ignore[assignment]  # which can be pickled
    model.register_load_state_dict_pre_hook(_inputs_as_they_are)


def _scaled_inputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return inputs * model.get_buffer("input_scale") + model.get_buffer("input_shift")


def _inputs_as_they_are(module: nn.Module, state: dict, prefix: str, *_: object) -> None:
    """Fill in what older states do not have."""
    for name in PUBLISHED_INPUTS:
        state.setdefault(prefix + name, getattr(module, name))


def _timm(name: str, num_classes: int, in_channels: int, image_size: ImageSize) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise NetworkError(f"timm:{name} needs timm, which is not installed: pip install timm") from None
    if not timm.is_model(name):
        _refuse_unknown(f"timm:{name}", name, timm.list_models())
    options: dict = {"num_classes": num_classes, "in_chans": in_channels}
    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError:  # it takes images of any size
        return timm.create_model(name, **options)


def _own(place: str, name: str, num_classes: int, in_channels: int, image_size: ImageSize) -> nn.Module:
    function = getattr(_module(place), name, None)
    if not callable(function):
        raise NetworkError(f"'{place}' has no function '{name}': name one that returns a network as {place}:FUNCTION")
    model = function(num_classes, in_channels, image_size)
    if not isinstance(model, nn.Module):
        raise NetworkError(f"{name} of '{place}' returns {type(model).__name__}: it has to return a torch.nn.Module")
    return model


BUILDERS: dict[str, Callable[[str, int, int, ImageSize], nn.Module]] = {"torchvision": _torchvision, "timm": _timm}


def _module(place: str) -> ModuleType:
    """Return the module of a file, or of a name that Python finds."""
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise NetworkError(
                f"there is no module '{place}' ({error}): name a file, as {place}.py:FUNCTION"
            ) from error
    if not os.path.isfile(place):
        raise NetworkError(f"there is no file '{place}': name one with a function that returns a network")
    spec = importlib.util.spec_from_file_location(os.path.basename(place)[:-3], place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.path.dirname(os.path.abspath(place)))  # for what lies beside the file
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _told(error: Exception) -> str:
    """Return an error in one line, with the place in the user's file."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}, {os.path.basename(where.filename)} line {where.lineno}"


def _logits_without_data(model: nn.Module, in_channels: int, image_size: ImageSize) -> object:
    """Return what a network in training makes of two images, on a copy of it without data."""
    shadow = copy.deepcopy(model).to("meta").train()
    return shadow(torch.zeros(2, in_channels, *image_size, device="meta"))


def _refuse_endless_averages(arch: str, model: nn.Module) -> None:
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.track_running_stats
            and module.momentum is None
        ):
            raise NetworkError(
                f"batch norm '{name}' of {arch} averages over all of training (momentum=None), by a number that each step "
                "would wait for: give it a momentum, such as 0.1"
            )


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def _first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    """Let the first convolution take another number of channels, by weights that a grey image cannot tell from before."""
    name, old = _first_convolution(model)
    new = nn.Conv2d(
        in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.no_grad():
        new.weight.copy_(old.weight.sum(1, keepdim=True) / in_channels)
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _refuse_unknown(arch: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, cutoff=0)
        raise NetworkError(f"there is no {arch}: did you mean {', '.join(near)}?")
