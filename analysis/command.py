"""What the commands of this package share: exit codes, files they write, and progress."""

import logging
import math
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tqdm import tqdm

from utils.errors import TrainingError, UsageError, memory_errors
from utils.packages import require_packages

REQUIREMENTS = "requirements-analysis.txt"


def run_command(run: Callable[[Namespace], None], args: Namespace, memory_advice: str | None = None) -> int:
    """Run a command and return its exit code; bad input ends in one sentence and exit code 2.

    Args:
        run: the command.
        args: its arguments.
        memory_advice: what to try where a GPU is out of memory, for a command that uses one.
    """
    try:
        with memory_errors(memory_advice) if memory_advice else nullcontext():
            run(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def matplotlib_imports() -> Iterator[None]:
    """Check that matplotlib is installed, and turn its complaint about a cache directory into a UsageError."""
    require_packages(REQUIREMENTS, "matplotlib")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would tell about its cache in several lines
    try:
        yield
    except OSError as error:
        raise UsageError(
            "matplotlib cannot write to a cache directory: set MPLCONFIGDIR to a directory that can be written to"
        ) from error


@contextmanager
def writing_to(output: Path, flag: str = "--output") -> Iterator[None]:
    """Turn errors of writing a file or directory into a UsageError; `flag` names another place, if there is one."""
    try:
        yield
    except OSError as error:
        way = f"name another {flag}" if flag else "make room there, or mend its permissions"
        raise UsageError(f"cannot write to '{output}' ({error.strerror}): {way}") from error


def make_writable(directory: Path) -> None:
    """Make a directory and check that files can be written there, before anything expensive begins.

    Raises:
        UsageError: they cannot.
    """
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


def make_room_for(file: Path, ending: str = ".json") -> None:
    """Make the directory of a file, and check that the file can be written, before anything expensive begins.

    Raises:
        UsageError: it cannot, or its name has another ending, as that of a checkpoint has.
    """
    if file.is_dir():
        raise UsageError(f"cannot write to '{file}', which is a directory: name a file in it by --output")
    if file.suffix not in ("", ending) and not file.suffix[1:].isdigit():  # as in rho0.05
        raise UsageError(
            f"'{file}' does not end in {ending}, as what is written there should: name another by --output"
        )
    make_writable(file.parent)


def throttled(show: Callable[[str], object], seconds: float = 10.0) -> Callable[..., None]:
    """Wrap a function that shows a line: show the first one at once, and later ones only now and then.

    Args:
        show: prints a line.
        seconds: between two lines, at least.

    Returns:
        A function of the line's parts.
    """
    last = -math.inf

    def show_now_and_then(*parts: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            show("".join(parts))

    return show_now_and_then


@contextmanager
def progress(total: int, unit: str, seconds: float = 10.0) -> Iterator[Callable[[], object]]:
    """Show progress on stderr: a bar on a terminal, elsewhere a line at the start, at the end and now and then.

    Args:
        total: number of units.
        unit: what is counted, in the plural.
        seconds: between two lines, at least.

    Yields:
        A function to call after each unit.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, unit=f" {unit}") as bar:
            yield bar.update
        return
    done, began = 0, time.monotonic()

    def show(text: str) -> None:
        print(f"{text} of {total:,} {unit}, {time.monotonic() - began:,.0f} s", file=sys.stderr, flush=True)

    show_now_and_then = throttled(show, seconds)

    def advance() -> None:
        nonlocal done
        done += 1
        (show_now_and_then if done < total else show)(f"{done:,}")

    show_now_and_then("0")
    yield advance
