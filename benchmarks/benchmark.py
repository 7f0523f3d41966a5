"""How fast this project is, beside the usual way of writing the same: python -m benchmarks.benchmark.

Everything that is compared is measured in one run, in turns, and given as the median of the turns with its lower and
upper quartile; a ratio is the median of the turns' ratios. Prints a table and whether each target is met, and writes
both with all samples as JSON.
"""

import argparse
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.baseline import UsualLoop, serve
from benchmarks.loop import BATCH, CLASSES, LOG_INTERVAL, MASK_INTERVAL, Loop, random_images
from benchmarks.report import Report, measure, ratios
from imagedata.images import Images
from imagedata.loaders import Batch
from models import build_model
from prune import METHODS, Pruner
from sam import SAM
from training.logger import git_revision, versions
from training.optim import build_optimizer
from training.state import TrainState
from training.step import TrainingStep, build_objective
from utils.device import device_name, keep_freed_memory, pick_device, use_deterministic_kernels
from utils.errors import UsageError
from utils.files import write_text_atomically
from utils.precision import PRECISIONS, Execution, resolve_execution

DYNAMIC = [name for name, method in METHODS.items() if method.has_interval]
ROOT = Path(__file__).parent.parent
TURNS = 7  # by default
MEMORY_BATCH = 32  # of the network whose memory is measured
STEP_FLOPS, STEPS = 3e10, 62_560  # what `auto` is resolved for: ResNet-20, 160 epochs of CIFAR-10


