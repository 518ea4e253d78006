"""The tables of what was measured, in Markdown, and the learning curves as a picture."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from calm_transformers.evaluation.report import markdown, saved_figure
from calm_transformers.experiments import sharpening
from calm_transformers.experiments.plan import Plan
from calm_transformers.experiments.share import share_of

CURVES = "curves"  # group of the table that is drawn
PARTS = ("nothing", "solver", "head", "head and backbone")
SIGMAS = (0.0, 0.3, 0.5, 1.0)


class Measured(NamedTuple):
    """A row's scores, one a seed: percent of the best score, or BrierLM where no best is known.

    Args:
        score: the mean.
        low, high: of the 95 % interval; of several seeds, the lowest and the highest score.
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


def measured(plan: Plan, row: dict, records: dict[str, dict]) -> Measured | None:
    """What is known of a row so far."""
    names = [f"{plan.name}/models/{model}/score" for model in plan.models(row["model"])]
    done = [records[name] for name in names if name in records]
    if not done:
        return None
    brierlms = [record["brierlm"]["value"] for record in done]
    scores = [100 * record["share"] for record in done] if plan.is_language else brierlms
    if len(done) > 1:
        low, high = min(scores), max(scores)
    elif plan.is_language:
        low, high = (100 * bound for bound in done[0]["share_interval"])
    else:
        low, high = done[0]["brierlm"]["low"], done[0]["brierlm"]["high"]
    cost = {name: mean(record["cost"][name] for record in done) for name in done[0]["cost"]}
    return Measured(mean(scores), low, high, mean(brierlms), len(done), cost)


def comparison(plan: Plan, rows: list[dict], records: dict[str, dict]) -> str:
    """A line a row; over several seeds the mean, and the lowest and the highest."""
    share = "share of the best (95 %)" if plan.is_language else "(95 %)"
    header = ["", "tokens", "training FLOPs", "CPU s", "BrierLM", share, "paper's BrierLM", "direction"]
    first, lines = measured(plan, rows[0], records), []
    for row in rows:
        found, paper = measured(plan, row, records), f"{row['paper']:.2f}" if "paper" in row else ""
        if found is None:
            lines.append([row["label"], "not run yet", *[""] * 4, paper, ""])
            continue
        form = "{:.1f}%" if plan.is_language else "{:.2f}"
        seeds = f", {found.seeds} seeds" if found.seeds > 1 else ""
        interval = f"({form.format(found.low)} to {form.format(found.high)}{seeds})"
        interval = f"{form.format(found.score)} {interval}" if plan.is_language else interval
        cost = [
            f"{found.cost['tokens'] / 1e6:.2f} M",
            f"{found.cost['flops']:.1e}",
            f"{found.cost['cpu_seconds']:.0f}",
        ]
        papers = row.get("paper"), rows[0].get("paper")
        verdict = "" if first is None or row is rows[0] else direction(found, first, *papers)
        lines.append([row["label"], *cost, f"{found.brierlm:.2f}", interval, paper, verdict])
    return markdown(header, lines)


def direction(found: Measured, first: Measured, paper: float | None, paper_first: float | None) -> str:
    """Whether a row lies on the same side of the table's first row as in the paper; nothing can be said where the two
    intervals overlap."""
    if found.low <= first.high and first.low <= found.high:
        return "within the intervals"
    is_above = found.low > first.high
    side = "above" if is_above else "below"
    if paper is None or paper_first is None:
        return side
    return f"{side}: {'agrees' if is_above == (paper > paper_first) else 'against the paper'}"


def document(plans: list[Plan], records: dict[str, dict]) -> str:
    """All tables, each under its title."""
    parts = ["# The paper's tables in miniature"]
    for plan in plans:
        for table in plan.tables:
            parts += [f"## {table['title']}", comparison(plan, table["rows"], records)]
        done = [name for name in plan.runs if name in records]
        for kind, table_of in (("replacements", replaced), ("sharpening", sharpening.report), ("noise", noise)):
            found = {name.split("/")[2]: records[name] for name in done if name.endswith(f"/{kind}")}
            if found:
                parts += [f"## {kind.capitalize()}", table_of(found)]
    return "\n\n".join(parts) + "\n"


def replaced(found: dict[str, dict]) -> str:
    """What is left of the best score where a model's parts are replaced."""
    rows = [
        [name, *(share_of(record[part]) if part in record else "" for part in PARTS)] for name, record in found.items()
    ]
    return markdown(["model", *(f"{part} replaced" for part in PARTS)], rows)


def noise(found: dict[str, dict]) -> str:
    """What each autoencoder gets back of unseen text, and from latents with noise."""
    rows = []
    for name, record in found.items():
        accuracy = {row["sigma"]: f"{row['token_accuracy']:.2%}" for row in record["noise"]}
        cells = [*(accuracy[sigma] for sigma in SIGMAS), f"{record['posterior_sigma']:.2f}", f"{record['kl']:.0f}"]
        rows.append([name, *cells])
    return markdown(["autoencoder", "σ = 0", "0.3", "0.5", "1", "posterior σ", "KL, nats a patch"], rows)


def draw_curves(plans: list[Plan], records: dict[str, dict], path: Path) -> None:
    """The rows of one label in the table of that group are the points of one line, over tokens and CPU seconds."""
    lines, tables = defaultdict(list), [(plan, table) for plan in plans for table in plan.tables]
    for plan, row in ((plan, row) for plan, table in tables if table["group"] == CURVES for row in table["rows"]):
        if found := measured(plan, row, records):
            lines[row["label"]].append(found)
    if not lines:
        return
    with saved_figure(path, 1, 2, figsize=(10, 4), sharey=True) as (figure, panels):
        for axes, key, scale in zip(panels, ("tokens", "cpu_seconds"), (1e6, 1), strict=True):
            for label, points in lines.items():
                points = sorted(points, key=lambda point: point.cost["tokens"])
                errors = [[p.score - p.low for p in points], [p.high - p.score for p in points]]
                along = [p.cost[key] / scale for p in points]
                axes.errorbar(along, [p.score for p in points], errors, marker="o", capsize=3, label=label)
            axes.set_xscale("log")
            axes.set_xlabel("million tokens of training" if key == "tokens" else "CPU seconds of training")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("share of the best BrierLM, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
