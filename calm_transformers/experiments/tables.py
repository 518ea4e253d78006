"""Formats the results of the experiments as Markdown tables, and plots the learning curves."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from calm_transformers.evaluation.report import markdown, saved_figure
from calm_transformers.experiments import temperature_fidelity
from calm_transformers.experiments.optimal_fraction import format_fraction
from calm_transformers.experiments.plan import Plan

CURVES = "curves"  # group of the table that is plotted
ABLATED_PARTS = ("nothing", "solver", "head", "head and backbone")
SIGMAS = (0.0, 0.3, 0.5, 1.0)


class Score(NamedTuple):
    """The scores of a row over its seeds, in percent of the optimal BrierLM, or as BrierLM if that is unknown."""

    mean: float
    low: float  # 95 % interval; with several seeds, the lowest and the highest score
    high: float
    brierlm: float  # mean over the seeds
    seeds: int
    cost: dict[str, float]  # mean tokens, FLOPs and CPU seconds of training


def row_score(plan: Plan, row: dict, records: dict[str, dict]) -> Score | None:
    """Combines the records of a row's finished seeds; None if there are none."""
    names = [f"{plan.name}/models/{model}/score" for model in plan.models(row["model"])]
    finished = [records[name] for name in names if name in records]
    if not finished:
        return None
    brierlms = [record["brierlm"]["value"] for record in finished]
    scores = [100 * record["share"] for record in finished] if plan.is_language else brierlms
    if len(finished) > 1:
        low, high = min(scores), max(scores)
    elif plan.is_language:
        low, high = (100 * bound for bound in finished[0]["share_interval"])
    else:
        low, high = finished[0]["brierlm"]["low"], finished[0]["brierlm"]["high"]
    cost = {name: mean(record["cost"][name] for record in finished) for name in finished[0]["cost"]}
    return Score(mean(scores), low, high, mean(brierlms), len(finished), cost)


def score_table(plan: Plan, rows: list[dict], records: dict[str, dict]) -> str:
    """Formats one table: a line per row, with cost, score, the paper's score, and the direction of the difference."""
    column = "fraction of optimal (95 %)" if plan.is_language else "(95 %)"
    header = ["", "tokens", "training FLOPs", "CPU s", "BrierLM", column, "paper's BrierLM", "direction"]
    first_score, lines = row_score(plan, rows[0], records), []
    number = "{:.1f}%" if plan.is_language else "{:.2f}"
    for row in rows:
        score, paper = row_score(plan, row, records), f"{row['paper']:.2f}" if "paper" in row else ""
        if score is None:
            lines.append([row["label"], "not run yet", *[""] * 4, paper, ""])
            continue
        seeds = f", {score.seeds} seeds" if score.seeds > 1 else ""
        interval = f"({number.format(score.low)} to {number.format(score.high)}{seeds})"
        interval = f"{number.format(score.mean)} {interval}" if plan.is_language else interval
        tokens, flops, cpu_seconds = (score.cost[name] for name in ("tokens", "flops", "cpu_seconds"))
        cost = [f"{tokens / 1e6:.2f} M", f"{flops:.1e}", f"{cpu_seconds:.0f}"]
        paper_scores = row.get("paper"), rows[0].get("paper")
        verdict = "" if first_score is None or row is rows[0] else direction(score, first_score, *paper_scores)
        lines.append([row["label"], *cost, f"{score.brierlm:.2f}", interval, paper, verdict])
    return markdown(header, lines)


def direction(score: Score, first: Score, paper: float | None, paper_first: float | None) -> str:
    """Returns on which side of the table's first row a row is, if intervals don't overlap, and if the paper agrees."""
    if score.low <= first.high and first.low <= score.high:
        return "within the intervals"
    is_above = score.low > first.high
    side = "above" if is_above else "below"
    if paper is None or paper_first is None:
        return side
    return f"{side}: {'agrees' if is_above == (paper > paper_first) else 'against the paper'}"


def format_tables(plans: list[Plan], records: dict[str, dict]) -> str:
    """Formats all tables, each under its title."""
    studies = {  # last part of a run's name → title and table
        "replacements": ("Oracle ablation", ablation_table),
        "sharpening": ("Temperature-sampling fidelity", temperature_fidelity.report),
        "noise": ("Autoencoder under latent noise", noise_table),
    }
    parts = ["# The paper's tables in miniature"]
    for plan in plans:
        for table in plan.tables:
            parts += [f"## {table['title']}", score_table(plan, table["rows"], records)]
        for study, (title, format_table) in studies.items():
            names = [name for name in plan.runs if name in records and name.endswith(f"/{study}")]
            if names:
                parts += [f"## {title}", format_table({name.split("/")[2]: records[name] for name in names})]
    return "\n\n".join(parts) + "\n"


def ablation_table(records: dict[str, dict]) -> str:
    rows = [
        [model, *(format_fraction(record[part]) if part in record else "" for part in ABLATED_PARTS)]
        for model, record in records.items()
    ]
    return markdown(["model", *(f"{part} replaced" for part in ABLATED_PARTS)], rows)


def noise_table(records: dict[str, dict]) -> str:
    """Formats each autoencoder's reconstruction accuracy on unseen text, by the noise added to its latents."""
    rows = []
    for name, record in records.items():
        accuracy = {row["sigma"]: f"{row['token_accuracy']:.2%}" for row in record["noise"]}
        cells = [*(accuracy[sigma] for sigma in SIGMAS), f"{record['posterior_sigma']:.2f}", f"{record['kl']:.0f}"]
        rows.append([name, *cells])
    return markdown(["autoencoder", "σ = 0", "0.3", "0.5", "1", "posterior σ", "KL, nats per patch"], rows)


def plot_curves(plans: list[Plan], records: dict[str, dict], path: Path) -> None:
    """Plots the scores of the table "curves" over tokens and CPU seconds; rows with the same label form one curve."""
    curves, tables = defaultdict(list), [(plan, table) for plan in plans for table in plan.tables]
    for plan, row in ((plan, row) for plan, table in tables if table["group"] == CURVES for row in table["rows"]):
        if score := row_score(plan, row, records):
            curves[row["label"]].append(score)
    if not curves:
        return
    with saved_figure(path, 1, 2, figsize=(10, 4), sharey=True) as (figure, panels):
        for axes, key, scale in zip(panels, ("tokens", "cpu_seconds"), (1e6, 1), strict=True):
            for label, scores in curves.items():
                scores = sorted(scores, key=lambda score: score.cost["tokens"])
                errors = [[score.mean - score.low for score in scores], [score.high - score.mean for score in scores]]
                costs = [score.cost[key] / scale for score in scores]
                means = [score.mean for score in scores]
                axes.errorbar(costs, means, errors, marker="o", capsize=3, label=label)
            axes.set_xscale("log")
            axes.set_xlabel("training tokens, millions" if key == "tokens" else "training CPU seconds")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("% of the optimal BrierLM")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
