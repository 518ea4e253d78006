"""Formats the results of the experiments as Markdown tables, and plots the learning curves."""

import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from calm_transformers.evaluation.report import markdown, saved_figure
from calm_transformers.experiments import temperature_fidelity
from calm_transformers.experiments.optimal_fraction import format_fraction
from calm_transformers.experiments.plan import Plan

CURVES = "curves"  # group of the table that is plotted
ABLATED_PARTS = ("nothing", "solver", "head", "head and backbone")
SIGMAS = (0.0, 0.3, 0.5, 1.0)
T_QUANTILES = {2: 12.706, 3: 4.303}  # 97.5 % of Student's t by the number of seeds


class Score(NamedTuple):
    """The scores of a row over its seeds, in percent of the optimal BrierLM, or as BrierLM if that is unknown."""

    mean: float
    low: float  # 95 % interval: of the mean over several seeds (Student's t), or of one model (bootstrap over blocks)
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
        half = T_QUANTILES[len(finished)] * stdev(scores) / math.sqrt(len(finished))
        low, high = mean(scores) - half, mean(scores) + half
    elif plan.is_language:
        low, high = (100 * bound for bound in finished[0]["share_interval"])
    else:
        low, high = finished[0]["brierlm"]["low"], finished[0]["brierlm"]["high"]
    cost = {name: mean(record["cost"][name] for record in finished) for name in finished[0]["cost"]}
    return Score(mean(scores), low, high, mean(brierlms), len(finished), cost)


def score_table(plan: Plan, rows: list[dict], records: dict[str, dict]) -> str:
    """Formats one table: a line per row, with cost and score; where the paper has them, its score and who is ahead."""
    column = "fraction of optimal, 95 % interval" if plan.is_language else "95 % interval"
    header = ["", "tokens", "training FLOPs", "CPU s", "BrierLM", column, "paper's BrierLM", "against the first row"]
    first, lines, number = row_score(plan, rows[0], records), [], "{:.1f}%" if plan.is_language else "{:.2f}"
    for row in rows:
        score, paper = row_score(plan, row, records), f"{row['paper']:.2f}" if "paper" in row else ""
        if score is None:
            lines.append([row["label"], "not run yet", *[""] * 4, paper, ""])
            continue
        source = f"{score.seeds} seeds" if score.seeds > 1 else "one model"
        interval = f"({number.format(score.low)} to {number.format(score.high)}, {source})"
        interval = f"{number.format(score.mean)} {interval}" if plan.is_language else interval
        tokens, flops, cpu_seconds = (score.cost[name] for name in ("tokens", "flops", "cpu_seconds"))
        cost = [f"{tokens / 1e6:.2f} M", f"{flops:.1e}", f"{cpu_seconds:.0f}"]
        verdict = "" if first is None or row is rows[0] else direction(score, first, row, rows[0])
        lines.append([row["label"], *cost, f"{score.brierlm:.2f}", interval, paper, verdict])
    num_columns = next(n for n in (8, 7, 6) if n == 6 or any(line[n - 1] for line in lines))  # no empty ones
    return markdown(header[:num_columns], [line[:num_columns] for line in lines])


def direction(score: Score, first: Score, row: dict, first_row: dict) -> str:
    """Returns whether a row is above or below the table's first one, as in the paper; "" if that can't be told.

    Both need a figure of the paper and several seeds.
    """
    if not ("paper" in row and "paper" in first_row and min(score.seeds, first.seeds) > 1):
        return ""
    if score.low <= first.high and first.low <= score.high:
        return "within the intervals"
    is_above = score.low > first.high
    agrees = is_above == (row["paper"] > first_row["paper"])
    return f"{'above' if is_above else 'below'}: {'agrees' if agrees else 'against the paper'}"


def format_tables(plans: list[Plan], records: dict[str, dict]) -> str:
    """Formats all tables, each under its title."""
    studies = {  # last part of a run's name → title and table
        "replacements": ("Oracle ablation", ablation_table),
        "sharpening": ("Temperature-sampling fidelity", temperature_fidelity.report),
        "distillation": ("Temperature distillation", distillation_table),
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


def distillation_errors(records: dict[str, dict], metric: str) -> dict[str, dict[float, list[float]]]:
    """Returns a metric of `temperature_fidelity` by sampler and temperature, a value for each seed.

    The samplers are exact samples, one draw of each model, and the candidates of those that were not distilled.
    """
    errors = defaultdict[str, dict[float, list[float]]](lambda: defaultdict(list))
    for name, record in records.items():
        model = name.rpartition("-seed")[0]
        for row in record["settings"]:
            method, temperature = row["method"], row["temperature"]
            if method == "one draw":
                errors["exact samples"][temperature].append(row[metric]["exact draws"][0])
            elif model.startswith("distilled"):
                continue  # candidates of a distilled head at T = 1 are not what it is for
            else:
                method = f"{row['num_candidates']} candidates"
            errors[f"{model}, {method}"][temperature].append(row[metric]["model"][0])
    return errors


def distillation_table(records: dict[str, dict]) -> str:
    """Formats the errors of one draw of distilled heads beside those of candidates: means and ranges over seeds."""
    first, parts = next(iter(records.values())), []
    for metric, (title, _, form) in temperature_fidelity.METRICS.items():
        errors, number = distillation_errors(records, metric), form.partition(" ")[0]
        temperatures = list(errors["exact samples"])

        def cell(values: list[float], number: str = number) -> str:
            if not values:
                return ""
            range_ = f" ({number.format(min(values))} to {number.format(max(values))})" if len(values) > 1 else ""
            return number.format(mean(values)) + range_

        rows = [[sampler, *(cell(by_T.get(T, [])) for T in temperatures)] for sampler, by_T in errors.items()]
        parts += [title, markdown(["", *(f"T = {T:.2g}" for T in temperatures)], rows)]
    contexts = f"{first['draws']:,} patches after each of {first['contexts']} contexts; means (and range) over seeds."
    return "\n\n".join([contexts, *parts])


def plot_distillation(records: dict[str, dict], path: Path) -> None:
    """Plots the total variation of each sampler over the temperature, if the study was run."""
    records = {name.split("/")[2]: record for name, record in records.items() if name.endswith("/distillation")}
    errors = distillation_errors(records, "total_variation")
    if not errors:
        return
    with saved_figure(path, figsize=(7, 4.5)) as (figure, axes):
        for sampler, by_T in errors.items():
            means, model = [mean(values) for values in by_T.values()], sampler.partition(",")[0]
            style = "k:" if sampler == "exact samples" else "--" if "candidates" in sampler else "-"
            axes.plot(list(by_T), means, style, marker="o" if model.startswith("distilled") else ".", label=sampler)
        axes.set_xlabel("temperature")
        axes.set_ylabel("total variation from P^(1/T) / Z")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2)


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
