"""A model's Brier scores on the language of language.py, and their share of the best possible ones.

    python -m calm_transformers.experiments.share --model MODEL --language DIR

`calm evaluate brier_lm` asks whether a drawn continuation is the text's. Here the law of the text is known, so it is
asked how probable the drawn continuation is, P(x) in place of 1{x = y}: the same mean, with less noise. And the best
score is known at every position, so it is the ratio of the two that is bootstrapped: what blocks differ in, some of
them being easier to predict than others, cancels.

Axes: B blocks, L tokens, P patches, K tokens per patch, M positions (m of a chunk), N draws, R resamples,
n = 1..4 tokens of a continuation.
"""

import argparse
import sys
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calm_transformers.command_line import Parser, command, known_errors, positive, writable
from calm_transformers.documents import read_documents
from calm_transformers.evaluation.blocks import pack_blocks
from calm_transformers.evaluation.branching import CalmReader, CausalLMReader
from calm_transformers.evaluation.brier import MAX_N, brierlm, prefix_matches
from calm_transformers.evaluation.models import positions_per_block
from calm_transformers.evaluation.report import write_json
from calm_transformers.experiments.language import HiddenMarkovLanguage, load, scored_beliefs
from calm_transformers.loading import is_calm, load_causal_lm, load_tokenizer
from calm_transformers.progress import progress_bar

POSITIONS_AT_ONCE = 128  # of a block, times the draws: bounds the mask of the branches


class TokenReader(CausalLMReader):
    """A causal LM as a model of patches of one token, which are drawn from its logits."""

    def _forward(self, tokens_BN1, mask, position_ids, cache):
        return super()._forward(tokens_BN1.squeeze(-1), mask, position_ids, cache)

    def draw(self, logits_V: Tensor, num_samples: int, generator=None) -> Tensor:
        probs = logits_V.float().softmax(-1)
        ids = probs.flatten(0, -2).multinomial(num_samples, replacement=True, generator=generator)
        return ids.T.unflatten(1, probs.shape[:-1]).unsqueeze(-1)


@torch.no_grad()
def continuations(reader, tokens_BL: Tensor, patch_size: int, num_draws: int, generator=None) -> Tensor:
    """(B, M, N, 4): drawn continuations of every position that `calm_transformers.evaluation` scores."""
    steps = ceil(MAX_N / patch_size)
    patches_BPK = tokens_BL.unflatten(1, (-1, patch_size))
    positions = patches_BPK.shape[1] - steps
    first_BMNK = reader.draw(reader.read(patches_BPK)[:, :positions], num_draws, generator=generator).movedim(0, 2)
    if steps == 1:
        return first_BMNK[..., :MAX_N]
    chunks = []
    for chunk_m in torch.arange(positions, device=tokens_BL.device).split(POSITIONS_AT_ONCE):
        reader.start(chunk_m.repeat_interleave(num_draws).expand(len(tokens_BL), -1))
        so_far = first_BMNK[:, chunk_m].flatten(1, 2)
        branches = torch.arange(so_far.shape[1], device=tokens_BL.device).expand(len(tokens_BL), -1)
        for _ in range(steps - 1):
            states = reader.extend(branches, so_far[..., -patch_size:])
            so_far = torch.cat([so_far, reader.draw(states, 1, generator=generator)[0]], dim=-1)
        chunks.append(so_far.unflatten(1, (-1, num_draws)))
    return torch.cat(chunks, dim=1)[..., :MAX_N]


