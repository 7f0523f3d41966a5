"""Measure how trained networks do on corrupted test images.

Prints, for each network, error, loss (negative log-likelihood) and expected calibration error on the clean test images,
and their means over the 15 corruptions of Hendrycks and Dietterich (2019) at five severities; errors by corruption and by
severity; means over seeds, and differences to the runs of --baseline, seed by seed. The mean of the errors is the mean
corruption error, not normalised; with --baseline there is the normalised one too (mCE): each corruption's error in percent
of the baseline's. Every network sees the same corrupted images, and every command corrupts them alike. Float32, batch norm
in evaluation mode. Writes robustness.json, .png and .pdf.
"""

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import mean

from analysis.checkpoints import add_checkpoints, find_checkpoints, open_checkpoint, smaller_batch, study_settings
from analysis.command import make_room_for, matplotlib_imports, progress, run_command, writing_to
from analysis.corrupted import (
    CorruptedImages,
    Network,
    Settings,
    errors_by_corruption,
    errors_by_severity,
    measure,
    relative_corruption_errors,
)
from analysis.labels import run_label
from analysis.landscape import resolve_compilation
from analysis.sharpness import Measured, over_seeds
from analysis.text_table import mean_and_std_text, number_text, text_table
from experiment.flags import number, plain
from experiment.trained_run import TrainedRun
from imagedata.corruptions import CORRUPTIONS, SEVERITIES
from prune.flops import count_flops
from utils.device import pick_device
from utils.errors import UsageError
from utils.files import write_text_atomically
from utils.statistics import student_interval


