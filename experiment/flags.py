"""The flags of main_prune_train.py, their defaults and their checks."""

import argparse
import difflib
import math
import re
from collections.abc import Callable
from pathlib import Path

from imagedata.sources import DATASETS
from models import ARCHITECTURES
from prune import METHODS, Options, Timing
from prune.budget import DISTRIBUTIONS
from training.optim import OPTIMIZERS
from utils.errors import UsageError
from utils.precision import PRECISIONS

SCHEDULES = ("cosine", "step", "constant")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        found = re.fullmatch(r"unrecognized arguments: (--[^\s=]+).*", message, re.DOTALL)
        near = difflib.get_close_matches(found[1], self._option_string_actions, 1) if found else []
        raise UsageError(f"{message} ({f'did you mean {near[0]}? ' if near else ''}see --help)")


def build_parser() -> Parser:
    parser = Parser(
        description="Train a sparse network with one-step sharpness-aware minimisation (SAM.v2).",
        epilog="Defaults that depend on other flags are given in parentheses.",
        allow_abbrev=False,
    )

    group = parser.add_argument_group("network")
    group.add_argument("--arch", choices=sorted(ARCHITECTURES), default="resnet", help="family (%(default)s)")
    group.add_argument(
        "--depth",
        type=int,
        help="layers: 18, 34, 50 or 6n+2 for a resnet, 16 or 19 for a vgg, 6n+4 for a wideresnet (the family's own)",
    )
    group.add_argument(
        "--width", type=number(float, above=0, most=100), default=1.0, help="factor on the channels (%(default)g)"
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="cifar10", help="digits needs no download (%(default)s)")
    group.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where CIFAR is kept (data), or the folder with train/<class>/* and test/<class>/*",
    )
    group.add_argument(
        "--image-size",
        type=number(int, above=0),
        metavar="PIXELS",
        help="side that images of a folder are brought to (their own)",
    )
    group.add_argument(
        "--val-split",
        type=number(int, least=0),
        default=0,
        metavar="N",
        help="hold N training images out and choose best.pt on them (%(default)s)",
    )
    group.add_argument(
        "--batch-size", type=number(int, above=0), default=128, metavar="N", help="images a step (%(default)s)"
    )
    group.add_argument(
        "--test-batch-size",
        type=number(int, above=0),
        default=500,
        metavar="N",
        help="images at once in evaluation (%(default)s)",
    )
    group.add_argument(
        "--accumulate",
        type=number(int, above=0),
        default=1,
        metavar="K",
        help="compute a batch in K parts to save memory, each batch-normalised by itself (%(default)s)",
    )
    group.add_argument("--mixup", action="store_true", help="train on mixtures of two images")
    group.add_argument("--alpha", type=number(float, above=0), help="mixup: parameter of the Beta distribution (1.0)")
    group.add_argument(
        "--smooth-eps",
        type=number(float, least=0, below=1),
        default=0.0,
        metavar="EPS",
        help="label smoothing (%(default)g)",
    )

    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--optmzr",
        choices=OPTIMIZERS,
        default="sgd",
        help="base optimizer, with or without SAM around it (%(default)s)",
    )
    group.add_argument(
        "--epochs", type=number(int, above=0), default=160, help="passes over the training images (%(default)s)"
    )
    group.add_argument(
        "--lr", type=number(float, above=0), help="learning rate (0.1 for sgd, 0.001 for adam and adamw)"
    )
    group.add_argument("--momentum", type=number(float, least=0, below=1), help="sgd only (0.9)")
    group.add_argument("--nesterov", action="store_true", help="sgd only")
    group.add_argument(
        "--weight-decay", "--wd", type=number(float, least=0), help="(5e-4 for sgd and adam, 0.01 for adamw)"
    )
    group.add_argument(
        "--lr-scheduler",
        choices=SCHEDULES,
        default="cosine",
        help="step: a tenth at 50%% and at 75%% of the epochs (%(default)s)",
    )
    group.add_argument(
        "--warmup-epochs",
        type=number(float, least=0),
        default=0.0,
        metavar="E",
        help="epochs over which the learning rate first rises (%(default)g)",
    )
    group.add_argument(
        "--clip-grad", type=number(float, above=0), metavar="NORM", help="clip the gradient to this norm (not clipped)"
    )

    group = parser.add_argument_group("sharpness-aware minimisation (with --optmzr *-sam)")
    group.add_argument(
        "--sam-v2", action="store_true", help="one step, along the previous gradient; without it the two-step SAM"
    )
    group.add_argument(
        "--sam-rho",
        type=number(float, least=0),
        metavar="RHO",
        help="radius of the perturbation (0.05; 0.5 with --adaptive)",
    )
    group.add_argument("--adaptive", action="store_true", help="scale the perturbation by the weights (ASAM)")

    group.add_argument(
        "--sam-local",
        action="store_true",
        help="two-step SAM in several processes: each perturbs along the gradient of its own images (m-sharpness)",
    )

    group = parser.add_argument_group("sparsity")
    group.add_argument("--prune-method", choices=METHODS, default="none", help="(%(default)s)")
    group.add_argument(
        "--sparsity",
        type=number(float, least=0, below=1),
        metavar="S",
        help="share of all convolution and linear weights that is zero in the end; an N:M pattern fixes it",
    )
    group.add_argument(
        "--sparsity-distribution", choices=DISTRIBUTIONS, help="how layers share the sparsity (the method's own)"
    )
    group.add_argument(
        "--sparsity-config",
        type=Path,
        metavar="FILE",
        help="instead, the sparsity of each layer: YAML, 'prune_ratios: {layer: sparsity}'",
    )
    group.add_argument(
        "--sparsity-pattern",
        default="unstructured",
        metavar="PATTERN",
        help="what lives and dies together: unstructured, kernel, channel, blocks such as 4x1, N:M such as 2:4 (%(default)s)",
    )
    group.add_argument(
        "--dense-layers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="layers that stay dense: stem, shortcut, classifier, or patterns of names; the others make up for them",
    )
    group.add_argument(
        "--update-interval",
        type=number(int, above=0),
        metavar="STEPS",
        help="steps from one change of the masks to the next (100)",
    )
    group.add_argument(
        "--stop-update",
        type=number(float, above=0, most=1),
        metavar="SHARE",
        help="share of training after which masks stay (0.75)",
    )
    group.add_argument(
        "--drop-fraction",
        type=number(float, above=0, below=1),
        metavar="F",
        help="set, rigl, mest: share of a layer's living weights that moves at first (0.3)",
    )
    group.add_argument(
        "--score-images",
        type=number(int, above=0),
        metavar="N",
        help="snip, grasp: images of each class that scores look at (10)",
    )
    group.add_argument(
        "--mest-lambda",
        type=number(float, least=0),
        metavar="L",
        help="mest: weight of the gradient in |w| + L |g| (1.0)",
    )
    group.add_argument(
        "--mest-soft", action="store_true", help="mest: grow above the target, drop back at the next change (EM&S)"
    )
    group.add_argument("--lth-rounds", type=number(int, above=0), metavar="N", help="lth: how often it prunes (3)")
    group.add_argument(
        "--lth-rewind",
        type=number(int, least=0),
        metavar="STEP",
        help="lth: the step whose weights it goes back to (0)",
    )
    group.add_argument(
        "--pretrained", type=Path, metavar="CKPT", help="start from the weights of this checkpoint; oneshot needs it"
    )
    group.add_argument(
        "--summary", action="store_true", help="print layers, shapes, densities and FLOPs before training"
    )

    group = parser.add_argument_group("run")
    group.add_argument(
        "--seed", type=number(int, least=0), default=0, help="of weights, masks, order and augmentation (%(default)s)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto: CUDA where there is one)")
    group.add_argument("--no-cuda", action="store_true", help="the same as --device cpu")
    group.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of the forward pass; auto: bf16 on GPUs and CPUs where it is faster; fp16 scales the loss (%(default)s)",
    )
    group.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="by torch.compile; auto: on GPUs, and on CPUs with AMX, where a run earns it back and is not --deterministic (%(default)s)",
    )
    group.add_argument(
        "--workers",
        type=number(int, least=0),
        metavar="N",
        help="processes that cut batches from images in the host's memory; 0: cut on the device (0 where they fit it)",
    )
    group.add_argument(
        "--nonfinite",
        choices=("stop", "skip"),
        default="stop",
        help="a loss or gradient that is not finite ends the run, or its step is left out, for one wait a step (%(default)s)",
    )
    group.add_argument(
        "--sync-bn",
        action="store_true",
        help="in several processes: batch norm over the images of all of them; not compiled",
    )
    group.add_argument("--deterministic", action="store_true", help="only deterministic kernels, which may be slower")
    group.add_argument(
        "--output-dir",
        "--save-model",
        type=directory,
        metavar="DIR",
        help="directory of the run (runs/<name from the flags>)",
    )
    group.add_argument(
        "--remark", default="", help="a note for args.json, added to the name of the run where --output-dir gives none"
    )
    group.add_argument(
        "--resume",
        metavar="PATH",
        help="go on from a checkpoint; auto: from that of the run's directory, if there is one",
    )
    group.add_argument(
        "--checkpoint-every",
        metavar="N",
        default="1",
        help="epochs, or with an m minutes (10m), from one checkpoint to the next (%(default)s)",
    )
    group.add_argument(
        "--recalibrate-bn",
        action="store_true",
        help="also evaluate the trained network with batch norm's statistics estimated anew, at its weights as they are",
    )
    group.add_argument(
        "--sharpness",
        action="store_true",
        help="after training measure Hessian eigenvalues, trace and SAM-sharpness, as python -m analysis.sharpness does",
    )
    group.add_argument("--evaluate", type=Path, metavar="CKPT", help="only evaluate this checkpoint on the test images")
    group.add_argument(
        "--log-interval",
        type=number(int, above=0),
        default=50,
        metavar="STEPS",
        help="steps from one logged step to the next (%(default)s)",
    )
    return parser


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """The flags, and the names of those that were given. Defaults that depend on others are still None.

    Raises:
        UsageError: a flag that does not exist, or a value that it cannot have.
    """
    parser = build_parser()
    unset = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    given = {name for name in names if getattr(args, name) is not unset}
    for name in names:
        if name not in given:
            setattr(args, name, parser.get_default(name))
    if args.resume is not None and args.evaluate is not None:
        raise UsageError("--resume goes on training and --evaluate does not train: give one of them")
    return args, given


def refuse_impossible(saved: dict) -> None:
    """Refuse flags out of a checkpoint whose values no command line could have given.

    Raises:
        UsageError: it names one.
    """
    for action in build_parser()._actions:
        value = saved.get(action.dest, action.default)
        if value == action.default:
            continue
        if action.nargs == 0:
            possible = isinstance(value, bool)
        else:
            values = value if action.nargs else [value]
            possible = isinstance(values, list) and all(_could_be(item, action) for item in values)
        if not possible:
            raise UsageError(f"the checkpoint's {flag(action.dest)} is {value!r}: it is not one of this program")


def _could_be(value: object, action: argparse.Action) -> bool:
    try:
        converted = (action.type or str)(str(value))
    except (argparse.ArgumentTypeError, UsageError, ValueError):
        return False
    same = str(converted) == value if isinstance(converted, Path) else converted == value
    return same and (action.choices is None or value in action.choices)


def check(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags that contradict each other or would be ignored.

    Raises:
        UsageError: one sentence that names them.
    """
    kind = OPTIMIZERS[args.optmzr]
    useless = _useless_for_method(args.prune_method) | {
        **dict.fromkeys(() if kind.momentum is not None else ("momentum", "nesterov"), f"--optmzr {args.optmzr}"),
        **dict.fromkeys(("sam_local",) if args.sam_v2 else (), "--sam-v2"),
        **dict.fromkeys(() if kind.sam else ("sam_v2", "sam_rho", "adaptive", "sam_local"), f"--optmzr {args.optmzr}"),
        **dict.fromkeys(() if args.mixup else ("alpha",), "without --mixup"),
        **dict.fromkeys(() if args.dataset == "folder" else ("image_size",), f"--dataset {args.dataset}"),
        **dict.fromkeys(() if args.dataset != "digits" else ("data_dir",), "--dataset digits"),
    }
    for name in sorted(given & useless.keys()):
        reason = useless[name] if useless[name].startswith("without") else f"with {useless[name]}"
        raise UsageError(f"{flag(name)} has no effect {reason}: leave it out, or change that")
    if args.nesterov and args.momentum == 0:
        raise UsageError("--nesterov needs a --momentum above 0")
    if (
        args.prune_method != "none"
        and args.sparsity is None
        and not args.sparsity_config
        and ":" not in args.sparsity_pattern
    ):
        raise UsageError(f"--prune-method {args.prune_method} needs --sparsity, e.g. --sparsity 0.9")
    if args.sparsity_config and args.sparsity_distribution:
        raise UsageError("--sparsity-config says what each layer keeps: leave --sparsity-distribution out")
    if METHODS[args.prune_method].pretrained and not args.pretrained:
        raise UsageError(f"--prune-method {args.prune_method} prunes trained weights: give them by --pretrained CKPT")
    if args.warmup_epochs >= args.epochs:
        raise UsageError(f"--warmup-epochs {args.warmup_epochs:g} has to be less than --epochs {args.epochs}")
    if args.accumulate > args.batch_size:
        raise UsageError(
            f"--accumulate {args.accumulate} cuts a batch of {args.batch_size} into parts of less than an image"
        )
    if args.sync_bn and args.sam_local:
        raise UsageError(
            "--sync-bn and --sam-local contradict each other: a process's own gradient needs its own statistics"
        )
    if args.sync_bn and args.compile == "on":
        raise UsageError("--sync-bn cannot be compiled: give --compile auto or off")
    if args.no_cuda and args.device not in ("auto", "cpu"):
        raise UsageError(f"--no-cuda and --device {args.device} contradict each other")


def _useless_for_method(name: str) -> dict[str, str]:
    """The sparsity flags that a method has no use for."""
    method, reason = METHODS[name], f"--prune-method {name}"
    useless = []
    if name == "none":
        useless += ["sparsity", "sparsity_distribution", "sparsity_config", "sparsity_pattern", "dense_layers"]
    if not method.update:
        useless += ["update_interval", "stop_update"]
    if not method.moves:
        useless += ["drop_fraction"]
    if not method.reads_images:
        useless += ["score_images"]
    if name != "mest":
        useless += ["mest_lambda", "mest_soft"]
    if not method.tickets:
        useless += ["lth_rounds", "lth_rewind"]
    return dict.fromkeys(useless, reason)


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on other flags."""
    args = argparse.Namespace(**vars(args))
    kind = OPTIMIZERS[args.optmzr]
    defaults = {"lr": kind.lr, "weight_decay": kind.weight_decay, "momentum": kind.momentum}
    if kind.sam:
        defaults["sam_rho"] = 0.5 if args.adaptive else 0.05
    if args.mixup:
        defaults["alpha"] = 1.0
    method, options = METHODS[args.prune_method], Options()
    if args.prune_method != "none" and not args.sparsity_config and ":" not in args.sparsity_pattern:
        defaults["sparsity_distribution"] = method.distributions[0]
    if method.update:
        defaults |= {"update_interval": Timing(1).interval, "stop_update": Timing(1).stop}
        if method.moves:
            defaults["drop_fraction"] = options.drop_fraction
    if method.reads_images:
        defaults["score_images"] = options.images_per_class
    if args.prune_method == "mest":
        defaults["mest_lambda"] = options.gradient_share
    if method.tickets:
        defaults |= {"lth_rounds": options.rounds, "lth_rewind": options.rewind}
    defaults["depth"] = ARCHITECTURES[args.arch].default_depth
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def directory(text: str) -> Path:
    """An argparse type: a path that is not empty, which would be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("has to name a directory")
    return Path(text)


def number(
    kind: type,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Callable[[str], float]:
    """An argparse type: a finite number within bounds."""
    named = (("at least", least), ("above", above), ("at most", most), ("below", below))
    bounds = " and ".join(f"{word} {bound:g}" for word, bound in named if bound is not None)

    def convert(text: str) -> float:
        try:
            value = kind(text)
            value = value if abs(value) < 2**63 else math.inf  # what torch can take
        except ValueError:
            value = math.nan
        fits = (
            math.isfinite(value)
            and (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        )
        if not fits:
            what = "a whole number" if kind is int else "a number"
            too_large = " and below 2^63" if value == math.inf else ""
            raise argparse.ArgumentTypeError(f"has to be {what} {bounds}{too_large}, not '{text}'")
        return value

    return convert
