"""docs/experiments.md from what is finished: the tables are made here, the words stand in report.md."""

import json
from argparse import Namespace
from pathlib import Path
from statistics import mean

from calm.evaluation.blocks import read_blocks
from calm.experiments.plan import Plan, Row, Stage, Table
from calm.experiments.stages import is_finished, result_file
from calm.training.tokenizer import load_tokenizer

TEMPLATE = Path(__file__).parent / "report.md"
HEADER = (
    "| | tokens | training FLOPs | CPU s per M tokens | Brier-1 (95 %) | Brier-2 | Brier-3 | Brier-4 "
    "| BrierLM (95 %) | paper's BrierLM | direction |"
)


def document(plan: Plan) -> str:
    """The template with each `{name}` in it replaced: `{GROUP}` by that table, `{trainings}` by sizes and costs."""
    text = TEMPLATE.read_text()
    parts = {table.group: comparison(plan, table) for table in plan.tables}
    parts |= {"trainings": trainings(plan), "autoencoders": autoencoders(plan)}
    parts |= {name: f"{value:,}" for name, value in plan.evaluation.items()}
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


# one table of the paper


def comparison(plan: Plan, table: Table) -> str:
    """Markdown: a line a trained model; with several seeds a line each, and their mean."""
    lines = [HEADER, "|" + " --- |" * HEADER.count("|", 1)]
    reference = table.rows[0]
    for row in table.rows:
        done = [name for name in row.models if is_finished(plan, plan.stages[f"models/{name}/score"])]
        if not done:
            lines.append(_line(row.label, row.why_missing or "not run yet", paper=row.paper))
        for name in done:
            label = row.label if len(row.models) == 1 else f"{row.label}, seed {name.rpartition('seed')[2]}"
            verdict = direction(plan, row, reference) if len(row.models) == 1 and row is not reference else ""
            lines.append(_model_line(plan, label, name, row.paper, verdict))
        if len(done) > 1:
            lines.append(_mean_line(plan, f"**{row.label}, mean of {len(done)}**", done, reference))
    tokenizer = Path(plan.stages[f"models/{reference.models[0]}"].fields["tokenizer"])
    if tokenizer.exists():
        floor = frequencies_brier(plan, tokenizer)
        lines.append(_line("*token frequencies alone*", brier=(f"{floor:z.4f}", "", "", "")))
    return "\n".join(lines)


def _line(label, tokens="", flops="", cost="", brier=("", "", "", ""), brierlm="", paper=None, verdict="") -> str:
    cells = [label, tokens, flops, cost, *brier, brierlm, "" if paper is None else f"{paper:.2f}", verdict]
    return f"| {' | '.join(cells)} |"


def _model_line(plan: Plan, label: str, name: str, paper: float | None, verdict: str) -> str:
    score, total = score_of(plan, name), totals(plan, plan.stages[f"models/{name}"])
    first = f"{score['brier'][0]:.4f} ({_range(score['brier_intervals'][0], 4)})"
    lm = f"{score['brierlm']['value']:.2f} ({_range([score['brierlm']['low'], score['brierlm']['high']], 2)})"
    brier = [first, *(f"{b:z.4f}" for b in score["brier"][1:])]
    return _line(label, *_cost_cells(total), brier, lm, paper, verdict)


def _mean_line(plan: Plan, label: str, names: list[str], reference: Row) -> str:
    """Means over the seeds, the range of Brier-1 over them, and the cost of a token beside the first row's."""
    scores, total = [score_of(plan, name) for name in names], mean_totals(plan, names)
    first = [score["brier"][0] for score in scores]
    brier = [f"{mean(first):.4f} ({_range([min(first), max(first)], 4)} over seeds)"]
    brier += [f"{mean(score['brier'][n] for score in scores):z.4f}" for n in (1, 2, 3)]
    lm, verdict = f"{mean(score['brierlm']['value'] for score in scores):.2f}", ""
    base = [name for name in reference.models if is_finished(plan, plan.stages[f"models/{name}/score"])]
    if base and base != names:
        ratio = cost_of_token(total) / cost_of_token(mean_totals(plan, base))
        verdict = f"{ratio:.2f} × the first row's cost a token"
    return _line(label, *_cost_cells(total), brier, lm, verdict=verdict)


def _cost_cells(total: dict) -> tuple[str, str, str]:
    return (
        f"{total['tokens'] / 1e6:.2f} M",
        f"{total['flops']:.1e}",
        f"{cost_of_token(total) * 1e6:.0f}",
    )


