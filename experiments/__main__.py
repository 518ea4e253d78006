"""The paper's tables in miniature: trains what is missing, scores it on unseen books, writes the tables.

    python -m calm.experiments --corpus DIR [--only lengths heads] [--document docs/experiments.md]

It can be stopped at any moment; the same command goes on where it was.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from calm.command_line import Parser, command, known_errors
from calm.experiments.plan import FOLDER, UNFINISHED, Plan, PlanError
from calm.experiments.report import document, trainings
from calm.experiments.stages import run
from calm.training.recipe import RecipeError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m calm.experiments", __doc__)
    parser.add_argument(
        "--corpus", required=True, type=Path, help="with books-train.jsonl.xz, books-validation.jsonl.xz"
    )
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="of the tables; default: all, in the file's order")
    parser.add_argument("--experiments", type=Path, default=FOLDER / "experiments.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--document", type=Path, help="default: experiments.md in the output folder")
    parser.add_argument("--max_steps", type=int, help="at most so many steps of each training, to try it out")
    parser.add_argument("--threads", type=int, default=1, help="of each training (default: 1)")
    parser.add_argument("--dry_run", action="store_true", help="print parameters, tokens and FLOPs, and exit")
    parser.add_argument("--report", action="store_true", help="write the document from what is finished, and exit")
    return parser.parse_args(argv)


def write_document(plan: Plan, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_text(document(plan))
    os.replace(unfinished, path)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    path = args.document or args.output / "experiments.md"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training of the moment ends too
    with known_errors(PlanError, RecipeError):
        plan = Plan(args.experiments, args.corpus, args.output, args.max_steps)
        stages = plan.of_groups(args.only)
        if args.dry_run:
            print(trainings(plan))
            print("\n" + "\n".join(f"{i}/{len(stages)} {stage.name}" for i, stage in enumerate(stages, start=1)))
            return 0
        if args.report:
            write_document(plan, path)
            return 0
        failed = run(plan, stages, args.threads, after_each=lambda: write_document(plan, path))
        write_document(plan, path)
    print(f"wrote {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
