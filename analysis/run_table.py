"""Read what runs left behind into a table with one row per run, finished or not."""

import json
import sys
from pathlib import Path

import pandas as pd

from analysis.labels import count_text, optimizer_name
from experiment.checks import complete_flags
from experiment.flags import DRAWN_BY_SEED, MAY_CHANGE_ON_RESUME, SAM_FLAGS
from imagedata.sources import DATASETS
from utils.errors import UsageError

METRIC, HELD_OUT = "test_top1", "val_top1"
RHO, SPARSITY, SEED = "--sam_rho", "--sparsity", "--seed"
# Resolved by the length of a run and so by its optimizer: it tells no settings apart.
COMPILE = "--compile"
# Flags that some optimizers alone have: these differ in nothing that is compared.
OF_OPTIMIZERS = (RHO, "--cram_sparsities", "--safe_lambda", "--safe_interval")
# Flags that the column `optimizer` stands for.
OPTIMIZER_FLAGS = ("--optmzr", *(f"--{name}" for name in SAM_FLAGS))


def read_runs(directories: list[Path]) -> pd.DataFrame:
    """Read all runs below the directories.

    Returns:
        One row per run: `directory` (Path), `state` (finished, if only in its training; repeated if it is the same as a run
        before it; failed where a sweep saw it fail; incomplete), `epochs_done`, `optimizer`, `data` (a name for its images,
        by their content), `processes`, `commit`, `device`, `torch`, every flag except those that only say where and how a
        run goes, and the figures of result.json for finished runs.

    Raises:
        UsageError: there are no runs, none has begun, or a file of a run cannot be read.
    """
    rows: dict[Path, dict] = {}
    for root in directories:
        if not root.is_dir():
            raise UsageError(f"there is no directory '{root}': name directories of runs or sweeps")
        for path in sorted(root.rglob("args.json")):
            rows.setdefault(path.parent.resolve(), _read_run(path.parent))
        for command in sorted(root.rglob(".sweep/*.command")):  # a run that failed at once may have no directory
            directory = command.parent.parent / command.stem
            unknown = {"directory": directory, "state": _unfinished_state(directory), "epochs_done": 0}
            rows.setdefault(directory.resolve(), unknown)
    if not rows:
        raise UsageError(f"no runs in {', '.join(map(str, directories))}: name directories of runs or sweeps")
    runs = pd.DataFrame(list(rows.values()))
    if METRIC not in runs:
        raise UsageError(f"none of {count_text(len(runs), 'run')} has finished: launch the sweep again to finish it")
    runs["data"] = _names_of_data(runs)
    # The same run in two sweeps, for example their common baseline, is one sample and not two.
    same = [name for name in runs if name in ("optimizer", "data", "processes") or name.startswith("--")]
    finished = runs[runs["state"] == "finished"]
    repeated = finished.duplicated([name for name in same if name != COMPILE])
    runs.loc[finished.index[repeated], "state"] = "repeated"
    return runs


def begun(runs: pd.DataFrame) -> pd.DataFrame:
    """Keep the runs whose settings are known because they have begun."""
    return runs[runs["optimizer"].notna()]


def read_curves(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """Read the evaluated epochs in metrics.csv of each run.

    Raises:
        UsageError: a run has no such file, or a damaged one.
    """
    curves = []
    for directory in runs["directory"]:
        try:
            curves.append(pd.read_csv(directory / "metrics.csv").dropna(subset=[METRIC]))
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(directory, error) from error
    return curves


def varying(runs: pd.DataFrame) -> list[str]:
    """List the settings that runs differ in: flags except the optimizer's and the seed, then `data` and `processes`."""
    known = begun(runs)
    flags = {name for name in runs if name.startswith("--")} - {SEED, COMPILE, *OPTIMIZER_FLAGS}
    found = [name for name in sorted(flags) if known[name].map(repr).nunique() > 1]
    if len(known) and known.groupby("--dataset")["data"].nunique().max() > 1:
        found.append("data")
    if known["processes"].nunique() > 1:
        found.append("processes")
    return found


def state_counts(runs: pd.DataFrame) -> str:
    """Say how many runs there are in each state."""
    counts = runs["state"].value_counts()
    states = (name for name in ("finished", "repeated", "incomplete", "failed") if name in counts)
    return f"{count_text(len(runs), 'run')}: {', '.join(f'{counts[name]} {name}' for name in states)}."


def _names_of_data(runs: pd.DataFrame) -> pd.Series:
    """Give the same images one name wherever they lay, and other images another name, even in the same place.

    Images that the seed chose differ from seed to seed, and keep their name; but where one seed has several, nobody can tell
    which of another seed's belong to which, and each gets a name of its own.
    """
    names: dict[tuple, dict[str, str]] = {}
    drawn = runs[[f"--{name}" for name in DRAWN_BY_SEED]].fillna(0)
    sizes = runs["--image_size"].map(repr)  # each size is named apart: its images have a fingerprint of their own
    rows = list(zip(runs["images"], runs["data"], runs[SEED], sizes, map(tuple, drawn.to_numpy()), strict=True))
    of_seed: dict[tuple, set] = {}
    for images, name, seed, *kind in rows:
        if isinstance(images, str):
            of_seed.setdefault((name, seed, *kind), set()).add(images)
    mixed = {
        (name, *kind): seed for (name, seed, *kind), images in of_seed.items() if len(images) > 1 and any(kind[-1])
    }
    for (name, *_), seed in mixed.items():
        print(
            f"note: runs of seed {seed:g} on {name} have different images, and nobody can tell which of them the other seeds' "
            "belong to: no mean is taken over seeds; summarize the runs of each data set by themselves",
            file=sys.stderr,
        )
    found = []
    for images, name, seed, size, how in rows:
        alike = names.setdefault((seed, size, *how) if any(how) else (), {})
        if isinstance(images, str) and images not in alike:
            taken = name in alike.values() or (name, size, how) in mixed
            alike[images] = f"{name} {images[:8]}" if taken else name
        found.append(alike.get(images, name))
    return pd.Series(found, index=runs.index)


def _read_run(directory: Path) -> dict:
    try:
        about = json.loads((directory / "args.json").read_text())
        args = complete_flags(about["args"])
        row = {
            "directory": directory,
            "optimizer": optimizer_name(args),
            "commit": about.get("git"),
            "device": about.get("device"),
            "torch": about.get("versions", {}).get("torch"),
            "images": about.get("images"),
            "processes": about.get("processes", 1),
            "data": f"{args['dataset']} ({args['data_dir']})"
            if DATASETS[args["dataset"]].own_files
            else args["dataset"],
        }
        row |= {
            f"--{n}": " ".join(map(str, v)) if isinstance(v, list) else v
            for n, v in args.items()
            if n not in MAY_CHANGE_ON_RESUME
        }
        metrics = directory / "metrics.csv"
        row["epochs_done"] = len(pd.read_csv(metrics)) if metrics.exists() else 0
        if not (directory / "result.json").exists():
            return row | {"state": _unfinished_state(directory)}
        result = json.loads((directory / "result.json").read_text())
        figures = {name: value for name, value in result.items() if isinstance(value, int | float) and name != "seed"}
        return row | {"state": "finished"} | figures
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(directory, error) from error


def _unreadable(directory: Path, error: Exception) -> UsageError:
    return UsageError(f"cannot read the run in '{directory}' ({error}): repair or remove it")


def _unfinished_state(directory: Path) -> str:
    failed = directory.parent / ".sweep" / f"{directory.name}.failed"
    return "failed" if failed.exists() else "incomplete"