def _range(interval: list[float], digits: int) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def frequencies_brier(plan: Plan, tokenizer: Path) -> float:
    """Brier-1 of one that knows how often each token occurs in the text, and nothing else: the sum of squares."""
    text = Namespace(data=str(plan.books("validation")), text_column="text", append_eos=False)
    loaded = load_tokenizer(tokenizer)
    ids_BL = read_blocks(text, loaded, plan.evaluation["block_size"], plan.evaluation["blocks"])
    return (ids_BL.flatten().bincount() / ids_BL.numel()).square().sum().item()


def score_of(plan: Plan, name: str) -> dict:
    return json.loads(result_file(plan, plan.stages[f"models/{name}/score"]).read_text())[0]


def direction(plan: Plan, row: Row, reference: Row) -> str:
    """Whether the row lies on the same side of the table's first row as in the paper, by Brier-1.

    Brier-1, because BrierLM is 0 wherever one of its factors is negative. "Within the intervals": the two 95 %
    intervals overlap, so nothing can be said.
    """
    if not reference.models or not is_finished(plan, plan.stages[f"models/{reference.models[0]}/score"]):
        return ""
    (low, high), (base_low, base_high) = (score_of(plan, r.models[0])["brier_intervals"][0] for r in (row, reference))
    if low <= base_high and base_low <= high:
        return "within the intervals"
    side = "above" if low > base_high else "below"
    if row.paper is None or reference.paper is None:
        return side
    return f"{side}: {'agrees' if (side == 'above') == (row.paper > reference.paper) else 'against the paper'}"


# what it took


def totals(plan: Plan, stage: Stage) -> dict[str, float]:
    """Tokens, FLOPs and CPU seconds of a model's training, with those of the models it goes on from."""
    phases = plan.phases(stage)
    tokens = [plan.tokens(phase) for phase in phases]
    flops = [sum(plan.cost(phase).train_flops.values()) * n for phase, n in zip(phases, tokens, strict=True)]
    seconds = [n / speed(plan, phase) for phase, n in zip(phases, tokens, strict=True)]
    return {"tokens": sum(tokens), "flops": sum(flops), "cpu_seconds": sum(seconds)}


def mean_totals(plan: Plan, names: list[str]) -> dict[str, float]:
    each = [totals(plan, plan.stages[f"models/{name}"]) for name in names]
    return {key: mean(total[key] for total in each) for key in each[0]}


def cost_of_token(total: dict[str, float]) -> float:
    """CPU seconds."""
    return total["cpu_seconds"] / total["tokens"]


def speed(plan: Plan, stage: Stage, key: str = "tokens_per_cpu_second") -> float:
    """Tokens of one training per second of CPU time, or another of its log's rates, over all of its log."""
    state = json.loads((plan.folder(stage) / "trainer_state.json").read_text())
    rates = [entry[key] for entry in state["log_history"] if key in entry]
    return 1 / mean(1 / rate for rate in rates)  # each entry is over equally many tokens


def trainings(plan: Plan) -> str:
    """Markdown: sizes and costs of every model of the plan, trained or not."""
    lines = [
        "| model | parameters | tokens | training FLOPs a token | FLOPs a generated token | CPU min | tokens/s |",
        "|" + " --- |" * 7,
    ]
    for stage in plan.stages.values():
        if stage.kind not in ("autoencoder", "calm", "ar"):
            continue
        cost, tokens, measured = plan.cost(stage), plan.tokens(stage), ["", ""]
        if is_finished(plan, stage):
            minutes = tokens / speed(plan, stage) / 60
            measured = [f"{minutes:.1f}", f"{speed(plan, stage, 'tokens_per_second'):,.0f}"]
        train, inference = sum(cost.train_flops.values()), sum(cost.inference_flops.values())
        cells = [
            f"{cost.trainable / 1e6:.2f} M",
            f"{tokens / 1e6:.2f} M",
            f"{train:.1e}",
            f"{inference:.1e}",
            *measured,
        ]
        lines.append(f"| {' | '.join([stage.name, *cells])} |")
    return "\n".join(lines)


def autoencoders(plan: Plan) -> str:
    """Markdown: what each autoencoder gets back of unseen books, and from latents with noise."""
    lines = ["| autoencoder | σ = 0 | 0.3 | 0.5 | 1 | posterior σ | KL, nats a patch |", "|" + " --- |" * 7]
    for stage in plan.stages.values():
        if stage.kind != "noise":
            continue
        name = stage.needs[0].partition("/")[2]
        if not is_finished(plan, stage):
            lines.append(f"| {name} | not run yet | | | | | |")
            continue
        result = json.loads(result_file(plan, stage).read_text())
        accuracy = {row["sigma"]: row["token_accuracy"] for row in result["noise"]}
        cells = [f"{accuracy[sigma]:.2%}" for sigma in (0.0, 0.3, 0.5, 1.0)]
        cells += [f"{result['posterior_sigma']:.2f}", f"{result['kl']:.0f}"]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)
