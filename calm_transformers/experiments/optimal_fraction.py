"""Scores a model on the hidden Markov language: its BrierLM as a fraction of the optimal one.

    python -m calm_transformers.experiments.optimal_fraction --model MODEL --language DIR

`calm evaluate brier_lm` compares sampled continuations with the text's, 1{x = y}. Here the distribution of y is known,
so the indicator is replaced by its expectation P(x), which has less variance. The optimal score is known at every
position too. The ratio of the two is bootstrapped over blocks, so that the difficulty of a block cancels.

Axes: B blocks, L tokens, P patches, K tokens per patch, M positions (m: those of a chunk), N samples, R resamples,
n = 1..4 tokens of a continuation.
"""

import argparse
import sys
from dataclasses import asdict
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calm_transformers.command_line import Parser, command, known_errors, positive, writable
from calm_transformers.documents import read_documents
from calm_transformers.evaluation.blocks import pack_blocks
from calm_transformers.evaluation.branching import CalmReader, CausalLMReader, SamplingReader
from calm_transformers.evaluation.brier import MAX_N, BrierCounts, bootstrap, brierlm, interval, prefix_matches
from calm_transformers.evaluation.models import positions_per_block
from calm_transformers.evaluation.report import write_json
from calm_transformers.experiments.language import HiddenMarkovLanguage, scored_beliefs
from calm_transformers.loading import is_calm, load_causal_lm, load_tokenizer
from calm_transformers.progress import progress_bar

POSITIONS_CHUNK_SIZE = 128  # per block; bounds the attention mask of the branches, (positions · samples)²


class TokenReader(CausalLMReader):
    """A causal LM with the interface of `CalmReader`, where patches have K = 1 token; samples from its logits."""

    def _forward(self, tokens_BN1, mask, position_ids, cache):
        return super()._forward(tokens_BN1.squeeze(-1), mask, position_ids, cache)

    def draw(self, logits_V: Tensor, num_samples: int, generator=None) -> Tensor:
        probs = logits_V.float().softmax(-1)
        ids = probs.flatten(0, -2).multinomial(num_samples, replacement=True, generator=generator)
        return ids.T.unflatten(1, probs.shape[:-1]).unsqueeze(-1)


@torch.no_grad()
def sample_continuations(
    reader: SamplingReader, tokens_BL: Tensor, patch_size: int, num_samples: int, generator: torch.Generator
) -> Tensor:
    """Samples continuations (B, M, N, 4) at every position that `calm_transformers.evaluation` scores."""
    steps = ceil(MAX_N / patch_size)
    patches_BPK = tokens_BL.unflatten(1, (-1, patch_size))
    positions = patches_BPK.shape[1] - steps
    states_BM = reader.read(patches_BPK)[:, :positions]
    first_BMNK = reader.draw(states_BM, num_samples, generator=generator).movedim(0, 2)
    if steps == 1:
        return first_BMNK[..., :MAX_N]
    chunks = []
    for chunk_m in torch.arange(positions, device=tokens_BL.device).split(POSITIONS_CHUNK_SIZE):
        reader.start(chunk_m.repeat_interleave(num_samples).expand(len(tokens_BL), -1))
        tokens = first_BMNK[:, chunk_m].flatten(1, 2)  # (B, branches, tokens so far)
        branches = torch.arange(tokens.shape[1], device=tokens_BL.device).expand(len(tokens_BL), -1)
        for _ in range(steps - 1):
            states = reader.extend(branches, tokens[..., -patch_size:])
            tokens = torch.cat([tokens, reader.draw(states, 1, generator=generator)[0]], dim=-1)
        chunks.append(tokens.unflatten(1, (-1, num_samples)))
    return torch.cat(chunks, dim=1)[..., :MAX_N]


