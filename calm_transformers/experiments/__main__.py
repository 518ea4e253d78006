"""The paper's tables in miniature: trains what is missing, scores it, writes the tables.

    calm experiments [--corpus DIR] [--only lengths heads]

On a language whose best score is known (language.py) and, with a corpus of stories, on those too. Trainings and
evaluations are commands of this package, run one after another, their output in .log files. What is finished is
skipped, and a training that was stopped resumes from its last checkpoint. In the end tables, records and learning
curves are written: experiments.md, .json and .png in the output folder.
Where a recipe has changed, remove the folder of what it trained: its result would be taken for the new one's.
"""

import json
import sys
from pathlib import Path

from calm_transformers.command_line import InputError, Parser, command, known_errors, require_package
from calm_transformers.evaluation.report import write_json
from calm_transformers.experiments.plan import FOLDER, Plan
from calm_transformers.experiments.tables import document, draw_curves
from calm_transformers.files import atomic_write
from calm_transformers.progress import print_above_bars, progress_bar


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser("calm experiments", __doc__)
    parser.add_argument("--corpus", type=Path, help="with tinystories-train.jsonl.xz, tinystories-validation.jsonl.xz")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="of the tables; default: all, in the files' order")
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
            if run.measures and run.result.exists() and (is_new or name not in records):
                records[name] = run.record()
                write_json(path, records)
        with atomic_write(path.with_suffix(".md")) as aside:
            aside.write_text(document(plans, records), encoding="utf-8")
        draw_curves(plans, records, path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.md')}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
