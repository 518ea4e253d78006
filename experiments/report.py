"""experiments.md from what was measured: the tables are made here, the words stand in report.md."""

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from calm.experiments import sharpening
from calm.experiments.plan import Plan, Row, Stage, Table
from calm.experiments.results import Results

TEMPLATE = Path(__file__).parent / "report.md"
NOT_ASKED = "*Not asked for in this run: the corpus (`--corpus`) was not given.*"
PARTS = ("nothing", "solver", "head", "head and backbone")


def document(plans: list[Plan], results: Results) -> str:
    """The template with each `{name}` in it replaced.

    `{GROUP}` is that group's table or studies, `{PLAN.trainings}` sizes and costs, `{PLAN.autoencoders}` what comes
    back of noisy latents.
    """
    text = TEMPLATE.read_text(encoding="utf-8")
    parts = {table.group: comparison(plan, table, results) for plan in plans for table in plan.tables}
    parts |= {name: part for plan in plans if plan.is_language for name, part in studies(plan, results).items()}
    parts |= {f"{plan.name}.trainings": trainings(plan, results) for plan in plans}
    parts |= {f"{plan.name}.autoencoders": autoencoders(plan, results) for plan in plans}
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return re.sub(r"^\{[\w.]+\}$", NOT_ASKED, text, flags=re.MULTILINE)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


# one comparison


@dataclass
class Measured:
    """A row's scores, one a seed, and what they cost on average.

    Args:
        score: mean of what is compared: the share of the best, or BrierLM where no best is known.
        low: of the 95 % interval; of several seeds, the lowest score.
        high: likewise.
        brierlm: mean over the seeds.
        seeds: how many.
        cost: tokens, FLOPs, CPU seconds; means.
    """

    score: float
    low: float
    high: float
    brierlm: float
    seeds: int
    cost: dict[str, float]


def measured(plan: Plan, row: Row, results: Results) -> Measured | None:
    """What is known of a row so far."""
    records = [results.get(plan, plan.stages[f"models/{model}/score"]) for model in row.models]
    done = [record for record in records if record is not None]
    if not done:
        return None
    if plan.is_language:
        scores, intervals = [record["share"] for record in done], [record["share_interval"] for record in done]
    else:
        scores = [record["brierlm"]["value"] for record in done]
        intervals = [(record["brierlm"]["low"], record["brierlm"]["high"]) for record in done]
    low, high = intervals[0] if len(done) == 1 else (min(scores), max(scores))
    cost = {name: mean(record["cost"][name] for record in done) for name in done[0]["cost"]}
    brierlm = mean(record["brierlm"]["value"] for record in done)
    return Measured(mean(scores), low, high, brierlm, len(done), cost)


def comparison(plan: Plan, table: Table, results: Results) -> str:
    """Markdown: a line a row; over several seeds the mean, and the lowest and the highest."""
    share = ["share of the best (95 %)"] if plan.is_language else ["(95 %)"]
    header = ["", "tokens", "training FLOPs", "CPU s", "BrierLM", *share, "paper's BrierLM", "direction"]
    reference = measured(plan, table.rows[0], results)
    lines = []
    for row in table.rows:
        found, paper = measured(plan, row, results), "" if row.paper is None else f"{row.paper:.2f}"
        if found is None:
            lines.append([row.label, row.why_missing or "not run yet", "", "", "", "", paper, ""])
            continue
        verdict = "" if row is table.rows[0] else direction(found, reference, row.paper, table.rows[0].paper)
        cost = [
            f"{found.cost['tokens'] / 1e6:.2f} M",
            f"{found.cost['flops']:.1e}",
            f"{found.cost['cpu_seconds']:.0f}",
        ]
        lines.append([row.label, *cost, f"{found.brierlm:.2f}", _interval(found, plan.is_language), paper, verdict])
    return markdown(header, lines)


def _interval(found: Measured, is_share: bool) -> str:
    if is_share:
        text = f"{found.score:.1%} ({found.low:.1%} to {found.high:.1%}"
    else:
        text = f"({found.low:.2f} to {found.high:.2f}"
    return f"{text}, {found.seeds} seeds)" if found.seeds > 1 else f"{text})"


