"""What main_prune_train.py measures of a trained network: --evaluate, --recalibrate-bn, --sharpness, --robustness."""

import itertools
from argparse import Namespace
from collections.abc import Iterator

from torch import Tensor, nn

from analysis import corrupted, hessian
from analysis.command import throttled
from experiment.load import network_file
from experiment.trained_run import open_run
from imagedata.augment import Normalize
from imagedata.files import ImageFiles
from imagedata.images import Dataset
from imagedata.loaders import EvalLoader, pick_workers
from training.batch_norm import recalibrated
from training.checkpoint import load_checkpoint
from training.loop import Run, evaluate
from utils.device import device_name, pick_device, use_deterministic_kernels
from utils.distributed import launched
from utils.errors import Preempted, UsageError, memory_errors, usage_errors
from utils.precision import resolve_execution

RECALIBRATED = ("test_loss_recalibrated_bn", "test_top1_recalibrated_bn")
MEASURED = ("sharpness", "robustness")


def measured_names(args: Namespace) -> set[str]:
    """Return what result.json holds beyond the usual with --recalibrate-bn, --sharpness and --robustness."""
    return set(RECALIBRATED if args.recalibrate_bn else ()) | {name for name in MEASURED if getattr(args, name)}


def has_measured(args: Namespace, result: dict) -> bool:
    """Return whether result.json has all that these flags ask for, and names no error."""
    wanted = measured_names(args)
    return (
        "error" not in result
        and result.keys() >= wanted
        and all(_is_measured(args, result, name) for name in wanted.intersection(MEASURED))
    )


def _is_measured(args: Namespace, result: dict, name: str) -> bool:
    """Return whether a result has a measurement with the statistics of batch norm that the flags ask for."""
    return name in result and result[name].get("recalibrated_bn") == args.recalibrate_bn


def measure_trained(
    result: dict, run: Run, args: Namespace, data: Dataset, normalize: Normalize, earlier: dict
) -> None:
    """Add what --recalibrate-bn, --sharpness and --robustness ask for to a result, each as it is measured.

    Args:
        result: of the training.
        run: at its end; signals are only noted. (Raised inside a derivative, Preempted would come out as an error of torch.)
        args: the flags.
        data: what it was trained on.
        normalize: what becomes of the images.
        earlier: result.json of a command before this one, whose measurements are kept.

    Raises:
        Preempted: a signal came.
    """
    result |= {name: earlier[name] for name in (*RECALIBRATED, *MEASURED) if name in earlier}
    if measured_names(args) and run.group.any(run.interruption.signal is not None, run.loader.device):
        raise Preempted("ended by a signal after the last step: --resume auto goes on with the measurements")
    model = run.state.pruner.whole(run.state.model)
    if args.recalibrate_bn:
        model, figures = _recalibrate(run, model)
        result |= figures
    if args.sharpness and run.group.is_main and not _is_measured(args, earlier, "sharpness"):
        result["sharpness"] = {"recalibrated_bn": args.recalibrate_bn} | _sharpness(run, model, data, normalize)
    if args.robustness and run.group.is_main and not _is_measured(args, earlier, "robustness"):
        result["robustness"] = {"recalibrated_bn": args.recalibrate_bn} | _robustness(run, model, data, normalize)


def _recalibrate(run: Run, model: nn.Module) -> tuple[nn.Module, dict[str, float]]:
    """Return the network with batch norm's statistics estimated anew, and its figures on the test images."""

    def inputs() -> Iterator[Tensor]:
        for step in range(run.loader.steps_per_epoch):
            if run.group.world == 1:  # several would wait for the one that ends
                _exit_if_signalled(run)
            yield run.loader.batch(step).inputs

    model = recalibrated(model, inputs(), run.execution, run.group)
    figures = evaluate(model, run.evaluators["test"], run.execution, run.group)
    run.logger.say(f"with batch norm's statistics estimated anew: test accuracy {figures[1]:.2f}%")
    return model, dict(zip(RECALIBRATED, figures, strict=True))


def _sharpness(run: Run, model: nn.Module, data: Dataset, normalize: Normalize) -> dict:
    command = f"python -m analysis.sharpness {run.logger.directory / 'checkpoint.pt'}"
    advice = f"{command} with a --batch-size below {hessian.Settings.batch_size}"

    def watch(what: str) -> None:
        _exit_if_signalled(run)
        run.logger.say(what)

    with usage_errors(), memory_errors(advice):
        found = hessian.measure(model, run.state.pruner.masks, data, normalize, run.loader.device, watch=watch)
    run.logger.scalars("sharpness", hessian.scalars(found), run.state.global_step)
    return found


def _robustness(run: Run, model: nn.Module, data: Dataset, normalize: Normalize) -> dict:
    settings = corrupted.Settings()
    command = f"python -m analysis.robustness {run.logger.directory / 'checkpoint.pt'}"
    advice = f"{command} with a --batch-size below {settings.batch_size}"
    images = corrupted.CorruptedImages(data.test, settings)
    show, done = throttled(run.logger.say, seconds=60), itertools.count(1)

    def advance() -> None:
        _exit_if_signalled(run)
        show(f"robustness: {next(done):,} of {len(images):,} batches of test images")

    networks = [corrupted.Network(model, normalize)]
    with memory_errors(advice):
        (found,), _ = corrupted.measure(networks, images, run.loader.device, advance=advance)
    run.logger.scalars("robustness", corrupted.scalars(found), run.state.global_step)
    return found


def _exit_if_signalled(run: Run) -> None:
    if run.interruption.signal:
        raise Preempted(f"ended by {run.interruption.signal}: --resume auto goes on with the measurements")


def evaluate_checkpoint(args: Namespace, given: set[str]) -> dict:
    """Print loss and accuracy of the checkpoint --evaluate on the test images, and return them by their names in result.json."""
    if launched("WORLD_SIZE", 1) > 1:
        raise UsageError("--evaluate takes one process: leave torchrun out")
    device = pick_device(args.device, args.no_cuda)
    use_deterministic_kernels(args.deterministic)
    trained = open_run(load_checkpoint(network_file(args.evaluate)), args, given, device)
    test, workers = trained.dataset.test, args.workers
    if not isinstance(test, ImageFiles):
        if workers is not None:
            raise UsageError("--workers has no effect with --evaluate on images in memory: leave it out")
        workers = 0
    elif workers is None:
        workers = pick_workers(test, device)
    args = trained.args
    print(f"{args.evaluate} on {device_name(device)}, after epoch {trained.epochs}")
    print(trained.pruner.describe())
    loader = EvalLoader(test, args.test_batch_size, trained.normalize, device, workers=workers)
    execution = resolve_execution(args.precision, "off", device)  # without gradients bf16 can be trusted everywhere
    loss, top1 = evaluate(trained.model, loader, execution)
    print(f"test loss {loss:.4f}   test top-1 {top1:.2f}%   ({len(loader):,} images)")
    found = {"test_loss": loss, "test_top1": top1}
    if args.recalibrate_bn:
        with usage_errors():
            model = recalibrated(trained.model, trained.training_inputs(device, workers), execution)
        loss, top1 = evaluate(model, loader, execution)
        print(f"test loss {loss:.4f}   test top-1 {top1:.2f}%   with batch norm's statistics estimated anew")
        found |= dict(zip(RECALIBRATED, (loss, top1), strict=True))
    return found
