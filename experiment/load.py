"""Trained networks out of files: `load(path)` needs no flags and no data set."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import models
from experiment.checks import complete_flags, refuse_to_run_code
from imagedata.augment import NormalizeImages
from imagedata.sources import DATASETS
from models.external import NetworkError, is_own_code
from prune.masks import Masks
from training.checkpoint import NEWEST, load_checkpoint, load_network
from utils.device import pick_device
from utils.errors import UsageError


@dataclass(frozen=True)
class Trained:
    """A trained network and what has to be known to use it.

    Attributes:
        model: in evaluation mode, with its masks applied; from normalised images [B, C, H, W] to logits.
        masks: over its prunable weights, and what goes with channels; a layer without one is dense.
        classes: their names, by logit.
        normalize: makes of images what the network wants, with the figures of its training images.
        args: the flags of its run.
        metrics: the row of metrics.csv of its epoch; in the middle of an epoch, where nothing was measured, `epoch` alone.
        data: what its run knew of its images: their `fingerprint`, `image_shape` (in older checkpoints missing), `mean` and
            `deviation` by channel, and others.
    """

    model: nn.Module
    masks: Masks
    classes: list[str]
    normalize: NormalizeImages
    args: dict
    metrics: dict
    data: dict


def load(path: Path | str, device: torch.device | str = "cpu", arch: str | None = None) -> Trained:
    """Load a trained network.

    Args:
        path: a checkpoint, a file that `python -m analysis.export` wrote as safetensors, or the directory of a run. There
            it is checkpoint.pt, whose accuracy is the headline of result.json, not best.pt.
        device: where the network is to be.
        arch: for a network of your own its function again, as FILE.py:FUNCTION: a file alone never runs code.

    Raises:
        UsageError: no such file, a damaged one, or another program's.
    """
    device = pick_device(str(device))
    checkpoint = load_checkpoint(network_file(Path(path)))
    refuse_to_run_code({"arch"} if arch else set(), checkpoint["args"])
    if arch and not is_own_code(str(checkpoint["args"].get("arch"))):
        raise UsageError(
            f"the checkpoint is of --arch {checkpoint['args'].get('arch')}, which it can build itself: leave --arch out"
        )
    return rebuild(checkpoint, device, arch)


def rebuild(
    checkpoint: dict, device: torch.device, arch: str | None = None, image_size: tuple[int, int] | None = None
) -> Trained:
    """Return the network of a checkpoint.

    Args:
        checkpoint: what load_checkpoint returned.
        device: where the network is to be.
        arch: its --arch, where it may have moved.
        image_size: height and width of images, where they are not those of its run.

    Raises:
        UsageError: the network cannot be built, or the checkpoint contradicts itself.
    """
    data, state = checkpoint["data"], checkpoint["state"]
    try:
        args = complete_flags(checkpoint["args"])
        side = args["image_size"] or DATASETS[args["dataset"]].side or 32  # where it is an older one and does not tell
        image_size = image_size or tuple(data.get("image_shape", (0, side, side))[1:])
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            model = models.build_model(
                arch or checkpoint["args"]["arch"], args["depth"], len(data["classes"]), args["width"], len(data["mean"]), image_size,
                args["stem"],
            )  # fmt: skip
        normalize = NormalizeImages(data["mean"], data["deviation"])
        metrics = dict(state["rows"][-1]) if state["rows"] else {"epoch": 0}
        if state["partial"]:
            metrics = {"epoch": metrics["epoch"]}
    except NetworkError as error:
        raise UsageError(str(error)) from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            "the checkpoint does not say which network it is of, and so is damaged or of another version of this program: name "
            "another one"
        ) from error
    model = model.to(device).to(memory_format=torch.channels_last)
    masks = Masks.of(model)
    load_network(model, masks, checkpoint)
    return Trained(model.eval(), masks, data["classes"], normalize.to(device), checkpoint["args"], metrics, data)


def network_file(path: Path) -> Path:
    """Return the file of a network that is named by it, or by the directory of its run."""
    return path / NEWEST if path.is_dir() else path
