"""What the studies train: tasks, arms, cells and seeds, in the order in which scripts/study.sh and study_gpu.sh run them.

A run is one arm in one cell of one task with one seed. An arm with several `values` is tuned first: in its task's first cell,
each value with the seeds TUNING_SEEDS, and the accuracy counts on images that are held out of training. The chosen value then
stands in all cells of the task, in runs with all training images and other seeds.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

TUNING_SEEDS = (100, 101)
MEASURED_IMAGES = 500
MEASURED = f"--splits train --spaces living --top 1 --trace-samples 0 --images {MEASURED_IMAGES} --rhos --adaptive-rhos"


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        title: as tables and pictures show it.
        flags: of main_prune_train.py, without the one that is tuned.
        values: of the tuned flag, to choose from; () where nothing is tuned.
        rho_of: the arm whose chosen rho it takes, scaled so that a living weight moves about as far as in the task's first cell.
        rho: of the first cell where none is chosen, scaled in the others likewise.
        length: of the training, as a multiple of the task's.
        tuned: the flag that is tuned.
    """

    title: str
    flags: str
    values: tuple[float, ...] = ()
    rho_of: str = ""
    rho: float | None = None
    length: float = 1.0
    tuned: str = "--sam-rho"

    @property
    def setting(self) -> str:
        """The name of what is tuned: `rho`, `lr` or `weight-decay`."""
        return self.tuned.removeprefix("--").removeprefix("sam-")


@dataclass(frozen=True)
class Task:
    """What is trained on.

    Attributes:
        title: for headings.
        flags: of every run.
        cells: flags by name; values are chosen in the first one.
        arms: by name; "sgd" is what the others are compared with.
        seeds: of the runs that count.
        val_split: images held out where a value is chosen.
        measured: arms whose sharpness is measured (by analysis.sharpness with the flags MEASURED).
        images: whether it needs the images of CIFAR-10: "folder" for DATA_DIR, "cifar10" for DATA_DIR or a download.
        first_seeds: of further runs that count in the first cell.
    """

    title: str
    flags: str
    cells: dict[str, str]
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    val_split: int = 0
    measured: tuple[str, ...] = ()
    images: str = ""
    first_seeds: tuple[int, ...] = ()

    @property
    def first(self) -> str:
        """The cell in which values are chosen."""
        return next(iter(self.cells))

    @property
    def epochs(self) -> int:
        """How long a run is, except of arms of another length."""
        return int(re.findall(r"--epochs (\d+)", self.flags)[0])

    def seeds_of(self, cell: str) -> tuple[int, ...]:
        """Return the seeds of the runs that count in a cell."""
        return (*self.seeds, *self.first_seeds) if cell == self.first else self.seeds

    def masks(self, cell: str) -> tuple[str, float]:
        """Return a cell's pruning method and its sparsity."""
        flags = dict(re.findall(r"--(prune-method|sparsity) (\S+)", self.cells[cell]))
        return flags["prune-method"], float(flags.get("sparsity", 0))

    def scale(self, cell: str) -> float:
        """Return the factor of rho by which a perturbation spread evenly moves each living weight about as far as in the first cell.

        Biases and batch norm, which are perturbed as well, are not counted: at 98% they would make some 10%.
        """
        return math.sqrt((1 - self.masks(cell)[1]) / (1 - self.masks(self.first)[1]))

    def has(self, cell: str, arm: str) -> bool:
        """Return whether an arm is trained in a cell: it is not where it would be the same as another one."""
        if "--sam-unmasked" in self.arms[arm].flags:
            return self.masks(cell)[0] != "none"
        return not self.arms[arm].rho_of or self.scale(cell) != 1


