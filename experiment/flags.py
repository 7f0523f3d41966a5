"""The flags of main_prune_train.py and their defaults."""

import argparse
import difflib
import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imagedata.augment import POLICIES
from imagedata.sources import DATASETS
from models import ARCHITECTURES
from models.external import is_external, is_own_code
from models.resnet import IMAGENET_FROM, STEMS
from prune import METHODS, Option
from prune.budget import DISTRIBUTIONS
from prune.methods import Value
from sam import DIRECTIONS
from training.optim import OPTIMIZERS, RHO_SCHEDULES, SCHEDULES
from utils.errors import UsageError
from utils.precision import PRECISIONS

# What tells one SAM from another, beside its rho.
SAM_FLAGS = (
    "sam_v2", "adaptive", "sam_local", "sam_unmasked", "sam_direction", "rho_schedule", "sam_from", "sam_until", "sam_every",
)  # fmt: skip

# Flags that may differ when a run is resumed, and do not name it: they do not touch the mathematics, except that
# `nonfinite` does where a run without it would have ended.
MAY_CHANGE_ON_RESUME = {
    "data_dir", "test_batch_size", "device", "no_cuda", "output_dir", "remark", "resume", "evaluate", "log_interval",
    "summary", "workers", "recalibrate_bn", "sharpness", "robustness", "checkpoint_every", "nonfinite", "eval_every",
    "config",
}  # fmt: skip

# Those of them that change no figure.
NOT_OF_FIGURES = MAY_CHANGE_ON_RESUME - {"nonfinite"}

# Flags that may differ between the processes of a run.
MAY_DIFFER_BETWEEN_PROCESSES = {
    "data_dir", "output_dir", "device", "no_cuda", "workers", "remark", "resume", "pretrained", "sparsity_config",
    "config",
}  # fmt: skip

# Flags whose `auto` is resolved when a run begins. When it is resumed, `auto` means what the run began with.
RESOLVED = ("precision", "compile", "stem")

PATHS = ("data_dir", "sparsity_config", "pretrained", "config")

# With one of these the seed chooses training images or their labels.
DRAWN_BY_SEED = ("train_images", "val_split", "label_noise")


