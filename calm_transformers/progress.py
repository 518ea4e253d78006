"""Progress bars of long work: tqdm's and those of transformers, on stderr where that is a terminal.

    for batch in progress_bar(batches, "BrierLM", "batch"):
        ...

Of the processes that torchrun starts, the first one alone shows bars.
"""

import os
import sys
from collections.abc import Iterable
from typing import TextIO

from tqdm import tqdm
from transformers.utils import logging


def shows_bars() -> bool:
    return os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()


def hide_upstream_bars() -> None:
    """Turns off the bars of transformers, which don't ask for a terminal, where ours aren't shown either."""
    if not shows_bars():
        logging.disable_progress_bar()


def progress_bar(work: Iterable | None, what: str, unit: str, total: float | None = None, done: int = 0) -> tqdm:
    """A bar over `work`, or with `None` one that the caller updates and closes, as by `with`.

    Args:
        work: iterated over.
        what: is being done; stands before the bar.
        unit: of what is counted, in the singular; "B" are bytes, written as kB, MB, GB.
        total: how many there are; by default the length of `work`, if it has one.
        done: how many an earlier run did, which count for neither rate nor time left.
    """
    hidden, scaled = not shows_bars(), unit == "B"
    return tqdm(work, desc=what, unit=unit, unit_scale=scaled, total=total, initial=done, disable=hidden)


def say(line: str, file: TextIO | None = None) -> None:
    """Prints a line, to stdout by default, above the bar that may be there."""
    stream = sys.stdout if file is None else file
    tqdm.write(line, file=stream)
    stream.flush()