@dataclass(frozen=True)
class Setting:
    """Where and how to measure a ResNet of so many layers; `scratch` is a directory to write to."""

    device: torch.device
    execution: Execution
    steps: int
    turns: int
    scratch: Path
    depth: int = 20

    @property
    def network(self) -> tuple[str, int, float]:
        """Its architecture, depth and width."""
        return "resnet", self.depth, 1.0

    def repeats(self, most: int) -> int:
        """Return how often to measure something short: less often with fewer turns than by default."""
        return max(2, most * min(self.turns, TURNS) // TURNS)


@contextmanager
def usual_loop(device: torch.device, images: int, depth: int = 20) -> Iterator[Callable[[bool, int], None]]:
    """Start the usual loop in a process of its own; yield a function that runs it with data or without, for some steps."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, str(device), BATCH, images, depth))
    process.start()
    there.close()  # so that reading here ends if the process does

    def run(with_data: bool, steps: int) -> None:
        here.send((with_data, steps))
        here.recv()

    try:
        yield run
    finally:
        with suppress(OSError):  # it may be gone
            here.send(None)  # ends it, with its workers
        process.join()


def whole_steps(report: Report, setting: Setting) -> None:
    """Measure training loops end to end, with each optimizer, with masks and logging."""
    device, steps = setting.device, setting.steps
    images = random_images(steps * BATCH)
    arms: dict[str, dict] = {
        "sgd": {"optimizer": "sgd"},
        "SAM": {"v2": False},
        "SAM.v2": {},
        "SAM.v2 masked": {"method": "random"},
    }
    loops = {
        name: Loop(device, setting.execution, images, setting.scratch / name, network=setting.network, **arm)
        for name, arm in arms.items()
    }
    tasks: dict[str, Callable[[], object]] = {name: loop.run for name, loop in loops.items()}
    tasks["logging every step"] = partial(loops["SAM.v2"].run, 1)
    tasks["evaluation"] = loops["SAM.v2"].evaluate
    seconds = measure(setting.turns, tasks, device)

    rate = lambda name: [len(images) / s for s in seconds[name]]  # noqa: E731
    for name in ("sgd", "SAM", "SAM.v2", "SAM.v2 masked"):
        report.add(f"this project end to end, {name}", rate(name), "images/s")
    report.add("evaluation", rate("evaluation"), "images/s")
    report.add("SAM.v2 / sgd, time of a step", ratios(seconds["SAM.v2"], seconds["sgd"]), "")
    report.add("SAM.v2 / SAM, time of a step", ratios(seconds["SAM.v2"], seconds["SAM"]), "")
    report.add("masked / dense, time of a step", ratios(seconds["SAM.v2 masked"], seconds["SAM.v2"]), "")
    report.add("160 epochs of CIFAR-10, SAM.v2", [160 * 50_000 / r for r in rate("SAM.v2")], "s")
    step = median(seconds["SAM.v2"]) / steps
    # The loop logs once in LOG_INTERVAL steps as it is; what a logged step costs comes from logging all of them.
    cost = [(a - b) / steps for a, b in zip(seconds["logging every step"], seconds["SAM.v2"], strict=True)]
    report.add("a logged step costs", [1e3 * c for c in cost], "ms")
    logging = f"logging on / off, every {LOG_INTERVAL} steps"
    report.add(logging, [1 + c / (LOG_INTERVAL * step) for c in cost], "")

    if device.type == "cuda":
        report.target("GPU: SAM.v2 at most 1.02 of sgd", "SAM.v2 / sgd, time of a step", most=1.02)
        report.target("GPU: SAM.v2 at most 0.52 of SAM", "SAM.v2 / SAM, time of a step", most=0.52)
        report.target("GPU: masked at most 1.02 of dense", "masked / dense, time of a step", most=1.02)
        text = "GPU: 160 epochs of CIFAR-10 with SAM.v2 in at most 90 s of training"
        report.target(text, "160 epochs of CIFAR-10, SAM.v2", most=90)
    report.target("logging at most 1.01 of none", logging, most=1.01)
    share_of_peak(report, setting, loops["SAM.v2 masked"], median(seconds["SAM.v2 masked"]) / steps)
    mask_updates(report, setting, images, step)


def whole_steps_of_the_usual_loop(report: Report, setting: Setting) -> None:
    """Measure SAM.v2 end to end in turns with the usual loop, on a GPU for a quarter of the steps: that loop is slow there."""
    steps = max(1, setting.steps // 4) if setting.device.type == "cuda" else setting.steps
    images = random_images(steps * BATCH)
    ours = Loop(setting.device, setting.execution, images, setting.scratch / "usual", network=setting.network)
    with usual_loop(setting.device, len(images), setting.depth) as run_usual:
        tasks: dict[str, Callable[[], object]] = {"SAM.v2": ours.run}
        tasks |= {"usual": partial(run_usual, True, steps), "usual, no data": partial(run_usual, False, steps)}
        try:
            seconds = measure(setting.turns, tasks, setting.device)
        except (EOFError, OSError):  # its process is gone, as where workers find no shared memory
            print("the usual loop ended by itself: it is not measured", file=sys.stderr)
            return
    rates = {name: [len(images) / s for s in samples] for name, samples in seconds.items()}
    report.add("the usual loop, SAM.v2 tensor by tensor, with its data", rates["usual"], "images/s")
    report.add("the usual loop on one batch, without data", rates["usual, no data"], "images/s")
    report.add("this project beside the usual loop, SAM.v2", rates["SAM.v2"], "images/s")
    ratio = "SAM.v2, this project / the usual loop"
    report.add(ratio, ratios(rates["SAM.v2"], rates["usual"]), "")
    if setting.device.type == "cpu":
        report.target("CPU: at least 3.0 times the images/s of the usual loop, end to end", ratio, least=3.0)


def alternatives(setting: Setting) -> list[Execution]:
    """Return each precision, compiled and not, as a run would execute it, and the chosen one without its graph."""
    precisions = PRECISIONS if setting.device.type == "cuda" else ("fp32", "bf16")  # fp16 is not for CPUs
    named = [resolve_execution(p, c, setting.device, STEP_FLOPS, STEPS) for p in precisions for c in ("off", "on")]
    return list(dict.fromkeys([*named, setting.execution, replace(setting.execution, graphed=False)]))


def executions(report: Report, setting: Setting) -> None:
    """Measure the alternatives, and whether the chosen one is the fastest in its precision (accuracy decides that)."""
    choices = alternatives(setting)
    seconds: dict[str, list[float]] = {}
    for precision in dict.fromkeys(choice.precision for choice in choices):
        chosen = precision == setting.execution.precision  # others may be emulated, and take minutes
        steps, turns = (setting.steps, setting.turns) if chosen else (max(2, setting.steps // 8), 1)
        images = random_images(steps * BATCH)
        tasks: dict[str, Callable[[], object]] = {}
        for choice in choices:
            if choice.precision == precision:
                loop = Loop(setting.device, choice, images, setting.scratch / str(choice), network=setting.network)
                tasks[str(choice)] = partial(loop.run, sys.maxsize)  # not logged: such steps are too few to be graphed
        measured = measure(turns, tasks, setting.device)
        for name, samples in measured.items():
            report.add(f"SAM.v2 in {name}", [len(images) / s for s in samples], "images/s")
        seconds |= measured if chosen else {}
    fastest = min(seconds, key=lambda name: median(seconds[name]))
    ratio = "the chosen execution / the fastest in its precision, time of a step"
    report.add(ratio, ratios(seconds[str(setting.execution)], seconds[fastest]), "")
    report.target("the chosen execution at most 1.03 of the fastest in its precision", ratio, most=1.03)


def share_of_peak(report: Report, setting: Setting, loop: Loop, step: float) -> None:
    """Where the time of a step goes, and how much of what a matrix product reaches the operations of a step come to."""
    device = setting.device
    size, dtype = 8192 if device.type == "cuda" else 2048, {"bf16": torch.bfloat16, "fp32": torch.float32}
    matrix = torch.randn(size, size, device=device, dtype=dtype[setting.execution.precision])
    seconds = median(measure(setting.repeats(50), {"product": lambda: matrix @ matrix}, device)["product"])
    peak = report.add(f"product of two {size} x {size} matrices", 2e-9 * size**3 / seconds, "GFLOP/s")
    flops = loop.meter.flops.dense_training
    attained = report.add("a step of SAM.v2, masked", 1e-9 * BATCH * flops / step, "GFLOP/s")
    report.add("a step of SAM.v2, masked / matrix product", attained / peak, "")
    with torch.profiler.profile(acc_events=True) as profile:
        loop.run()
    on_cuda = device.type == "cuda"
    spent = {"compiled kernels": 0.0, "convolutions": 0.0, "masks and base optimizer": 0.0, "everything else": 0.0}
    # In this order: the names of compiled kernels have those of what they stand for in them.
    kinds = {"triton": 0, "CompiledFxGraph": 0, "conv": 1, "gemm": 1, "cudnn": 1, "foreach": 2, "multi_tensor": 2}
    kinds |= {"fused_sgd": 2}
    for event in profile.key_averages():
        kind = next((place for word, place in kinds.items() if word in event.key), 3)
        spent[list(spent)[kind]] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    for name, value in spent.items():
        report.add(f"share of a step of SAM.v2, masked: {name}", value / sum(spent.values()), "")


def mask_updates(report: Report, setting: Setting, images: Images, step: float) -> None:
    """Measure masking alone, and what a change of the masks takes beyond that with each method that makes one."""
    calls: dict[str, Callable[[], object]] = {}
    for name in ("random", *DYNAMIC):
        loop = Loop(setting.device, Execution(), images, setting.scratch / name, method=name, network=setting.network)
        for p in loop.model.parameters():
            p.grad = torch.randn_like(p)
        due = MASK_INTERVAL - 1

        def call(pruner: Pruner = loop.pruner, at: int = due) -> None:
            pruner.mask_gradients(at)
            pruner.mask_weights()
            pruner.update_masks(at)

        calls[name] = call
    seconds = measure(setting.repeats(20), calls, setting.device)
    report.add("masks on gradients and weights", [1e3 * s for s in seconds["random"]], "ms")
    for name in DYNAMIC:
        extra = [a - b for a, b in zip(seconds[name], seconds["random"], strict=True)]
        report.add(f"a mask update of {name}", [1e3 * s for s in extra], "ms")
        ratio = f"{name} / static masks, every {MASK_INTERVAL} steps"
        report.add(ratio, [1 + s / (MASK_INTERVAL * step) for s in extra], "")
        report.target(f"{name} at most 1.02 of static masks", ratio, most=1.02)


def optimizer_alone(report: Report, setting: Setting) -> None:
    """Measure optimizer steps on given gradients, and count the numbers that optimizers keep."""
    device = setting.device
    options: dict = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    repeats = 20 if device.type == "cuda" else 1  # so that the last wait is little beside what it waits for

    def repeated(step: Callable[[], object]) -> Callable[[], object]:
        return lambda: [step() for _ in range(repeats)]

    def parameters() -> list[Tensor]:
        model = build_model("resnet", setting.depth, CLASSES).to(device).to(memory_format=torch.channels_last)
        for p in model.parameters():
            p.grad = 1e-3 * torch.randn_like(p)
        return list(model.parameters())

    default, fused = (torch.optim.SGD(parameters(), **options, fused=f) for f in (None, True))
    model = build_model("resnet", setting.depth, CLASSES).to(device).to(memory_format=torch.channels_last)
    ours = build_optimizer("sgd-sam", model, **options, rho=0.05, v2=True)
    assert isinstance(ours, SAM)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    usual = UsualLoop(build_model("resnet", setting.depth, CLASSES), device, BATCH, None).optimizer
    for p in usual.param_groups[0]["params"]:
        p.grad = 1e-3 * torch.randn_like(p)

    # One gradient stands for that of every step; in a loop it would be left over from a backward pass too many.
    warnings.filterwarnings("ignore", "one-step SAM does not use the gradient")

    def samv2() -> None:
        ours.first_step()
        ours.second_step()

    def per_tensor() -> None:
        usual.first_step()
        usual.second_step()

    steps = {"default": default.step, "fused": fused.step, "ours": samv2, "usual": per_tensor}
    seconds = measure(setting.repeats(300), {name: repeated(step) for name, step in steps.items()}, device)
    for name, text in {
        "default": "torch.optim.SGD by default, alone",
        "fused": "its fused kernel, the base optimizer here",
        "ours": "SAM.v2 around it, all of it",
        "usual": "SAM.v2 tensor by tensor around the default, all of it",
    }.items():
        report.add(text, [1e3 * s / repeats for s in seconds[name]], "ms")
    report.add("SAM.v2 / its base optimizer, alone", ratios(seconds["ours"], seconds["fused"]), "")
    own = [a - b for a, b in zip(seconds["ours"], seconds["fused"], strict=True)]
    cost = "SAM.v2's own cost / a default SGD step"
    report.add(cost, ratios(own, seconds["default"]), "")
    own = [a - b for a, b in zip(seconds["usual"], seconds["default"], strict=True)]
    report.add("the same, tensor by tensor", ratios(own, seconds["default"]), "")
    if device.type == "cpu":
        report.target("CPU: SAM.v2's own cost at most 0.8 of a default SGD step", cost, most=0.8)
    count = sum(p.numel() for p in model.parameters())
    floats = sum(t.numel() for s in ours.state.values() for t in s.values() if t is not None)
    kept = "numbers a parameter that SAM.v2 with SGD keeps"
    report.add(kept, round(floats / count, 3), "")
    report.add("the same, tensor by tensor", usual.floats() / count, "")
    report.target("at most 2.0 numbers a parameter kept by SAM.v2 with SGD", kept, most=2.0)


def peak_memory(
    name: str, v2: bool, device_text: str, trace: Path, pipe: multiprocessing.connection.Connection
) -> None:
    """Send the bytes that torch hands out at the peak of three steps of VGG-19, in a process of its own."""
    device = torch.device(device_text)
    with torch.profiler.profile(profile_memory=True) as profile:
        model = build_model("vgg", 19, CLASSES).to(device).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(name, model, lr=0.1, weight_decay=5e-4, momentum=0.9, rho=0.05, v2=v2)
        state = TrainState(model, optimizer, Pruner(model))
        step = TrainingStep(state, build_objective(model, Execution(), MEMORY_BATCH), lr_at=lambda step: 0.1)
        images = torch.randn(MEMORY_BATCH, 3, 32, 32, device=device)
        batch = Batch(images, torch.full((MEMORY_BATCH, CLASSES), 0.1, device=device), MEMORY_BATCH)
        for _ in range(3):
            step(batch)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:  # of the resident memory a part is what the C library keeps for later
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        peak = max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
    pipe.send((peak, sum(p.nbytes for p in model.parameters())))


def memory(report: Report, setting: Setting) -> None:
    """Measure the peak memory of SAM.v2 over that of SGD."""
    peaks, context = {}, multiprocessing.get_context("spawn")
    for name in ("sgd", "sgd-sam"):
        here, there = context.Pipe()
        arguments = (name, name == "sgd-sam", str(setting.device), setting.scratch / "trace.json", there)
        process = context.Process(target=peak_memory, args=arguments)
        process.start()
        there.close()
        peaks[name], parameters = here.recv()
        process.join()
    report.add(f"peak memory, VGG-19 at batch {MEMORY_BATCH}, sgd", peaks["sgd"] / 2**20, "MiB")
    report.add(f"peak memory, VGG-19 at batch {MEMORY_BATCH}, SAM.v2", peaks["sgd-sam"] / 2**20, "MiB")
    extra = "SAM.v2 over sgd, in buffers of parameters"
    report.add(extra, round((peaks["sgd-sam"] - peaks["sgd"]) / parameters, 3), "")
    report.target("peak memory of SAM.v2 at most one buffer of parameters over sgd", extra, most=1.0)


def launches(report: Report, setting: Setting) -> None:
    """Measure the seconds from launching the command line on digits to the end of its first step."""
    cases = (
        ("not compiled", "off", "none"),
        ("compiled, cold cache", "on", "new"),
        ("compiled, warm cache", "on", "new"),
    )
    for number, (name, compilation, cache) in enumerate(cases):
        flags = (
            f"--dataset digits --optmzr sgd-sam --sam-v2 --epochs 1 --compile {compilation} --device {setting.device}"
        )
        command = [
            sys.executable,
            "main_prune_train.py",
            *flags.split(),
            "--output-dir",
            str(setting.scratch / f"launch{number}"),
        ]
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(setting.scratch / cache),
            "TRITON_CACHE_DIR": str(setting.scratch / cache / "triton"),
        }
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("the first step took"):
                    report.add(f"from launch to the first step, {name}", time.perf_counter() - began, "s")
                    break
            else:
                raise RuntimeError(f"a run for the time to its first step ended before that: {' '.join(command)}")
            process.kill()


PARTS = {  # the most telling first, for those who have no time for all
    "steps": whole_steps,
    "optimizer": optimizer_alone,
    "memory": memory,
    "usual": whole_steps_of_the_usual_loop,
    "executions": executions,
    "launches": launches,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (auto: CUDA where there is one)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="(%(default)s)")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="(%(default)s)")
    parser.add_argument("--depth", type=int, default=20, help="layers of the ResNet, 6n + 2 (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    parser.add_argument("--turns", type=int, default=TURNS, help="of each whole training loop (%(default)s)")
    parser.add_argument("--steps", type=int, help="of a training loop in each turn (20 on the CPU, 400 on CUDA)")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="(%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.turns < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--turns and --steps have to be whole numbers above 0")
    if args.depth < 8 or args.depth % 6 != 2:
        parser.error("--depth has to be 8, 14, 20 or another 6n + 2")
    if args.output.is_dir():
        parser.error(f"--output: '{args.output}' is a directory: name a file")
    if not args.output.parent.is_dir():  # known now, not when everything is measured
        parser.error(f"--output: there is no directory '{args.output.parent}'")
    try:
        device = pick_device(args.device)
        execution = resolve_execution(args.precision, args.compile, device, STEP_FLOPS, STEPS)
    except UsageError as error:
        parser.error(str(error))
    use_deterministic_kernels(False)
    keep_freed_memory()
    steps = args.steps or (400 if device.type == "cuda" else 20)
    report = Report()
    about = {"command": sys.argv, "device": device_name(device), "cores": len(os.sched_getaffinity(0)),
             "execution": str(execution), "versions": versions(), "git": git_revision()}  # fmt: skip
    print(f"ResNet-{args.depth}, batch {BATCH}, {device_name(device)}, {execution}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(device, execution, steps, args.turns, Path(scratch), args.depth)
        for name in args.parts:
            PARTS[name](report, setting)
            gc.collect()
            # After each part: what is measured counts, even if the rest is cut off.
            result = about | {"figures": report.figures, "targets": report.targets}
            write_text_atomically(args.output, json.dumps(result, indent=1) + "\n")
    report.show_targets()
    print(f"\n{args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
