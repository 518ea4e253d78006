"""The paper's tables in miniature: trains what is missing, scores it, writes the tables.

    python -m calm.experiments [--corpus DIR] [--only lengths heads]

On a language whose best score is known (language.py) and, with a corpus of stories, on those too. It can be stopped at
any moment; the same command goes on where it was.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from calm.command_line import InputError, Parser, command, known_errors, positive
from calm.experiments.curves import draw
from calm.experiments.plan import FOLDER, UNFINISHED, Plan, Stage
from calm.experiments.report import document, trainings
from calm.experiments.results import Results
from calm.experiments.stages import check, run
from calm.training.extras import need


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m calm.experiments", __doc__)
    parser.add_argument("--corpus", type=Path, help="with tinystories-train.jsonl.xz, tinystories-validation.jsonl.xz")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="of the tables; default: all, in the files' order")
    parser.add_argument("--experiments", nargs="+", type=Path, metavar="FILE", help="default: language, then stories")
    parser.add_argument("--output", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--document", type=Path, help="default: experiments.md in the output folder")
    parser.add_argument(
        "--reuse", type=Path, metavar="JSON", help="don't repeat what was measured by the same recipes"
    )
    parser.add_argument("--max_steps", type=positive, help="at most so many steps of each training, to try it out")
    parser.add_argument(
        "--jobs", type=positive, default=os.cpu_count(), help="trainings at a time; default: the cores"
    )
    parser.add_argument("--threads", type=positive, default=1, help="of each training (default: 1)")
    parser.add_argument("--dry_run", action="store_true", help="print parameters, tokens and FLOPs, and exit")
    parser.add_argument("--report", action="store_true", help="write the document from what is finished, and exit")
    return parser.parse_args(argv)


def make_plans(args: argparse.Namespace) -> list[Plan]:
    files = args.experiments or [FOLDER / "language.yaml", *([FOLDER / "stories.yaml"] if args.corpus else [])]
    return [Plan(file, args.output / file.stem, args.corpus, args.max_steps) for file in files]


def chosen(plans: list[Plan], groups: list[str] | None) -> list[tuple[Plan, list[Stage]]]:
    """Each plan with the stages that the groups' tables need.

    Raises:
        InputError: a group that no plan has.
    """
    known = [group for plan in plans for group in plan.groups]
    unknown = [group for group in groups or [] if group not in known]
    if unknown:
        raise InputError(f"no group {unknown[0]!r}: the groups are {', '.join(known)}.")
    return [(plan, plan.of_groups(groups)) for plan in plans]


def write(plans: list[Plan], results: Results, path: Path) -> None:
    """The document, and beside it the records that it was written from and its picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write(path.with_suffix(".json"))
    draw(plans, results, path.with_suffix(".png"))
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_text(document(plans, results), encoding="utf-8")
    os.replace(unfinished, path)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    path = args.document or args.output / "experiments.md"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the trainings of the moment end too
    failed = []
    with known_errors(InputError, OSError):
        need("matplotlib", "eval", "the learning curves")
        plans = make_plans(args)
        work = chosen(plans, args.only)
        if args.dry_run:
            for plan, stages in work:
                print(trainings(plan, Results([])), end="\n\n")
                print("\n".join(f"{i}/{len(stages)} {stage.name}" for i, stage in enumerate(stages, start=1)))
            return 0
        results = Results(plans, args.reuse)
        work = [] if args.report else [(plan, results.missing(plan, stages)) for plan, stages in work]
        for plan, stages in work:  # of all of them, before hours of work with the first one
            check(plan, stages)
        for plan, stages in work:

            def after_each(stage: Stage, plan: Plan = plan) -> None:
                results.add(plan, stage)
                write(plans, results, path)

            failed += run(plan, stages, args.threads, args.jobs, after_each)
        write(plans, results, path)
    print(f"wrote {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
