"""Progress bars, tqdm's and those of transformers, shown on stderr only if it is a terminal and only by rank 0.

for batch in progress_bar(batches, "BrierLM", "batch"):
    ...
"""

import os
import sys
from collections.abc import Iterable
from typing import TextIO

from tqdm import tqdm
from transformers.utils import logging


def shows_bars() -> bool:
    """Whether this process shows progress bars."""
    return os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()


def hide_upstream_bars() -> None:
    """Disables transformers' progress bars, which don't check for a terminal, if ours aren't shown either."""
    if not shows_bars():
        logging.disable_progress_bar()


def progress_bar(
    iterable: Iterable | None, description: str, unit: str, total: float | None = None, initial: int = 0
) -> tqdm:
    """Returns a progress bar over `iterable`; without one, the caller updates and closes it (use `with`).

    Args:
        iterable: the items.
        description: shown before the bar.
        unit: name of one item, in the singular; "B" (bytes) is scaled to kB, MB, GB.
        total: number of items, by default the length of `iterable`.
        initial: number of items done by an earlier run, left out of the rate and the time left.
    """
    hidden, scaled = not shows_bars(), unit == "B"
    return tqdm(iterable, desc=description, unit=unit, unit_scale=scaled, total=total, initial=initial, disable=hidden)


def print_above_bars(line: str, file: TextIO | None = None) -> None:
    """Prints a line, to stdout by default, above any progress bar."""
    stream = sys.stdout if file is None else file
    tqdm.write(line, file=stream)
    stream.flush()
