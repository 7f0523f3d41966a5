"""Which combinations of flags are refused: contradictions, flags without effect, and changes to a run that goes on."""

import argparse
from pathlib import Path

from experiment.flags import (
    MAY_CHANGE_ON_RESUME,
    PATHS,
    RESOLVED,
    SAM_FLAGS,
    absolute,
    flag,
    method_options,
    parse,
    plain,
    resolve,
)
from imagedata.sources import DATASETS
from models.external import is_external, is_own_code
from prune import METHODS
from training.optim import OPTIMIZERS
from utils.errors import UsageError

Reasons = dict[str, tuple[str, str]]  # why a flag has no effect, and what would give it one, by name


def check(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags that contradict each other or would be ignored.

    Raises:
        UsageError: one sentence that names them.
    """
    useless = without_effect(args)
    for name in sorted(given & useless.keys()):
        reason, way = useless[name]
        raise UsageError(f"{flag(name)} has no effect {reason}: {way}, or leave it out")
    _check_sparsity(args)
    _check_granet(args, given)
    _check_rivals(args)
    _check_training(args)


def resumed_flags(args: argparse.Namespace, given: set[str], saved: dict) -> argparse.Namespace:
    """Return the flags of a checkpoint, replaced by those given now where they may differ.

    Raises:
        UsageError: a flag that changes the mathematics differs.
    """
    refuse_to_run_code(given, saved)
    now, saved = plain(args), complete_flags(saved)
    saved |= {name: absolute(saved[name]) for name in PATHS}
    given = given - {name for name in RESOLVED if now[name] == "auto"}
    may_change = MAY_CHANGE_ON_RESUME - ({"eval_every"} if saved["val_split"] else set())  # which chooses best.pt
    differing = sorted(name for name in given - may_change if now[name] != saved.get(name))
    if differing == ["epochs"] and now["epochs"] > saved["epochs"] and may_grow(saved):
        differing = []
    if differing:
        changes = ", ".join(f"{flag(name)} was {saved.get(name)} and is {now[name]}" for name in differing)
        hint = ""
        if "epochs" in differing:
            hint = (
                " (--epochs may grow with --lr-scheduler constant, masks that stay, and no --sam-from or --sam-until)"
            )
        if set(PATHS).intersection(differing) or ("arch" in differing and is_own_code(str(saved["arch"]))):
            hint += " (its files have to be where they were: put them back)"
        raise UsageError(f"a resumed run cannot change its mathematics: {changes}{hint}")
    return _merge(args, given, saved)


def evaluated_flags(args: argparse.Namespace, given: set[str], saved: dict) -> argparse.Namespace:
    """Return the flags of a checkpoint that is to be evaluated, replaced by those given now.

    Raises:
        UsageError: another network than the checkpoint's, or a flag that is for training.
    """
    refuse_to_run_code(given, saved)
    saved = complete_flags(saved)
    network = ("arch", "depth", "width", "stem")
    allowed = {
        "dataset", "data_dir", "image_size", "test_batch_size", "device", "no_cuda", "deterministic", "evaluate",
        "precision", "recalibrate_bn", "workers",
    }  # fmt: skip
    for name in sorted(given - allowed - set(network)):
        raise UsageError(f"{flag(name)} has no effect with --evaluate: leave it out")
    for name in network:
        if name in given and getattr(args, name) != saved[name] and not is_own_code(args.arch):
            raise UsageError(
                f"the checkpoint is of another network: its {flag(name)} is {saved[name]}, not {getattr(args, name)}; "
                "leave the network's flags out"
            )
    if "dataset" in given:
        saved = saved | {"data_dir": None, "image_size": None}
    merged = _merge(args, given | {"recalibrate_bn", "sharpness", "robustness"}, saved)
    check(merged, given & allowed)
    return merged


def refuse_to_run_code(given: set[str], saved: dict) -> None:
    """Raise UsageError where a file alone, a checkpoint or --config, would choose which function runs."""
    arch = str(saved.get("arch"))
    if is_own_code(arch) and "arch" not in given:
        raise UsageError(f"it is of a network of your own: name its function again, as --arch {arch}, if you trust it")


def complete_flags(saved: dict) -> dict:
    """Return the flags of a run with those that came after it: they had their defaults, and a ResNet had one stem."""
    return vars(parse([])[0]) | ({"stem": "cifar"} if saved.get("arch") == "resnet" else {}) | saved


def may_grow(flags: dict) -> bool:
    """Return whether nothing in a run depends on its number of epochs."""
    method = METHODS[flags["prune_method"]]
    whole = flags["sam_from"] == 0 and flags["sam_until"] == 1
    return flags["lr_scheduler"] == "constant" and whole and not method.update and not method.tickets


def without_effect(args: argparse.Namespace) -> Reasons:
    """Return the flags that the others leave without effect, each with the reason and what would give it one."""
    last = _step_without_effect(args) | _data_and_network_without_effect(args)
    return _unmasked_without_effect(args) | _masks_without_effect(args) | last


def _unmasked_without_effect(args: argparse.Namespace) -> Reasons:
    """Where pruned weights would not be perturbed even so; the other reasons go before these."""
    if args.sam_v2 and args.sam_direction == "momentum":
        return {"sam_unmasked": ("with --sam-direction momentum: pruned weights have none", "take another direction")}
    if args.adaptive:
        return {"sam_unmasked": ("with --adaptive, which leaves weights of 0 where they are", "leave --adaptive out")}
    if args.prune_method == "final":
        return {
            "sam_unmasked": ("with --prune-method final, which prunes nothing before the end", "take another method")
        }
    if args.sparsity_pattern == "channel":
        still = "with --sparsity-pattern channel, whose dead weights have no gradient"
        return {"sam_unmasked": (still, "take another pattern")}
    return {}


def _masks_without_effect(args: argparse.Namespace) -> Reasons:
    method, with_method = METHODS[args.prune_method], f"with --prune-method {args.prune_method}"
    reasons: Reasons = {}
    for option in method_options():
        if option not in method.options:
            having = [name for name, other in METHODS.items() if option in other.options]
            way = "add" if args.prune_method == "none" else "take"
            way += f" --prune-method {', '.join(having[:-1])}{' or ' if having[1:] else ''}{having[-1]}"
            reasons[option.name] = with_method, way
    if args.prune_method != "none":
        reasons["keep_masks"] = f"{with_method}, which makes masks of its own", "take --prune-method none"
        if not args.keep_masks and args.sparsity_pattern != "channel":
            reasons["compact"] = f"with --sparsity-pattern {args.sparsity_pattern}", "take --sparsity-pattern channel"
        return reasons
    for name in ("sparsity", "sparsity_distribution", "sparsity_config", "sparsity_pattern", "dense_layers"):
        fixed = name in ("sparsity", "sparsity_config") or args.sparsity or args.sparsity_config
        taken = "final" if OPTIMIZERS[args.optmzr].rival else "random"
        reasons[name] = with_method, f"add --prune-method {taken}" + ("" if fixed else " --sparsity 0.9")
    if not args.pretrained:
        reasons["keep_masks"] = "without --pretrained", "add --pretrained CKPT"
    if not args.keep_masks:
        reasons["sam_unmasked"] = with_method, "add --prune-method random --sparsity 0.9"
        reasons["compact"] = with_method, "add --prune-method random --sparsity 0.7 --sparsity-pattern channel"
    return reasons


def _step_without_effect(args: argparse.Namespace) -> Reasons:
    optimizer, with_optimizer = OPTIMIZERS[args.optmzr], f"with --optmzr {args.optmzr}"
    reasons: Reasons = {}
    if optimizer.momentum is None:
        sgd = "sgd-sam" if optimizer.sam else "sgd"
        reasons |= dict.fromkeys(("momentum", "nesterov"), (with_optimizer, f"take --optmzr {sgd}"))
    if args.optmzr != "sgd-cram":
        reasons["cram_sparsities"] = with_optimizer, "take --optmzr sgd-cram"
    elif ":" in args.sparsity_pattern:
        fixed = f"with --sparsity-pattern {args.sparsity_pattern}, which fixes the sparsity"
        reasons["cram_sparsities"] = fixed, "take another pattern"
    if args.optmzr != "sgd-safe":
        reasons |= dict.fromkeys(("safe_lambda", "safe_interval"), (with_optimizer, "take --optmzr sgd-safe"))
    if optimizer.rival:
        own = f"{with_optimizer}, whose step is its own"
        reasons |= dict.fromkeys((*SAM_FLAGS, "no_norm_decay"), (own, "take --optmzr sgd-sam"))
    elif not optimizer.sam:
        reasons |= dict.fromkeys((*SAM_FLAGS, "sam_rho"), (with_optimizer, f"add --optmzr {args.optmzr}-sam"))
    elif args.sam_v2:
        reasons["sam_local"] = "with --sam-v2", "leave --sam-v2 out"
        reasons["sam_every"] = "with --sam-v2, which has no second pass to save", "leave --sam-v2 out"
    else:
        reasons["sam_direction"] = "on two-step SAM, which perturbs along the gradient of its own batch", "add --sam-v2"
    if args.rho_schedule == "lr" and args.lr_scheduler == "constant" and not args.warmup_epochs:
        reasons["rho_schedule"] = "with a constant learning rate", "take --lr-scheduler cosine or --rho-schedule sqrt"
    return reasons


def _data_and_network_without_effect(args: argparse.Namespace) -> Reasons:
    with_network, with_data = f"with --arch {args.arch}", f"with --dataset {args.dataset}"
    reasons: Reasons = {}
    if is_external(args.arch):
        reasons |= dict.fromkeys(("depth", "width"), (with_network, "take a family of ours"))
    if args.arch != "resnet":
        reasons["stem"] = with_network, "take --arch resnet"
    if not args.arch.startswith("torchvision:"):
        reasons["pretrained_weights"] = with_network, "take --arch torchvision:NAME"
    if not DATASETS[args.dataset].own_files:
        reasons["image_size"] = with_data, "take --dataset folder"
    if not DATASETS[args.dataset].takes_directory:
        reasons["data_dir"] = with_data, "take --dataset folder"
    if not args.mixup:
        reasons["alpha"] = "without --mixup", "add --mixup"
    return reasons


def _check_sparsity(args: argparse.Namespace) -> None:
    method, fixed = args.prune_method, args.sparsity_config or ":" in args.sparsity_pattern
    if method != "none" and args.sparsity is None and not fixed:
        raise UsageError(f"--prune-method {method} needs --sparsity, e.g. --sparsity 0.9")
    if args.sparsity_config and args.sparsity_distribution:
        raise UsageError("--sparsity-config says what each layer keeps: leave --sparsity-distribution out")
    if args.compact and (METHODS[method].update or METHODS[method].tickets):
        raise UsageError(
            f"--compact trains a network whose channels are gone for good, and --prune-method {method} changes masks during "
            "training: leave it out"
        )
    if args.compact and args.sam_unmasked:
        raise UsageError("--sam-unmasked perturbs pruned weights, which --compact takes out: leave one of them out")
    if METHODS[method].pretrained and not (args.pretrained or args.pretrained_weights):
        raise UsageError(f"--prune-method {method} prunes trained weights: give them by --pretrained CKPT")


def _check_granet(args: argparse.Namespace, given: set[str]) -> None:
    if "granet_until" in given and args.granet_until > (stop := resolve(args).stop_update):
        raise UsageError(
            f"--granet-until {args.granet_until:g} comes after masks have stopped changing, at --stop-update {stop:g}: lower it, "
            "or raise that"
        )
    if "granet_start" in given and args.sparsity is not None and args.granet_start > args.sparsity:
        raise UsageError(
            f"--granet-start {args.granet_start:g} is sparser than --sparsity {args.sparsity:g}, at which it ends: lower it"
        )


def _check_rivals(args: argparse.Namespace) -> None:
    if not OPTIMIZERS[args.optmzr].rival:
        return
    if args.prune_method != "final" and (args.optmzr, args.prune_method) != ("sgd-cram", "none"):
        raise UsageError(
            f"--optmzr {args.optmzr} trains a dense network that is pruned after the last step, and not one of --prune-method "
            f"{args.prune_method}: take --prune-method final --sparsity 0.9"
        )
    if args.optmzr == "sgd-cram" and args.sam_rho == 0:
        raise UsageError("--sam-rho 0 leaves nothing of --optmzr sgd-cram: give a rho above 0, or take --optmzr sgd")
    if args.optmzr == "sgd-cram" and args.precision == "fp16":
        raise UsageError(
            "--optmzr sgd-cram perturbs by the gradient itself, which --precision fp16 scales: take bf16 or fp32"
        )
    if args.optmzr == "sgd-cram" and args.sparsity_config:
        raise UsageError("--optmzr sgd-cram draws one sparsity for all layers: leave --sparsity-config out")


def _check_training(args: argparse.Namespace) -> None:
    if args.pretrained and args.pretrained_weights:
        raise UsageError("--pretrained and --pretrained-weights both say what to start from: leave one of them out")
    if args.nesterov and args.momentum == 0:
        raise UsageError("--nesterov needs a --momentum above 0, as --momentum 0.9")
    if args.sam_direction == "momentum" and args.momentum == 0:
        raise UsageError("--sam-direction momentum needs a --momentum above 0, as --momentum 0.9")
    if args.sam_from >= args.sam_until:
        raise UsageError(f"--sam-from {args.sam_from:g} has to be less than --sam-until {args.sam_until:g}")
    if args.warmup_epochs >= args.epochs:
        raise UsageError(f"--warmup-epochs {args.warmup_epochs:g} has to be less than --epochs {args.epochs}")
    if args.accumulate > args.batch_size:
        raise UsageError(
            f"--accumulate {args.accumulate} cuts a batch of {args.batch_size} into parts of less than an image: give at "
            f"most --accumulate {args.batch_size}, or a larger --batch-size"
        )
    if args.sam_unmasked and args.clip_grad:
        raise UsageError(
            "--clip-grad would clip by the gradients of pruned weights, which --sam-unmasked keeps: leave one of them out"
        )
    if args.sync_bn and args.sam_local:
        raise UsageError(
            "--sync-bn and --sam-local contradict each other: a process's own gradient needs its own statistics; leave "
            "one of them out"
        )
    if args.sync_bn and args.compile == "on":
        raise UsageError("--sync-bn cannot be compiled: give --compile auto or off")
    if args.no_cuda and args.device not in ("auto", "cpu"):
        raise UsageError(f"--no-cuda and --device {args.device} contradict each other: leave one of them out")


def _merge(args: argparse.Namespace, given: set[str], saved: dict) -> argparse.Namespace:
    merged = vars(args) | {name: value for name, value in saved.items() if name not in given}
    for name in PATHS:
        if merged[name]:
            merged[name] = Path(merged[name])
    for name in ("resume", "evaluate", "output_dir", "device", "no_cuda"):  # of this command, not of the first
        merged[name] = getattr(args, name)
    return argparse.Namespace(**merged)
