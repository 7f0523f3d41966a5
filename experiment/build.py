"""Flags become objects: the only place where that happens, for the recipe, the benchmarks, the analyses and the tests."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import models
import training.optim
from experiment.checks import complete_flags, evaluated_flags
from experiment.flags import flag, flag_errors, load_layer_sparsity
from experiment.load import network_file
from imagedata.augment import Augmentation, Normalize
from imagedata.corruptions import CORRUPTIONS, refuse_uncorruptible
from imagedata.files import ImageFiles
from imagedata.images import Dataset, balanced_part, channel_statistics, fingerprint, hold_out, with_label_noise
from imagedata.loaders import EvalLoader, TrainLoader, pick_workers
from imagedata.sources import DATASETS, load_dataset
from models.external import is_external, load_published_weights
from models.resnet import pick_stem
from prune import METHODS, BudgetError, Pruner
from prune.flops import Flops
from prune.scores import refuse_normalisation_by_input, synflow
from training import foreign
from training.batch_norm import refuse_other_batch_norm, refuse_single_values, refuse_without_batch_norm, synchronise
from training.checkpoint import load_checkpoint, load_network
from training.nonfinite import NonFiniteGuard
from training.optim import OPTIMIZERS, learning_rate, radius
from training.state import TrainState
from training.step import TrainingStep, build_objective
from utils import distributed
from utils.device import pick_device, use_deterministic_kernels
from utils.distributed import ProcessGroup
from utils.errors import DamagedError, UsageError, memory_errors
from utils.precision import Execution, bf16_on_cpu, refuse_uncompilable, resolve_execution


def check_on_meta(args: Namespace, resumed: bool = False) -> None:
    """Build network and masks without memory or data, so that impossible flags are known before data is touched.

    Args:
        args: the flags.
        resumed: the run goes on from a checkpoint, and so does not begin from --pretrained.

    Raises:
        UsageError: flags that the network, the optimizer or the pruning method cannot have.
    """
    source = DATASETS[args.dataset]
    classes, channels = source.classes or 1000, source.channels or 3  # a folder's are known only with the data
    side = args.image_size or source.side
    if is_external(args.arch) and side is None:  # which may be made for one size
        return
    side = side or 32
    with flag_errors(), torch.device("meta"):
        model = models.build_model(args.arch, args.depth, classes, args.width, channels, (side, side), args.stem)
        refuse_batch_norm_flags(args, model)
        if METHODS[args.prune_method].score is synflow:
            refuse_normalisation_by_input(model)
    if args.pretrained and not resumed:
        checkpoint, weights = pretrained(args)
        if checkpoint is None and source.classes:
            foreign.fitting(model, weights, args.pretrained)
    try:
        # How many steps there will be is known only with the data, and so is what to warn of and which interval is too long.
        known = Namespace(**vars(args) | {"update_interval": None})
        pruner(known, model, [], total_steps=2**62, warn=lambda words: None)
    except UsageError as error:
        # Which sparsities a network can have depends on the number of classes too.
        if not (isinstance(error.__cause__, BudgetError) and source.classes is None):
            raise


def refuse_batch_norm_flags(args: Namespace, model: nn.Module) -> None:
    """Raise ValueError for flags of batch norm that this network cannot have."""
    if args.recalibrate_bn:
        refuse_without_batch_norm(model)
    if args.sync_bn:
        refuse_without_batch_norm(model, "--sync-bn")
        refuse_other_batch_norm(model)


def place(args: Namespace, resumed: bool) -> tuple[torch.device, ProcessGroup]:
    """Return the device, and the processes that share the training, having joined them."""
    device = pick_device(distributed.local_device(args.device, args.no_cuda), args.no_cuda)
    if args.compile == "on":
        refuse_uncompilable(device)
    group = distributed.start(device)
    use_deterministic_kernels(args.deterministic)
    for name in ("sam_local", "sync_bn"):
        if getattr(args, name) and group.world == 1 and not resumed:
            raise UsageError(f"{flag(name)} has no effect in one process: launch several by torchrun, or leave it out")
    return device, replace(group, synchronised=args.sync_bn and group.world > 1)


def dataset(args: Namespace, group: ProcessGroup = ProcessGroup()) -> Dataset:
    """Return the data set that a run trains on. Raises UsageError."""
    with group.main_first():
        data = load_dataset(args.dataset, args.data_dir, args.image_size)
    if args.robustness:
        refuse_uncorruptible(tuple(CORRUPTIONS), data.test.image_shape)
    with flag_errors():
        return training_part(args, data)


def training_part(args: Namespace, data: Dataset) -> Dataset:
    """Return the data set with its held-out images, its part to train on and its wrong labels.

    The held-out images are the same whatever the part, and their labels are right. Raises ValueError.
    """
    classes = len(data.classes)
    if args.val_split:
        data = hold_out(data, args.val_split, args.seed)
    if args.train_images:
        data = replace(data, train=balanced_part(data.train, args.train_images, classes, args.seed))
    if args.label_noise:
        data = replace(data, train=with_label_noise(data.train, args.label_noise, classes, args.seed))
    return data


def describe_data(args: Namespace, data: Dataset, group: ProcessGroup) -> dict:
    """Return what a checkpoint tells of what its run was given beside flags.

    That is classes, fingerprint, shape of an image, mean and deviation by channel, processes, and what --sparsity-config says.
    """
    statistics = channel_statistics(data.train)
    about = {"classes": data.classes, "fingerprint": fingerprint(data), "image_shape": list(data.image_shape)}
    layers = load_layer_sparsity(args.sparsity_config) if args.sparsity_config else None
    return about | {**statistics, "processes": group.world, "layer_sparsity": layers}


def augmentation(args: Namespace, data: Dataset) -> Augmentation:
    """Return what becomes of the training images."""
    return Augmentation(
        len(data.train), args.batch_size, args.seed, data.pad, data.flip, args.alpha or 0.0, args.cutmix, args.augment,
        args.random_erasing, DATASETS[args.dataset].policies,
    )  # fmt: skip


def network(args: Namespace, data: Dataset, device: torch.device) -> nn.Module:
    """Return the untrained network for a data set. Write what `auto` came to into args. Raises UsageError."""
    with flag_errors():
        if args.arch == "resnet":
            args.stem = pick_stem(args.stem, data.image_shape[1:])
        model = models.build_model(
            args.arch, args.depth, len(data.classes), args.width, data.channels, data.image_shape[1:], args.stem
        )
        refuse_batch_norm_flags(args, model)  # again: an external network may be known only with the data
    return model.to(device).to(memory_format=torch.channels_last)


def optimizer(args: Namespace, model: nn.Module, total_steps: int) -> torch.optim.Optimizer:
    """Return the optimizer of a network's parameters for a training of so many steps."""
    rival: dict = {}
    if OPTIMIZERS[args.optmzr].rival:  # it prunes as the run does
        rule = pruner(args, model, [], total_steps=2**62, warn=lambda words: None)
        own = {
            "sgd-cram": {"sparsities": args.cram_sparsities},
            "sgd-safe": {
                "sparsity": rule.budget.sparsity, "strength": args.safe_lambda, "interval": args.safe_interval,
                "total_steps": total_steps,
            },
        }  # fmt: skip
        rival = {"largest": rule.largest, **own[args.optmzr]}
    with flag_errors():
        return training.optim.build_optimizer(
            args.optmzr, model, args.lr, args.weight_decay, args.momentum, args.nesterov,
            args.sam_rho, args.sam_v2, args.adaptive, args.sam_direction, args.seed, not args.no_norm_decay, **rival,
        )  # fmt: skip


