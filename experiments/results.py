"""What was measured, a record each: enough to write the document without the models that it speaks of."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from statistics import mean

from calm.experiments.plan import UNFINISHED, Plan, Stage
from calm.experiments.stages import EVALUATIONS, is_finished, read_score, result_file


class Results:
    """Records of the finished evaluations of some plans, those of other runs of the same recipes included.

    Args:
        plans: whose stages the records are of.
        reuse: a file that `write` wrote; of its records those count whose recipes are the plan's.
    """

    def __init__(self, plans: list[Plan], reuse: Path | None = None):
        self.records: dict[str, dict] = {}
        before = json.loads(reuse.read_text(encoding="utf-8")) if reuse else {}
        for plan in plans:
            for stage in plan.stages.values():
                if stage.kind not in EVALUATIONS:
                    continue
                if is_finished(plan, stage):
                    self.add(plan, stage)
                elif before.get(key(plan, stage), {}).get("recipes") == digest(plan, stage):
                    self.records[key(plan, stage)] = before[key(plan, stage)]

    def add(self, plan: Plan, stage: Stage) -> None:
        """Takes in what a finished evaluation found, and what the trainings before it cost."""
        record = {"recipes": digest(plan, stage), **read_score(result_file(plan, stage))}
        record.pop("model", None)  # a path
        record["cost"] = totals(plan, plan.stages[stage.needs[0]])
        self.records[key(plan, stage)] = record

    def get(self, plan: Plan, stage: Stage) -> dict | None:
        return self.records.get(key(plan, stage))

    def missing(self, plan: Plan, stages: list[Stage]) -> list[Stage]:
        """Of the stages those that an evaluation without a record needs, itself included, in their order."""
        needed: set[str] = set()

        def add(stage: Stage) -> None:
            needed.add(stage.name)
            for name in stage.needs:
                add(plan.stages[name])

        for stage in stages:
            if stage.kind in EVALUATIONS and self.get(plan, stage) is None:
                add(stage)
        return [stage for stage in stages if stage.name in needed]

    def write(self, path: Path) -> None:
        unfinished = path.with_name(path.name + UNFINISHED)
        unfinished.write_text(json.dumps(self.records, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(unfinished, path)


def key(plan: Plan, stage: Stage) -> str:
    return f"{plan.name}/{stage.name}"


def digest(plan: Plan, stage: Stage) -> str:
    """Of all recipes and options that led to the stage's result, wherever it and the corpus lie."""

    def content(stage: Stage) -> list:
        stated = changed(stage.resolved()) if stage.is_training else stage.options
        return [stage.kind, stated, [content(plan.stages[name]) for name in stage.needs]]

    text = json.dumps(content(stage), sort_keys=True, default=str)
    for place in filter(None, (plan.output, plan.corpus)):
        text = text.replace(str(place), "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def changed(options) -> dict:
    """The fields of a dataclass that are not at their defaults: a new field leaves what was measured valid."""
    stated = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            stated[field.name] = changed(value)
        elif value != field.default:
            stated[field.name] = value
    return stated


# what it took


def totals(plan: Plan, stage: Stage) -> dict[str, float]:
    """Tokens, FLOPs and CPU seconds of a model's training, with those of the models it goes on from."""
    phases = plan.phases(stage)
    tokens = [plan.tokens(phase) for phase in phases]
    flops = [sum(plan.cost(phase).train_flops.values()) * n for phase, n in zip(phases, tokens, strict=True)]
    seconds = [n / speed(plan, phase) for phase, n in zip(phases, tokens, strict=True)]
    return {"tokens": sum(tokens), "flops": sum(flops), "cpu_seconds": sum(seconds)}


def speed(plan: Plan, stage: Stage) -> float:
    """Tokens of one training per second of CPU time, over all of its log."""
    state = json.loads((plan.folder(stage) / "trainer_state.json").read_text(encoding="utf-8"))
    key = "tokens_per_cpu_second"
    rates = [entry[key] for entry in state["log_history"] if key in entry]
    return 1 / mean(1 / rate for rate in rates)  # each entry is over equally many tokens
