"""Train a sparse network with SGD, SAM or one-step SAM: data, network, masks, optimizer, step, loop, result.

Read on in training/step.py (the step), sam.py (the perturbation) and prune/pruner.py (the masks).
"""

import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping

import torch

from analysis.trained import evaluate_checkpoint, has_measured, measure_trained
from experiment import build
from experiment.config import as_argv, parse_and_replay
from experiment.exit_code import exceptions, exit_code, smaller_batch
from experiment.flags import MAY_CHANGE_ON_RESUME, MAY_DIFFER_BETWEEN_PROCESSES, plain
from experiment.run_directory import Located, locate_run
from imagedata.augment import Normalize
from imagedata.images import Dataset
from prune.compact import compacted_size
from prune.flops import FlopsMeter, count_flops, summary_table
from training.checkpoint import CheckpointSchedule, CheckpointWriter
from training.logger import Logger, run_result
from training.loop import Run, fit
from training.optim import OPTIMIZERS, passes_per_step
from utils.device import device_name, keep_freed_memory, kernels_restored
from utils.errors import memory_errors
from utils.signals import Interruption


def train(located: Located, interruption: Interruption, command: list[str]) -> dict:
    """Train a network from fresh weights, or go on from the checkpoint of an interrupted run.

    Args:
        located: the run.
        interruption: notes signals.
        command: for args.json.

    Returns:
        What result.json holds.
    """
    args, directory, checkpoint = located.args, located.directory, located.checkpoint
    schedule = CheckpointSchedule(args.checkpoint_every)
    build.check_on_meta(args, resumed=checkpoint is not None)
    device, group = build.place(args, resumed=checkpoint is not None)

    # data
    data = build.dataset(args, group)
    about = build.describe_data(args, data, group)
    normalize = Normalize(about["mean"], about["deviation"], device)
    steps_per_epoch = build.augmentation(args, data).steps_per_epoch
    total_steps = args.epochs * steps_per_epoch

    # network
    torch.manual_seed(args.seed)
    model = build.network(args, data, device)
    if (args.pretrained or args.pretrained_weights) and not checkpoint:
        build.load_weights(model, args, data)

    # masks
    pruner = build.pruner(args, model, [], total_steps)
    if args.compact:  # masks that never change are chosen now, and what they leave is trained
        model = build.compacted(args, pruner, data, normalize, checkpoint)

    # optimizer
    optimizer = build.optimizer(args, model, total_steps)
    pruner.optimizers = [optimizer]

    # step
    flops, passes = count_flops(pruner.model, data.image_shape), passes_per_step(optimizer)
    execution = build.execution(args, model, data, flops, passes, total_steps, group)
    loader, evaluators = build.loaders(args, data, normalize, device, execution, group)
    state = build.state(args, model, optimizer, pruner)
    step = build.step(args, state, execution, steps_per_epoch, group)
    if checkpoint:
        build.restore(state, checkpoint, args, data, about)
    elif not args.compact:
        build.choose_masks(args, pruner, loader)

    # directory: nothing is written before everything is known, and the same in all processes
    trained = state.schedule_step >= total_steps and not pruner.has_next_round
    earlier = located.read_result() if trained else {}
    if earlier and has_measured(args, earlier):
        if group.is_main:
            print(f"finished already with test accuracy {earlier['test_top1']:.2f}%: {directory / 'result.json'}")
        return earlier
    flags = {name: value for name, value in plain(args).items() if name not in MAY_DIFFER_BETWEEN_PROCESSES}
    group.check_same({"flags": flags, "data": about, "state": state.state_dict()})
    if group.is_main:
        located.prepare(keep_result=bool(earlier))
    logger = Logger(
        directory,
        {"args": plain(args), "command": command, "device": device_name(device), "images": about["fingerprint"]}
        | {name: about[name] for name in ("processes", "layer_sparsity")},
        state.rows,
        state.global_step,
        loss_label="loss at w+e" if OPTIMIZERS[args.optmzr].sam else "loss",
        total_epochs=args.epochs + pruner.extra_epochs(total_steps, steps_per_epoch),
        writes=group.is_main,
    )

    # loop
    run = Run(
        state, step, loader, evaluators, FlopsMeter(flops, pruner.masks, passes), logger,
        CheckpointWriter(directory, schedule, plain(args), about, writes=group.is_main),
        total_steps, args.log_interval, execution, group, args.eval_every, interruption,
    )  # fmt: skip
    introduce(run, args, data, resumed=checkpoint is not None)
    with interruption.finishing():
        fit(run)

        # result
        result = run_result(state, run.meter, plain(args), args.epochs * len(data.train))
        result |= compacted_size(pruner.model, pruner.masks, data.image_shape, flops)
        with logger.writing_result(result, {n: v for n, v in plain(args).items() if n not in MAY_CHANGE_ON_RESUME}):
            measure_trained(result, run, args, data, normalize, earlier)
    file = directory / "result.json"
    logger.say(f"final test accuracy {result['test_top1']:.2f}% after {result['epochs']} epochs, {file}")
    return result


def introduce(run: Run, args: Namespace, data: Dataset, resumed: bool) -> None:
    """Print what is about to run."""
    say, state, group = run.logger.say, run.state, run.group
    several = f", {group.world} processes" if group.world > 1 else ""
    network, kind = build.network_name(args), f"{args.optmzr}{' v2' if args.sam_v2 else ''}"
    say(f"{network} on {device_name(run.loader.device)}, {kind}, {run.execution}{several}")
    say(
        f"{len(data.train):,} training and {len(data.test):,} test images, {len(data.classes)} classes{build.how_recognised(data)}"
    )
    if args.summary:
        say(summary_table(run.meter.flops, state.pruner.masks))
        left = compacted_size(state.pruner.model, state.pruner.masks, data.image_shape, run.meter.flops)
        say("without dead channels: {parameters_compacted:,} parameters, {flops_compacted:,} FLOPs".format(**left))
    say(state.pruner.describe())
    say(f"run directory: {run.logger.directory}" + (f", resumed after step {state.global_step:,}" if resumed else ""))


def run(flags: Mapping[str, object] | Iterable[str]) -> dict:
    """Train in a program or notebook of your own.

    For instance run({"dataset": "digits", "optmzr": "sgd-sam", "sam_v2": True}). A signal such as Ctrl-C ends the training
    with a checkpoint, and then does what it would have done without it.

    Args:
        flags: values by name, True for a switch; or the words of a command line.

    Returns:
        What result.json holds; with `evaluate` the figures on the test images.

    Raises:
        UsageError: bad input.
        TrainingError: a run that cannot go on.
    """
    interruption = Interruption()
    with exceptions(interruption), kernels_restored():
        return run_flags(as_argv(flags), interruption)


def run_flags(argv: list[str] | None, interruption: Interruption) -> dict:
    """Train, or evaluate, as the flags say, and return the figures."""
    args, given = parse_and_replay(argv)
    if args.evaluate:
        with memory_errors(smaller_batch(args)):
            return evaluate_checkpoint(args, given)
    command = sys.argv if argv is None else ["main_prune_train.py", *argv]
    with interruption, locate_run(args, given) as located, memory_errors(smaller_batch(located.args)):
        return train(located, interruption, command)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns its exit code, see experiment/exit_code.py."""
    keep_freed_memory()
    return exit_code(lambda: run_flags(argv, Interruption()))


if __name__ == "__main__":
    sys.exit(main())
