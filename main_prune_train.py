"""Train a sparse network with one-step sharpness-aware minimisation: parse the flags, build the parts, call fit."""

import contextlib
import os
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from analysis import hessian as sharpness
from experiment import flags as cli
from experiment import run_directory as runs
from experiment.build import build_augmentation, build_network, check_fits, load_weights, open_trained
from experiment.flags import flag
from experiment.sparsity_config import load_layer_sparsity
from imagedata.images import channel_statistics, fingerprint, hold_out
from imagedata.loaders import EvalLoader, Normalize, TrainLoader, pick_workers
from imagedata.sources import load_dataset
from models import build_model
from prune import EmptyLayerError, Options, Pruner, Timing
from prune.flops import FlopsMeter, count_flops, summary_table
from training.batch_norm import recalibrated, refuse_single_values, refuse_without_batch_norm
from training.checkpoint import TrainState, save_checkpoint
from training.logger import Logger, settle_output, summarize
from training.loop import Recipe, build_objective, evaluate, fit, is_best, update_weights
from training.nonfinite import NonFiniteGuard
from training.optim import OPTIMIZERS, build_optimizer, learning_rate, perturbation_of, state_holders
from training.sync_batch_norm import synchronise
from utils import distributed
from utils.device import device_name, keep_freed_memory, pick_device, use_deterministic_kernels
from utils.errors import Preempted, TrainingError, UsageError, memory_errors, run_errors, usage_errors
from utils.precision import bf16_on_cpu, resolve_execution
from utils.signals import CheckpointSchedule, Interruption


