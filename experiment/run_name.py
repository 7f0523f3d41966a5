"""The name of a run: its hyper-parameters."""

import argparse
import hashlib
import re

from experiment.checks import may_grow
from experiment.flags import MAY_CHANGE_ON_RESUME, parse, plain, resolve
from imagedata.sources import DATASETS
from models.external import is_external
from training.optim import OPTIMIZERS

# Flags that have their place in every name.
NAMED = {
    "arch", "depth", "dataset", "optmzr", "sam_v2", "adaptive", "sam_rho", "prune_method", "sparsity",
    "sparsity_distribution", "sparsity_config", "sparsity_pattern", "lr", "epochs", "seed", "mixup", "sam_direction",
    "rho_schedule",
}  # fmt: skip


def run_name(args: argparse.Namespace) -> str:
    """Return a name from the hyper-parameters: the most telling ones always, any other one where it is not the default.

    Args:
        args: complete flags, see `flags.resolve`.
    """
    named = DATASETS[args.dataset].own_files and args.data_dir
    dataset = f"{args.dataset}-{args.data_dir.resolve().name}" if named else args.dataset
    network = "-".join(re.split(r"[/:]", args.arch)[-2:]) if is_external(args.arch) else f"{args.arch}{args.depth}"
    parts = [network, dataset, _optimizer_part(args), _sparsity_part(args), f"lr{args.lr:g}"]
    if not may_grow(vars(args)):
        parts.append(f"epochs{args.epochs}")
    parts += _other_parts(args)
    if args.mixup:
        parts.append("mixup")
    parts.append(f"seed{args.seed}")
    if args.remark:
        parts.append(args.remark)
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts)).strip(".-")
    if len(name) > 200:  # file systems take 255
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def _optimizer_part(args: argparse.Namespace) -> str:
    if not OPTIMIZERS[args.optmzr].sam:
        return args.optmzr
    parts = [args.optmzr, args.sam_v2 and "v2", args.adaptive and "adaptive"]
    parts += [args.sam_direction != "previous" and args.sam_direction, f"rho{args.sam_rho:g}"]
    parts.append(args.rho_schedule != "constant" and args.rho_schedule)
    return "-".join(filter(None, parts))


def _sparsity_part(args: argparse.Namespace) -> str:
    if args.prune_method == "none":
        return "dense"
    parts = [args.prune_method, args.sparsity_distribution, args.sparsity and f"{args.sparsity:g}"]
    if args.sparsity_config:
        parts.append(args.sparsity_config.stem)
    if args.sparsity_pattern != "unstructured":
        parts.append(args.sparsity_pattern.replace(":", "of"))
    return "-".join(filter(None, parts))


def _other_parts(args: argparse.Namespace) -> list[str]:
    """Return a part for each other flag that differs from its default."""
    same = {name: getattr(args, name) for name in ("arch", "optmzr", "mixup", "prune_method")}
    defaults = vars(resolve(argparse.Namespace(**vars(parse([])[0]) | same)))
    parts = []
    for name, value in plain(args).items():
        if name in NAMED | MAY_CHANGE_ON_RESUME or value == defaults[name]:
            continue
        text = (
            "-" + "-".join(map(str, value))
            if isinstance(value, list)
            else f"{value:g}"
            if type(value) is float
            else str(value)
        )
        parts.append(name.replace("_", "-") + ("" if value is True else text))
    return parts
