"""Measures how often a CALM's text scores (text_scores.py) rank the true continuation of a text above a wrong one.

    calm evaluate ranking --model MODEL --data FILE --num_samples 16 100

Each document gives a prefix and its continuation, of whole patches; the wrong continuation is taken from the same
positions of the next document. Chance is 50 %. Ties count half.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from calm_transformers.command_line import Parser, command, known_errors, positive, seed_number
from calm_transformers.documents import DocumentEnding, tokenize_documents
from calm_transformers.evaluation.blocks import add_data_arguments, open_documents
from calm_transformers.evaluation.text_scores import score_texts
from calm_transformers.loading import is_calm, load_with_tokenizer
from calm_transformers.progress import print_above_bars, progress_bar

BATCH_SIZE = 32


def long_documents(documents: Iterable[str], tokenizer, num_tokens: int, max_rows: int, append_eos: bool) -> Tensor:
    """Returns the first `num_tokens` ids of the first `max_rows` documents that have as many, (B, num_tokens)."""
    rows = []
    for ids in tokenize_documents(documents, tokenizer, DocumentEnding(append_eos=append_eos)):
        if len(ids) >= num_tokens:
            rows.append(ids[:num_tokens].tolist())
        if len(rows) == max_rows:
            break
    if len(rows) < 2:
        raise ValueError(f"Fewer than two documents have {num_tokens} tokens: use shorter texts.")
    return torch.tensor(rows)


def true_and_wrong(ids_BL: Tensor, num_before: int, num_after: int) -> tuple[Tensor, Tensor]:
    """Returns prefixes with the true continuations and with the next document's, (B, num_before + num_after) each."""
    true_BL = ids_BL[:, : num_before + num_after]
    return true_BL, torch.cat([true_BL[:, :num_before], true_BL.roll(-1, 0)[:, num_before:]], dim=1)


def score_continuations(
    model, ids_BL: Tensor, num_after: int, num_samples: int, seed: int, bar: tqdm | None = None
) -> dict[str, Tensor]:
    """Returns each text's mean "energy", "Brier-1" and "Brier-K" over the patches of its continuation, (B,)."""
    patch_size, means = model.config.patch_size, []
    generator = torch.Generator(model.device).manual_seed(seed)
    for chunk_BL in ids_BL.split(BATCH_SIZE):
        scores = score_texts(model, chunk_BL, num_samples=num_samples, generator=generator)
        assert scores.energy is not None and scores.brier is not None
        last = slice(-(num_after // patch_size), None)
        brier_BK = scores.brier[:, last].mean(1)
        means.append(torch.stack([scores.energy[:, last].mean(1), brier_BK[:, 0], brier_BK[:, -1]]))
        if bar is not None:
            bar.update(len(chunk_BL))
    return dict(zip(("energy", "Brier-1", "Brier-K"), torch.cat(means, dim=1), strict=True))


def ranking_accuracy(true_B: Tensor, wrong_B: Tensor) -> float:
    """Returns the fraction of pairs whose true text has the higher score; a tie counts half."""
    return ((true_B > wrong_B).float() + 0.5 * (true_B == wrong_B)).mean().item()


def at_least_two(text: str) -> int:
    """Parses an integer of at least 2, for `type=` of an option."""
    if positive(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 2.")
    return int(text)


def check_lengths(config, num_before: int, nums_after: list[int]) -> None:
    """Raises a ValueError if a number of tokens isn't divisible by K or is more than the model supports."""
    for tokens in (*nums_after, num_before):
        if tokens % config.patch_size:
            raise ValueError(f"{tokens} tokens: not divisible by the patch size {config.patch_size}.")
    total, max_tokens = num_before + max(nums_after), config.max_position_embeddings * config.patch_size
    if total > max_tokens:
        raise ValueError(f"{num_before} + {max(nums_after)} tokens: the model supports at most {max_tokens}.")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm evaluate ranking", __doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a CALM")
    add_data_arguments(parser)
    parser.add_argument("--num_samples", type=at_least_two, nargs="+", default=[100], help="samples per patch")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[8, 32], help="tokens of a continuation")
    parser.add_argument("--tokens_before", type=positive, default=32, help="tokens of a prefix")
    parser.add_argument("--num_pairs", type=at_least_two, default=200, help="maximum number of pairs")
    parser.add_argument("--seed", type=seed_number, default=0)
    args = parser.parse_args(argv)
    with known_errors():
        model, tokenizer = load_with_tokenizer(args.model)
        if not is_calm(model):
            raise ValueError(f"{args.model}: is not a CALM; other models rank texts by likelihood.")
        check_lengths(model.config, args.tokens_before, args.tokens)
        num_tokens = args.tokens_before + max(args.tokens)
        ids_BL = long_documents(open_documents(args), tokenizer, num_tokens, args.num_pairs, args.append_eos)
    rows = list(itertools.product(args.tokens, args.num_samples))
    print("| tokens | samples N | pairs | energy | Brier-1 | Brier-K |\n|" + " --- |" * 6)
    with progress_bar(None, "Scoring", "text", total=2 * len(ids_BL) * len(rows)) as bar:
        for tokens, num_samples in rows:
            pairs = true_and_wrong(ids_BL, args.tokens_before, tokens)
            true, wrong = (score_continuations(model, ids, tokens, num_samples, args.seed, bar) for ids in pairs)
            accuracies = " | ".join(f"{ranking_accuracy(true[name], wrong[name]):.1%}" for name in true)
            print_above_bars(f"| {tokens} | {num_samples} | {len(ids_BL)} | {accuracies} |")


if __name__ == "__main__":
    sys.exit(main())