def _warn(words: str) -> None:
    distributed.complain(f"warning: {words}", alike=True)


def pruner(
    args: Namespace, model: nn.Module, optimizers: list[torch.optim.Optimizer], total_steps: int,
    warn: Callable[[str], None] = _warn,
) -> Pruner:  # fmt: skip
    """Return what keeps a network sparse. Raises UsageError."""
    options = {option.name: getattr(args, option.name) for option in METHODS[args.prune_method].options}
    with flag_errors():
        return Pruner(
            model, args.prune_method, args.sparsity, args.sparsity_distribution,
            load_layer_sparsity(args.sparsity_config) if args.sparsity_config else None,
            args.sparsity_pattern, args.dense_layers, total_steps, total_steps // args.epochs, args.seed, optimizers, warn,
            **{name: value for name, value in options.items() if value is not None},
        )  # fmt: skip


def choose_masks(args: Namespace, pruner: Pruner, loader: TrainLoader) -> None:
    """Choose the masks that a training begins with, or take those of --pretrained.

    Raises:
        UsageError: a sparsity that leaves no path through the network.
        TrainingError: the GPU has too little memory for the scores.
    """
    images = int(pruner.options.get("score_images", 1))
    advice = f"--score-images {images // 2}" if images > 1 else "a smaller --width"
    with flag_errors(), memory_errors(f"{advice} (the memory is for choosing the masks)"):
        if args.keep_masks:
            load_network(pruner.model, pruner.masks, load_checkpoint(network_file(args.pretrained)))
        pruner.choose_masks(loader.sample)


