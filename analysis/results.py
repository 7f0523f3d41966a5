"""Reading what runs left behind: a table with a row a run, whatever became of it."""

import json
from pathlib import Path

import pandas as pd

from experiment.run_directory import FREE

# What tells runs of a study apart, but is not a setting that is studied.
REPETITION = "seed"
# Resolved by how long a run is, and so by the optimizer.
CONSEQUENCE = "compile"
# Flags that the column `optimizer` stands for.
OPTIMIZER_FLAGS = ("optmzr", "sam_v2", "adaptive", "sam_local")
METRIC = "test_top1"


def optimizer_name(args: dict) -> str:
    """As papers call it: sgd, sgd SAM, sgd SAM.v2, sgd ASAM, sgd SAM local ..."""
    base = args["optmzr"].removesuffix("-sam")
    if base == args["optmzr"]:
        return base
    name = f"{base} {'A' if args['adaptive'] else ''}SAM{'.v2' if args['sam_v2'] else ''}"
    return f"{name} local" if args.get("sam_local") else name


def label(args: dict) -> str:
    """What a run did, in a few words: sgd SAM.v2, rho 0.05, random 0.9."""
    parts = [optimizer_name(args)]
    if args["sam_rho"] is not None:
        parts.append(f"rho {args['sam_rho']:g}")
    parts.append(
        "dense" if args["prune_method"] == "none" else f"{args['prune_method']} {args['sparsity'] or ''}".strip()
    )
    return ", ".join(parts)


def read_runs(directories: list[Path]) -> pd.DataFrame:
    """One row for each run below the directories.

    Returns:
        Columns `directory` (Path), `state` (finished; repeated if a run before it is the same; failed where a sweep saw it
        fail; incomplete), `epochs_done`, `optimizer`, `data` (a name for its images, by their content), `processes`,
        `commit`, `device`, `torch`, every flag but those that say only where and how a run goes, and for finished runs
        the figures of result.json.

    Raises:
        ValueError: no runs there, or a file of a run that cannot be read.
    """
    rows = {}
    for root in directories:
        if not root.is_dir():
            raise ValueError(f"there is no directory '{root}'")
        for path in sorted(root.rglob("args.json")):
            rows.setdefault(path.parent.resolve(), _read_run(path.parent))
        for command in sorted(root.rglob(".sweep/*.command")):  # one that failed may have left no directory
            directory = command.parent.parent / command.stem
            if directory.resolve() not in rows:
                rows[directory.resolve()] = {"directory": directory, "state": _broken(directory), "epochs_done": 0}
    if not rows:
        raise ValueError(f"no runs in {', '.join(map(str, directories))}: name directories of runs or sweeps")
    runs = pd.DataFrame(list(rows.values()))
    # The same run in two sweeps, as of their common baseline, is one sample and not two.
    if "data" in runs:
        runs["data"] = _names_of_data(runs)
    same = [name for name in runs.columns if name in ("optimizer", "data", "processes") or name.startswith("--")]
    same = [name for name in same if name != f"--{CONSEQUENCE}"]
    finished = runs[runs["state"] == "finished"]
    runs.loc[finished.index[finished.duplicated(same)], "state"] = "repeated"
    return runs


def read_curves(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """metrics.csv of each run."""
    return [pd.read_csv(directory / "metrics.csv") for directory in runs["directory"]]


def varying(runs: pd.DataFrame) -> list[str]:
    """Columns that runs differ in: flags, the optimizer and repetitions apart, then `data` and `processes`."""
    known = runs[runs["optimizer"].notna()] if "optimizer" in runs else runs.iloc[:0]
    flags = [name.removeprefix("--") for name in runs.columns if name.startswith("--")]
    names = [flag for flag in flags if flag not in (REPETITION, CONSEQUENCE, *OPTIMIZER_FLAGS)]
    found = [f"--{name}" for name in sorted(names) if known[f"--{name}"].map(repr).nunique() > 1]
    if len(known) and known.groupby("--dataset")["data"].nunique().max() > 1:
        found.append("data")
    if len(known) and known["processes"].nunique() > 1:
        found.append("processes")
    return found


def _names_of_data(runs: pd.DataFrame) -> pd.Series:
    """One name for the same images wherever they lay, and another for others, even in the same place."""
    names: dict[str, str] = {}
    for images, name in zip(runs["images"], runs["data"], strict=True):
        if isinstance(images, str) and images not in names:
            names[images] = f"{name} {images[:8]}" if name in names.values() else name
    found = [names.get(images, name) for images, name in zip(runs["images"], runs["data"], strict=True)]
    return pd.Series(found, index=runs.index)


def _read_run(directory: Path) -> dict:
    try:
        about = json.loads((directory / "args.json").read_text())
        args = about["args"]
        row = {"directory": directory, "optimizer": optimizer_name(args)}
        row |= {
            "commit": about.get("git"),
            "device": about.get("device"),
            "torch": about.get("versions", {}).get("torch"),
        }
        row["images"], row["processes"] = about.get("images"), about.get("processes", 1)
        row["data"] = f"folder ({args['data_dir']})" if args["dataset"] == "folder" else args["dataset"]
        row |= {f"--{n}": " ".join(v) if isinstance(v, list) else v for n, v in args.items() if n not in FREE}
        metrics = directory / "metrics.csv"
        row["epochs_done"] = len(pd.read_csv(metrics)) if metrics.exists() else 0
        if not (directory / "result.json").exists():
            return row | {"state": _broken(directory)}
        result = json.loads((directory / "result.json").read_text())
        figures = {name: value for name, value in result.items() if isinstance(value, int | float)}
        figures.pop("seed")
        return row | {"state": "finished"} | figures
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read the run in '{directory}' ({error}): repair or remove it") from error


def _broken(directory: Path) -> str:
    return "failed" if (directory.parent / ".sweep" / f"{directory.name}.failed").exists() else "incomplete"
