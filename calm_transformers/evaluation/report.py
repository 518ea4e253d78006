"""What the commands that measure something write: tables in Markdown, figures in JSON, pictures."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calm_transformers.command_line import require_package
from calm_transformers.files import atomic_write


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def write_json(path: Path | None, content: Any) -> None:
    """Nothing where no path is given."""
    if path is not None:
        with atomic_write(path) as aside:
            aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def picture_of(path: Path, *subplots: int, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """Yields `plt.subplots(*subplots, **settings)`, figure and axes, and writes the figure in the end.

    Raises:
        InputError: matplotlib is missing.
    """
    require_package("matplotlib", "eval", "a picture")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*subplots, **{"layout": "constrained", **settings})
    yield figure, axes
    with atomic_write(path) as aside:
        figure.savefig(aside, dpi=120, bbox_inches="tight", format=path.suffix[1:])
    plt.close(figure)
