"""Output of the evaluation and benchmark commands: Markdown tables, JSON files and plots."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calm_transformers.command_line import require_package
from calm_transformers.files import atomic_write


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def write_json(path: Path | None, content: Any) -> None:
    """Writes `content` as JSON; does nothing if `path` is None."""
    if path is not None:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def saved_figure(path: Path, *subplots: int, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """Yields figure and axes of `plt.subplots(*subplots, **settings)` and saves the figure to `path` on exit."""
    require_package("matplotlib", "eval", "a plot")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*subplots, **{"layout": "constrained", **settings})
    yield figure, axes
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight", format=path.suffix[1:])
    plt.close(figure)