@dataclass(frozen=True)
class Opened:
    """A checkpoint that is to be measured.

    Attributes:
        path: of the checkpoint.
        network: on the device.
        about: its flags and finished epochs.
        study: what it has in common with repetitions of its run by other seeds.
    """

    path: Path
    network: Network
    about: dict
    study: str

    @property
    def seed(self) -> int:
        """Seed of its run."""
        return self.about["args"]["seed"]


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed, or a single run.

    Attributes:
        title: their numbers in the list of networks.
        label: what they are, for the picture.
        runs: the runs.
    """

    title: str
    label: str
    runs: list[Measured]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m analysis.robustness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoints(parser)
    add = parser.add_argument
    add("--baseline", type=Path, nargs="+", default=[], metavar="PATH",
        help="checkpoints or directories of the runs to compare with: one of each seed, or one for all")  # fmt: skip
    add("--images", type=number(int, above=0), metavar="N", help="number of test images (all)")
    add("--corruptions", choices=tuple(CORRUPTIONS), nargs="+", default=tuple(CORRUPTIONS), metavar="NAME",
        help=f"{', '.join(CORRUPTIONS)} (all)")  # fmt: skip
    add("--severities", type=int, choices=SEVERITIES, nargs="+", default=SEVERITIES, metavar="S", help="1 to 5 (all)")
    add("--official", type=Path, metavar="DIR",
        help="read the files of CIFAR-10-C or CIFAR-100-C there, NAME.npy and labels.npy, and corrupt nothing")  # fmt: skip
    add("--workers", type=number(int, least=0), default=default.workers, metavar="N",
        help="processes that corrupt images; 0 for none (%(default)s)")  # fmt: skip
    add("--output", type=Path, metavar="FILE",
        help="JSON file; the picture gets its name (robustness.json beside the first checkpoint)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    return run_command(run, args, smaller_batch(args))


def run(args: Namespace) -> None:
    """Measure all networks; print tables, draw a picture and write all figures."""
    with matplotlib_imports():
        from analysis import robustness_plots  # here: --help and the sentence above need no matplotlib
        from analysis.figures import SUFFIXES
    if args.output and args.output.suffix in SUFFIXES:
        raise UsageError(f"--output '{args.output}' is the JSON file, and the picture would replace it: name it .json")
    device = pick_device(args.device)
    paths = find_checkpoints([*args.checkpoints, *args.baseline], args.arch)
    baselines = {path.resolve() for path in find_checkpoints(args.baseline)}
    settings = Settings(
        args.images, tuple(dict.fromkeys(args.corruptions)), tuple(sorted(set(args.severities))), args.official,
        args.batch_size, args.workers,
    )  # fmt: skip
    opened, first = [], None
    for path in paths:
        trained, model = open_checkpoint(path, args)
        first = first or trained
        check_same_test_images(first, trained, path)
        study = json.dumps([study_settings(trained), trained.epochs], sort_keys=True)
        about = {"checkpoint": str(path), "args": plain(trained.args), "epochs": trained.epochs}
        opened.append(Opened(path, Network(model, trained.normalize), about, study))
    partners = pair_with_baselines(
        opened, [place for place, one in enumerate(opened) if one.path.resolve() in baselines]
    )
    assert first is not None  # find_checkpoints names at least one
    images = CorruptedImages(first.dataset.test, settings)
    output = args.output or paths[0].parent / "robustness.json"
    make_room_for(output)
    passes = len(images) * args.batch_size
    flops = passes * count_flops(opened[0].network.model, first.dataset.image_shape).dense_training / 3
    execution = resolve_compilation(args.compile, device, flops)
    with progress(len(images), "batches") as advance:
        results, speeds = measure([one.network for one in opened], images, device, execution, advance)
    records = []
    for place, (one, figures) in enumerate(zip(opened, results, strict=True)):
        record = one.about | {"recalibrated_bn": args.recalibrate_bn} | figures
        if partners:
            record["baseline"] = against_baseline(figures, results[partners[place]], opened[partners[place]])
        records.append(record)
    arms = group_by_seeds(opened, records)
    with writing_to(output):
        write_text_atomically(output, json.dumps(records, indent=2) + "\n")
        files = robustness_plots.draw([(arm.label, [one.figures for one in arm.runs]) for arm in arms], output)
    print("\n".join(f"{place:>3}  {describe(one)}: {one.path}" for place, one in enumerate(opened, 1)))
    print_tables(arms, speeds if args.official is None else {})
    if partners:
        print_differences(arms, records, partners)
    print("\n" + "\n".join(map(str, [output, *files])))


def check_same_test_images(first: TrainedRun, other: TrainedRun, path: Path) -> None:
    """Raise UsageError where two checkpoints do not have the same test images."""
    if any(a != b for a, b in zip_longest(first.dataset.test.identity(), other.dataset.test.identity())):
        raise UsageError(
            f"'{path}' has other test images than the first checkpoint: measure it by a command of its own"
        )


def pair_with_baselines(opened: Sequence[Opened], baselines: Sequence[int]) -> list[int]:
    """Return each network's baseline: that of its seed, or the only one. Nothing without baselines.

    Args:
        opened: all networks.
        baselines: places of the baselines among them.

    Raises:
        UsageError: a network has none, or more than one.
    """
    if not baselines:
        return []
    of_seed = {opened[place].seed: place for place in baselines}
    if len(of_seed) < len(baselines):
        raise UsageError("two of --baseline have the same seed: name one run of each seed")
    if len(of_seed) == 1:
        return [baselines[0]] * len(opened)
    for one in opened:
        if one.seed not in of_seed:
            raise UsageError(
                f"no --baseline has seed {one.seed}, that of '{one.path}': name one run of each seed, or a single one"
            )
    return [of_seed[one.seed] for one in opened]


def against_baseline(figures: dict, baseline: dict, other: Opened) -> dict:
    """Return the normalised corruption errors against a baseline, and their mean."""
    errors = relative_corruption_errors(figures, baseline)
    known = [error for error in errors.values() if error is not None]
    average = mean(known) if len(known) == len(errors) else None
    return {"checkpoint": str(other.path), "seed": other.seed, "ce": errors, "mce": average}


def group_by_seeds(opened: Sequence[Opened], records: Sequence[dict]) -> list[Arm]:
    """Put runs that differ only in their seed together, in the order of the first ones."""
    runs = [
        Measured(place, one.seed, one.study, record)
        for place, (one, record) in enumerate(zip(opened, records, strict=True), 1)
    ]
    groups = {group[0].number: group for group in over_seeds(runs)}
    in_groups = {one.number for group in groups.values() for one in group}
    found = []
    for one in runs:
        if one.number in groups or one.number not in in_groups:
            group = groups.get(one.number, [one])
            label = run_label(one.figures["args"]) + (f", seed {one.seed}" if len(group) == 1 else "")
            found.append(Arm(", ".join(str(other.number) for other in group), label, group))
    return found


def describe(one: Opened) -> str:
    """Name a run for the list of networks."""
    return f"{run_label(one.about['args'])}, seed {one.seed}, epoch {one.about['epochs']}"


def shown_figures(record: dict) -> dict[str, float | None]:
    """Select the figures of the first table, by the names of its columns."""
    clean, corrupted = record["clean"], record["mean"]
    shown = {
        "clean: error (%)": clean["error"], "loss": clean["loss"], "ECE (%)": clean["ece"],
        "corrupted: error (%)": corrupted["error"], "loss ": corrupted["loss"], "ECE (%) ": corrupted["ece"],
    }  # fmt: skip
    return shown | ({"mCE (%)": record["baseline"]["mce"]} if "baseline" in record else {})


def print_tables(arms: Sequence[Arm], speeds: dict[str, float]) -> None:
    """Print figures of each network, means over seeds, and errors by corruption and by severity.

    Args:
        arms: all networks.
        speeds: images corrupted per second of a processor, by corruption.
    """
    runs = sorted((one for arm in arms for one in arm.runs), key=lambda one: one.number)
    about = runs[0].figures
    rows = [
        {"": str(one.number)} | {name: number_text(value) for name, value in shown_figures(one.figures).items()}
        for one in runs
    ]
    print(f"\n{about['images']:,} test images, {about['source']} corruptions\n\n{text_table(rows)}")
    means = [
        {"": arm.title} | by_name([shown_figures(one.figures) for one in arm.runs]) for arm in arms if len(arm.runs) > 1
    ]
    if means:
        print(f"\nmean ± standard deviation over seeds\n\n{text_table(means)}")
    corruptions = rows_by_arm(arms, errors_by_corruption)
    for row in corruptions if speeds else ():
        row["images/s"] = f"{speeds[row['']]:,.0f}"
    print("\nerror (%) by corruption" + ("; images/s: corrupted per second of a processor" if speeds else ""))
    print(f"\n{text_table(corruptions)}")
    print(f"\nerror (%) by severity\n\n{text_table(rows_by_arm(arms, errors_by_severity))}")


def rows_by_arm(arms: Sequence[Arm], select: Callable[[dict], dict]) -> list[dict[str, str]]:
    """Return a table with a column for each arm and a row for each figure that `select` returns of a record."""
    columns = {arm.title: by_name([select(one.figures) for one in arm.runs]) for arm in arms}
    names = next(iter(columns.values()))
    return [{"": str(name)} | {title: cells[name] for title, cells in columns.items()} for name in names]


def by_name(figures: Sequence[dict]) -> dict:
    """Return the texts of figures of several seeds: mean and standard deviation, or the only one."""
    values = {name: [one[name] for one in figures] for name in figures[0]}
    return {name: mean_and_std_text(v) if len(v) > 1 else number_text(v[0]) for name, v in values.items()}


def print_differences(arms: Sequence[Arm], records: Sequence[dict], partners: Sequence[int]) -> None:
    """Print how far runs are from their baselines, with 95% intervals by Student's t over seeds.

    Args:
        arms: all networks.
        records: of all networks.
        partners: place of each network's baseline.
    """
    rows = []
    for arm in arms:
        places = [one.number - 1 for one in arm.runs if partners[one.number - 1] != one.number - 1]
        if not places:
            continue
        own = [shown_figures(records[place]) for place in places]
        other = [shown_figures(records[partners[place]]) for place in places]
        names = [name for name in own[0] if name != "mCE (%)"]
        pairs = {name: [(a[name], b[name]) for a, b in zip(own, other, strict=True)] for name in names}
        rows.append({"": arm.title} | {name: difference_text(pair) for name, pair in pairs.items()})
    if rows:
        spread = "" if len(set(partners)) > 1 else ", without the spread of the one baseline"
        print(f"\ndifference to the baseline, 95% interval over seeds{spread}\n\n{text_table(rows)}")


def difference_text(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """Return the mean difference within pairs, with its interval where there are several; `-` where one is missing."""
    differences = [own - other for own, other in pairs if own is not None and other is not None]
    if len(differences) < len(pairs):
        return "-"
    if len(differences) == 1:
        return f"{differences[0]:+.4g}"
    interval = student_interval(differences)
    return f"{interval.mean:+.3g} ({interval.low:+.3g} to {interval.high:+.3g})"


if __name__ == "__main__":
    sys.exit(main())