# fmt: off
SAM, ONE_STEP = "--optmzr sgd-sam", "--optmzr sgd-sam --sam-v2"
RHOS = (0.05, 0.1, 0.2, 0.3, 0.5)  # five, as every arm has; more where the digits chose an end
ARMS = {
    "sgd":            Arm("SGD", "--optmzr sgd"),
    "sam":            Arm("SAM (two-step)", SAM, RHOS),
    "previous":       Arm("one-step SAM", ONE_STEP, RHOS),
    "msam":           Arm("MSAM", f"{ONE_STEP} --sam-direction momentum", (-0.3, -1, -2, -3, -5)),
    "random":         Arm("random", f"{ONE_STEP} --sam-direction random", (0.1, 0.3, 1, 2, 4, 8, 16, 32)),
    "random-scaled":  Arm("random, scaled", f"{ONE_STEP} --sam-direction random", rho_of="random"),
    "sgd-1e-4":       Arm("SGD, weight decay 1e-4", "--optmzr sgd --weight-decay 1e-4"),  # the SGD arm of the paper's code
    "sgd-lr":         Arm("SGD, learning rate tuned", "--optmzr sgd", (0.01, 0.02, 0.05, 0.2, 0.5, 1, 2), tuned="--lr"),  # the others have 0.1
    "sgd-decay":      Arm("SGD, weight decay tuned", "--optmzr sgd", (1e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05), tuned="--weight-decay"),  # the others have 5e-4
    "sgd-quarter":    Arm("SGD, a quarter as long", "--optmzr sgd", length=0.25),  # ending early keeps wrong labels out, too
    "sgd-half":       Arm("SGD, half as long", "--optmzr sgd", length=0.5),
    "sgd-long":       Arm("SGD, twice as long", "--optmzr sgd", length=2),  # at the cost of two-step SAM
    "nesterov":       Arm("SGD, Nesterov", "--optmzr sgd --nesterov"),
    "asam":           Arm("ASAM (two-step)", f"{SAM} --adaptive", (0.25, 0.5, 1, 2, 4, 8)),
    "late-0.1":       Arm("SAM in the last 10%", f"{SAM} --sam-from 0.9", RHOS),
    "late-0.25":      Arm("SAM in the last 25%", f"{SAM} --sam-from 0.75", (*RHOS, 1, 2)),
    "every-5":        Arm("SAM every 5 steps", f"{SAM} --sam-every 5", (*RHOS, 1)),
    "previous-minus": Arm("one-step SAM, rho < 0", ONE_STEP, tuple(-rho for rho in (0.02, *RHOS))),
    "momentum":       Arm("momentum, rho > 0", f"{ONE_STEP} --sam-direction momentum", (0.03, 0.1, 0.3, 1, 2, 3, 5)),
    "ema":            Arm("average of gradients", f"{ONE_STEP} --sam-direction ema", (0.1, 0.3, 0.5, 1, 2)),
    "unmasked":       Arm("one-step SAM, unmasked", f"{ONE_STEP} --sam-unmasked", (0.1, 0.3, 0.5, 1, 2, 3)),  # its norm is spread over pruned weights, too: larger rhos
}
MAIN = ("sgd", "sam", "previous", "msam", "random")
RIVALS = ("random-scaled", "late-0.25", "sgd-decay", "sgd-half")  # what one step has to beat beside them
OTHERS = tuple(name for name in ARMS if name not in (*MAIN, *RIVALS))
FIRST_ALONE = ("sgd-1e-4", "sgd-lr", "sgd-quarter", "sgd-long")  # these of them in the first cells only: they ask how SGD is tuned

SPARSE = "--sparsity-distribution erk --sparsity"
CELLS = {
    "random-0.9":  f"--prune-method random {SPARSE} 0.9",
    "random-0.95": f"--prune-method random {SPARSE} 0.95",
    "random-0.98": f"--prune-method random {SPARSE} 0.98",
    "rigl-0.9":    f"--prune-method rigl {SPARSE} 0.9",
    "dense":       "--prune-method none",
}
DIGITS = "--dataset digits --label-noise 0.4 --epochs 60 --batch-size 64 --arch resnet --depth 20 --precision fp32 --compile off"
# A pilot chose the size, two-step SAM against SGD: seeds 0 and 1 with wrong labels, seed 0 with right ones. They do not count.
CIFAR_PART = "--image-size 16 --train-images 500 --epochs 100 --batch-size 64 --arch resnet --depth 8 --width 2 --precision fp32 --compile off --eval-every 100"
CIFAR_CLEAN = Task("A part of CIFAR-10, right labels", CIFAR_PART, CELLS, ARMS, seeds=tuple(range(2, 7)), first_seeds=tuple(range(7, 12)), val_split=5000, measured=MAIN, images="folder")