def train(args: Namespace, given: set[str], interruption: Interruption) -> None:
    """Train a network from fresh weights, or from the checkpoint of an interrupted run."""
    located = runs.locate_run(args, given)
    args, directory, checkpoint = located.args, located.directory, located.checkpoint
    schedule = CheckpointSchedule(args.checkpoint_every)
    check_on_meta(args)
    device = pick_device(distributed.local_device(args.device, args.no_cuda), args.no_cuda)
    group = distributed.start(device)
    use_deterministic_kernels(args.deterministic)
    for name in ("sam_local", "sync_bn"):
        if getattr(args, name) and group.world == 1 and not checkpoint:
            raise UsageError(f"{flag(name)} has no effect in one process: launch several by torchrun, or leave it out")
    group = replace(group, synchronised=args.sync_bn and group.world > 1)

    with group.main_first():
        dataset = load_dataset(args.dataset, args.data_dir, args.image_size)
    if args.val_split:
        with usage_errors():
            dataset = hold_out(dataset, args.val_split, args.seed)
    about_data = {"classes": dataset.classes, "fingerprint": fingerprint(dataset), **channel_statistics(dataset.train)}
    augmentation = build_augmentation(args, dataset)
    total_steps = args.epochs * augmentation.steps_per_epoch

    torch.manual_seed(args.seed)
    model = build_network(args, dataset, device)
    if args.pretrained and not checkpoint:
        load_weights(model, args, dataset)
    optimizer = build_optimizer(
        args.optmzr, model, args.lr, args.weight_decay, args.momentum, args.nesterov,
        rho=args.sam_rho, v2=args.sam_v2, adaptive=args.adaptive,
    )  # fmt: skip
    pruner = build_pruner(args, model, state_holders(optimizer), total_steps)
    perturbation = perturbation_of(optimizer, model, pruner, args.sam_local)
    with usage_errors():
        refuse_single_values(model, dataset.image_shape, augmentation.smallest_part(args.accumulate, group))
    flops = count_flops(model, dataset.image_shape)
    meter = FlopsMeter(flops, pruner, perturbation.passes)
    execution = resolve_execution(
        args.precision,
        "off" if group.synchronised else args.compile,
        device,
        step_flops=perturbation.passes * args.batch_size / group.world * flops.dense_training,
        steps=total_steps,
        deterministic=args.deterministic,
        cpu_kernels=bf16_on_cpu(model, dataset.image_shape),
        watched=args.nonfinite == "skip" or group.world > 1,
    )
    if group.synchronised:
        synchronise(model)
    args.precision, args.compile = execution.precision, "on" if execution.compiled else "off"
    guard = NonFiniteGuard(model, args.precision == "fp16", args.nonfinite == "skip", device.type)
    state = TrainState(model, optimizer, pruner, guard)

    normalize = Normalize(about_data["mean"], about_data["deviation"], device)
    workers = pick_workers(dataset.train, device) if args.workers is None else args.workers
    loader = TrainLoader(
        dataset.train, augmentation, len(dataset.classes), normalize, device, workers, execution, group
    )
    splits = {"test": dataset.test} | ({"val": dataset.val} if dataset.val else {})
    evaluators = {
        name: EvalLoader(group.share_of(images), args.test_batch_size, normalize, device, resident=not workers)
        for name, images in splits.items()
    }

    if checkpoint:
        check_fits(checkpoint, dataset)
        if checkpoint["data"]["fingerprint"] != about_data["fingerprint"]:
            raise UsageError("the images are not those that the run began with: give it its own --data-dir")
        processes = checkpoint["data"].get("processes", group.world)
        if args.sam_local and processes != group.world:
            raise UsageError(
                f"--sam-local perturbs along the gradient of each process's share: go on in {processes} processes as before"
            )
        state.load_state_dict(checkpoint["state"])
        if state.schedule_step > total_steps or len(state.partial.get("sums", ())) > loader.steps_per_epoch:
            raise UsageError("the checkpoint is beyond the end of its own run or epoch: it is not one of this program")
    else:
        with usage_errors():
            pruner.before_training(loader.sample)

    recipe = Recipe(
        build_objective(model, execution, -(-args.batch_size // (args.accumulate * group.world)), args.smooth_eps),
        execution, perturbation, execution.graph(update_weights),
        lr_at=partial(
            learning_rate, lr=args.lr, schedule=args.lr_scheduler, total_steps=total_steps,
            warmup_steps=round(args.warmup_epochs * loader.steps_per_epoch),
        ),
        total_steps=total_steps,
        accumulate=args.accumulate, clip_grad=args.clip_grad, log_interval=args.log_interval,
        group=group,
    )  # fmt: skip
    known = runs.read_result(directory) if state.schedule_step >= recipe.total_steps else {}
    if known and known.keys() >= closer_look(args.recalibrate_bn, args.sharpness):
        if group.is_main:
            print(f"finished already with test accuracy {known['test_top1']:.2f}%: {directory / 'result.json'}")
        return
    # All have looked for a checkpoint before the first process writes, and found the same.
    flags = {name: value for name, value in runs.plain(args).items() if name not in runs.OWN}
    group.check_same({"flags": flags, "data": about_data, "state": state.state_dict()})
    lock = runs.claim_directory(located, keep_result=bool(known)) if group.is_main else contextlib.nullcontext()
    logger = Logger(
        directory, runs.plain(args), device_name(device), state.rows, state.global_step,
        loss_label="loss at w+e" if OPTIMIZERS[args.optmzr].sam else "loss",
        total_epochs=args.epochs + pruner.extra_epochs(total_steps, loader.steps_per_epoch),
        about={"images": about_data["fingerprint"], "processes": group.world}, writes=group.is_main,
    )  # fmt: skip
    logger.say(
        f"{args.arch}-{args.depth} on {device_name(device)}, {args.optmzr}{' v2' if args.sam_v2 else ''}, {execution}"
        + (f", {group.world} processes" if group.world > 1 else "")
    )
    logger.say(f"{len(dataset.train):,} training and {len(dataset.test):,} test images, {len(dataset.classes)} classes")
    if args.summary:
        logger.say(summary_table(meter.flops, pruner))
    logger.say(pruner.describe())
    logger.say(f"run directory: {directory}" + (f", resumed after step {state.global_step:,}" if checkpoint else ""))

    def save(state: TrainState) -> None:
        if not group.is_main:
            return
        write = partial(
            save_checkpoint, state=state, args=runs.plain(args), data=about_data | {"processes": group.world}
        )
        if not state.partial and is_best(state.rows):
            write(directory / "best.pt")
        write(directory / "checkpoint.pt")

    with interruption.finishing():
        fit(state, recipe, loader, evaluators, meter, logger, save, schedule, interruption)
    result = summarize(state, meter, runs.plain(args), args.epochs * len(dataset.train))
    result |= {name: known[name] for name in closer_look(True, True) & known.keys()}  # of an earlier command
    if closer_look(args.recalibrate_bn, args.sharpness) and group.any(interruption.signal is not None, device):
        raise Preempted("ended by a signal after the last step: --resume auto looks at the network more closely")
    if args.recalibrate_bn:
        inputs = (loader.batch(step)[0] for step in range(loader.steps_per_epoch))
        model = recalibrated(model, inputs, execution)
        group.reduce(model, torch.zeros(1, device=device), gradients=False)  # statistics of all shares
        loss, top1 = evaluate(model, evaluators["test"], execution, group)
        result |= {"test_loss_recalibrated_bn": loss, "test_top1_recalibrated_bn": top1}
        logger.say(f"with batch norm's statistics estimated anew: test accuracy {top1:.2f}%")
    if args.sharpness and group.is_main:
        by_hand = f"python -m analysis.sharpness {directory / 'checkpoint.pt'} with a --batch-size below {sharpness.Settings.batch_size}"
        with usage_errors(), memory_errors(by_hand):
            figures = sharpness.measure(model, pruner.masks, dataset, normalize, device, watch=logger.say)
        result["sharpness"] = {"recalibrated_bn": args.recalibrate_bn} | figures
        logger.scalars("sharpness", sharpness.scalars(figures), state.global_step)
    with lock:
        logger.finish(result, state.global_step)
    logger.say(
        f"final test accuracy {result['test_top1']:.2f}% after {result['epochs']} epochs, {directory / 'result.json'}"
    )


def evaluate_checkpoint(args: Namespace, given: set[str]) -> None:
    """Print loss and accuracy of a checkpoint on the test images."""
    if distributed.launched("WORLD_SIZE", 1) > 1:
        raise UsageError("--evaluate takes one process: leave torchrun out")
    device = pick_device(args.device, args.no_cuda)
    use_deterministic_kernels(args.deterministic)
    trained = open_trained(args, given, device)
    args = trained.args
    print(f"{args.evaluate} on {device_name(device)}, after epoch {trained.epochs}")
    print(trained.pruner.describe())
    loader = EvalLoader(trained.dataset.test, args.test_batch_size, trained.normalize, device)
    execution = resolve_execution(args.precision, "off", device)  # without gradients bf16 can be trusted everywhere
    loss, top1 = evaluate(trained.model, loader, execution)
    print(f"test loss {loss:.4f}   test top-1 {top1:.2f}%   ({len(loader):,} images)")
    if args.recalibrate_bn:
        with usage_errors():
            model = recalibrated(trained.model, trained.training_inputs(device), execution)
        loss, top1 = evaluate(model, loader, execution)
        print(f"test loss {loss:.4f}   test top-1 {top1:.2f}%   with batch norm's statistics estimated anew")


def closer_look(statistics: bool, flatness: bool) -> set[str]:
    """What a result has beyond the usual with --recalibrate-bn and with --sharpness."""
    names = {"test_loss_recalibrated_bn", "test_top1_recalibrated_bn"} if statistics else set()
    return names | ({"sharpness"} if flatness else set())


def check_on_meta(args: Namespace) -> None:
    """Build network and sparsity without memory or data, so that impossible flags are known before data is touched."""
    with usage_errors(), torch.device("meta"):
        model = build_model(args.arch, args.depth, num_classes=1000, width=args.width)
        if args.recalibrate_bn:
            refuse_without_batch_norm(model)
        if args.sync_bn:
            refuse_without_batch_norm(model, "--sync-bn")
    build_pruner(args, model, optimizers=[], total_steps=2**62)  # how many there will be only the data tell


def build_pruner(
    args: Namespace, model: nn.Module, optimizers: list[torch.optim.Optimizer], total_steps: int
) -> Pruner:
    timing = Timing(total_steps)
    if args.update_interval:
        timing = Timing(total_steps, args.update_interval, args.stop_update)
    given = {
        "drop_fraction": args.drop_fraction, "gradient_share": args.mest_lambda, "soft": args.mest_soft or None,
        "images_per_class": args.score_images,
        "rounds": args.lth_rounds, "rewind": args.lth_rewind,
    }  # fmt: skip
    with usage_errors():
        return Pruner(
            model, args.prune_method, args.sparsity, args.sparsity_distribution,
            load_layer_sparsity(args.sparsity_config) if args.sparsity_config else None,
            args.sparsity_pattern, args.dense_layers, timing,
            Options(**{name: value for name, value in given.items() if value is not None}),
            args.seed, optimizers,
        )  # fmt: skip


def out_of_memory(args: Namespace) -> str:
    """What to try where a GPU is out of memory."""
    if args.evaluate:
        return f"--test-batch-size {max(1, args.test_batch_size // 2)}"
    smaller = f"--batch-size {args.batch_size // 2}" if args.batch_size > 1 else "a smaller --width"
    if 2 * args.accumulate > args.batch_size:
        return smaller
    return f"--accumulate {2 * args.accumulate}, where batch norm then normalises smaller parts, or {smaller}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 for a run that went wrong; 2 for bad input; 75 for one that was ended and may go on by --resume
        auto; 130 for one that Ctrl-C ended at once.
    """
    keep_freed_memory()
    settle_output()
    try:
        args, given = cli.parse(argv)
        with run_errors(), memory_errors(out_of_memory(args)):
            if args.evaluate:
                evaluate_checkpoint(args, given)
            else:
                with Interruption() as interruption:
                    train(args, given, interruption)
    except UsageError as error:
        distributed.complain(f"error: {error}", alike=not distributed.together())
        return 2
    except (TrainingError, EmptyLayerError) as error:
        distributed.complain(f"error: {error}")
        return 1
    except Preempted as notice:
        distributed.complain(str(notice), alike=True)
        return 75
    except BrokenPipeError:
        # Or Python's own last words are another traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        distributed.complain("error: nobody reads the output any more: a training goes on by --resume auto")
        return 1
    except RuntimeError as error:
        if not distributed.lost_another(error):
            raise
        distributed.complain("error: another process of this training is gone: go on by --resume auto")
        return 1
    except KeyboardInterrupt:
        distributed.complain("interrupted: a training goes on from its last checkpoint by --resume auto")
        return 130
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
