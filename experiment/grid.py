"""The grid of a sweep, as a script writes it down, and the runs that it makes.

A grid has lines of five kinds; scripts/reproduce_cifar.sh shows all of them:

    # TEXT                         --help shows it
    NAME = VALUES  # MEANING       a setting with its default; an environment variable of that name replaces the default
    ARM FLAG ...                   a name and flags, for each value of every setting in braces: {NAME} stands for the
                                   value, {NAME=VALUE} for this value alone
    + {NAME=VALUE} ... FLAG ...    flags for the runs in which each of these settings, METHODS and SPARSITIES among them,
                                   has this value, one of {NAME=VALUE|VALUE}, or none of {NAME=!VALUE|VALUE}
    > COMMAND                      runs at the end of the sweep, without a shell; {OUTPUT_DIR} is the sweep's directory

Every arm becomes a run for each pruning method, sparsity and seed.
"""

import difflib
import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

SETTINGS = {  # of every sweep: default, which a grid may replace, and meaning
    "METHODS": ("random", "pruning methods; none for a dense network"),
    "SPARSITIES": ("0.9", "shares of the weights that are zero"),
    "SEEDS": ("0 1 2", ""),
    "EPOCHS": ("160", ""),
    "JOBS": ("1", "runs at a time; the cores are shared out between them, unless OMP_NUM_THREADS is set"),
    "GPUS": ("", "numbers of the GPUs to spread runs over, such as 0 1; several runs may share one"),
    "OUTPUT_DIR": ("", "where the directories of the runs are"),
}
SETTING = re.compile(r"([A-Z][A-Z0-9_]*)\s*=\s*([^#]*?)\s*(?:#\s*(.*))?")
PLACE = re.compile(r"\{([A-Z][A-Z0-9_]*)(?:=([^{}]*))?\}")
NEAR = 0.76  # difflib's ratio: RHO is nearer than this to RHOS, and SPARSITY to SPARSITIES; CPUS is not to GPUS
SET_BY_SWEEP = {"prune_method", "sparsity", "sparsity_config", "seed", "epochs", "output_dir", "resume", "evaluate"}
PATHS = ("--data-dir", "--pretrained", "--config", "--sparsity-config")
BY_RUN = ("METHODS", "SPARSITIES")  # settings of every sweep that may be conditions for added flags

Flags = dict[str, list[str]]  # by the name of a run


class Arm(NamedTuple):
    """An arm of a grid: its flags, and the values of the grid's own settings that it is for."""

    flags: list[str]
    chosen: dict[str, str]