# What the rules add where SGD has the weight decay that held-out images chose for it: each rho is chosen anew.
DECAY_TASKS = ("cifar-clean-decay", "digits-noise-decay", "cifar-noise-decay")
DECAY_ARMS = {arm: ARMS[arm] for arm in ("sgd", "previous", "late-0.25", "sam", "msam", "random")}

# Two epochs of a part of CIFAR-10: whether every method runs and reaches its sparsity.
METHODS = "--train-images 10000 --arch resnet --depth 20 --epochs 2 --precision fp32 --compile off"
STATIC = ("random", "magnitude", "snip", "iter-snip", "force", "grasp", "synflow")
MOVING = ("set", "rigl", "mest", "dsr", "snfs", "gmp", "granet", "acdc")
PER_METHOD = {
    "dense": "--prune-method none",
    **{f"{method}-0.9": f"--prune-method {method} --sparsity 0.9" for method in STATIC},
    **{f"{method}-0.9": f"--prune-method {method} --sparsity 0.9 --update-interval 20" for method in MOVING},
    "mest-soft-0.9": "--prune-method mest --sparsity 0.9 --update-interval 20 --mest-soft",
    "lth-0.9": "--prune-method lth --sparsity 0.9 --lth-rounds 3 --lth-rewind 20",
    "lth-keep-0.9": "--prune-method lth --sparsity 0.9 --lth-rounds 3 --lth-rewind 20 --lth-keep-weights",
    "lamp-0.9": "--prune-method lamp --sparsity 0.9 --lth-rounds 3 --lth-rewind 20",
    # in braces: the last checkpoint of that run
    "oneshot-0.9": "--prune-method oneshot --sparsity 0.9 --pretrained {dense-previous-seed0}",
    "final-0.9": "--prune-method final --sparsity 0.9 --recalibrate-bn",
    **{f"{method}-0.98": f"--prune-method {method} --sparsity 0.98" for method in ("random", "snip")},
    **{f"{method}-0.98": f"--prune-method {method} --sparsity 0.98 --update-interval 20" for method in ("rigl", "gmp")},
}
METHOD_ARMS = {
    "previous": Arm("one-step SAM", f"{ONE_STEP} --sam-rho 0.05"),
    "sgd":      ARMS["sgd"],
    "cram":     Arm("CrAM+", "--optmzr sgd-cram"),
    "safe":     Arm("SAFE", "--optmzr sgd-safe"),
}

# Whether SAM and the one-step rules lift other methods, too: the six above whose two accuracies at 90% have the highest mean,
# LTH once. The rhos are those that the digits chose. LTH and LAMP train four times the length.
NOISE_CELLS = {
    "lth-0.9": PER_METHOD["lth-keep-0.9"],
    "lamp-0.9": PER_METHOD["lamp-0.9"],
    **{f"{method}-0.9": f"--prune-method {method} {SPARSE} 0.9" for method in ("dsr", "set", "mest", "granet")},
}
NOISE_RHOS = {"sam": 0.2, "msam": -2, "previous": 0.3, "random": 8}
NOISE_ARMS = {"sgd": ARMS["sgd"]} | {
    arm: Arm(ARMS[arm].title, f"{ARMS[arm].flags} --sam-rho {rho:g}") for arm, rho in NOISE_RHOS.items()
}

