"""How a run ends: for a command errors become one sentence on stderr and an exit code, for a caller exceptions."""

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from experiment.flags import as_flags
from prune import EmptyLayerError
from utils import distributed
from utils.errors import Preempted, TrainingError, UsageError, run_errors
from utils.signals import Interruption


def exit_code(command: Callable[[], object]) -> int:
    """Run a command, alone or as one of several processes.

    Returns:
        0; 1 for a run that went wrong; 2 for bad input; 75 for a run that was told to end and goes on by --resume auto;
        130 for one that Ctrl-C ended at once.
    """
    try:
        with run_errors():
            command()
    except UsageError as error:
        distributed.complain(f"error: {error}", alike=not distributed.together())
        return 2
    except (TrainingError, EmptyLayerError) as error:
        distributed.complain(f"error: {as_flags(str(error)) if isinstance(error, EmptyLayerError) else error}")
        return 1
    except Preempted as notice:
        distributed.complain(str(notice), alike=True)
        return 75
    except BrokenPipeError:
        # Otherwise Python flushes the closed pipe at its end, and prints a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        distributed.complain("error: nobody reads the output any more: a training goes on by --resume auto")
        return 1
    except RuntimeError as error:
        if not distributed.lost_another(error):
            raise
        distributed.complain("error: another process of this training is gone: go on by --resume auto")
        return 1
    except KeyboardInterrupt:
        distributed.complain("interrupted: a training goes on from its last checkpoint by --resume auto")
        return 130
    finally:
        distributed.stop()
    return 0


@contextmanager
def exceptions(interruption: Interruption) -> Iterator[None]:
    """Turn what ends a run into exceptions for a caller in this process.

    Raises:
        UsageError, TrainingError: as they come.
        Preempted: a signal came that does nothing by itself; any other one is raised again.
    """
    try:
        with run_errors():
            yield
    except EmptyLayerError as error:
        raise TrainingError(as_flags(str(error))) from error
    except Preempted:
        if interruption.signal:
            signal.raise_signal(signal.Signals[interruption.signal])
        raise
    finally:
        distributed.stop()


def smaller_batch(args: Namespace) -> str:
    """Return the flags to try where a GPU is out of memory."""
    if args.evaluate:
        return f"--test-batch-size {max(1, args.test_batch_size // 2)}"
    smaller = f"--batch-size {args.batch_size // 2}" if args.batch_size > 1 else "a smaller --width"
    if 2 * args.accumulate > args.batch_size:
        return smaller
    return f"--accumulate {2 * args.accumulate}, where batch norm then normalises smaller parts, or {smaller}"
