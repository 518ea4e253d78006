"""BrierLM of one or several models on held-out text.

    python -m calm.evaluation.brier_lm --model MODEL [MODEL2 ...] --data FILE_OR_DATASET --block_size 2048

A CALM is scored from two samples of every position, any other causal LM by the AR estimator. BrierLM depends on the
block length (longer contexts predict better) and on the tokenizer: compare models at the same of both.
"""

# B blocks, L tokens

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from math import ceil
from pathlib import Path

import torch
from accelerate import PartialState

from calm.command_line import Parser, command, known_errors, natural, need, picture, positive, writable
from calm.evaluation.blocks import add_data_arguments, read_blocks
from calm.evaluation.brier import BrierScore
from calm.evaluation.models import count_model, load_causal_lm, positions_per_block
from calm.loading import check_tokenizer
from calm.training.tokenizer import load_tokenizer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m calm.evaluation.brier_lm", __doc__)
    parser.add_argument("--model", nargs="+", required=True, help="model folders or Hub ids; several are compared")
    parser.add_argument("--tokenizer", help="tokenizer folder or Hub id for all models (default: each model's own)")
    add_data_arguments(parser)
    parser.add_argument("--block_size", type=positive, required=True, help="tokens a block (published: 8192, AR 2048)")
    parser.add_argument("--max_positions", type=positive, help="stop after the block that reaches this many positions")
    parser.add_argument("--batch_size", type=positive, default=1, help="blocks at a time (default: 1)")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=writable, help="write a list with one object a model")
    parser.add_argument("--plot", type=picture, help="write a bar chart (default with several models: brier_lm.png)")
    args = parser.parse_args(argv)
    if args.plot is None and len(args.model) > 1:
        args.plot = Path("brier_lm.png")
    return args


def evaluate(name: str, args: argparse.Namespace, state: PartialState) -> BrierScore:
    """Score of one model; under torchrun every process takes its share of the blocks."""
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    assert state.device is not None, "a process has a device once its state is made"
    model = load_causal_lm(name, dtype, state.device)
    per_block = positions_per_block(model, args.block_size)
    max_blocks = None if args.max_positions is None else ceil(args.max_positions / per_block)
    tokenizer = load_tokenizer(args.tokenizer or name)
    check_tokenizer(model, tokenizer, args.tokenizer or name)
    blocks_BL = read_blocks(args, tokenizer, args.block_size, max_blocks)
    if len(blocks_BL) < state.num_processes:
        raise ValueError(f"{len(blocks_BL)} blocks for {state.num_processes} processes: start fewer processes")
    own_blocks = blocks_BL[state.process_index :: state.num_processes]
    seed = args.seed + state.process_index
    return count_model(model, own_blocks, args.batch_size, seed).gather().score()


def table(scores: dict[str, BrierScore], block_size: int) -> str:
    """Markdown table, one line a model."""
    lines = [
        "| model | Brier-1 | Brier-2 | Brier-3 | Brier-4 | BrierLM ×100 | 95 % interval | block size | positions |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, score in scores.items():
        lm = score.brierlm
        interval = "one block: none" if lm.low is None else f"{lm.low:.2f} to {lm.high:.2f}"
        cells = [name, *(f"{b:.4f}" for b in score.brier), f"{lm.value:.2f}", interval, block_size, score.positions]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write_json(path: Path, scores: dict[str, BrierScore], block_size: int) -> None:
    objects = [{"model": name, **asdict(score), "block_size": block_size} for name, score in scores.items()]
    path.write_text(json.dumps(objects, indent=2) + "\n", encoding="utf-8")


def write_plot(path: Path, scores: dict[str, BrierScore], block_size: int) -> None:
    """Bars: Brier-1..4 on the left, BrierLM with its interval on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=[2, 1], layout="constrained")
    width = 0.8 / len(scores)
    for i, (name, score) in enumerate(scores.items()):
        left.bar([n + i * width for n in range(4)], score.brier, width, label=name)
        lm = score.brierlm
        error = None
        if lm.low is not None and lm.high is not None:
            error = [[max(0, lm.value - lm.low)], [max(0, lm.high - lm.value)]]
        right.bar(i, lm.value, 0.8, yerr=error, capsize=4)
    left.set_xticks([n + 0.4 - width / 2 for n in range(4)], [f"Brier-{n}" for n in range(1, 5)])
    left.legend()
    right.set_xticks([])
    right.set_title(f"BrierLM × 100, blocks of {block_size} tokens")
    figure.savefig(path, dpi=120)
    plt.close(figure)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    state = PartialState(cpu=not torch.cuda.is_available())  # without it accelerate runs no processes on the CPU
    with known_errors(ValueError, OSError):
        if args.plot:
            need("matplotlib", "eval", "--plot")
        scores = {name: evaluate(name, args, state) for name in args.model}
    if state.is_main_process:
        print(table(scores, args.block_size))
        if args.json:
            write_json(args.json, scores, args.block_size)
        if args.plot:
            write_plot(args.plot, scores, args.block_size)


if __name__ == "__main__":
    sys.exit(main())
