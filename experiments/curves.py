"""Learning curves as a picture: a table's rows of one label are the points of one line, over tokens."""

from collections import defaultdict
from pathlib import Path

from calm.experiments.plan import UNFINISHED, Plan, Table
from calm.experiments.report import Measured, measured
from calm.experiments.results import Results

GROUP = "curves"


def curves(plan: Plan, table: Table, results: Results) -> dict[str, list[Measured]]:
    """Label → what is known of its rows so far, by tokens."""
    lines = defaultdict(list)
    for row in table.rows:
        found = measured(plan, row, results)
        if found is not None:
            lines[row.label].append(found)
    return {label: sorted(points, key=lambda point: point.cost["tokens"]) for label, points in lines.items()}


def draw(plans: list[Plan], results: Results, path: Path) -> None:
    """Writes the picture of the plans' table of that name, if there is one and something is known of it."""
    for plan in plans:
        for table in plan.tables:
            if table.group == GROUP and (lines := curves(plan, table, results)):
                _write(lines, plan.is_language, path)


def _write(lines: dict[str, list[Measured]], is_share: bool, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    scale = 100 if is_share else 1
    for label, points in lines.items():
        scores = [scale * point.score for point in points]
        errors = [[scale * (p.score - p.low) for p in points], [scale * (p.high - p.score) for p in points]]
        places = [p.cost["tokens"] / 1e6 for p in points], [p.cost["cpu_seconds"] for p in points]
        for axes, along in zip((left, right), places, strict=True):
            axes.errorbar(along, scores, errors, marker="o", capsize=3, label=label)
    left.set_ylabel("share of the best BrierLM, %" if is_share else "BrierLM × 100")
    for axes, name in ((left, "million tokens of training"), (right, "CPU seconds of training")):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    unfinished = path.with_name(f"{UNFINISHED}-{path.name}")  # matplotlib goes by the ending
    figure.savefig(unfinished, dpi=120)
    plt.close(figure)
    unfinished.replace(path)
