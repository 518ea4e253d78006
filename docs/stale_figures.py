"""Lists figures in README and docs measured with other than the bundled weights: `python docs/stale_figures.py`."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from calm_transformers.command_line import Parser, command

DOCS = Path(__file__).parent
WEIGHTS = DOCS.parent / "model.safetensors"
DIGITS = 12


@dataclass(frozen=True)
class Figures:
    """Results of one command on the bundled model that a document quotes.

    Args:
        what: description.
        document: path relative to the repository's root.
        quotes: the quoted text, up to line breaks.
        command: the command that prints them.
        weights: first digits of the SHA-256 of the measured weights.
    """

    what: str
    document: str
    quotes: list[str]
    command: str
    weights: str


def all_figures() -> list[Figures]:
    return [Figures(**entry) for entry in yaml.safe_load((DOCS / "figures.yaml").read_text(encoding="utf-8"))]


def digits_of(weights: Path) -> str:
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def stale(figures: list[Figures], weights: str) -> list[str]:
    """Returns a line for each entry that was measured with other weights."""
    return [f"{f.document}: {f.what}, measured at {f.weights}: {f.command}" for f in figures if f.weights != weights]


@command
def main(argv: list[str] | None = None) -> int:
    """Returns 1 if there are stale figures, else 0."""
    Parser("python docs/stale_figures.py", __doc__).parse_args(argv)
    weights = digits_of(WEIGHTS)
    lines = stale(all_figures(), weights)
    print("\n".join(lines) if lines else f"all figures are of the bundled weights, {weights}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
