"""What main_prune_train.py measures of a trained network: --evaluate, --recalibrate-bn, --sharpness, --robustness."""

from argparse import Namespace

import torch

from analysis import corrupted, hessian
from analysis.command import throttled
from experiment import build
from experiment.load import network_file
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


def measure_trained(run: Run, args: Namespace, data: Dataset, normalize: Normalize, earlier: dict) -> dict:
    """Return what --recalibrate-bn, --sharpness and --robustness ask for, by name.

    Args:
        run: at its end.
        args: the flags.
        data: what it was trained on.
        normalize: what becomes of the images.
        earlier: result.json of a command before this one, whose measurements are kept.

    Raises:
        Preempted: a signal came.
    """
    model = run.state.pruner.whole(run.state.model)
    device, group, say = run.loader.device, run.group, run.logger.say
    found = {name: earlier[name] for name in (*RECALIBRATED, *MEASURED) if name in earlier}
    if measured_names(args) and group.any(run.interruption.signal is not None, device):
        raise Preempted("ended by a signal after the last step: --resume auto goes on with the measurements")
    if args.recalibrate_bn:
        inputs = (run.loader.batch(step).inputs for step in range(run.loader.steps_per_epoch))
        model = recalibrated(model, inputs, run.execution)
        group.reduce(model, torch.zeros(1, device=device), gradients=False)  # statistics of all processes' images
        figures = evaluate(model, run.evaluators["test"], run.execution, group)
        found |= dict(zip(RECALIBRATED, figures, strict=True))
        say(f"with batch norm's statistics estimated anew: test accuracy {figures[1]:.2f}%")
    interrupted = "--resume auto goes on with the measurements"
    checkpoint, step = run.logger.directory / "checkpoint.pt", run.state.global_step
    if args.sharpness and group.is_main:
        advice = f"python -m analysis.sharpness {checkpoint} with a --batch-size below {hessian.Settings.batch_size}"

        def watch(what: str) -> None:
            if run.interruption.signal:
                raise Preempted(f"ended by {run.interruption.signal}: {interrupted}")
            say(what)

        # A signal is only noted: raised inside a derivative, Preempted would come out as an error of torch.
        with usage_errors(), memory_errors(advice), run.interruption.finishing():
            sharpness = hessian.measure(model, run.state.pruner.masks, data, normalize, device, watch=watch)
        found["sharpness"] = {"recalibrated_bn": args.recalibrate_bn} | sharpness
        run.logger.scalars("sharpness", hessian.scalars(sharpness), step)
    if args.robustness and group.is_main:
        settings = corrupted.Settings()
        advice = f"python -m analysis.robustness {checkpoint} with a --batch-size below {settings.batch_size}"
        images = corrupted.CorruptedImages(data.test, settings)
        show, done = throttled(say, seconds=60), 0

        def advance() -> None:
            nonlocal done
            done += 1
            if run.interruption.signal:
                raise Preempted(f"ended by {run.interruption.signal}: {interrupted}")
            show(f"robustness: {done:,} of {len(images):,} batches of test images")

        with memory_errors(advice), run.interruption.finishing():
            (robustness,), _ = corrupted.measure([corrupted.Network(model, normalize)], images, device, advance=advance)
        found["robustness"] = {"recalibrated_bn": args.recalibrate_bn} | robustness
        run.logger.scalars("robustness", corrupted.scalars(robustness), step)
    return found


def evaluate_checkpoint(args: Namespace, given: set[str]) -> dict:
    """Print loss and accuracy of the checkpoint --evaluate on the test images, and return them by their names in result.json."""
    if launched("WORLD_SIZE", 1) > 1:
        raise UsageError("--evaluate takes one process: leave torchrun out")
    device = pick_device(args.device, args.no_cuda)
    use_deterministic_kernels(args.deterministic)
    trained = build.trained(load_checkpoint(network_file(args.evaluate)), args, given, device)
    args = trained.args
    print(f"{args.evaluate} on {device_name(device)}, after epoch {trained.epochs}")
    print(trained.pruner.describe())
    test = trained.dataset.test
    workers = pick_workers(test, device) if isinstance(test, ImageFiles) else 0
    loader = EvalLoader(test, args.test_batch_size, trained.normalize, device, workers=workers)
    execution = resolve_execution(args.precision, "off", device)  # without gradients bf16 can be trusted everywhere
    loss, top1 = evaluate(trained.model, loader, execution)
    print(f"test loss {loss:.4f}   test top-1 {top1:.2f}%   ({len(loader):,} images)")
    found = {"test_loss": loss, "test_top1": top1}
    if args.recalibrate_bn:
        with usage_errors():
            model = recalibrated(trained.model, trained.training_inputs(device), execution)
        loss, top1 = evaluate(model, loader, execution)
        print(f"test loss {loss:.4f}   test top-1 {top1:.2f}%   with batch norm's statistics estimated anew")
        found |= dict(zip(RECALIBRATED, (loss, top1), strict=True))
    return found
