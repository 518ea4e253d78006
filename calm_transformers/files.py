"""Writes files and folders atomically: a partially written one never has the final name."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from calm_transformers.command_line import InputError, format_error

TEMPORARY_SUFFIX = ".unfinished"
# Of libraries in Rust (safetensors, tokenizers) and of torch.save, whose types are their own or RuntimeError.
WRITE_ERRORS = re.compile(r"\(os error \d+\)|inline_container|PytorchStreamWriter")


@contextmanager
def written(path: str | Path) -> Iterator[None]:
    """Converts an error of writing, as on a full disk, to an InputError that names the file, by default `path`."""
    try:
        yield
    except BrokenPipeError:  # of what reads a command's output
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not WRITE_ERRORS.search(str(error)):
            raise
        message = format_error(error).rstrip(".") + "."
        raise InputError(message if getattr(error, "filename", None) else f"{path}: {message}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or folder; renames it to `path` on success, else removes it.

    A temporary file left behind by a killed process is removed first.

    Raises:
        InputError: another process is writing `path`, or it cannot be written, as on a full disk.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)  # released by the system when a process dies
    with written(path):
        try:
            lock.acquire()
        except Timeout:
            raise InputError(f"{path} is being written by another process: wait for it, or name another.") from None
        try:
            _remove(temporary)
            yield temporary
            os.replace(temporary, path)
        finally:
            _remove(temporary)
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `output` on success and removed on any error.

    Raises:
        InputError: `output` exists and is not an empty folder, its parent folder does not exist, or the disk is full.
    """
    output = output.absolute()
    if not output.parent.is_dir():
        raise InputError(f"{output}: {output.parent} is not a folder.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output} exists already and is not an empty folder.")
    with atomic_write(output) as folder:
        folder.mkdir()
        yield folder