def compacted(
    args: Namespace, pruner: Pruner, data: Dataset, normalize: Normalize, checkpoint: dict | None
) -> nn.Module:
    """Return the network without dead channels that --compact trains, having chosen the masks.

    Args:
        args: the flags.
        pruner: of the whole network.
        data: what it trains on.
        normalize: with the figures of `data`.
        checkpoint: that the run goes on from, whose masks are taken.

    Raises:
        UsageError: see Pruner.compact.
    """
    if checkpoint:
        load_network(pruner.model, pruner.masks, checkpoint)
    else:
        device, classes = next(pruner.model.parameters()).device, len(data.classes)
        choose_masks(
            args, pruner, TrainLoader(data.train, augmentation(args, data), classes, normalize, device, 0, Execution())
        )
    try:
        return pruner.compact()
    except ValueError as error:
        raise UsageError(f"--compact: {error}: leave it out") from error


def execution(
    args: Namespace, model: nn.Module, data: Dataset, flops: Flops, passes: int, steps: int, group: ProcessGroup
) -> Execution:
    """Return how the run computes. Write what `auto` came to into args.

    Args:
        args: the flags.
        model: on the device.
        data: what it trains on.
        flops: of the network, for one image.
        passes: forward-backward passes of a step that perturbs; others take one.
        steps: of the schedule.
        group: the processes.
    """
    device = next(model.parameters()).device
    with flag_errors():
        plans = augmentation(args, data)
        refuse_single_values(model, data.image_shape, plans.smallest_part(args.accumulate, group))
        if args.recalibrate_bn and group.synchronised:  # which each process does with its own images
            alone = plans.smallest_part(1, replace(group, synchronised=False))
            refuse_single_values(model, data.image_shape, alone)
    perturbing = (args.sam_until - args.sam_from) / args.sam_every  # share of the steps
    resolved = resolve_execution(
        args.precision,
        "off" if group.synchronised else args.compile,
        device,
        step_flops=(1 + (passes - 1) * perturbing) * args.batch_size / group.world * flops.dense_training,
        steps=steps,
        deterministic=args.deterministic,
        cpu_kernels=partial(bf16_on_cpu, model, data.image_shape),
        watched=args.nonfinite == "skip"
        or group.world > 1
        or args.sam_direction == "random"
        or OPTIMIZERS[args.optmzr].rival is not None,
        compacted=args.compact,
    )
    args.precision, args.compile = resolved.precision, "on" if resolved.compiled else "off"
    return resolved