def refuse(sentence: str) -> NoReturn:
    """Say in a sentence what is wrong with the input, and exit with code 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def same_value(one: str, other: str) -> bool:
    """Return whether two words are the same, or the same number: 0.90 is 0.9."""
    try:
        return one == other or float(one) == float(other)
    except ValueError:
        return False


def is_for(value: str, wanted: str) -> bool:
    """Return whether a value is one of those that a condition lists, or none of them after an exclamation mark."""
    listed = any(same_value(value, one) for one in wanted.removeprefix("!").split("|"))
    return listed != wanted.startswith("!")


@dataclass(frozen=True)
class Grid:
    """What a grid says.

    Attributes:
        about: its comments.
        settings: default and meaning of each setting.
        arms: name and flags of each arm, with places for the values of settings.
        added: conditions and flags of each line that begins with a plus.
        after: commands for the end of the sweep.
    """

    about: list[str]
    settings: dict[str, tuple[str, str]]
    arms: list[list[str]]
    added: list[list[str]]
    after: list[list[str]]

    def value(self, name: str) -> str:
        """Return a setting's text, from the environment or the grid."""
        return os.environ.get(name) or self.settings[name][0]

    def numbers(self, name: str) -> list[str]:
        """Return a setting's whole numbers, as text."""
        values = self.value(name).split()
        for value in values:
            if not re.fullmatch("[0-9]+", value):
                refuse(f"{name} takes whole numbers, not '{value}'")
        return values

    def number(self, name: str) -> int:
        """Return a setting that is one whole number."""
        values = self.numbers(name)
        if len(values) != 1 or int(values[0]) < 1:
            refuse(f"{name} takes one whole number above 0, not '{' '.join(values)}'")
        return int(values[0])

    def help(self) -> str:
        """Describe the sweep and the settings that it reads."""
        lines = [*self.about, "", "settings, in the environment, and their defaults; lists are separated by spaces:"]
        for name, (default, meaning) in self.settings.items():
            lines.append(" ".join([f"  {name:<11}", *filter(None, [meaning, default and f"({default})"])]))
        return "\n".join(lines)

    def expand_arms(self) -> dict[str, Arm]:
        """Return each arm by its name, for every combination of the grid's own settings."""
        own = {name: self.value(name).split() for name in self.settings if name not in SETTINGS}
        taken = self.named_values(own)
        arms: dict[str, Arm] = {}
        for values in itertools.product(*own.values()):
            chosen = dict(zip(own, values, strict=True))
            for arm in self.arms:
                places = PLACE.findall(" ".join(arm))
                if excluded := [name for name, only in places if only.startswith("!")]:
                    refuse(
                        f"an arm of the grid is for values, not for all but some: {{{excluded[0]}=!...}} is for added flags"
                    )
                if any(only and only != chosen[name] for name, only in places):
                    continue
                name, *flags = (fill_in(word, chosen) for word in arm)
                arm_of_name = arms.setdefault(name, Arm(flags, chosen))
                if arm_of_name.flags != flags or self.added_flags(arm_of_name.chosen) != self.added_flags(chosen):
                    refuse(f"two arms of the grid are called '{name}': give them different names")
                taken |= {(name, chosen[name]) for name, _ in places}
        for name, value in [(name, value) for name, values in own.items() for value in values]:
            if (name, value) not in taken:
                refuse(f"{name}: no arm of this sweep is for '{value}'")
        return arms

    def named_values(self, own: dict[str, list[str]]) -> set[tuple[str, str]]:
        """Return the values that lines of added flags are for. Refuses names that no setting has, and places without a value."""
        added, arms = (PLACE.findall(" ".join(itertools.chain(*lines))) for lines in (self.added, self.arms))
        for places, settings in ((added, {*own, *BY_RUN}), (arms, own)):
            for name, _ in places:
                if name not in settings:
                    refuse(f"the grid has no setting for {{{name}}}: begin it with '{name} = VALUES'")
        for word in itertools.chain(*self.added):
            found = PLACE.search(word)
            if found and not (PLACE.fullmatch(word) and found[2]):
                refuse(
                    f"'{word}' in a line of added flags: such a line says which runs it is for, as {{{found[1]}=VALUE}}"
                )
        values = {name: self.settings[name][0].split() for name, _ in added}
        return {(name, value) for name, only in added for value in [*only.removeprefix("!").split("|"), *values[name]]}

    def added_flags(self, chosen: dict[str, str]) -> list[str]:
        """Return the flags that are added where settings have these values, whatever those have that are not among them."""
        flags: list[str] = []
        for line in self.added:
            conditions = PLACE.findall(" ".join(line))
            if all(is_for(chosen[name], only) for name, only in conditions if name in chosen):
                flags += [word for word in line if not PLACE.fullmatch(word)]
        return flags

    def expand_runs(self, arms: dict[str, Arm], extra: list[str]) -> Flags:
        """Return the flags of each run, which end in the extra ones."""
        runs: Flags = {}
        for arm, method, sparsity, seed in itertools.product(
            arms, self.value("METHODS").split(), self.value("SPARSITIES").split(), self.numbers("SEEDS")
        ):
            sparse, share = (["--sparsity", sparsity], f"{method}-{sparsity}") if method != "none" else ([], "dense")
            added = self.added_flags(arms[arm].chosen | {"METHODS": method, "SPARSITIES": sparsity if sparse else ""})
            flags = ["--prune-method", method, *sparse, *arms[arm].flags, *added]
            flags += ["--seed", seed, "--epochs", self.value("EPOCHS")]
            name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{share}-{arm}-seed{seed}")
            if runs.setdefault(name, [*flags, *extra]) != [*flags, *extra]:
                refuse(f"two runs of the grid are called '{name}': give its arms other names")
        if not runs:
            refuse("there is nothing to run: the grid has no arm, or a setting is white space alone")
        return runs


def fill_in(word: str, values: dict[str, str]) -> str:
    """Put the values of settings in their places."""
    return PLACE.sub(lambda place: values[place[1]], word)


def read_grid(text: str, name: str) -> Grid:
    """Read a sweep's grid, and refuse variables of the environment that look like one of its settings misspelt."""
    settings = SETTINGS | {"OUTPUT_DIR": (f"runs/{name}", SETTINGS["OUTPUT_DIR"][1])}
    grid = Grid([], {}, [], [], [])
    for line in map(str.strip, text.splitlines()):
        try:
            if line.startswith("#"):
                grid.about.append(line.removeprefix("#").strip())
            elif setting := SETTING.fullmatch(line):
                grid.settings[setting[1]] = (setting[2], setting[3] or settings.get(setting[1], ("", ""))[1])
            elif line.startswith("+"):
                grid.added.append(shlex.split(line[1:]))
            elif line.startswith(">"):
                grid.after.append(shlex.split(line[1:]))
                if not shutil.which(grid.after[-1][0]) and grid.after[-1][0] != "python":
                    refuse(f"the grid ends in a command that is not installed: {line}")
            elif line:
                grid.arms.append(shlex.split(line))
        except ValueError:
            refuse(f"a quotation in the grid has no end: {line}")
    grid.settings.update({known: both for known, both in settings.items() if known not in grid.settings})
    refuse_misspelt(grid.settings, "sweep")
    return grid