# The paper's own network at its own length. It took rho = 0.05, and weight decay 1e-4 for SGD and 5e-4 for SAM. 1e-3 and 2e-3
# are here because SGD gained most by a larger weight decay on the small tasks. RigL stands for the paper's methods. Nothing is
# tuned: 0.3 is what the digits with label noise chose for one-step SAM, 0.1 is common for two-step SAM on CIFAR-10, and 3 about
# what MSAM's paper takes. 9.4 moves each living weight as far as the 8 of the digits does.
PAPER = "--arch resnet --depth 32 --width 2 --epochs 160"
PAPER_CELLS = {
    f"rigl-{sparsity}-batch{batch}": f"--prune-method rigl {SPARSE} {sparsity} --batch-size {batch}"
    for sparsity in (0.98, 0.95, 0.9) for batch in (64, 128)
}
PAPER_ARMS = {
    "sgd":          ARMS["sgd"],
    "previous":     Arm("one-step SAM, the paper's rho", f"{ONE_STEP} --sam-rho 0.05"),
    "sam":          Arm("SAM (two-step)", f"{SAM} --sam-rho 0.1"),
    "previous-0.3": Arm("one-step SAM, rho 0.3", f"{ONE_STEP} --sam-rho 0.3"),
    "msam":         Arm("MSAM", f"{ONE_STEP} --sam-direction momentum --sam-rho -3"),
    "sgd-1e-4":     ARMS["sgd-1e-4"],
    "sgd-1e-3":     Arm("SGD, weight decay 1e-3", "--optmzr sgd --weight-decay 1e-3"),
    "sgd-2e-3":     Arm("SGD, weight decay 2e-3", "--optmzr sgd --weight-decay 2e-3"),
    "late-0.25":    Arm("SAM in the last 25%", f"{SAM} --sam-from 0.75 --sam-rho 0.1"),
    "random":       Arm("random", f"{ONE_STEP} --sam-direction random", rho=9.4),
}

def with_decay(task: Task, decay: float) -> Task:
    """Return the first cell of a task at another weight decay."""
    flags, seeds = f"{task.flags} --weight-decay {decay}", task.seeds_of(task.first)
    cells = {task.first: task.cells[task.first]}
    return replace(task, title=f"{task.title}, weight decay {decay}", flags=flags, cells=cells, arms=DECAY_ARMS, seeds=seeds, first_seeds=(), measured=())