def state(args: Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> TrainState:
    """Return all that changes during training."""
    device = next(model.parameters()).device
    guard = NonFiniteGuard(model, args.precision == "fp16", args.nonfinite == "skip", device.type)
    return TrainState(model, optimizer, pruner, guard)


def loaders(
    args: Namespace, data: Dataset, normalize: Normalize, device: torch.device, execution: Execution,
    group: ProcessGroup = ProcessGroup(),
) -> tuple[TrainLoader, dict[str, EvalLoader]]:  # fmt: skip
    """Return the training batches, and the images to evaluate on by split."""
    by_sample = augmentation(args, data).by_sample
    workers = pick_workers(data.train, device, by_sample) if args.workers is None else args.workers
    loader = TrainLoader(
        data.train, augmentation(args, data), len(data.classes), normalize, device, workers, execution, group
    )
    resident = not workers or (by_sample and not pick_workers(data.train, device))
    splits = {"test": data.test} | ({"val": data.val} if data.val else {})
    evaluators = {
        name: EvalLoader(
            images,
            args.test_batch_size,
            normalize,
            device,
            resident=resident,
            group=group,
            workers=workers,
        )
        for name, images in splits.items()
    }
    return loader, evaluators


def step(
    args: Namespace, state: TrainState, execution: Execution, steps_per_epoch: int, group: ProcessGroup = ProcessGroup(),
    measure_ascent: bool = True,
) -> TrainingStep:  # fmt: skip
    """Return the training step. Raises UsageError for a window of SAM, or a warm-up, that has no step or leaves none."""
    if group.synchronised:
        synchronise(state.model)
    micro_batch, total_steps = -(-args.batch_size // (args.accumulate * group.world)), args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    if args.warmup_epochs and not 0 < warmup_steps < total_steps:
        raise UsageError(
            f"--warmup-epochs {args.warmup_epochs:g} comes to {warmup_steps} of the {total_steps:,} steps: give "
            f"{'more, or leave it out' if warmup_steps == 0 else 'fewer'}"
        )
    lr_at = partial(
        learning_rate, lr=args.lr, schedule=args.lr_scheduler, total_steps=total_steps, warmup_steps=warmup_steps
    )

    def rho_at(step: int) -> float:
        return radius(
            step, args.sam_rho, args.rho_schedule, total_steps, steps_per_epoch, lr_at(step) / args.lr,
            args.sam_from, args.sam_until, args.sam_every,
        )  # fmt: skip

    first = int(args.sam_from * total_steps)
    if args.sam_rho and not any(map(rho_at, range(first, min(total_steps, first + args.sam_every + 1)))):
        raise UsageError(
            f"no step of {total_steps:,} perturbs between --sam-from {args.sam_from:g} and --sam-until {args.sam_until:g} with "
            f"--sam-every {args.sam_every}: give a wider window, or train without SAM"
        )
    return TrainingStep(
        state, build_objective(state.model, execution, micro_batch, args.smooth_eps), lr_at,
        args.accumulate, args.clip_grad, args.sam_local, args.sam_unmasked, group, execution.graphed,
        rho_at if args.sam_rho else None, args.rho_schedule != "constant", measure_ascent, args.seed,
    )  # fmt: skip


def restore(state: TrainState, checkpoint: dict, args: Namespace, data: Dataset, about: dict) -> None:
    """Load a checkpoint that a run goes on from.

    Args:
        state: what it is loaded into.
        checkpoint: what load_checkpoint returned.
        args: the flags.
        data: the run's data set.
        about: see describe_data.

    Raises:
        UsageError: it is of other images or sparsities of layers, of another number of processes where that counts, or does not
            fit.
    """
    check_fits(checkpoint["data"], data)
    if checkpoint["data"]["fingerprint"] != about["fingerprint"]:
        raise UsageError("the images are not those that the run began with: give it its own --data-dir")
    if checkpoint["data"].get("layer_sparsity", about["layer_sparsity"]) != about["layer_sparsity"]:
        raise UsageError(f"'{args.sparsity_config}' has other sparsities than when the run began: restore them")
    processes = checkpoint["data"].get("processes", about["processes"])
    if args.sam_local and processes != about["processes"]:
        raise UsageError(
            f"--sam-local perturbs along the gradient of each process's images: go on in {processes} processes as before"
        )
    state.load_state_dict(checkpoint["state"])


def how_recognised(data: Dataset) -> str:
    """Return a warning, for people, of a fingerprint that does not see every change of the images."""
    files = isinstance(data.train, ImageFiles)
    return ", in files that are recognised by their names and sizes" if files else ""


def network_name(args: Namespace) -> str:
    """Return what to call the network: family and depth, or its own name, and a stem that is not the usual one."""
    if is_external(args.arch):
        return args.arch
    return f"{args.arch}-{args.depth}" + (f" with the {args.stem} stem" if args.stem == "imagenet" else "")


def load_weights(model: nn.Module, args: Namespace, data: Dataset) -> None:
    """Load the weights of --pretrained-weights, or of --pretrained: of the same network for the same data.

    Raises:
        UsageError: there are no such weights, or they do not fit.
    """
    if args.pretrained_weights:
        with flag_errors():
            load_published_weights(model, args.arch, args.pretrained_weights)
        return
    checkpoint, weights = pretrained(args)
    masks = Pruner(model).masks
    if checkpoint is None:
        model.load_state_dict(foreign.fitting(model, weights, args.pretrained))
    else:
        check_fits(checkpoint["data"], data)
        stem = complete_flags(checkpoint["args"])["stem"]
        if args.arch == "resnet" and stem != args.stem:
            raise UsageError(
                f"the checkpoint's --stem is {stem}, and that of this network {args.stem}: give --stem {stem}"
            )
        load_network(model, masks, checkpoint)
    sparsity = masks.sparsity()
    if args.keep_masks and not sparsity:
        raise UsageError("--keep-masks has no effect: the file of --pretrained has no masks; leave it out")
    if sparsity and args.prune_method == "none" and not args.keep_masks:
        _warn(
            f"the checkpoint's masks, of sparsity {sparsity:.4f}, are not kept and its zeros train on as weights: --keep-masks "
            "keeps them"
        )


def pretrained(args: Namespace) -> tuple[dict | None, dict[str, Tensor]]:
    """Read the file of --pretrained.

    Returns:
        The checkpoint or exported network; or None, and the weights that another program has trained.

    Raises:
        UsageError: it is neither, or of another network.
    """
    path = network_file(args.pretrained)
    try:
        checkpoint = load_checkpoint(path)
    except DamagedError as error:
        if not path.exists():
            raise
        weights = foreign.read_state_dict(path)
        if weights is None:
            words = f"{error}; what torch.save(model.state_dict(), FILE) writes is read as well"
            raise UsageError(words) from error
        return None, weights
    evaluated_flags(args, {"arch", "depth", "width"}, checkpoint["args"])  # `auto` of a stem is known with the data
    return checkpoint, {}


def check_fits(about: dict, data: Dataset) -> None:
    """Raise UsageError for a network for other data than `about`, see describe_data."""
    classes, channels = about["classes"], len(about["mean"])
    if (classes, channels) != (data.classes, data.channels):
        raise UsageError(
            f"the checkpoint is of a network for {len(classes)} classes and {channels} channels and does not fit this "
            f"data set of {len(data.classes)} and {data.channels}: give the data it was trained on"
        )
