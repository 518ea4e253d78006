"""Plots training logs: `calm evaluate plot RUN [RUN ...] [--output curves.png]`.

A run is the output folder of a train command. One panel per metric, one line per run; an unfinished run is plotted up
to its last checkpoint.
"""

import json
import sys
from pathlib import Path

from calm_transformers.command_line import Parser, command, image_path, known_errors
from calm_transformers.evaluation.report import saved_figure

# Counters and timings are not plotted.
EXCLUDED_NAMES = {"step", "epoch", "total_flos", "train_loss"}
EXCLUDED_SUFFIXES = ("_runtime", "_per_second")
NUM_COLUMNS = 3


def read_log(run: Path) -> list[dict]:
    """Returns the Trainer's log entries of a run, up to its last checkpoint if it isn't finished."""
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    for folder in [run, *reversed(checkpoints)]:
        if (folder / "trainer_state.json").exists():
            return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    raise ValueError(f"{run}: no trainer_state.json in the folder or a checkpoint.")


def series(log: list[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """Returns metric → (steps, values); evaluation metrics start with eval_."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for entry in log:
        for name, value in entry.items():
            is_excluded = name in EXCLUDED_NAMES or name.endswith(EXCLUDED_SUFFIXES) and name != "tokens_per_second"
            if not is_excluded and isinstance(value, (int, float)):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    return curves


def plot_runs(runs: list[Path], output: Path) -> None:
    """Writes a plot with one panel per metric; eval_X is a dashed line in the panel of X."""
    lines = {run.name: series(read_log(run)) for run in runs}
    names = dict.fromkeys(name.removeprefix("eval_") for curves in lines.values() for name in curves)
    panels = sorted(names, key=lambda name: name != "loss")  # the loss first
    rows = -(-len(panels) // NUM_COLUMNS)
    size = (4 * NUM_COLUMNS, 2.6 * rows)
    with saved_figure(output, rows, NUM_COLUMNS, figsize=size, squeeze=False, layout="tight") as (figure, axes):
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        legend = {}
        for panel, axis in zip(panels, axes.flat, strict=False):
            for number, (run, curves) in enumerate(lines.items()):
                for name, style, label in ((panel, "-", run), (f"eval_{panel}", "--", f"{run}, held out")):
                    if name in curves:
                        (legend[label],) = axis.plot(*curves[name], style, color=f"C{number}")
            axis.set_title(panel.replace("_", " "), fontsize=10)
            axis.set_xlabel("step", fontsize=8)
            axis.tick_params(labelsize=8)
        legend_options = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": 4, "fontsize": 8}
        figure.legend(legend.values(), legend.keys(), **legend_options)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm evaluate plot", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a train command")
    parser.add_argument("--output", type=image_path, help="file to write (default: curves.png in the first run)")
    options = parser.parse_args(argv)
    output = options.output or options.runs[0] / "curves.png"
    with known_errors():
        plot_runs(options.runs, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    sys.exit(main())
