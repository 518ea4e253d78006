"""Writes files and folders so that a half-written one never stands under its name."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from calm_transformers.command_line import InputError

UNFINISHED = ".unfinished"


@contextmanager
def unfinished(path: str | Path) -> Iterator[Path]:
    """Yields a free path beside `path` for a file or folder, renamed to `path` if the block ends without an error and
    removed if not; what a killed process left there is removed first.

    Raises:
        InputError: another process is writing it.
    """
    path = Path(path)
    aside = path.with_name(path.name + UNFINISHED)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)  # which the system releases when a process dies
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{path} is being written by another process: wait for it, or name another.") from None
    try:
        _remove(aside)
        yield aside
        os.replace(aside, path)
    finally:
        _remove(aside)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a folder to write to, which becomes `output` at the end, and is removed where anything fails.

    Raises:
        InputError: `output` is there, and no empty folder.
        OSError: the disk is full or cannot be written to; it names a file or the folder.
    """
    output = output.absolute()
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is not a folder.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output} exists already and is not an empty folder.")
    try:
        with unfinished(output) as folder:
            folder.mkdir()
            yield folder
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(output)) from error
