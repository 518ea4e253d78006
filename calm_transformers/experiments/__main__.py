"""Reproduces the paper's tables in miniature: trains and scores small models, and writes the tables.

    calm experiments [--corpus DIR] [--only lengths heads]

The models are trained on a language whose optimal score is known (language.py) and, given a corpus, on stories.
Trainings and evaluations run one after another as commands of this package, with their output in .log files. Finished
ones are skipped, and an interrupted training resumes from its last checkpoint. At the end tables, records and learning
curves are written to experiments.md, .json and .png in the output folder, errors of temperature sampling to
temperature.png.
After changing a recipe, remove the folders of its trainings: existing results are never recomputed.
"""

import json
import sys
from pathlib import Path

from calm_transformers.command_line import InputError, Parser, command, known_errors, require_package
from calm_transformers.evaluation.report import write_json
from calm_transformers.experiments.plan import FOLDER, Plan
from calm_transformers.experiments.tables import format_tables, plot_curves, plot_distillation
from calm_transformers.files import atomic_write
from calm_transformers.progress import print_above_bars, progress_bar


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser("calm experiments", __doc__)
    parser.add_argument("--corpus", type=Path, help="folder with tinystories-{train,validation}.jsonl.xz")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups of tables (default: all)")
    parser.add_argument("--experiments", nargs="+", type=Path, metavar="FILE", help="default: language, then stories")
    parser.add_argument("--output", type=Path, default=Path("runs/experiments"))
    args = parser.parse_args(argv)
    stories = [FOLDER / "stories.yaml"] if args.corpus else []
    with known_errors(InputError, OSError):
        require_package("matplotlib", "eval", "the learning curves")
        files = args.experiments or [FOLDER / "language.yaml", *stories]
        plans = [Plan(file, args.output, args.corpus, args.only) for file in files]
        runs = {name: run for plan in plans for name, run in plan.runs.items()}
        path = args.output / "experiments.json"
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        failed = []
        for name, run in progress_bar(runs.items(), "Experiments", "run"):
            is_new = not run.result.exists()
            if is_new:
                print_above_bars(f"{name} ...")
                if not run.execute():
                    failed.append(name)
                    print_above_bars(f"  failed: see {run.log}", file=sys.stderr)
            if run.is_evaluation and run.result.exists() and (is_new or name not in records):
                records[name] = run.record()
                write_json(path, records)
        with atomic_write(path.with_suffix(".md")) as temporary:
            temporary.write_text(format_tables(plans, records), encoding="utf-8")
        plot_curves(plans, records, path.with_suffix(".png"))
        plot_distillation(records, args.output / "temperature.png")
    print(f"wrote {path.with_suffix('.md')}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
