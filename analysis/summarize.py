"""Summarize the runs of a study in tables and pictures.

Runs that differ only in their seed are one line: mean and standard deviation of the last epoch's test accuracy, with the
number of runs. The best line of each setting is bold. Runs that did not finish are counted and listed, and are in no mean.
The paired comparison subtracts, seed by seed, the base optimizer's accuracy from SAM's.
"""

import argparse
import shlex
import sys
from argparse import Namespace
from pathlib import Path

from analysis.command import REQUIREMENTS, make_writable, matplotlib_imports, run_command, writing_to
from utils.files import write_text_atomically
from utils.packages import require_packages

PICTURES = ("accuracy_over_epochs", "accuracy_against_rho", "accuracy_against_sparsity")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.summarize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directories", metavar="DIR", type=Path, nargs="+", help="runs or sweeps, at any depth")
    parser.add_argument("--pivot", metavar="FLAG", help="also write pivot.md: tables with one column per value of FLAG")
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory of the files (summary in the first DIR)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(run, build_parser().parse_args(argv))


def run(args: Namespace) -> None:
    """Write tables and pictures, and print the summary."""
    require_packages(REQUIREMENTS, "pandas", "tabulate", "jinja2")
    with matplotlib_imports():  # here: --help and the sentence about a missing package need none of them
        from analysis import pivot, plots, tables
        from analysis.figures import SUFFIXES, save_figure
        from analysis.run_table import RHO, SPARSITY, begun, read_runs, varying
    runs = read_runs(args.directories)
    known, settings = begun(runs), varying(runs)
    pairs = tables.paired(known, settings)
    summary = tables.summary(known, settings)
    texts = {
        "summary.md": tables.page(runs, settings),
        "summary.csv": tables.with_whole_numbers(summary).to_csv(index=False),
        "summary.tex": tables.latex(summary),
        "runs.csv": tables.with_whole_numbers(runs).to_csv(index=False),
    }
    if not pairs.empty:
        texts["paired.csv"] = tables.with_whole_numbers(pairs).to_csv(index=False)
    if args.pivot:
        column = pivot.pivot_column(known, args.pivot)
        texts["pivot.md"] = pivot.page(runs, column, _command(args))
    finished, columns = known[known["state"] == "finished"], ["optimizer", *settings]
    figures = [
        plots.draw_over_epochs(finished, columns),
        plots.draw_against(finished, RHO, [name for name in columns if name != RHO]),
        plots.draw_against(finished, SPARSITY, [name for name in columns if name != SPARSITY]),
    ]
    output = args.output or args.directories[0] / "summary"
    make_writable(output)
    files = []
    with writing_to(output):
        for name in ("paired.csv", "pivot.md", *(name + suffix for name in PICTURES for suffix in SUFFIXES)):
            (output / name).unlink(missing_ok=True)  # of an earlier summary, which may have had more to show
        for name, text in texts.items():
            write_text_atomically(output / name, text)
            files.append(output / name)
        for name, figure in zip(PICTURES, figures, strict=True):
            files += save_figure(figure, output / name) if figure else []
    print(texts["pivot.md"] if args.pivot else texts["summary.md"])
    print("\n".join(map(str, files)))


def _command(args: Namespace) -> str:
    """Return the command that makes the tables again."""
    output = ["--output", str(args.output)] if args.output else []
    words = ["-m", "analysis.summarize", *map(str, args.directories), "--pivot", args.pivot, *output]
    return shlex.join(["python", *words])


if __name__ == "__main__":
    sys.exit(main())