DIGITS_NOISE = Task("Digits, 40% of the training labels wrong", DIGITS, CELLS, ARMS, tuple(range(10)), val_split=237, measured=MAIN)
CIFAR_NOISE = replace(CIFAR_CLEAN, title="A part of CIFAR-10, 40% of the training labels wrong", flags=f"--label-noise 0.4 {CIFAR_PART}")
TASKS = {
    "digits-noise": DIGITS_NOISE,
    "cifar-noise": CIFAR_NOISE,
    "cifar-clean": CIFAR_CLEAN,
    "digits-noise-decay": with_decay(DIGITS_NOISE, 0.01),
    "cifar-noise-decay": with_decay(CIFAR_NOISE, 0.01),
    "cifar-clean-decay": with_decay(CIFAR_CLEAN, 0.005),
    "methods": Task("Every method once", METHODS, PER_METHOD, METHOD_ARMS, (0,), images="folder"),
    "methods-noise": Task("Digits, 40% of the training labels wrong: other methods", DIGITS, NOISE_CELLS, NOISE_ARMS, tuple(range(5))),
    "paper": Task("The paper's network and length", PAPER, PAPER_CELLS, PAPER_ARMS, tuple(range(5)), images="cifar10"),
}
# fmt: on


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        task, cell, arm: names.
        seed: of the run.
        value: of the arm's tuned flag that is tried; in other runs the chosen one, filled in once it is known; None where the
            arm's flags say everything.
        tuning: whether it serves to choose a value.
    """

    task: str
    cell: str
    arm: str
    seed: int
    value: float | None = None
    tuning: bool = False

    @property
    def name(self) -> str:
        """Its name within the task."""
        if self.tuning:
            setting = TASKS[self.task].arms[self.arm].setting
            return f"tune-{self.cell}-{self.arm}-{setting}{self.value:g}-seed{self.seed}"
        return f"{self.cell}-{self.arm}-seed{self.seed}"

    @property
    def tuned_arm(self) -> str:
        """The arm whose tuning decides its value; "" where its flags say everything."""
        arm = TASKS[self.task].arms[self.arm]
        return self.arm if arm.values else arm.rho_of

    def with_value(self, chosen: float) -> "Run":
        """Return it with the value that was chosen for `tuned_arm`."""
        return replace(self, value=chosen if self.tuned_arm == self.arm else chosen * TASKS[self.task].scale(self.cell))

    def flags(self) -> list[str]:
        """Return its flags, without those that say where the images are and where the run goes."""
        task = TASKS[self.task]
        arm = task.arms[self.arm]
        flags = [*task.flags.split(), *task.cells[self.cell].split(), *arm.flags.split()]
        if arm.length != 1:
            flags += ["--epochs", f"{arm.length * task.epochs:.0f}"]
        if self.value is not None:
            flags += [arm.tuned, f"{self.value:g}"]
        if self.tuning:
            flags += ["--val-split", str(task.val_split)]
        return [*flags, "--seed", str(self.seed)]


def tuning(task: str, arms: tuple[str, ...]) -> Iterator[Run]:
    """Yield the runs by which values are chosen, arm by arm."""
    for arm in arms:
        for seed in TUNING_SEEDS:
            for value in TASKS[task].arms[arm].values:
                yield Run(task, TASKS[task].first, arm, seed, value, tuning=True)


def finals(task: str, cells: tuple[str, ...], arms: tuple[str, ...]) -> Iterator[Run]:
    """Yield the runs that count, cell by cell and seed by seed, so that an unfinished study has whole pairs."""
    for cell in cells:
        for seed in TASKS[task].seeds_of(cell):
            for arm in arms:
                if TASKS[task].has(cell, arm):
                    rho = TASKS[task].arms[arm].rho
                    yield Run(task, cell, arm, seed, rho and rho * TASKS[task].scale(cell))


def cpu_study() -> Iterator[Run]:
    """Yield the runs of scripts/study.sh, the most telling ones first."""
    first, *others = CELLS
    for arms in (MAIN, RIVALS, OTHERS):
        yield from tuning("digits-noise", arms)
        yield from finals("digits-noise", (first,), arms)
    for task in ("cifar-noise", "cifar-clean"):
        for arms in (MAIN, RIVALS):
            yield from tuning(task, arms)
            yield from finals(task, (first,), arms)
    for task in DECAY_TASKS:
        yield from tuning(task, tuple(DECAY_ARMS))
        yield from finals(task, (first,), tuple(DECAY_ARMS))
    yield from methods_study()
    yield from finals("methods-noise", tuple(NOISE_CELLS), tuple(NOISE_ARMS))
    for task in ("digits-noise", "cifar-noise", "cifar-clean"):
        yield from finals(task, tuple(others), (*MAIN, *RIVALS))
    for task in ("cifar-noise", "cifar-clean"):
        yield from tuning(task, OTHERS)
        yield from finals(task, (first,), OTHERS)
    for task in ("digits-noise", "cifar-noise", "cifar-clean"):
        yield from finals(task, tuple(others), tuple(arm for arm in OTHERS if arm not in FIRST_ALONE))


def methods_study() -> Iterator[Run]:
    """Yield the runs that try every method."""
    yield from finals("methods", tuple(PER_METHOD), ("previous",))
    yield from finals("methods", tuple(cell for cell in PER_METHOD if not cell.endswith("-0.98")), ("sgd",))
    yield from finals("methods", ("final-0.9",), ("cram", "safe"))


def gpu_study() -> Iterator[Run]:
    """Yield the runs of scripts/study_gpu.sh."""
    yield from finals("paper", tuple(PAPER_CELLS), tuple(PAPER_ARMS))


STUDIES = {"study": cpu_study, "study_gpu": gpu_study}
