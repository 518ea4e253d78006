"""Running the stages: each in a process of its own, skipped when finished, resumed when half finished."""

import fcntl
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from calm.experiments.plan import UNFINISHED, Plan, PlanError, Stage
from calm.training.recipe import load_recipe

SCORE_FILE, NOISE_FILE = "brier.json", "noise.json"
COMMANDS = {"score": "calm.evaluation.brier_lm", "noise": "calm.evaluation.autoencoder_report"}


def result_file(plan: Plan, stage: Stage) -> Path:
    """What stands there only when the stage is finished."""
    folder = plan.folder(stage)
    if stage.kind in COMMANDS:
        return folder.parent / (SCORE_FILE if stage.kind == "score" else NOISE_FILE)
    return folder / ("tokenizer_config.json" if stage.kind == "tokenizer" else "trainer_state.json")


def is_finished(plan: Plan, stage: Stage) -> bool:
    """A score counts only for the text that the plan asks for."""
    path = result_file(plan, stage)
    if not path.exists() or stage.kind != "score":
        return path.exists()
    [score] = json.loads(path.read_text())
    return (score["block_size"], score["blocks"]) == (plan.evaluation["block_size"], plan.evaluation["blocks"])


def check_corpus(plan: Plan) -> None:
    """Raises `PlanError` where the corpus is not what the plan reads."""
    missing = [path for path in (plan.books("train"), plan.books("validation")) if not path.is_file()]
    if missing:
        raise PlanError(f"{missing[0]}: no such file. Give --corpus (make: CORPUS=) the folder that holds the books.")


def check_recipes(plan: Plan, stages: list[Stage]) -> None:
    """Nothing that was trained by another recipe is taken for this one.

    Raises:
        PlanError: the first such training.
    """
    for stage in stages:
        saved = plan.folder(stage) / "recipe.yaml"
        if stage.is_training and saved.exists() and load_recipe(str(saved)) != stage.resolved():
            raise PlanError(
                f"{plan.folder(stage)} was trained by another recipe than {stage.name} has now: "
                "remove the folder, and what depends on it, or choose another --output."
            )


def command(plan: Plan, stage: Stage) -> list[str]:
    """The command line of a stage."""
    python = [sys.executable, "-m"]
    if stage.is_training:
        return [*python, f"calm.training.train_{stage.kind}", "--recipe", str(stage.recipe), *stage.arguments()]
    options = {**stage.options, "json": _unfinished(result_file(plan, stage))}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [*python, COMMANDS[stage.kind], *words]


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


def run_stage(plan: Plan, stage: Stage, threads: int) -> bool:
    """Runs a stage to its end, its output in a .log beside its folder; whether it went well."""
    folder = plan.folder(stage)
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    log = folder.with_name(f"{folder.name}.log")
    with log.open("a") as file:
        words = command(plan, stage)
        print(" ".join(words), file=file, flush=True)
        code = subprocess.run(words, stdout=file, stderr=file, env=environment, close_fds=False).returncode
    if code == 0 and stage.kind == "tokenizer":
        os.replace(_unfinished(folder), folder)
    if code == 0 and not stage.is_training:
        os.replace(_unfinished(result_file(plan, stage)), result_file(plan, stage))
    if code:
        print(f"  failed with exit code {code}, see {log}", file=sys.stderr, flush=True)
    return code == 0


def run(plan: Plan, stages: list[Stage], threads: int, after_each=lambda: None) -> list[str]:
    """Runs what is not finished, in order; names of the stages that failed or could not run because of one.

    Args:
        plan: of all stages.
        stages: those to run, each after what it needs.
        threads: CPU threads that each computes on.
        after_each: called after each evaluation.
    """
    check_corpus(plan)
    check_recipes(plan, stages)
    failed = []
    with _alone(plan.output):
        for number, stage in enumerate(stages, start=1):
            progress = f"{number}/{len(stages)} {stage.name}"
            if is_finished(plan, stage):
                print(f"{progress}: finished before", flush=True)
            elif any(name in failed for name in stage.needs):
                print(f"{progress}: left out, for {', '.join(n for n in stage.needs if n in failed)} failed")
                failed.append(stage.name)
            else:
                print(f"{progress} ...", flush=True)
                if not run_stage(plan, stage, threads):
                    failed.append(stage.name)
                elif not stage.is_training:
                    after_each()
    return failed


@contextmanager
def _alone(output: Path):
    """Holds the folder's lock. The stages' processes inherit it: one that outlives a killed parent still holds it.

    Raises:
        PlanError: somebody else has it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PlanError(f"{output}: another run works there; wait for it, or choose another --output.") from error
        yield
