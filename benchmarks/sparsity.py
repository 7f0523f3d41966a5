"""Where sparsity pays: python -m benchmarks.sparsity.

Trains and runs one network dense, with masks, compacted (see prune/compact.py), and in ONNX Runtime, for several patterns
and sparsities. Everything is measured in turns; figures are medians, and a speed-up is the median of the turns' ratios to
the dense network. Prints a table and whether each target is met; writes both with all samples as JSON, a picture, and the
table into a page.
"""

import argparse
import copy
import gc
import importlib.util
import io
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.benchmark import STEP_FLOPS, STEPS
from benchmarks.report import Report, four_digits, measure, ratios
from imagedata.loaders import Batch
from models import build_model
from prune import Pruner
from prune.compact import compact
from prune.kernels import GatheredLinear
from prune.patterns import Channels
from training.exported import pack
from training.logger import git_revision, versions
from training.optim import build_optimizer
from training.state import TrainState
from training.step import TrainingStep, build_objective
from utils.device import device_name, keep_freed_memory, pick_device, use_deterministic_kernels
from utils.errors import UsageError
from utils.files import write_text_atomically
from utils.precision import Execution, resolve_execution

BATCH, CLASSES, SIDE = 128, 10, 32
SPARSITIES = (0.5, 0.7, 0.9, 0.95)
PATTERNS = ("unstructured", "fan-in", "2:4", "channel")
PARTS = ("training", "inference", "memory")
BEGIN, END = "<!-- written by benchmarks.sparsity -->\n", "<!-- end -->\n"
SOME = 1.1  # times as fast, from which on a difference is worth a word


@dataclass(frozen=True)
class Form:
    """One way of having the network.

    Attributes:
        name: of its figures.
        model: the network.
        pruner: its masks; of the compacted network there are none, and those of a dense one are empty.
        sparsity: share of its convolution and linear weights that is zero or gone.
        gone: share of its channels that is gone.
        trains: whether it is worth training on its own.
        fast: the network for inference on so many images.
        bytes: of its tensors in an exported file.
    """

    name: str
    model: nn.Module
    pruner: Pruner
    sparsity: float
    gone: float
    trains: bool
    fast: Callable[[Tensor], nn.Module]
    bytes: int


@dataclass(frozen=True)
class Setting:
    """What to measure: an architecture with its depth and width, on a device, as trainings of it and with --compact compute."""

    network: tuple[str, int | None, float]
    device: torch.device
    execution: Execution
    compacted: Execution
    turns: int
    batch: int

    def build(self) -> nn.Module:
        """Return the network, the same every time."""
        torch.manual_seed(0)
        arch, depth, width = self.network
        return build_model(arch, depth, CLASSES, width).to(self.device).to(memory_format=torch.channels_last)

    def images(self, count: int) -> Tensor:
        """Return random images."""
        return torch.randn(count, 3, SIDE, SIDE, device=self.device).to(memory_format=torch.channels_last)


def masked_network(setting: Setting, pattern: str, sparsity: float | None) -> tuple[nn.Module, Pruner]:
    """Return a network with random masks. Raises ValueError for a sparsity that the pattern cannot have.

    Args:
        setting: what to measure.
        pattern: of the masks.
        sparsity: share of the weights that is zero, with channels that of the channels; None where the pattern says it.
    """
    model = setting.build()
    if pattern == "channel" and sparsity is not None:
        sparsity = sparsity_of(model, sparsity)
    pruner = Pruner(model, "random", sparsity, None if sparsity is None else "uniform", pattern=pattern)
    pruner.choose_masks()
    return model, pruner


def sparsity_of(model: nn.Module, share: float) -> float:
    """Return the share of weights that is gone where this share of the channels of each group is."""
    pruner = Pruner(model, pattern="channel")
    assert isinstance(pruner.pattern, Channels)
    size = {name: group.size for name, group in pruner.pattern.groups.items()}
    kept = {name: max(1, round((1 - share) * channels)) for name, channels in size.items()}
    gone = pruner.pattern.weights(size) - pruner.pattern.weights(kept)
    return gone / sum(w.numel() for w in pruner.masks.weights.values())