# Keywords of Pruner in the sentences by which prune refuses its arguments, and the flags that they are.
KEYWORDS = {
    "sparsity": "sparsity", "distribution": "sparsity_distribution", "pattern": "sparsity_pattern",
    "layer_sparsity": "sparsity_config", "dense_layers": "dense_layers",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UsageErrors, and which names the flag or value that a mistyped one is near to."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own does not know -1e-3

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse's own exits
        """Raise UsageError."""
        meant = ""
        if found := re.match(r"unrecognized arguments: (-[^\s=]+)", message):
            meant = near_flag(
                found[1], [f for f, a in self._option_string_actions.items() if a.help != argparse.SUPPRESS]
            )
        elif found := re.match(r"argument (--[^\s/]+).*?: invalid choice: '(.*?)' \(", message):
            choices = self._option_string_actions[found[1]].choices
            meant = near_value(found[1], found[2], list(choices or ()))
        raise UsageError(f"{message} ({f'did you mean {meant}? ' if meant else ''}see --help)")


def near_flag(text: str, flags: list[str]) -> str:
    """Return the flag that a mistyped one stands for, or "" where none is near.

    Near are a flag of almost the same letters, one made of the first letters of its words (--learning-rate is --lr), and
    the only one that has it as its last word, or else as a word (--rho is --sam-rho).
    """
    names = {name.lstrip("-"): name for name in flags}
    word = text.lstrip("-").replace("_", "-").lower()
    initials = "".join(part[:1] for part in word.split("-"))
    containing = [name for name in names if word in name.split("-")]
    containing = [name for name in containing if name.endswith(word)] or containing
    near = difflib.get_close_matches(word, names, 1, cutoff=0.75)
    near += [initials] if len(initials) > 1 and initials in names else []
    near += containing if len(containing) == 1 else []
    return names[near[0]] if near else ""


def near_value(name: str, text: str, choices: list[str]) -> str:
    """Return the flags that say what a value stands for that a flag does not have, or "" where none is near."""
    word = text.lower()
    if name == "--arch" and (
        found := re.fullmatch(r"([a-z_-]*[a-z])[-_]?(\d+)(?:[-_x](\d+(?:\.\d+)?))?(?:[-_]bn)?", word)
    ):
        family = {"wrn": "wideresnet"}.get(found[1], re.sub("[-_]", "", found[1]))
        if family in choices:
            width = f" --width {found[3]}" if found[3] else ""
            return f"{name} {family} --depth {found[2]}{width}"
    if name == "--dataset" and word in ("imagenet", "imagenet1k", "ilsvrc2012"):
        return f"{name} imagefolder --data-dir DIR"
    if name == "--optmzr" and "sam" in word:
        base = next((base for base in ("adamw", "adam") if base in word), "sgd")
        one_step = " --sam-v2" if re.search("v2|s2|one", word) else ""
        adaptive = " --adaptive" if "asam" in word or "adaptive" in word else ""
        return f"{name} {base}-sam{one_step}{adaptive}"
    near = (
        [choice for choice in choices if choice == word]
        or [choice for choice in choices if len(word) > 1 and choice.startswith(word)]
        or [max((choice for choice in choices if word.startswith(choice)), key=len, default="")]
    )
    near = list(filter(None, near)) or difflib.get_close_matches(word, choices, 1, cutoff=0.7)
    return " or ".join(f"{name} {choice}" for choice in near)


@contextmanager
def flag_errors() -> Iterator[None]:
    """Turn the ValueErrors by which sam, prune and models refuse their arguments into UsageErrors that name flags."""
    try:
        yield
    except ValueError as error:
        raise UsageError(as_flags(str(error))) from error


def as_flags(sentence: str) -> str:
    """Return a sentence of prune with flags for its keywords: update_interval=10 is --update-interval 10."""
    names = KEYWORDS | {option.name: option.name for option in method_options()}
    keywords = "|".join(names)
    sentence = re.sub(rf"\b({keywords})=(?=\S)", lambda found: flag(names[found[1]]) + " ", sentence)
    bare = "|".join(name for name in names if "_" in name)
    return re.sub(rf"(?<![-\w'])({bare})\b", lambda found: flag(names[found[1]]), sentence)


@functools.cache  # a sweep parses the flags of hundreds of runs
def build_parser() -> Parser:
    """Return the parser of main_prune_train.py."""
    parser = Parser(
        description="Train a sparse network with one-step sharpness-aware minimisation (SAM.v2).",
        epilog="Defaults that depend on other flags are given in parentheses.",
        allow_abbrev=False,
    )
    _add_network(parser.add_argument_group("network"))
    _add_data(parser.add_argument_group("data"))
    _add_optimizer(parser.add_argument_group("optimizer"))
    _add_sam(parser.add_argument_group("sharpness-aware minimisation (with --optmzr *-sam)"))
    _add_rivals(parser.add_argument_group("CrAM+ and SAFE (with --optmzr sgd-cram, sgd-safe)"))
    _add_sparsity(parser.add_argument_group("sparsity"))
    _add_run(parser.add_argument_group("run"))
    for action in [action for action in parser._actions if isinstance(action, argparse._StoreTrueAction)]:
        if action.dest != "no_cuda":
            turn_off = flag(f"no_{action.dest}")  # for --config, see experiment/config.py
            parser.add_argument(turn_off, dest=action.dest, action="store_false", default=False, help=argparse.SUPPRESS)
    return parser


# fmt: off
def _add_network(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--arch", type=architecture, choices=Architectures(), default="resnet", metavar="NAME",
        help=f"a family of {', '.join(sorted(ARCHITECTURES))}; torchvision:NAME, timm:NAME, or FILE.py:FUNCTION for a network "
             "of your own (%(default)s)")
    add("--depth", type=int,
        help="layers: 18, 34, 50 or 6n+2 for a resnet, 16 or 19 for a vgg, 6n+4 for a wideresnet, 28 for a mobilenet, blocks of a vit "
             "(the family's own)")
    add("--width", type=number(float, above=0, most=100), default=1.0, help="factor on the channels (%(default)g)")
    add("--stem", choices=("auto", *STEMS), default="auto",
        help="of a resnet: cifar, a 3x3 convolution, or imagenet, a 7x7 convolution and a pool, which quarter the image; auto: "
             f"imagenet from {IMAGENET_FROM} pixels on (%(default)s)")


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset", choices=DATASETS, default="cifar10", help="digits needs no download (%(default)s)")
    add("--data-dir", type=Path, metavar="DIR",
        help="where torchvision's data is kept (data), or the folder with train/<class>/* and test/<class>/*")
    add("--image-size", type=number(int, above=0, most=65_535), metavar="PIXELS",
        help="side that images of a folder are resized to (their own; 224 for imagefolder)")
    add("--val-split", type=number(int, least=0), default=0, metavar="N",
        help="hold out N training images and choose best.pt on them (%(default)s)")
    add("--train-images", type=number(int, above=0), metavar="N",
        help="train on N images, as many of each class to within one, chosen by the seed (all)")
    add("--label-noise", type=number(float, least=0, below=1), default=0.0, metavar="P",
        help="give this fraction of the training labels a random other class, by the seed (%(default)g)")
    add("--batch-size", type=number(int, above=0), default=128, metavar="N", help="images per step (%(default)s)")
    add("--test-batch-size", type=number(int, above=0), default=500, metavar="N",
        help="images at once in evaluation (%(default)s)")
    add("--accumulate", type=number(int, above=0), default=1, metavar="K",
        help="compute a batch in K parts to save memory, each batch-normalised by itself (%(default)s)")
    add("--augment", choices=POLICIES, default="crop-flip",
        help="after the shift or crop and the mirroring that suit the data set, a policy of torchvision (%(default)s)")
    add("--random-erasing", type=number(float, least=0, most=1), default=0.0, metavar="P",
        help="probability that a box of a training image is erased (%(default)g)")
    add("--cutmix", action="store_true", help="train on images with a box of another one; with --mixup on either")
    add("--mixup", action="store_true", help="train on mixtures of two images")
    add("--alpha", type=number(float, above=0), help="mixup: parameter of the Beta distribution (1.0)")
    add("--smooth-eps", type=number(float, least=0, below=1), default=0.0, metavar="EPS",
        help="label smoothing (%(default)g)")


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--optmzr", choices=OPTIMIZERS, default="sgd",
        help="base optimizer, with or without SAM around it; sgd-cram and sgd-safe train a network that is pruned afterwards "
             "(%(default)s)")
    add("--epochs", type=number(int, above=0), default=160, help="passes over the training images (%(default)s)")
    add("--lr", type=number(float, above=0), help="learning rate (0.1 for sgd, 0.001 for adam and adamw; a tenth with oneshot)")
    add("--momentum", type=number(float, least=0, below=1), help="sgd only (0.9)")
    add("--nesterov", action="store_true", help="sgd only")
    add("--weight-decay", "--wd", type=number(float, least=0), help="weight decay (5e-4 for sgd and adam, 0.01 for adamw)")
    add("--no-norm-decay", action="store_true", help="no weight decay on normalisation and biases")
    add("--lr-scheduler", choices=SCHEDULES, default="cosine",
        help="step: a tenth at 50%% and at 75%% of the epochs (%(default)s)")
    add("--warmup-epochs", type=number(float, least=0), default=0.0, metavar="E",
        help="epochs over which the learning rate first rises (%(default)g)")
    add("--clip-grad", type=number(float, above=0), metavar="NORM", help="clip the gradient to this norm (not clipped)")


