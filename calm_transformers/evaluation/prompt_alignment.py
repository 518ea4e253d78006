"""Measures the loss in BrierLM for prompts whose length is not divisible by K, with padding on either side.

calm evaluate prompt_alignment --model CALM --data FILE_OR_DATASET --output docs/prompt_alignment.md
"""

# N prompts, L tokens of a prompt, K tokens per patch, 4 tokens of a continuation

import argparse
import shlex
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from calm_transformers.command_line import Parser, command, known_errors, positive, seed_number, writable
from calm_transformers.evaluation.blocks import add_data_arguments, read_blocks
from calm_transformers.evaluation.brier import MAX_N, BrierCounts, BrierScore
from calm_transformers.evaluation.report import markdown
from calm_transformers.loading import check_tokenizer, is_calm, load_causal_lm, load_tokenizer
from calm_transformers.progress import progress_bar

CASES = ("left", "left with PAD", "right")
BATCH_SIZE = 250

METHOD = """\
- "left", as in generate(), pads the *first* patch on the left, with a filler that the model may know from training.
- "left with PAD" does the same with the padding token: it differs from the published code only in the side.
- "right", as in the published code, pads the *last* patch, from which the next patch is predicted.

All sample two continuations of the same prompts with generate() at T = 1; Brier-n scores the first n new tokens
against the true continuation. For every length mod K the prompts end at the same positions of the text, so the rows
differ only in the length of the prompt (by less than K tokens).
"""


