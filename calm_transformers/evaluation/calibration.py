"""Correlates BrierLM with cross-entropy over the checkpoints of an autoregressive language model.

    calm evaluate calibration --run RUN_FOLDER --data FILE_OR_DATASET --block_size 512

RUN_FOLDER holds a Trainer's checkpoint-N folders. A high correlation justifies BrierLM in place of perplexity (paper
section 4).
"""

# B blocks, L tokens of a block

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path

import torch

from calm_transformers.command_line import (
    Parser,
    command,
    image_path,
    known_errors,
    positive,
    require_package,
    seed_number,
    writable,
)
from calm_transformers.evaluation.blocks import add_data_arguments, read_blocks
from calm_transformers.evaluation.models import brier_counts, positions_per_block
from calm_transformers.evaluation.report import markdown, saved_figure, write_json
from calm_transformers.loading import is_calm, load_with_tokenizer
from calm_transformers.progress import progress_bar


def checkpoints(run: Path) -> dict[int, Path]:
    """Returns step → checkpoint-N folder of a run, sorted."""
    folders = {int(p.name.removeprefix("checkpoint-")): p for p in run.glob("checkpoint-*") if p.name[11:].isdigit()}
    if len(folders) < 2:
        raise ValueError(f"{run}: contains {len(folders)} checkpoint-N folders; a correlation needs at least two")
    return dict(sorted(folders.items()))


def tokenizer_folder(run: Path) -> Path:
    """Returns the run's folder if it contains a tokenizer, else the first checkpoint that does."""
    for folder in (run, *checkpoints(run).values()):
        if (folder / "tokenizer_config.json").exists():
            return folder
    raise ValueError(f"{run}: neither the folder nor its checkpoints contain a tokenizer; use --tokenizer")


@torch.no_grad()
def cross_entropy(model, blocks_BL: torch.Tensor, batch_size: int = 1) -> float:
    """Returns the mean cross-entropy in nats per predicted token."""
    batches = blocks_BL.to(model.device).split(batch_size)
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in batches]
    return (torch.stack(losses).sum() / len(blocks_BL)).item()


def correlations(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Returns the Pearson and Spearman correlations."""
    values = torch.tensor([first, second], dtype=torch.float64)
    ranks = values.argsort(dim=1).argsort(dim=1).double()
    return {"pearson": values.corrcoef()[0, 1].item(), "spearman": ranks.corrcoef()[0, 1].item()}


def measure(run: Path, args: argparse.Namespace) -> list[dict]:
    """Returns one row per checkpoint: step, cross_entropy, brier, brierlm."""
    rows, tokenizer_name = [], str(args.tokenizer or tokenizer_folder(run))
    for step, folder in progress_bar(checkpoints(run).items(), "Checkpoints", "checkpoint"):
        model, tokenizer = load_with_tokenizer(str(folder), tokenizer_name)
        if is_calm(model):
            raise ValueError(f"{folder}: a CALM has no cross-entropy; calibration needs a token-level model")
        max_blocks = ceil(args.max_positions / positions_per_block(model, args.block_size))
        blocks_BL = read_blocks(args, tokenizer, args.block_size, max_blocks)
        score = brier_counts(model, blocks_BL, args.batch_size, args.seed).score()
        rows.append({"step": step, "cross_entropy": cross_entropy(model, blocks_BL, args.batch_size), **asdict(score)})
    return rows


def report(rows: list[dict], correlation: dict[str, float]) -> str:
    lines = [[str(row["step"]), f"{row['cross_entropy']:.4f}", f"{row['brierlm']['value']:.2f}"] for row in rows]
    table = markdown(["step", "cross-entropy (nats per token)", "BrierLM ×100"], lines)
    return f"{table}\n\nPearson {correlation['pearson']:.3f}, Spearman {correlation['spearman']:.3f}"


def write_plot(path: Path, rows: list[dict]) -> None:
    with saved_figure(path, figsize=(6, 4)) as (_, axes):
        axes.plot([row["cross_entropy"] for row in rows], [row["brierlm"]["value"] for row in rows], marker="o")
        for row in rows:
            axes.annotate(row["step"], (row["cross_entropy"], row["brierlm"]["value"]), fontsize=8)
        axes.set_xlabel("cross-entropy (nats per token)")
        axes.set_ylabel("BrierLM × 100")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm evaluate calibration", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder with the checkpoint-N folders of a Trainer")
    parser.add_argument("--tokenizer", help="tokenizer folder or Hub id (default: the run's own)")
    add_data_arguments(parser)
    parser.add_argument("--block_size", type=positive, required=True, help="tokens per block")
    parser.add_argument("--max_positions", type=positive, default=20_000)
    parser.add_argument("--batch_size", type=positive, default=1)
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--json", type=writable, help="write the results")
    parser.add_argument("--plot", type=image_path, help="plot BrierLM against cross-entropy")
    args = parser.parse_args(argv)
    with known_errors(ValueError, OSError):
        if args.plot:
            require_package("matplotlib", "eval", "--plot")
        rows = measure(args.run, args)
    entropies, scores = zip(*((row["cross_entropy"], row["brierlm"]["value"]) for row in rows), strict=True)
    correlation = correlations(entropies, scores)
    print(report(rows, correlation))
    write_json(args.json, {**correlation, "checkpoints": rows})
    if args.plot:
        write_plot(args.plot, rows)


if __name__ == "__main__":
    sys.exit(main())