def _add_sam(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--sam-v2", action="store_true", help="one step, along the previous gradient; without it two-step SAM")
    add("--sam-direction", choices=DIRECTIONS, default="previous",
        help="one-step SAM perturbs along the previous gradient, the optimizer's momentum (MSAM with a negative --sam-rho), an "
             "average of gradients, or noise of the seed (%(default)s)")
    add("--sam-rho", type=number(float), metavar="RHO",
        help="radius of the perturbation; a negative one perturbs the other way (0.05; 0.5 with --adaptive; 0.2 for "
             "sgd-cram, times the gradient; 0.1 for sgd-safe)")
    add("--rho-schedule", choices=RHO_SCHEDULES, default="constant",
        help="lr: in proportion to the learning rate; sqrt: times sqrt(1/(1+epoch)), epochs counted from 0 (%(default)s)")
    add("--sam-from", type=number(float, least=0, below=1), default=0.0, metavar="SHARE",
        help="perturb from this share of the training steps on: late SAM is two-step SAM with 0.9 or 0.75 (%(default)g)")
    add("--sam-until", type=number(float, above=0, most=1), default=1.0, metavar="SHARE",
        help="perturb up to this share of the training steps (%(default)g)")
    add("--sam-every", type=number(int, above=0), default=1, metavar="K",
        help="two-step SAM at every K-th step, and one pass of the base optimizer at the others (%(default)s)")
    add("--adaptive", action="store_true", help="scale the perturbation by the weights (ASAM)")
    add("--sam-local", action="store_true",
        help="two-step SAM in several processes: each perturbs along the gradient of its own images (m-sharpness)")
    add("--sam-unmasked", action="store_true",
        help="perturb pruned weights too, as the code of S2-SAM does, but not with --adaptive; training FLOPs are counted as "
             "if it did not")


def _add_rivals(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--cram-sparsities", type=number(float, above=0, below=1), nargs="+", metavar="S",
        help="sgd-cram: sparsities of the compressed weights, of which each step draws one (0.5 0.7 0.8 0.9 0.95)")
    add("--safe-lambda", type=number(float, above=0), metavar="L",
        help="sgd-safe: strength of the pull towards the sparse point, which it rises to along a cosine (0.001)")
    add("--safe-interval", type=number(int, above=0), metavar="N",
        help="sgd-safe: steps between two projections onto the sparse set (32)")


def _add_sparsity(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prune-method", choices=METHODS, default="none", help="pruning method; none: dense (%(default)s)")
    add("--sparsity", type=number(float, least=0, below=1), metavar="S",
        help="fraction of all convolution and linear weights that is zero in the end; an N:M pattern fixes it")
    add("--sparsity-distribution", choices=DISTRIBUTIONS, help="how layers share the sparsity (the method's own)")
    add("--sparsity-config", type=Path, metavar="FILE",
        help="instead, the sparsity of each layer: YAML, 'prune_ratios: {layer: sparsity}'")
    add("--sparsity-pattern", default="unstructured", metavar="PATTERN",
        help="which weights live and die together: unstructured, fan-in, kernel, channel, blocks such as 4x1, N:M such as 2:4 "
             "(%(default)s)")
    add("--dense-layers", nargs="+", default=[], metavar="NAME",
        help="layers that stay dense: stem, shortcut, depthwise, classifier, or patterns of names; the others make up for them")
    for option in method_options():
        methods = ", ".join(name for name, method in METHODS.items() if option in method.options)
        if option.default is False:
            add(flag(option.name), action="store_true", help=f"{methods}: {option.help}")
        else:
            add(flag(option.name), type=option_type(option), metavar=option.metavar,
                help=f"{methods}: {option.help} ({option.default_shown})")
    add("--pretrained", type=Path, metavar="CKPT",
        help="start from the weights of a checkpoint, a run, an exported file or a state_dict that fits; oneshot needs some")
    add("--pretrained-weights", metavar="WEIGHTS",
        help="start from weights that torchvision publishes for its network, such as DEFAULT")
    add("--keep-masks", action="store_true",
        help="with --pretrained and without a pruning method: what that checkpoint's masks prune stays zero")
    add("--compact", action="store_true",
        help="with --sparsity-pattern channel and masks that never change: train the smaller network without dead channels")
    add("--summary", action="store_true", help="print layers, shapes, densities and FLOPs before training")


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--seed", type=number(int, least=0), default=0, help="of weights, masks, order and augmentation (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto: CUDA where there is one)")
    add("--no-cuda", action="store_true", help="the same as --device cpu")
    add("--precision", choices=("auto", *PRECISIONS), default="auto",
        help="of the forward pass; auto: bf16 on GPUs and CPUs where it is faster; fp16 scales the loss (%(default)s)")
    add("--compile", choices=("auto", "on", "off"), default="auto",
        help="torch.compile; auto turns it on where the run is long enough to repay it, never with --deterministic "
             "(%(default)s)")
    add("--workers", type=number(int, least=0), metavar="N",
        help="processes that make training batches on the host; 0: none (0 if the device can hold the images and no policy or "
             "erasing takes each by itself, else one per core, at most 4; imagefolder: at most 16, and also for --evaluate)")
    add("--nonfinite", choices=("stop", "skip"), default="stop",
        help="at a loss or gradient that is not finite, end the run or leave the step out; skip waits for the device "
             "once a step (%(default)s)")
    add("--sync-bn", action="store_true",
        help="in several processes: batch norm over the images of all of them; not compiled")
    add("--deterministic", action="store_true", help="only deterministic kernels, which may be slower")
    add("--output-dir", "--save-model", type=directory, metavar="DIR",
        help="directory of the run (runs/<name from the flags>)")
    add("--config", type=Path, metavar="FILE",
        help="replay the flags of an args.json, or of a run's directory: flags beside it win, --no-FLAG turns a switch off")
    add("--remark", default="",
        help="a note for args.json, added to the name of the run where --output-dir gives none")
    add("--resume", metavar="PATH",
        help="go on from a checkpoint, or from that of a directory; auto: from that of the run's directory, if there is one")
    add("--checkpoint-every", metavar="N", default="1",
        help="epochs, or with an m minutes (10m), between two checkpoints (%(default)s)")
    add("--eval-every", type=number(int, above=0), default=1, metavar="EPOCHS",
        help="evaluate on held-out and test images after every so many epochs, and after the last one (%(default)s)")
    add("--recalibrate-bn", action="store_true",
        help="also evaluate the trained network with batch norm's statistics estimated anew")
    add("--sharpness", action="store_true",
        help="after training measure Hessian eigenvalues, trace and SAM-sharpness, as python -m analysis.sharpness does")
    add("--robustness", action="store_true",
        help="after training measure error, loss and calibration on corrupted test images, as python -m analysis.robustness does")
    add("--evaluate", type=Path, metavar="CKPT", help="only evaluate this checkpoint on the test images")
    add("--log-interval", type=number(int, above=0), default=50, metavar="STEPS",
        help="steps between two logged steps; the last one of an epoch is logged too. A logged step of one-step SAM takes a "
             "further pass, which measures its ascent and changes nothing (%(default)s)")
# fmt: on


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """Return the flags, and the names of those that were given. Defaults that depend on others are still None.

    Raises:
        UsageError: a flag that does not exist, or a value that it cannot have.
    """
    parser = build_parser()
    unset = object()
    names = dict.fromkeys(action.dest for action in parser._actions if action.dest != "help")
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    given = {name for name in names if getattr(args, name) is not unset}
    for name in names:
        if name not in given:
            setattr(args, name, parser.get_default(name))
    if args.resume is not None and args.evaluate is not None:
        raise UsageError("--resume goes on training and --evaluate does not train: give one of them")
    return args, given


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags with the defaults that depend on other flags."""
    optimizer, method = OPTIMIZERS[args.optmzr], METHODS[args.prune_method]
    defaults: dict = {
        "lr": optimizer.fine_tuning_lr if method.pretrained else optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "momentum": optimizer.momentum,
        "depth": None if is_external(args.arch) else ARCHITECTURES[args.arch].default_depth,
    }
    given = {option.name: getattr(args, option.name) for option in method.options}
    complete = method.complete({name: value for name, value in given.items() if value is not None})
    defaults |= {option.name: complete[option.name] for option in method.options if not option.late}
    if optimizer.sam:
        defaults["sam_rho"] = 0.5 if args.adaptive else optimizer.rho
    if args.optmzr == "sgd-cram":
        defaults["cram_sparsities"] = [0.5, 0.7, 0.8, 0.9, 0.95]
    if args.optmzr == "sgd-safe":
        defaults |= {"safe_lambda": 1e-3, "safe_interval": 32}
    if args.mixup:
        defaults["alpha"] = 1.0
    if DATASETS[args.dataset].own_files:
        defaults["image_size"] = DATASETS[args.dataset].side
    if args.prune_method != "none" and not args.sparsity_config and ":" not in args.sparsity_pattern:
        defaults["sparsity_distribution"] = method.distributions[0]
    missing = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    return argparse.Namespace(**vars(args) | missing)


def plain(args: argparse.Namespace) -> dict:
    """Return the flags as values that JSON and a checkpoint can hold: files are found from any directory."""
    return {
        name: absolute(value) if name in PATHS else str(value) if isinstance(value, Path) else value
        for name, value in sorted(vars(args).items())
    }


def absolute(path: Path | str | None) -> str | None:
    """Return the absolute path of a file that a flag names, or None where it names none."""
    return os.path.abspath(path) if path else None


def method_options() -> list[Option]:
    """Return the options of all pruning methods, each once."""
    return list(dict.fromkeys(option for method in METHODS.values() for option in method.options))


def flag(name: str) -> str:
    """Return the flag of a name: drop_fraction is --drop-fraction."""
    return "--" + name.replace("_", "-")


class Architectures:
    """What --arch takes, for argparse: the families of models/, and any network from elsewhere."""

    def __contains__(self, arch: str) -> bool:
        return arch in ARCHITECTURES or is_external(arch)

    def __iter__(self) -> Iterator[str]:
        return iter([*sorted(ARCHITECTURES), "torchvision:NAME", "timm:NAME", "FILE.py:FUNCTION"])


def architecture(text: str) -> str:
    """Convert the text of --arch: a file is found from any directory."""
    place, _, name = text.rpartition(":")
    if is_external(text) and not (place and name):
        raise argparse.ArgumentTypeError(f"has to be torchvision:NAME, timm:NAME or FILE.py:FUNCTION, not '{text}'")
    return f"{os.path.abspath(place)}:{name}" if is_own_code(text) and place.endswith(".py") else text


def directory(text: str) -> Path:
    """Convert a flag's text to a path that is not empty, which would be the current directory, and that TensorBoard takes."""
    if not text:
        raise argparse.ArgumentTypeError("has to name a directory")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("has to be a name in UTF-8") from None
    return Path(text)


def option_type(option: Option) -> Callable[[str], Value]:
    """Return the argparse type of a method's option."""
    parse = option.parse
    if parse is not None:

        def convert(text: str) -> Value:
            try:
                return parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error

        return convert
    return number(type(option.default), option.least, option.above, option.below, option.most)


def number(
    kind: type,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Callable[[str], float]:
    """Return an argparse type: a finite number within bounds, of which `least` and `most` are allowed values."""
    named = (("at least", least), ("above", above), ("at most", most), ("below", below))
    bounds = [f"{word} {bound:g}" for word, bound in named if bound is not None]

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
            within = " and ".join([*bounds, "below 2^63"] if value == math.inf else bounds)
            raise argparse.ArgumentTypeError(f"has to be {what}{' ' if within else ''}{within}, not '{text}'")
        return value

    return convert


def load_layer_sparsity(path: Path) -> dict[str, float]:
    """Read the file of --sparsity-config: `prune_ratios: {layer: sparsity}` in YAML.

    A layer is named by its module or, with `.weight`, by its parameter.

    Raises:
        UsageError: there is no such file, or it has another content, or names a layer twice.
    """
    import yaml  # here: whoever gives no such file needs no YAML

    try:
        loader = yaml.SafeLoader(path.read_text())
        root = loader.get_single_node()
        (told,) = [value for key, value in root.value if key.value == "prune_ratios"]
        names = [key.value for key, _ in told.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [name for name in names if names.count(name) > 1]:  # of equal names YAML takes the last
            raise UsageError(f"'{path}' names '{twice[0]}' twice: leave one of them out")
        content = loader.construct_document(root)
        ratios = content["prune_ratios"]
        sparsities = {str(name).removesuffix(".weight"): float(value) for name, value in ratios.items()}
    except OSError as error:
        raise UsageError(f"cannot read '{path}' ({error.strerror})") from error
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"'{path}' is not a file of 'prune_ratios: {{layer: sparsity}}' in YAML") from error
    if len(sparsities) < len(ratios):
        raise UsageError(f"'{path}' names a layer both by its module and by its weight: leave one of them out")
    return sparsities