def spread_windows(tokens_L: torch.Tensor, window: int, num_windows: int) -> torch.Tensor:
    """Returns evenly spaced windows of a text, (N, window). They may overlap, but not in their last four tokens."""
    stride = min(window, (len(tokens_L) - window) // max(1, num_windows - 1))
    if stride < MAX_N:
        needed = window + MAX_N * (num_windows - 1)
        raise ValueError(
            f"the data has {len(tokens_L)} tokens; {num_windows} prompts need at least {needed}: add text"
        )
    return tokens_L.unfold(0, window, stride)[:num_windows]


def cut_prompts(windows_NL: torch.Tensor, length: int, bos_token_id: int | None) -> torch.Tensor:
    """Returns prompts (N, length) that end four tokens before each window's end; BOS replaces their first token."""
    end = windows_NL.shape[1] - MAX_N
    prompts_NL = windows_NL[:, end - length : end].clone()
    if bos_token_id is not None:
        prompts_NL[:, 0] = bos_token_id
    return prompts_NL


def pad(prompts_NL: torch.Tensor, patch_size: int, token_id: int, side: str) -> torch.Tensor:
    """Pads prompts on the given side to a multiple of the patch size."""
    missing = -prompts_NL.shape[1] % patch_size
    return F.pad(prompts_NL, (missing, 0) if side == "left" else (0, missing), value=token_id)


@torch.no_grad()
def count_continuations(
    model, prompts_NL: torch.Tensor, targets_N4: torch.Tensor, bar: tqdm, seed: int = 0
) -> BrierCounts:
    """Samples two continuations of each prompt with generate() at T = 1 and returns the counts, a block per prompt.

    bar: progress bar that is advanced by the prompts.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    counts = BrierCounts.empty()
    for prompts, targets in zip(prompts_NL.split(BATCH_SIZE), targets_N4.split(BATCH_SIZE), strict=True):
        sequences = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            num_return_sequences=2,
            max_new_tokens=MAX_N,
            min_new_tokens=MAX_N,
            generator=generator,
        )
        first, second = sequences[:, -MAX_N:].unflatten(0, (-1, 2)).unsqueeze(2).unbind(1)
        counts += BrierCounts.from_samples(first, second, targets.unsqueeze(1))
        bar.update(len(prompts))
    return counts


def measure(
    model, windows_NL: torch.Tensor, length: int, bos_token_id: int | None, pad_token_id: int, seed: int = 0
) -> list[dict[str, BrierScore]]:
    """Returns scores by case, one row per length mod K: prompts of length, length + 1, ... length + K - 1 tokens."""
    windows_NL = windows_NL.to(model.device)
    targets_N4 = windows_NL[:, -MAX_N:]
    rows, patch_size = [], model.config.patch_size
    with progress_bar(None, "Generating", "prompt", patch_size * len(CASES) * len(windows_NL)) as bar:
        for remainder in range(patch_size):
            prompts_NL = cut_prompts(windows_NL, length + remainder, bos_token_id)
            rows.append({})
            for case in CASES:
                prompts = prompts_NL
                if case != "left":  # generate() pads these itself
                    prompts = pad(prompts_NL, patch_size, pad_token_id, case.split()[0])
                rows[-1][case] = count_continuations(model, prompts, targets_N4, bar, seed).score()
    return rows


def table(rows: list[dict[str, BrierScore]]) -> str:
    """Returns a Markdown table with one row per length mod K."""
    lines = []
    for remainder, scores in enumerate(rows):
        cells = [str(remainder)]
        for score in scores.values():
            lm = score.brierlm
            cells += [f"{score.brier[0]:.4f}", f"{lm.value:.2f} ({lm.low:.2f} to {lm.high:.2f})"]
        lines.append([*cells, str(scores["left"].positions)])
    columns = [f"{case}: {figure}" for case in CASES for figure in ("Brier-1", "BrierLM ×100")]
    return markdown(["length mod K", *columns, "prompts"], lines)


def document(rows: list[dict[str, BrierScore]], args: argparse.Namespace, length: int, command: str) -> str:
    """Returns the page in docs: method, settings and table."""
    patch_size = len(rows)
    fraction = {
        case: sum(row[case].brier[0] for row in rows[1:]) / (patch_size - 1) / rows[0][case].brier[0] for case in CASES
    }
    return f"""# Prompts whose length is not divisible by K

{METHOD}
- model: `{args.model}` (K = {patch_size}); text: `{args.data}`
- {args.prompts} prompts of each length from {length} to {length + patch_size - 1} tokens, BOS first; seed {args.seed}
- in brackets: 95 % bootstrap interval over prompts
- command: `{command}`

{table(rows)}

Of the Brier-1 at length mod K = 0, the other lengths keep on average {fraction["left"]:.0%} as in generate(),
{fraction["left with PAD"]:.0%} with PAD on the left, {fraction["right"]:.0%} with the published padding.
"""


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm evaluate prompt_alignment", __doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a CALM with K > 1")
    parser.add_argument("--tokenizer", help="tokenizer folder or Hub id (default: the model's own)")
    add_data_arguments(parser)
    parser.add_argument("--prompts", type=positive, default=2000, help="prompts per length mod K (default: 2000)")
    parser.add_argument("--prompt_patches", type=positive, default=8, help="whole patches per prompt (default: 8)")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--output", type=writable, help="write a Markdown page")
    args = parser.parse_args(argv)
    with known_errors():
        model = load_causal_lm(args.model)
        if not is_calm(model) or model.config.patch_size < 2:
            raise ValueError(f"{args.model}: must be a CALM with patches of at least 2 tokens")
        tokenizer = load_tokenizer(args.tokenizer or args.model)
        check_tokenizer(model, tokenizer, args.tokenizer or args.model)
        if tokenizer.pad_token_id is None:
            raise ValueError(f"{args.model}: its tokenizer has no padding token, which the comparison needs")
        length = args.prompt_patches * model.config.patch_size
        window = length + model.config.patch_size - 1 + MAX_N
        tokens_L = read_blocks(args, tokenizer, 1, max_blocks=window * args.prompts).flatten()
        windows_NL = spread_windows(tokens_L, window, args.prompts)
    rows = measure(model, windows_NL, length, tokenizer.bos_token_id, tokenizer.pad_token_id, args.seed)
    print(table(rows))
    if args.output:
        words = sys.argv[1:] if argv is None else argv
        command = shlex.join(["calm", "evaluate", "prompt_alignment", *words])
        args.output.write_text(document(rows, args, length, command), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
