"""Draws what training logged: `calm evaluate plot RUN [RUN ...] [--output curves.png]`.

A run is the folder that a train_* command writes. One panel a figure, one line a run; a run that goes on is drawn up
to its last checkpoint.
"""

import json
import sys
from pathlib import Path

from calm_transformers.command_line import Parser, command, known_errors, picture
from calm_transformers.evaluation.report import saved_figure

# Not worth a panel: they count, or say what the recipe says.
LEFT_OUT = {"step", "epoch", "total_flos", "train_loss"}
ENDS_LEFT_OUT = ("_runtime", "_per_second")
PANELS_A_ROW = 3


def read_log(run: Path) -> list[dict]:
    """Log entries of a run, each with its step.

    Raises:
        ValueError: the folder holds neither a finished run nor a checkpoint.
    """
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    for folder in [run, *reversed(checkpoints)]:
        if (folder / "trainer_state.json").exists():
            return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    raise ValueError(f"{run}: no trainer_state.json, neither there nor in a checkpoint.")


def series(log: list[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """Figure → (steps, values). Evaluation's figures have names that begin with eval_."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for entry in log:
        for name, value in entry.items():
            counts = name in LEFT_OUT or (name.endswith(ENDS_LEFT_OUT) and name != "tokens_per_second")
            if not counts and isinstance(value, (int, float)):
                steps, values = found.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    return found


def draw(runs: list[Path], output: Path) -> None:
    """Writes a picture with one panel for each figure; eval_X shares the panel of X, dashed."""
    lines = {run.name: series(read_log(run)) for run in runs}
    names = dict.fromkeys(name.removeprefix("eval_") for found in lines.values() for name in found)
    panels = sorted(names, key=lambda name: name != "loss")  # the loss first
    rows = -(-len(panels) // PANELS_A_ROW)
    size = (4 * PANELS_A_ROW, 2.6 * rows)
    with saved_figure(output, rows, PANELS_A_ROW, figsize=size, squeeze=False, layout="tight") as (figure, axes):
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        labels = {}
        for panel, axis in zip(panels, axes.flat, strict=False):
            for number, (run, found) in enumerate(lines.items()):
                for name, style, label in ((panel, "-", run), (f"eval_{panel}", "--", f"{run}, held out")):
                    if name in found:
                        (labels[label],) = axis.plot(*found[name], style, color=f"C{number}")
            axis.set_title(panel.replace("_", " "), fontsize=10)
            axis.set_xlabel("step", fontsize=8)
            axis.tick_params(labelsize=8)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": 4, "fontsize": 8}
        figure.legend(labels.values(), labels.keys(), **place)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm evaluate plot", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that a train_* command wrote")
    parser.add_argument("--output", type=picture, help="picture; by default curves.png in the first run")
    options = parser.parse_args(argv)
    output = options.output or options.runs[0] / "curves.png"
    with known_errors():
        draw(options.runs, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    sys.exit(main())
