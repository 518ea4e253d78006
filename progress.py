"""Progress bars of long work: how much is done, its rate and the time left, on stderr where that is a terminal.

    for batch in progress_bar(batches, "BrierLM", "batch"):
        ...

Nothing is shown where stderr is a file or a pipe, nor by any process of torchrun but the first. There is one bar at a
time: one that begins while another runs is not shown. While a bar runs, lines are printed by `say`.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO
from weakref import WeakSet

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LIBRARIES = ("transformers", "accelerate")  # whose loggers write to stderr by handlers of their own
_bars: WeakSet[tqdm] = WeakSet()


def is_first_process() -> bool:
    """Of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def shows_bars() -> bool:
    return is_first_process() and sys.stderr.isatty()


def progress_bar(work: Iterable | None, what: str, unit: str, total: float | None = None, done: int = 0) -> tqdm:
    """A bar over `work`, or one that the caller updates; with `total`, it says the time left.

    Args:
        work: iterated over; `None` for a bar that is updated by hand and closed, as by `with`.
        what: is being done; stands before the bar.
        unit: of what is counted, in the singular; "B" are bytes, written as kB, MB, GB.
        total: how many there are; by default the length of `work`, if it has one.
        done: how many were done before, by a run that goes on now: they count for neither rate nor time.
    """
    has_size = terminal_has_size()
    is_inside = any(not bar.disable for bar in _bars)  # a bar that has ended is disabled
    bar = tqdm(
        work,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        total=total,
        initial=done,
        disable=True if is_inside or not is_first_process() else None,  # None: by whether stderr is a terminal
        dynamic_ncols=has_size,
        ncols=None if has_size else 80,
        nrows=None if has_size else 24,
    )
    _bars.add(bar)
    return bar


def terminal_has_size() -> bool:
    """A new pseudo-terminal says that it has no columns, and would be shown nothing of a bar."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # stderr is no file of the system's
        return False


def say(line: str, file: TextIO | None = None) -> None:
    """Prints a line, to stdout by default, above the bar that may be there."""
    stream = sys.stdout if file is None else file
    tqdm.write(line, file=stream)
    stream.flush()


@contextmanager
def unbroken() -> Iterator[None]:
    """Within, warnings and what libraries log are written above the bar; one that an error leaves open ends, too."""
    if not shows_bars():
        yield
        return

    def show(message, category, filename, lineno, file=None, line=None):
        text = warnings.formatwarning(message, category, filename, lineno, line)
        tqdm.write(text, file=file or sys.stderr, end="")

    before, warnings.showwarning = warnings.showwarning, show
    try:
        with logging_redirect_tqdm([logging.root, *map(logging.getLogger, LIBRARIES)]):
            yield
    finally:
        warnings.showwarning = before
        for bar in _bars:
            bar.close()


def load_with_bar(load, name: str | Path, **settings):
    """`load(name, **settings)`, as `from_pretrained`, with a bar over the weights.

    Upstream has one by itself, too, but not in every version for weights in one file, and then not only on terminals.
    """
    with loading_bar(name):
        return load(name, **settings)


@contextmanager
def loading_bar(name: str | Path) -> Iterator[None]:
    """Within, a bar counts the weights that models get which are being loaded; upstream's own is silent.

    Args:
        name: folder or Hub id, which says how many there are. Files of the Hub are downloaded first, with its bars.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    bar: tqdm | None = None

    def count(module, parameter_name, parameter) -> None:
        nonlocal bar
        empty = module._parameters.get(parameter_name)
        if parameter is None or empty is None or not empty.is_meta or parameter.is_meta:
            return
        if bar is None:
            bar = progress_bar(None, "Loading weights", "tensor", num_tensors(name))
        if bar.total is None or bar.n < bar.total:  # tied weights come twice
            bar.update()

    hook = register_module_parameter_registration_hook(count)
    try:
        with _upstream_is_silent():
            yield
        if bar is not None and bar.total is not None:  # what the model has no place for was read, too
            bar.update(bar.total - bar.n)
    finally:
        hook.remove()
        if bar is not None:
            bar.close()


@contextmanager
def _upstream_is_silent() -> Iterator[None]:
    """Without transformers' bars, but with those of downloads, which know when they have no terminal."""
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    was_enabled, downloads_show = transformers.logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers.logging.disable_progress_bar()
    if downloads_show:
        enable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            transformers.logging.enable_progress_bar()


def num_tensors(name: str | Path) -> int | None:
    """Tensors in the safetensors files of a folder or of a Hub id in the cache; `None` where there are none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from safetensors import safe_open

    def find(file: str) -> Path | None:
        if (Path(name) / file).is_file():
            return Path(name) / file
        try:
            cached = try_to_load_from_cache(str(name), file)
        except HFValidationError:  # a folder
            return None
        return Path(cached) if isinstance(cached, str) else None

    if path := find("model.safetensors"):
        with safe_open(path, "pt") as weights:
            return len(weights.keys())
    if path := find("model.safetensors.index.json"):
        return len(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    return None