def refuse_misspelt(settings: Iterable[str], what: str) -> None:
    """Refuse variables of the environment that look like one of the settings of this sweep or study misspelt."""
    for variable in filter(str.isupper, os.environ):
        near = difflib.get_close_matches(variable, settings, 1, NEAR)
        if near and variable not in settings and near[0] not in os.environ:
            refuse(f"{variable} is no setting of this {what}, but {near[0]} is: set that, or unset {variable}")


def refuse_foreign(settings: Iterable[str], what: str) -> None:
    """Refuse variables of the environment that are settings of sweeps, or of another one, and would do nothing in this one."""
    for name in SETTINGS:
        if os.environ.get(name) and name not in settings:
            refuse(f"{name} is a setting of sweeps, and not of this {what}: unset it")
    for script in sorted((Path(__file__).parents[1] / "scripts").glob("*.sh")):
        for line in script.read_text().partition("<<'GRID'\n")[2].splitlines():
            setting = SETTING.fullmatch(line.strip())
            if setting and os.environ.get(setting[1]) and setting[1] not in settings:
                refuse(f"{setting[1]} is a setting of {script.name}, and not of this {what}: unset it")


def absolute_paths(arguments: list[str], directory: str) -> Iterator[str]:
    """Yield flags and their values, with relative paths among them taken from a directory."""

    def absolute(flag: str, value: str) -> str:
        path, colon, function = value.rpartition(":") if flag == "--arch" else (value, "", "")
        if flag not in PATHS and not (flag == "--arch" and path.endswith(".py")):
            return value
        return os.path.realpath(os.path.join(directory, path)) + colon + function

    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag, equals, value = argument.partition("=")
        joined = equals and flag.startswith("--")
        yield f"{flag}={absolute(flag, value)}" if joined else absolute(before, argument)


def check_flags(runs: Flags, of_grid: Iterable[list[str]], extra: list[str], trained_here: bool = True) -> Flags:
    """Refuse what a run would refuse before it looks at data, so that none is started in vain.

    Args:
        runs: flags of each run.
        of_grid: lists of flags that the grid sets, and the extra ones may not.
        extra: flags of all runs.
        trained_here: whether this machine needs the data; others may have a directory that it has not.

    Returns:
        The runs. Flags of --config take its place, so that all runs have the same whatever becomes of the file; one that other
        arms set, and its own does not, is left out.
    """
    from experiment.build import check_on_meta  # here: these import torch
    from experiment.checks import check
    from experiment.config import as_argv, parse_and_replay
    from experiment.flags import SAM_FLAGS, flag, parse, resolve
    from imagedata.sources import DATASETS
    from training.checkpoint import CheckpointSchedule
    from utils.errors import UsageError

    not_of_networks = {"optmzr", "sam_rho", "seed", *SAM_FLAGS}  # networks that differ in them build alike
    run, built = "all runs", set()
    complete: Flags = {}
    try:
        taken = SET_BY_SWEEP.union(*(parse(flags)[1] for flags in of_grid))
        for name in sorted(taken & parse(extra)[1]):
            refuse(f"{flag(name)} is set by the sweep: leave it out; --help lists what can be set, in the environment")
        for run, flags in runs.items():
            args, given = parse_and_replay(flags, without=taken)
            complete[run] = flags
            if args.config:
                complete[run] = as_argv(
                    {name: value for name, value in vars(args).items() if name in given - {"config"}}
                )
            check(args, given)
            CheckpointSchedule(args.checkpoint_every)
            own_files = args.data_dir and DATASETS[args.dataset].own_files
            if trained_here and own_files and not os.path.isdir(args.data_dir):
                raise UsageError(f"'{args.data_dir}' is not a directory: --data-dir names the one with the images")
            network = str(sorted((name, value) for name, value in vars(args).items() if name not in not_of_networks))
            if network not in built:
                check_on_meta(resolve(args))
            built.add(network)
    except UsageError as error:
        refuse(f"{error} (flags of {run}; no run was started)")
    return complete