def direction(found: Measured, reference: Measured | None, paper: float | None, paper_reference: float | None) -> str:
    """Whether a row lies on the same side of the table's first row as in the paper.

    "Within the intervals": the two intervals overlap, so nothing can be said.
    """
    if reference is None:
        return ""
    if found.low <= reference.high and reference.low <= found.high:
        return "within the intervals"
    side = "above" if found.low > reference.high else "below"
    if paper is None or paper_reference is None:
        return side
    return f"{side}: {'agrees' if (side == 'above') == (paper > paper_reference) else 'against the paper'}"


# studies of single models


def studies(plan: Plan, results: Results) -> dict[str, str]:
    """Markdown of each kind of study."""
    rows, sharpened, missing = [], {}, []
    for stage in plan.studies["replacements"]:
        record = results.get(plan, stage)
        cells = ["not run yet", "", "", ""] if record is None else [_share(record.get(part)) for part in PARTS]
        rows.append([_model_of(stage), *cells])
    for stage in plan.studies["sharpening"]:
        record = results.get(plan, stage)
        if record is None:
            missing.append(f"{_model_of(stage)}: not run yet.")
        else:
            sharpened[_model_of(stage)] = record
    tables = [sharpening.report(sharpened)] if sharpened else []
    replaced = markdown(["model", *(f"{part} replaced" for part in PARTS)], rows)
    return {"replacements": replaced, "sharpening": "\n\n".join([*tables, *missing])}


def _model_of(stage: Stage) -> str:
    return stage.needs[0].partition("/")[2]


def _share(result: dict | None) -> str:
    """Of a part that the model has."""
    if result is None:
        return ""
    low, high = result["share_interval"]
    return f"{result['share']:.1%} ({low:.1%} to {high:.1%})"


# all of them


def trainings(plan: Plan, results: Results) -> str:
    """Markdown: sizes and costs of every model of the plan, trained or not."""
    header = ["model", "parameters", "tokens", "training FLOPs a token", "FLOPs a generated token", "CPU min"]
    lines = []
    for stage in plan.stages.values():
        if stage.kind not in ("autoencoder", "calm", "ar"):
            continue
        cost, record = plan.cost(stage), results.get(plan, _evaluation_of(plan, stage))
        minutes = "" if record is None else f"{record['cost']['cpu_seconds'] / 60:.1f}"
        train, inference = sum(cost.train_flops.values()), sum(cost.inference_flops.values())
        sizes = [f"{cost.trainable / 1e6:.2f} M", f"{plan.tokens(stage) / 1e6:.2f} M"]
        lines.append([stage.name, *sizes, f"{train:.1e}", f"{inference:.1e}", minutes])
    return markdown(header, lines)


def _evaluation_of(plan: Plan, stage: Stage) -> Stage:
    return plan.stages[f"{stage.name}/{'noise' if stage.kind == 'autoencoder' else 'score'}"]


def autoencoders(plan: Plan, results: Results) -> str:
    """Markdown: what each autoencoder gets back of unseen text, and from latents with noise."""
    sigmas = (0.0, 0.3, 0.5, 1.0)
    header = ["autoencoder", "σ = 0", *(f"{sigma:g}" for sigma in sigmas[1:]), "posterior σ", "KL, nats a patch"]
    lines = []
    for stage in plan.stages.values():
        if stage.kind != "noise":
            continue
        name, result = stage.needs[0].partition("/")[2], results.get(plan, stage)
        if result is None:
            lines.append([name, "not run yet", *[""] * 5])
            continue
        accuracy = {row["sigma"]: row["token_accuracy"] for row in result["noise"]}
        cells = [f"{accuracy[sigma]:.2%}" for sigma in sigmas]
        lines.append([name, *cells, f"{result['posterior_sigma']:.2f}", f"{result['kl']:.0f}"])
    return markdown(header, lines)
