"""Measures the speed table of docs/results/speed.md and its plot: `make speed`.

    calm bench speed --folder runs/speed

Compares CALM-M with Transformer-S in float32, both with the same libraries for linear layers (`--fast_baseline`) and
with PyTorch's default for the Transformer, and in bfloat16; and the bundled model with a Llama of demo-transformer's
shape. CALM-M draws at T = 0.5 with a distilled head or with candidates, and at T = 1. A part is one run of `calm bench
generation`. Results are stored in the folder, so that an interrupted run resumes; remove the folder to measure again.
Once all parts are finished, the table is inserted between its markers in the page.
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
PAGE = ROOT / "docs" / "results" / "speed.md"
FAST_BASELINE, FLOAT32, BFLOAT16, DEMO = "float32-fast-baseline", "float32", "bfloat16", "demo"
BATCH_SIZES = ("1", "8")
COMMON = "--device cpu --num_candidates 200"
CALM_M = "--shape calm-m --baseline transformer-s --output_length 32 --repetitions 3"
OPTIONS = {
    FAST_BASELINE: f"{CALM_M} --dtype float32 --fast_baseline",
    FLOAT32: f"{CALM_M} --dtype float32",
    BFLOAT16: f"{CALM_M} --dtype bfloat16",
    DEMO: "--shape demo --baseline demo-transformer --dtype float32 --output_length 128 --repetitions 15",
}
SAMPLING = {  # of CALM-M
    "distilled": "--temperature 0.5 --sampling_method distilled --workload worst",
    "candidates": "--temperature 0.5 --workload worst real",
    "untempered": "--temperature 1 --workload worst",
}
DEMO_SAMPLING = {f"T{T}": f"--temperature {T} --workload real" for T in ("0.5", "1")}


class Part(NamedTuple):
    """One run of the generation benchmark: keys of `OPTIONS` and of `SAMPLING` or `DEMO_SAMPLING`, and batch size."""

    comparison: str
    sampling: str
    batch_size: str

    def path(self, folder: Path) -> Path:
        return folder / f"{self.comparison}-{self.sampling}-batch{self.batch_size}.json"

    def rows(self, folder: Path) -> list[dict]:
        return json.loads(self.path(folder).read_text(encoding="utf-8"))

    def measure(self, folder: Path) -> None:
        """Runs the benchmark unless its rows exist."""
        path = self.path(folder)
        if path.exists():
            return
        print(f"\n{path.stem}", flush=True)
        args = [*OPTIONS[self.comparison].split(), *COMMON.split(), *(SAMPLING | DEMO_SAMPLING)[self.sampling].split()]
        with atomic_write(path) as temporary:
            args += ["--batch_size", self.batch_size, "--json", str(temporary)]
            if generation.main(args):
                raise InputError(f"{path.stem} could not be measured.")


PARTS = [
    Part(comparison, sampling, batch_size)
    for comparison in OPTIONS
    for sampling in (DEMO_SAMPLING if comparison == DEMO else SAMPLING)
    for batch_size in BATCH_SIZES
]


def read_rows(comparison: str, folder: Path) -> list[dict]:
    """Reads all rows of a comparison, in the order of the tables."""
    return [row for part in PARTS if part.comparison == comparison for row in part.rows(folder)]


def describe_sampling(row: dict) -> str:
    """Returns in words how a row's patches were sampled."""
    if row["draws"] == 1:
        return "one sample" if row["temperature"] == 1 else "distilled head, one sample"
    return f"up to {row['num_candidates']} candidates, {row['workload']}" if row["shape"] != "demo" else "rejection"


def speed_table(folder: Path) -> str:
    """Formats the tokens per second of all comparisons."""
    header = ["comparison", "sampling", "T", "batch"]
    header += ["CALM, tokens/s", "Transformer, tokens/s", "ratio", "ms per step"]
    names = {
        FAST_BASELINE: "CALM-M, Transformer-S: float32, equal libraries",
        FLOAT32: "… PyTorch's default for Transformer-S",
        BFLOAT16: "… bfloat16",
        DEMO: "demo, Llama of demo-transformer's shape: float32, 15 runs",
    }
    rows = [
        [
            *(name, describe_sampling(row), f"{row['temperature']:g}", str(row["batch_size"])),
            *(f"{row['tokens_per_second']:.1f}", f"{row['baseline_tokens_per_second']:.1f}"),
            *(f"{row['ratio']:.2f}", f"{row['step_ms']:.1f}"),
        ]
        for comparison, name in names.items()
        for row in read_rows(comparison, folder)
    ]
    return markdown(header, rows) + "\n\n" + provenance(read_rows(FAST_BASELINE, folder))


def provenance(rows: list[dict]) -> str:
    """Returns the line below the table: machine, versions, settings and dates."""
    row, dates = rows[0], sorted({row["date"] for row in rows})
    return (
        f"{row['device_name']}, {row['threads']} threads, torch {row['torch']}, transformers {row['transformers']}, "
        f"N = {row['num_candidates']}, medians of {row['repetitions']} runs in turns; {' and '.join(dates)}."
    )


def replace_table(path: Path, table: str) -> None:
    """Replaces the text between the markers of a document."""
    begin, end = "<!-- make speed -->\n", "\n<!-- until here -->"
    before, begin_found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, end_found, after = rest.partition(end)
    if not (begin_found and end_found):
        raise ValueError(f"{path} has no markers {begin.strip()} and {end.strip()} around the table.")
    with atomic_write(path) as temporary:
        temporary.write_text(before + begin + table + end + after, encoding="utf-8")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm bench speed", __doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/speed"), help="for the results of finished parts")
    options = parser.parse_args(argv)
    with known_errors(OSError):
        options.folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        part.measure(options.folder)
    with known_errors(ValueError, OSError):
        generation.write_plot(ROOT / "docs" / "speed.png", read_rows(FAST_BASELINE, options.folder))
        replace_table(PAGE, speed_table(options.folder))


if __name__ == "__main__":
    sys.exit(main())
