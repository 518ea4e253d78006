"""Measures BrierLM of one or several models on held-out text.

    calm evaluate brier_lm --model MODEL [MODEL2 ...] --data FILE_OR_DATASET --block_size 2048

A CALM is scored from two samples per position, any other causal LM by the AR estimator. BrierLM depends on the block
size (longer contexts predict better) and on the tokenizer: use the same for all models that you compare.
"""

# B blocks, L tokens

import argparse
import sys
from dataclasses import asdict
from math import ceil
from pathlib import Path

import torch
from accelerate import PartialState

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
from calm_transformers.evaluation.brier import BrierScore
from calm_transformers.evaluation.models import brier_counts, positions_per_block
from calm_transformers.evaluation.report import markdown, saved_figure, write_json
from calm_transformers.loading import load_with_tokenizer


def evaluate(name: str, args: argparse.Namespace, state: PartialState) -> BrierScore:
    """Returns the score of one model; under torchrun the blocks are split among the processes."""
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    assert state.device is not None, "PartialState sets the device"
    model, tokenizer = load_with_tokenizer(name, args.tokenizer, dtype, state.device)
    per_block = positions_per_block(model, args.block_size)
    max_blocks = None if args.max_positions is None else ceil(args.max_positions / per_block)
    blocks_BL = read_blocks(args, tokenizer, args.block_size, max_blocks)
    if len(blocks_BL) < state.num_processes:
        raise ValueError(f"{len(blocks_BL)} blocks for {state.num_processes} processes: use fewer processes")
    process_blocks = blocks_BL[state.process_index :: state.num_processes]
    seed = args.seed + state.process_index
    return brier_counts(model, process_blocks, args.batch_size, seed).gather().score()


def table(scores: dict[str, BrierScore], block_size: int) -> str:
    """Returns a Markdown table with one row per model."""
    rows = []
    for name, score in scores.items():
        lm = score.brierlm
        interval = "none (one block)" if lm.low is None else f"{lm.low:.2f} to {lm.high:.2f}"
        sizes = [str(block_size), str(score.positions)]
        rows.append([name, *(f"{b:.4f}" for b in score.brier), f"{lm.value:.2f}", interval, *sizes])
    names = [*(f"Brier-{n}" for n in range(1, 5)), "BrierLM ×100", "95 % interval", "block size", "positions"]
    return markdown(["model", *names], rows)


def write_plot(path: Path, scores: dict[str, BrierScore], block_size: int) -> None:
    """Plots bars of Brier-1..4 on the left and of BrierLM with its interval on the right."""
    width = 0.8 / len(scores)
    with saved_figure(path, 1, 2, figsize=(10, 4), width_ratios=[2, 1]) as (_, (left, right)):
        for i, (name, score) in enumerate(scores.items()):
            left.bar([n + i * width for n in range(4)], score.brier, width, label=name)
            lm, error = score.brierlm, None
            if lm.low is not None and lm.high is not None:
                error = [[max(0, lm.value - lm.low)], [max(0, lm.high - lm.value)]]
            right.bar(i, lm.value, 0.8, yerr=error, capsize=4)
        left.set_xticks([n + 0.4 - width / 2 for n in range(4)], [f"Brier-{n}" for n in range(1, 5)])
        left.legend()
        right.set_xticks([])
        right.set_title(f"BrierLM × 100, blocks of {block_size} tokens")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm evaluate brier_lm", __doc__)
    parser.add_argument("--model", nargs="+", required=True, help="model folders or Hub ids; several are compared")
    parser.add_argument("--tokenizer", help="tokenizer folder or Hub id for all models (default: each model's own)")
    add_data_arguments(parser)
    parser.add_argument("--block_size", type=positive, required=True, help="tokens (published: 8192, AR 2048)")
    parser.add_argument("--max_positions", type=positive, help="stop after the block that reaches this many positions")
    parser.add_argument("--batch_size", type=positive, default=1, help="blocks per batch (default: 1)")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=writable, help="write a list with one object per model")
    parser.add_argument("--plot", type=image_path, help="bar chart (default with several models: brier_lm.png)")
    args = parser.parse_args(argv)
    plot = args.plot or (Path("brier_lm.png") if len(args.model) > 1 else None)
    state = PartialState(cpu=not torch.cuda.is_available())  # accelerate needs cpu=True for CPU processes
    with known_errors(ValueError, OSError):
        if plot:
            require_package("matplotlib", "eval", "--plot")
        scores = {name: evaluate(name, args, state) for name in args.model}
    if state.is_main_process:
        print(table(scores, args.block_size))
        objects = [{"model": name, **asdict(score), "block_size": args.block_size} for name, score in scores.items()]
        write_json(args.json, objects)
        if plot:
            write_plot(plot, scores, args.block_size)


if __name__ == "__main__":
    sys.exit(main())
