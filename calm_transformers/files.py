"""Writes files and folders so that a half-written one never stands under its name."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"


@contextmanager
def unfinished(path: str | Path) -> Iterator[Path]:
    """Yields a free path beside `path` for a file or folder, renamed to `path` if the block ends without an error and
    removed if not; what a killed process left there is removed first."""
    path = Path(path)
    aside = path.with_name(path.name + UNFINISHED)
    _remove(aside)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