def forms(setting: Setting, patterns: list[str], sparsities: list[float]) -> list[Form]:
    """Return the dense network, and each pattern at each sparsity that it can have: with masks, and compacted."""
    dense = setting.build()
    nothing = Pruner(dense)
    found = [Form("dense", dense, nothing, 0.0, 0.0, True, lambda images: dense, _bytes(dense, nothing))]
    for pattern in patterns:
        wanted: list[float | None] = [None] if ":" in pattern else list(sparsities)
        for sparsity in wanted:
            name = pattern if sparsity is None else f"{pattern} {100 * sparsity:g}%"
            try:
                model, pruner = masked_network(setting, pattern, sparsity)
            except ValueError as error:
                print(f"{name}: left out, since {error}", file=sys.stderr)
                continue
            found += _both(name, model, pruner)
    return found


def _both(name: str, model: nn.Module, pruner: Pruner) -> list[Form]:
    groups = pruner.pattern.pool(pruner.masks.masks) if isinstance(pruner.pattern, Channels) else {}
    channels = sum(map(len, groups.values()))
    gone = sum(int((share == 0).sum()) for share in groups.values()) / channels if channels else 0.0
    sparsity, size = pruner.masks.sparsity(), _bytes(model, pruner)
    masked = Form(f"{name}, masked", model, pruner, sparsity, gone, True, lambda images: model, size)
    small = compact(model, pruner.masks) if channels else copy.deepcopy(model)
    without = Pruner(small)

    def fast(images: Tensor) -> nn.Module:
        return compact(model, pruner.masks, images)

    size = _bytes(small, without) if channels else size
    return [masked, Form(f"{name}, compacted", small, without, sparsity, gone, bool(channels), fast, size)]


def _bytes(model: nn.Module, pruner: Pruner) -> int:
    """Return the bytes of the tensors of an exported file."""
    names = {id(p): name for name, p in model.named_parameters()}
    masks = {names[id(pruner.masks.parameter(name))]: mask for name, mask in pruner.masks.state_dict().items()}
    return sum(tensor.nbytes for tensor in pack(model.state_dict(), masks).values())


def training(setting: Setting, model: nn.Module, pruner: Pruner, execution: Execution) -> Callable[[], object]:
    """Return a function that takes a step of one-step SAM on a batch of random images."""
    optimizer = build_optimizer("sgd-sam", model, lr=1e-3, weight_decay=5e-4, momentum=0.9, rho=0.05, v2=True)
    pruner.optimizers = [optimizer]
    objective = build_objective(model.train(), execution, setting.batch)
    take = TrainingStep(TrainState(model, optimizer, pruner), objective, lambda step: 1e-3, graphed=execution.graphed)
    targets = torch.full((setting.batch, CLASSES), 1 / CLASSES, device=setting.device)
    batch = Batch(setting.images(setting.batch), targets, setting.batch)
    return lambda: take(batch)


def measure_training(report: Report, setting: Setting, networks: list[Form]) -> None:
    """Measure steps of training, of copies of the networks."""
    tasks = {}
    for form in networks:
        if form.trains:
            model = copy.deepcopy(form.model)
            pruner = Pruner(model)
            pruner.masks.load_state_dict(form.pruner.masks.state_dict())
            execution = setting.compacted if form.name.endswith("compacted") else setting.execution
            tasks[form.name] = training(setting, model, pruner, execution)
    _report(report, setting, "training step", tasks)