def brier_terms(
    language: HiddenMarkovLanguage, tokens_BL: Tensor, drawn_BMN4: Tensor, patch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the positions of each block of Brier-1..4, and of the best ones, (B, 4) each.

    Brier-n is estimated without bias by 2 · mean P(x_i) − mean 1{x_i = x_j} over the draws, and i ≠ j.
    """
    beliefs_BMS = scored_beliefs(language, tokens_BL, patch_size)
    num_draws = drawn_BMN4.shape[2]
    drawn = language.symbols(drawn_BMN4.numpy())
    # A special token is no symbol: from there on the continuation has no chance.
    is_text = (drawn >= 0).cumprod(-1)
    probability = language.probability(beliefs_BMS[:, :, None].repeat(num_draws, 2), drawn.clip(0)) * is_text
    left, right = np.triu_indices(num_draws, 1)
    equal = prefix_matches(drawn_BMN4[:, :, left], drawn_BMN4[:, :, right]).double().mean(2).numpy()
    return (2 * probability.mean(2) - equal).sum(1), language.best_brier(beliefs_BMS).sum(1)


def summary(sums_B4: np.ndarray, best_B4: np.ndarray, positions: int, resamples: int = 1000) -> dict:
    """Means over all positions, and the share of the best, with 95 % intervals from resampled blocks."""
    rng, blocks = np.random.default_rng(0), len(sums_B4)
    times_RB = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples)
    model_R4, best_R4 = (times_RB @ sums / positions for sums in (sums_B4, best_B4))

    def score(brier):
        return brierlm(torch.as_tensor(brier)).numpy()

    model, best = sums_B4.sum(0) / positions, best_B4.sum(0) / positions
    low, high = _intervals(score(model_R4))
    return {
        "brier": model.tolist(),
        "brier_intervals": _intervals(model_R4),
        "brierlm": {"value": float(score(model)), "low": low, "high": high},
        "best_brier": best.tolist(),
        "best_brierlm": float(score(best)),
        "share": float(score(model) / score(best)),
        "share_interval": _intervals(score(model_R4) / score(best_R4)),
        "positions": positions,
        "blocks": blocks,
    }


def _intervals(values_R: np.ndarray) -> list:
    """2.5 % and 97.5 % quantiles along the first axis, as pairs."""
    return np.quantile(values_R, [0.025, 0.975], axis=0).T.tolist()


def share_of(result: dict) -> str:
    """With its interval, for people."""
    return "{:.1%} ({:.1%} to {:.1%})".format(result["share"], *result["share_interval"])


def measure(
    reader,
    patch_size: int,
    language: HiddenMarkovLanguage,
    blocks_BL: Tensor,
    num_draws: int,
    batch_size: int,
    what: str = "Share",
) -> dict:
    """`summary` of a model, by its reader and K (1 for a causal LM), on blocks of the language's tokens."""
    generator = torch.Generator().manual_seed(0)
    sums, best, positions = [], [], 0
    for batch_BL in progress_bar(blocks_BL.split(batch_size), what, "batch"):
        drawn = continuations(reader, batch_BL, patch_size, num_draws, generator)
        for terms, kept in zip(brier_terms(language, batch_BL, drawn, patch_size), (sums, best), strict=True):
            kept.append(terms)
        positions += drawn.shape[0] * drawn.shape[1]
    return summary(np.concatenate(sums), np.concatenate(best), positions)


def parser_of(prog: str, description: str | None, **draws) -> Parser:
    """The options that say which model is measured, and on which language; `draws` are those of --draws."""
    parser = Parser(prog, description)
    parser.add_argument("--model", required=True, help="folder or Hub id of a model trained on the language")
    parser.add_argument("--language", required=True, type=Path, help="folder that experiments.language wrote")
    parser.add_argument("--draws", type=positive, **{"default": 4, "help": "of each position", **draws})
    parser.add_argument("--json", type=writable, help="write the figures")
    return parser


def parse_with_blocks(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """And the options that say on how much of the language's text."""
    parser.add_argument("--block_size", type=positive, default=256)
    parser.add_argument("--max_positions", type=positive, default=100_000)
    parser.add_argument("--batch_size", type=positive, default=16, help="blocks at a time")
    return parser.parse_args(argv)


def text_of(model, args: argparse.Namespace) -> tuple[HiddenMarkovLanguage, Tensor]:
    """The language, and blocks (B, L) of its validation text with as many positions as the options ask for.

    Raises:
        ValueError: the model can't read such blocks, or there is less text.
        OSError: there is no language.
    """
    language = load(args.language)
    num_blocks = ceil(args.max_positions / positions_per_block(model, args.block_size))
    texts = read_documents([args.language / "validation.jsonl"])
    blocks_BL = pack_blocks(texts, load_tokenizer(args.language), args.block_size, num_blocks)
    if len(blocks_BL) < num_blocks:
        raise ValueError(
            f"{args.language}: its validation text has {len(blocks_BL):,} blocks of {args.block_size} tokens, "
            f"{args.max_positions:,} positions are in {num_blocks:,}."
        )
    return language, blocks_BL


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_with_blocks(parser_of("python -m calm_transformers.experiments.share", __doc__), argv)
    with known_errors(ValueError, OSError):
        model = load_causal_lm(args.model, device="cpu")
        language, blocks_BL = text_of(model, args)
    reader, patch_size = (CalmReader(model), model.config.patch_size) if is_calm(model) else (TokenReader(model), 1)
    result = measure(reader, patch_size, language, blocks_BL, args.draws, args.batch_size)
    write_json(args.json, {"block_size": args.block_size, "draws": args.draws, **result})
    print("Brier-1..4", *(f"{b:.4f}" for b in result["brier"]))
    print(f"BrierLM {result['brierlm']['value']:.2f} of {result['best_brierlm']:.2f}: {share_of(result)}")
    print(f"at {result['positions']:,} positions")


if __name__ == "__main__":
    sys.exit(main())
