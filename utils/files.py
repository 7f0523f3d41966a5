"""Files that are either whole or not there: written beside their place, synced, then renamed into it."""

import io
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], previous: Path | None = None) -> None:
    """Write a binary file and put it at `path`, replacing what was there in one step.

    A process that is killed at any moment leaves the old file or the new one; a left-over `.tmp` file is harmless.

    Args:
        path: of the file.
        write: fills the file.
        previous: a path in the same directory, where what was at `path` is kept.
    """
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        if previous is not None:
            _keep(path, previous)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself survives a power cut
    finally:
        os.close(directory)


def save_atomically(path: Path, value: object, previous: Path | None = None) -> None:
    """Write what torch.save makes of a value; see `write_atomically`."""
    content = io.BytesIO()  # or a full disk would be a RuntimeError of torch's writer
    torch.save(value, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()), previous)


def load_whole(path: Path, mmap: bool = False) -> Any:
    """Read what torch.save wrote, on the CPU. Nothing but tensors and plain values is ever loaded.

    Raises:
        Exception: of any kind, for a file that does not exist, is not whole, or has another content.
    """
    with zipfile.ZipFile(path) as parts, warnings.catch_warnings():
        if parts.testzip() is not None:  # torch.load does not look at checksums
            raise zipfile.BadZipFile
        warnings.simplefilter("ignore")  # about foreign pickles, which are refused
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file; see `write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def _keep(path: Path, previous: Path) -> None:
    """Make `previous` name the file that `path` names, in one step; `path` keeps naming it where hard links exist."""
    link = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
        os.replace(link, previous)
    except FileNotFoundError:
        return  # there is nothing to keep yet
    except OSError:  # a file system without hard links
        os.replace(path, previous)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
