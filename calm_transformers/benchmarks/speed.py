"""The speed tables of docs/guide.md and docs/speed.md and their picture, measured anew: `make speed`.

    calm bench speed --demo runs/k4-demo --folder runs/speed

CALM-M against Transformer-S in float32, against a Transformer-S that is lent CALM's products (`--fast_baseline`) and
in bfloat16, and the bundled model against a Llama of demo-transformer's shape. A part is one run of
`calm bench generation`. What is measured is kept in the folder, so that the same command resumes where it was stopped:
remove the folder to measure anew. When all parts are there, the tables are written between their marks in
both documents.

`--demo` is a trained model with CALM-M's K = 4, whose candidates "real" imposes; the bundled one has K = 2.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from calm_transformers.benchmarks import generation
from calm_transformers.command_line import InputError, Parser, command, known_errors
from calm_transformers.evaluation.report import markdown
from calm_transformers.files import atomic_write

ROOT = Path(__file__).parents[2]
GUIDE, SPEED = ROOT / "docs" / "guide.md", ROOT / "docs" / "speed.md"
PLAIN, LENT, BFLOAT16, DEMO = "float32", "float32-fast-baseline", "bfloat16", "demo"
TEMPERATURES, BATCH_SIZES = ("0.5", "1"), ("1", "8")
COMMON = "--device cpu --num_candidates 200 --repetitions 3"
OPTIONS = {
    PLAIN: "--shape calm-m --baseline transformer-s --dtype float32 --output_length 32",
    LENT: "--shape calm-m --baseline transformer-s --dtype float32 --output_length 32 --fast_baseline",
    BFLOAT16: "--shape calm-m --baseline transformer-s --dtype bfloat16 --output_length 32",
    DEMO: "--shape demo --baseline demo-transformer --dtype float32 --output_length 128 --workload real",
}


class Part(NamedTuple):
    """One run of the benchmark: a key of `OPTIONS`, temperature and batch size."""

    kind: str
    temperature: str
    batch_size: str

    def path(self, folder: Path) -> Path:
        return folder / f"{self.kind}-T{self.temperature}-batch{self.batch_size}.json"

    def rows(self, folder: Path) -> list[dict]:
        return json.loads(self.path(folder).read_text(encoding="utf-8"))

    def measure(self, folder: Path, demo: str) -> None:
        """Runs the benchmark, unless its rows are there.

        Raises:
            InputError: the benchmark refused.
        """
        path = self.path(folder)
        if path.exists():
            return
        print(f"\n{path.stem}", flush=True)
        words = [*OPTIONS[self.kind].split(), *COMMON.split(), *([] if self.kind == DEMO else ["--demo", demo])]
        with atomic_write(path) as aside:
            words += ["--temperature", self.temperature, "--batch_size", self.batch_size, "--json", str(aside)]
            if generation.main(words):
                raise InputError(f"{path.stem} could not be measured.")


PARTS = [Part(kind, T, size) for kind in OPTIONS for T in TEMPERATURES for size in BATCH_SIZES]


def rows_of(kind: str, folder: Path) -> list[dict]:
    """All rows of a kind, in the tables' order."""
    rows = [row for part in PARTS if part.kind == kind for row in part.rows(folder)]
    return sorted(rows, key=lambda row: (row["temperature"], row["batch_size"], row["workload"] == "real"))


def guide_table(folder: Path) -> str:
    """The rows in float32, and their ratios in the two other comparisons."""
    head = ["workload", "T", "batch", "tokens/s (range)", "Transformer-S", "ratio", "with oneDNN for both"]
    head += ["both in bfloat16", "ms per step: backbone, head, decode, selection", "draws", "memory ÷ weights"]
    rows = []
    for row, lent, half in zip(*(rows_of(kind, folder) for kind in (PLAIN, LENT, BFLOAT16)), strict=True):
        speed = "{tokens_per_second:.1f} ({low:.1f} – {high:.1f})".format(
            **row, low=row["tokens_per_second_range"][0], high=row["tokens_per_second_range"][1]
        )
        parts = ", ".join(f"{row[f'{part}_ms']:.0f}" for part in ("backbone", "head", "decode", "selection"))
        memory = "–" if row["peak_over_weights"] is None else f"{row['peak_over_weights']:.2f}"
        rows.append(
            [
                *(row["workload"], f"{row['temperature']:g}", str(row["batch_size"]), speed),
                *(f"{row['baseline_tokens_per_second']:.1f}", f"**{row['ratio']:.2f}**"),
                *(f"{lent['ratio']:.2f}", f"{half['ratio']:.2f}", parts, f"{row['draws']:.0f}", memory),
            ]
        )
    return markdown(head, rows) + "\n\n" + provenance(rows_of(PLAIN, folder))


def speed_table(folder: Path) -> str:
    """Tokens a second of every comparison."""
    head = ["comparison", "workload", "T", "batch", "CALM, tokens/s", "Transformer, tokens/s", "ratio", "ms per step"]
    names = {
        PLAIN: "CALM-M, Transformer-S: float32",
        LENT: "… with oneDNN for both",
        BFLOAT16: "… bfloat16",
        DEMO: "demo, Llama of demo-transformer's shape: float32",
    }
    rows = [
        [
            *(name, row["workload"], f"{row['temperature']:g}", str(row["batch_size"])),
            *(f"{row['tokens_per_second']:.1f}", f"{row['baseline_tokens_per_second']:.1f}"),
            *(f"{row['ratio']:.2f}", f"{row['step_ms']:.1f}"),
        ]
        for kind, name in names.items()
        for row in rows_of(kind, folder)
    ]
    return markdown(head, rows) + "\n\n" + provenance(rows_of(PLAIN, folder))


def provenance(rows: list[dict]) -> str:
    row, dates = rows[0], sorted({row["date"] for row in rows})
    return (
        f"{row['device_name']}, {row['threads']} threads, torch {row['torch']}, transformers {row['transformers']}, "
        f"N = {row['num_candidates']}, medians of {row['repetitions']} runs that take turns; {' and '.join(dates)}."
    )


def put(path: Path, text: str) -> None:
    """Writes a table between its marks.

    Raises:
        ValueError: the document has no such marks.
    """
    begin, end = "<!-- make speed -->\n", "\n<!-- until here -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise ValueError(f"{path}: it has no lines {begin.strip()} and {end.strip()}, between which the table goes.")
    with atomic_write(path) as aside:
        aside.write_text(before + begin + text + end + after, encoding="utf-8")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm bench speed", __doc__)
    parser.add_argument("--demo", default="runs/k4-demo", help="a trained model of K = 4")
    parser.add_argument("--folder", type=Path, default=Path("runs/speed"), help="where what is measured is kept")
    options = parser.parse_args(argv)
    if not (Path(options.demo) / "config.json").exists():
        raise InputError(f"--demo {options.demo}: there is no model (config.json).")
    with known_errors(OSError):
        options.folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        part.measure(options.folder, options.demo)
    with known_errors(ValueError, OSError):
        generation.write_plot(ROOT / "docs" / "speed.png", rows_of(PLAIN, options.folder))
        put(GUIDE, guide_table(options.folder))
        put(SPEED, speed_table(options.folder))


if __name__ == "__main__":
    sys.exit(main())