def measure_inference(report: Report, setting: Setting, networks: list[Form], batch: int) -> None:
    """Measure forward passes in evaluation mode, by torch and, where it is installed, by ONNX Runtime on the CPU."""
    images = setting.images(batch)
    repeats = max(1, 32 // batch) if setting.device.type == "cpu" else max(1, 256 // batch)
    tasks: dict[str, Callable[[], object]] = {}
    for form in networks:
        model = form.fast(images).eval()
        gathered = sum(isinstance(module, GatheredLinear) for module in model.modules())
        if gathered:
            report.add(f"{form.name}: layers that gather, batch {batch}", gathered, "")
        tasks[form.name] = _repeated(_torch_call(model, images), repeats)
        own_shapes = form.trains and not form.name.endswith("masked")  # with masks it is the dense network's graph
        if own_shapes and setting.device.type == "cpu" and has_onnx_runtime():
            call = onnx_call(copy.deepcopy(form.model).eval(), images)
            tasks[f"{form.name}, ONNX Runtime"] = _repeated(call, repeats)
    _report(report, setting, f"inference, batch {batch}", tasks, repeats)


def _torch_call(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return call


def _repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    return lambda: [call() for _ in range(times)]


def _report(
    report: Report, setting: Setting, what: str, tasks: dict[str, Callable[[], object]], repeats: int = 1
) -> None:
    seconds = measure(setting.turns, tasks, setting.device)
    for name, samples in seconds.items():
        report.add(f"{name}: {what}", [1e3 * s / repeats for s in samples], "ms")
        if name != "dense":
            report.add(f"{name}: {what}, speed-up", ratios(seconds["dense"], samples), "")


def has_onnx_runtime() -> bool:
    """Return whether ONNX files can be made and run."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def onnx_call(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """Return a function that runs a network in ONNX Runtime."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (images,), dynamo=True, external_data=False, verbose=False)
    assert program is not None
    file = io.BytesIO()
    program.save(file)  # type: ignore[arg-type]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads slow down what comes next
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda: session.run(None, inputs)


def measure_memory(report: Report, setting: Setting, networks: list[Form]) -> None:
    """Measure the bytes that torch hands out at the peak of two training steps, in a process of its own each."""
    context = multiprocessing.get_context("spawn")
    for form in networks:
        if not form.trains:
            continue
        here, there = context.Pipe()
        with tempfile.TemporaryDirectory() as scratch:
            arguments = (setting, form.model, form.pruner.masks.state_dict(), Path(scratch) / "trace.json", there)
            process = context.Process(target=peak_memory, args=arguments)
            process.start()
            there.close()
            try:
                peak = here.recv()
            except EOFError:  # it has died, and said why
                print(f"{form.name}: no figure for memory", file=sys.stderr)
                continue
            finally:
                process.join()
        report.add(f"{form.name}: peak memory of training", peak / 2**20, "MiB")


def peak_memory(
    setting: Setting, model: nn.Module, masks: dict[str, Tensor], trace: Path,
    pipe: multiprocessing.connection.Connection,
) -> None:  # fmt: skip
    """Send the bytes that torch hands out at the peak of two training steps."""
    with torch.profiler.profile(profile_memory=True) as profile:
        model = copy.deepcopy(model).to(setting.device)
        pruner = Pruner(model)
        pruner.masks.load_state_dict(masks)
        take = training(setting, model, pruner, Execution())
        for _ in range(2):
            take()
    if setting.device.type == "cuda":
        pipe.send(torch.cuda.max_memory_allocated(setting.device))
        return
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    pipe.send(max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"))


def add_targets(report: Report, networks: list[Form]) -> None:
    """Hold the figures to what was asked for."""
    for share, least in ((70, 2.0), (90, 3.0)):
        name = f"channel {share}%, compacted: training step, speed-up"
        if name in report.figures:
            text = f"compacted training without {share}% of channels at least {least} times as fast"
            report.target(text, name, least=least)
    for name in [name for name in report.figures if name.endswith(", masked: training step, speed-up")]:
        pattern = name.split(", masked")[0]
        inverse = f"{pattern}: masked / dense, time of a training step"
        report.add(inverse, [1 / sample for sample in report.figures[name]["samples"]], "")
        report.target(f"masked training at most 1.02 of dense ({pattern})", inverse, most=1.02)
    share_of_dense = "unstructured 90%, masked: exported file / dense"
    if share_of_dense in report.figures:
        report.target("exported 90% unstructured at most 0.16 of the dense bytes", share_of_dense, most=0.16)


def table(report: Report, networks: list[Form]) -> str:
    """Return the figures as a Markdown table, with a sentence per row."""
    figures = {name: figure["median"] for name, figure in report.figures.items()}

    def cell(name: str, what: str) -> str:
        time = figures.get(f"{name}: {what}")
        ratio = figures.get(f"{name}: {what}, speed-up")
        if time is None:
            return ""
        return four_digits(time) + (f" (x{ratio:.2f})" if ratio is not None else "")

    batches = sorted({int(n.rsplit(" ", 1)[1]) for n in figures if n.startswith("dense: inference, batch")})
    times = ["training step, ms", *(f"inference of {batch}, ms" for batch in batches)]
    head = ["network", "weights gone", "channels gone", *times, "file, KiB", "peak memory, MiB", "what it is good for"]
    lines = [head, ["---"] * len(head)]
    for form in networks:
        memory = figures.get(f"{form.name}: peak memory of training")
        row = [form.name, f"{100 * form.sparsity:.1f}%", f"{100 * form.gone:.0f}%" if form.gone else ""]
        row += [cell(form.name, what) for what in ("training step", *(f"inference, batch {b}" for b in batches))]
        row += [four_digits(form.bytes / 1024), four_digits(memory) if memory else ""]
        lines.append([*row, verdict(form, networks[0], figures)])
        runtime = f"{form.name}, ONNX Runtime"
        cells = [cell(runtime, f"inference, batch {batch}") for batch in batches]
        if any(cells):
            lines.append([runtime, *row[1:3], "", *cells, "", "", "answering without torch"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def verdict(form: Form, dense: Form, figures: dict[str, float]) -> str:
    """Return what a row says to somebody who has to choose."""
    if form is dense:
        return "what the others are compared with"
    gains = []
    for what, words in (("training step", "trains"), ("inference, batch", "answers")):
        names = [n for n in figures if n.startswith(f"{form.name}: {what}") and n.endswith("speed-up")]
        found = [figures[name] for name in names]
        if found and max(found) >= SOME:
            span = f"{min(found):.1f} to " if max(found) - min(found) > 0.1 else ""
            gains.append(f"{words} {span}{max(found):.1f} times as fast")
    size = f"a file of {100 * form.bytes / dense.bytes:.2g}% of the dense one"
    return f"{' and '.join(gains)}; {size}" if gains else f"{size}, and no faster"


def draw(report: Report, networks: list[Form], path: Path) -> None:
    """Draw the speed-up over the dense network against the share of weights that are gone."""
    from matplotlib.figure import Figure

    measured = [name.removeprefix("dense: ") for name in report.figures if name.startswith("dense: ")]
    panels = [what for what in measured if what == "training step" or what.startswith("inference")]
    figure = Figure((4.2 * len(panels), 4), layout="constrained")
    lines: dict[str, list[Form]] = {}
    for form in networks[1:]:
        pattern, kind = form.name.split(",")[0].split()[0], form.name.rsplit(", ", 1)[1]
        lines.setdefault(f"{pattern}, {kind}", []).append(form)
    for axes, what in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (label, members) in enumerate(lines.items()):
            for suffix, style in (("", "-"), (", ONNX Runtime", ":")):
                points = [
                    (100 * form.sparsity, report.figures[key]["median"])
                    for form in sorted(members, key=lambda form: form.sparsity)
                    if (key := f"{form.name}{suffix}: {what}, speed-up") in report.figures
                ]
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        style,
                        marker="o",
                        markersize=4,
                        color=f"C{number}",
                        label=label + suffix,
                    )
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(title=what, xlabel="weights gone, %", ylabel="times as fast as dense")
    handles = {h.get_label(): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=150)


def around_table(page: Path) -> tuple[str, str]:
    """Return what stands before and after the place of the table in a page. Raises UsageError where it has none."""
    content = page.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise UsageError(f"'{page}' has no lines '{BEGIN.strip()}' and '{END.strip()}' for the table: add them")
    before, rest = content.split(BEGIN)
    return before + BEGIN, END + rest.split(END)[1]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="resnet", help="(%(default)s)")
    parser.add_argument("--depth", type=int, help="(the family's own)")
    parser.add_argument("--width", type=float, default=1.0, help="(%(default)g)")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS), help="(all)")
    parser.add_argument(
        "--sparsities",
        nargs="+",
        type=float,
        default=list(SPARSITIES),
        help="shares of the weights, with channel those of the channels (0.5 0.7 0.9 0.95)",
    )
    parser.add_argument(
        "--batch", type=int, default=BATCH, help="images of a training step and of the larger batch (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (auto: CUDA where there is one)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of training (%(default)s)"
    )
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="of training (%(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    parser.add_argument("--output", type=Path, default=Path("sparsity.json"), help="(%(default)s)")
    parser.add_argument("--picture", type=Path, help="write the picture to this file, PNG or PDF")
    parser.add_argument("--page", type=Path, help="write the table into this page, between its two marks")
    return parser


def refuse_bad_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a sentence for what would be found out only after everything is measured."""
    if args.turns < 1 or args.batch < 2:
        parser.error("--turns has to be a whole number above 0, and --batch above 1")
    if not all(0 < sparsity < 1 for sparsity in args.sparsities):
        parser.error("--sparsities lie between 0 and 1")
    if args.output.is_dir():
        parser.error(f"--output: '{args.output}' is a directory: name a file")
    if args.picture and not {"training", "inference"}.intersection(args.parts):
        parser.error("--picture shows times: add training or inference to --parts")
    if args.picture and args.picture.suffix not in (".png", ".pdf"):
        parser.error(f"--picture: '{args.picture}' is no name of a PNG or PDF file")
    if args.picture and not importlib.util.find_spec("matplotlib"):
        parser.error("--picture needs matplotlib: pip install -r requirements-analysis.txt")
    for name in ("output", "picture", "page"):
        if (path := getattr(args, name)) is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{name}: there is no directory '{path.parent}'")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    refuse_bad_arguments(parser, args)
    try:
        device = pick_device(args.device)
        execution, compacted = (
            resolve_execution(args.precision, args.compile, device, STEP_FLOPS, STEPS, compacted=small)
            for small in (False, True)
        )
        setting = Setting((args.arch, args.depth, args.width), device, execution, compacted, args.turns, args.batch)
        setting.build()
        before, after = around_table(args.page) if args.page else ("", "")
    except (UsageError, ValueError, OSError) as error:
        parser.error(str(error))
    use_deterministic_kernels(False)
    keep_freed_memory()
    report = Report()
    threads = f"{torch.get_num_threads()} threads"
    network = f"{args.arch}-{args.depth}" if args.depth else args.arch
    about = {"command": sys.argv, "device": device_name(device), "cores": len(os.sched_getaffinity(0)),
             "execution": str(execution), "compacted": str(compacted), "versions": versions(), "git": git_revision()}  # fmt: skip
    where = f"{network}, width {args.width:g}, {device_name(device)}, {threads}; training: batch {args.batch}, SAM.v2, {execution}"
    if compacted != execution:
        where += f" (compacted: {compacted})"
    print(f"{where}; inference: float32, torch {torch.__version__}\n")
    networks = forms(setting, args.patterns, args.sparsities)
    for form in networks[1:]:
        report.add(f"{form.name}: exported file / dense", form.bytes / networks[0].bytes, "")
    if "training" in args.parts:
        measure_training(report, setting, networks)
        gc.collect()
    for batch in (1, args.batch) if "inference" in args.parts else ():
        measure_inference(report, setting, networks, batch)
    if "memory" in args.parts:
        measure_memory(report, setting, networks)
    add_targets(report, networks)
    report.show_targets()
    text = table(report, networks)
    print(f"\n{text}\n{args.output}")
    result = about | {"figures": report.figures, "targets": report.targets, "table": text}
    write_text_atomically(args.output, json.dumps(result, indent=1) + "\n")
    if args.picture:
        draw(report, networks, args.picture)
    if args.page:
        caption = f"{where}; inference: float32. Medians of {args.turns} turns."
        write_text_atomically(args.page, f"{before}{caption}\n\n{text}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
