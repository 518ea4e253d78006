"""Running the stages: each in a process of its own, several at a time, skipped when finished, resumed when half so."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from calm.command_line import InputError
from calm.experiments.language import LANGUAGE_FILE
from calm.experiments.plan import LANGUAGE, UNFINISHED, Plan, Stage
from calm.progress import progress_bar, say
from calm.training.recipe import load_recipe

EVALUATIONS = {
    "score": "calm.evaluation.brier_lm",
    "share": "calm.experiments.share",
    "replacements": "calm.experiments.replacements",
    "sharpening": "calm.experiments.sharpening",
    "noise": "calm.evaluation.autoencoder_report",
}
SECONDS_BETWEEN_LOOKS = 0.2


def result_file(plan: Plan, stage: Stage) -> Path:
    """What stands there only when the stage is finished."""
    folder = plan.folder(stage)
    if stage.kind in EVALUATIONS:
        return folder.parent / (f"{stage.kind}.json" if stage.kind not in ("score", "share") else "brier.json")
    written_last = {LANGUAGE: LANGUAGE_FILE, "tokenizer": "tokenizer_config.json"}
    return folder / written_last.get(stage.kind, "trainer_state.json")


def is_finished(plan: Plan, stage: Stage) -> bool:
    """A score counts only where it was measured at as many positions as the plan asks for, or more."""
    path = result_file(plan, stage)
    if not path.exists() or stage.kind not in ("score", "share"):
        return path.exists()
    score = read_score(path)
    enough = score["positions"] >= stage.options["max_positions"]
    return enough and score["block_size"] == plan.evaluation["block_size"]


def read_score(path: Path) -> dict:
    """What an evaluation of one model wrote."""
    score = json.loads(path.read_text(encoding="utf-8"))
    return score[0] if isinstance(score, list) else score


def check(plan: Plan, stages: list[Stage]) -> None:
    """The corpus is there, and nothing that was trained by another recipe is taken for this one.

    Raises:
        InputError: that is not so.
    """
    missing = [plan.text(part) for part in ("train", "validation") if not plan.text(part).is_file()]
    if missing and not plan.is_language:
        raise InputError(f"{missing[0]}: no such file. Give --corpus (make: CORPUS=) the folder that holds it.")
    for stage in stages:
        saved = plan.folder(stage) / "recipe.yaml"
        if stage.is_training and saved.exists() and load_recipe(str(saved)) != stage.resolved():
            raise InputError(
                f"{plan.folder(stage)} was trained by another recipe than {stage.name} has now: "
                "remove the folder, and what depends on it, or choose another --output."
            )


def command(plan: Plan, stage: Stage) -> list[str]:
    """The command line of a stage."""
    python, options = [sys.executable, "-m"], dict(stage.options)
    if stage.is_training:
        return [*python, f"calm.training.train_{stage.kind}", "--recipe", str(stage.recipe), *stage.arguments()]
    if stage.kind == LANGUAGE:
        module, options["output"] = "calm.experiments.language", plan.folder(stage)
    else:
        module, options["json"] = EVALUATIONS[stage.kind], _unfinished(result_file(plan, stage))
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value) if word is not None]
    return [*python, module, *words]


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


class Running:
    """A stage at work, its output in a .log beside its folder.

    Args:
        plan: of the stage.
        stage: what to run.
        threads: CPU threads that it computes on.
    """

    def __init__(self, plan: Plan, stage: Stage, threads: int):
        self.plan, self.stage = plan, stage
        folder = plan.folder(stage)
        folder.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.log = folder.with_name(f"{folder.name}.log")
        with self.log.open("a", encoding="utf-8") as file:
            words = command(plan, stage)
            print(" ".join(words), file=file, flush=True)
            # The lock of the output folder is handed on.
            self.process = subprocess.Popen(words, stdout=file, stderr=file, env=environment, close_fds=False)

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def conclude(self) -> bool:
        """Gives the result its name; whether it went well."""
        code, stage = self.process.returncode, self.stage
        if code == 0 and stage.kind == "tokenizer":
            os.replace(_unfinished(self.plan.folder(stage)), self.plan.folder(stage))
        if code == 0 and stage.kind in EVALUATIONS:
            os.replace(_unfinished(result_file(self.plan, stage)), result_file(self.plan, stage))
        if code:
            say(f"  {stage.name} failed with exit code {code}, see {self.log}", file=sys.stderr)
        return code == 0

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def run(
    plan: Plan,
    stages: list[Stage],
    threads: int = 1,
    jobs: int = 1,
    after_each: Callable[[Stage], None] = lambda stage: None,
) -> list[str]:
    """Runs what is not finished; names of the stages that failed or could not run because of one.

    Args:
        plan: of all stages.
        stages: those to run, each after what it needs. The first that can run is next.
        threads: CPU threads that each computes on.
        jobs: stages that run at a time.
        after_each: called after each evaluation.

    Raises:
        InputError: as `check`, or another run works in the folder.
    """
    check(plan, stages)
    failed: list[str] = []
    numbers = {stage.name: f"{number}/{len(stages)} {stage.name}" for number, stage in enumerate(stages, start=1)}
    waiting, running = list(stages), list[Running]()
    done = sum(is_finished(plan, stage) for stage in stages)
    with _alone(plan.output), progress_bar(None, plan.name, "stage", len(stages), done) as bar:
        try:
            while waiting or running:
                busy = {one.stage.name for one in running}
                stage = _next(waiting, busy) if len(running) < jobs else None
                if stage is not None:
                    waiting.remove(stage)
                    unmet = [name for name in stage.needs if name in failed]
                    if is_finished(plan, stage):
                        say(f"{numbers[stage.name]}: finished before")
                    elif unmet:
                        say(f"{numbers[stage.name]}: left out, for {', '.join(unmet)} failed")
                        bar.update()
                        failed.append(stage.name)
                    else:
                        say(f"{numbers[stage.name]} ...")
                        running.append(Running(plan, stage, threads))
                    continue
                time.sleep(SECONDS_BETWEEN_LOOKS)
                bar.refresh()  # the time goes on
                for one in [one for one in running if one.has_ended]:
                    running.remove(one)
                    bar.update()
                    if not one.conclude():
                        failed.append(one.stage.name)
                    elif one.stage.kind in EVALUATIONS:
                        after_each(one.stage)
        finally:
            for one in running:
                one.stop()
    return failed


def _next(waiting: list[Stage], busy: set[str]) -> Stage | None:
    """The first stage for which nothing that it needs is still to come."""
    to_come = busy | {stage.name for stage in waiting}
    return next((stage for stage in waiting if not to_come.intersection(stage.needs)), None)


@contextmanager
def _alone(output: Path):
    """Holds the folder's lock. The stages' processes inherit it: one that outlives a killed parent still holds it.

    Raises:
        InputError: somebody else has it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w", encoding="utf-8") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{output}: another run works there; wait for it, or choose another --output.") from error
        yield