def brier_sums(
    language: HiddenMarkovLanguage, tokens_BL: Tensor, samples_BMN4: Tensor, patch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns Brier-1..4 summed over the positions of each block, the model's and the optimal ones, (B, 4) each.

    The unbiased estimate of Brier-n is 2 · mean P(x_i) − mean 1{x_i = x_j} over samples i and pairs i < j.
    """
    beliefs_BMS = scored_beliefs(language, tokens_BL, patch_size)
    num_samples = samples_BMN4.shape[2]
    symbols_BMN4 = language.to_symbols(samples_BMN4.numpy())
    # From the first special token on, which isn't a symbol, a continuation has probability 0.
    has_only_symbols_BMN4 = (symbols_BMN4 >= 0).cumprod(-1)
    probability_BMN4 = language.probability(beliefs_BMS[:, :, None].repeat(num_samples, 2), symbols_BMN4.clip(0))
    probability_BMN4 *= has_only_symbols_BMN4
    first, second = np.triu_indices(num_samples, 1)
    equal_BM4 = prefix_matches(samples_BMN4[:, :, first], samples_BMN4[:, :, second]).double().mean(2).numpy()
    return (2 * probability_BMN4.mean(2) - equal_BM4).sum(1), language.optimal_brier(beliefs_BMS).sum(1)


def summarise(model_B4: np.ndarray, optimal_B4: np.ndarray, positions: int, resamples: int = 1000) -> dict:
    """Returns mean scores and the fraction of the optimal BrierLM, with 95 % bootstrap intervals over blocks."""
    sums_B4 = torch.from_numpy(model_B4), torch.from_numpy(optimal_B4)
    positions_B = torch.full((len(model_B4),), positions // len(model_B4))  # every block has as many
    score, best = (BrierCounts(each, torch.zeros_like(each), positions_B).score(resamples) for each in sums_B4)
    model_R4, optimal_R4 = (bootstrap(each, positions_B, resamples) for each in sums_B4)  # the same blocks of both
    return {
        **asdict(score),
        "best_brier": best.brier,
        "best_brierlm": best.brierlm.value,
        "share": score.brierlm.value / best.brierlm.value,
        "share_interval": interval(brierlm(model_R4) / brierlm(optimal_R4)),
    }


def format_fraction(result: dict) -> str:
    """Formats the fraction of the optimal BrierLM with its interval."""
    return "{:.1%} ({:.1%} to {:.1%})".format(result["share"], *result["share_interval"])


def evaluate(
    reader: SamplingReader,
    patch_size: int,
    language: HiddenMarkovLanguage,
    blocks_BL: Tensor,
    num_samples: int,
    batch_size: int,
    description: str = "Scoring",
) -> dict:
    """Scores a model on blocks of token ids (see `summarise`); `patch_size` is 1 for a causal LM."""
    generator = torch.Generator().manual_seed(0)
    model, optimal, positions = [], [], 0
    for batch_BL in progress_bar(blocks_BL.split(batch_size), description, "batch"):
        samples_BMN4 = sample_continuations(reader, batch_BL, patch_size, num_samples, generator)
        model_B4, optimal_B4 = brier_sums(language, batch_BL, samples_BMN4, patch_size)
        model.append(model_B4)
        optimal.append(optimal_B4)
        positions += samples_BMN4.shape[0] * samples_BMN4.shape[1]
    return summarise(np.concatenate(model), np.concatenate(optimal), positions)


def make_parser(prog: str, description: str | None, num_samples=4, samples_help="samples per position") -> Parser:
    """Returns a parser with the options that the commands on the language share."""
    parser = Parser(prog, description)
    parser.add_argument("--model", required=True, help="folder or Hub id of a model trained on the language")
    parser.add_argument("--language", required=True, type=Path, help="folder that experiments.language wrote")
    parser.add_argument("--draws", type=positive, default=num_samples, help=f"{samples_help} (default: {num_samples})")
    parser.add_argument("--json", type=writable, help="write the results")
    return parser


def parse_block_options(prog: str, description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """Parses the shared options and those of the evaluated blocks."""
    parser = make_parser(prog, description)
    parser.add_argument("--block_size", type=positive, default=256)
    parser.add_argument("--max_positions", type=positive, default=100_000)
    parser.add_argument("--batch_size", type=positive, default=16, help="blocks per batch")
    return parser.parse_args(argv)


def load_blocks(model, args: argparse.Namespace) -> tuple[HiddenMarkovLanguage, Tensor]:
    """Loads the language, and blocks (B, L) of its validation text with at least `args.max_positions` positions."""
    language = HiddenMarkovLanguage.load(args.language)
    num_blocks = ceil(args.max_positions / positions_per_block(model, args.block_size))
    documents = read_documents([args.language / "validation.jsonl"])
    blocks_BL = pack_blocks(documents, load_tokenizer(args.language), args.block_size, num_blocks)
    if len(blocks_BL) < num_blocks:
        raise ValueError(
            f"{args.language}: its validation text has {len(blocks_BL):,} blocks of {args.block_size} tokens, "
            f"{args.max_positions:,} positions need {num_blocks:,}."
        )
    return language, blocks_BL


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_block_options("python -m calm_transformers.experiments.optimal_fraction", __doc__, argv)
    with known_errors(ValueError, OSError):
        model = load_causal_lm(args.model, device="cpu")
        language, blocks_BL = load_blocks(model, args)
    reader, patch_size = (CalmReader(model), model.config.patch_size) if is_calm(model) else (TokenReader(model), 1)
    result = evaluate(reader, patch_size, language, blocks_BL, args.draws, args.batch_size)
    write_json(args.json, {"block_size": args.block_size, "draws": args.draws, **result})
    print("Brier-1..4", *(f"{score:.4f}" for score in result["brier"]))
    print(f"BrierLM {result['brierlm']['value']:.2f} of {result['best_brierlm']:.2f}: {format_fraction(result)}")
    print(f"at {result['positions']:,} positions")


if __name__ == "__main__":
    sys.exit(main())
