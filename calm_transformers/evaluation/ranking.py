"""How often a CALM's scores of texts (text_scores.py) rank the true continuation of a text above another text's.

    calm evaluate ranking --model MODEL --data FILE --num_samples 16 100

Each document gives a beginning and its continuation, of whole patches; the wrong one is the same place of the next
document. Chance is 50 %. A score that ties counts half.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from calm_transformers.command_line import Parser, command, known_errors, natural, positive
from calm_transformers.documents import DocumentEnding, tokenize_documents
from calm_transformers.evaluation.blocks import add_data_arguments, open_documents
from calm_transformers.evaluation.text_scores import score_texts
from calm_transformers.loading import is_calm, load_with_tokenizer
from calm_transformers.progress import progress_bar, say

TEXTS_AT_ONCE = 32


def long_documents(documents: Iterable[str], tokenizer, num_tokens: int, most: int, append_eos: bool) -> Tensor:
    """The beginnings (B, L) of the first documents that have so many tokens; no more are read.

    Raises:
        ValueError: fewer than two have.
    """
    rows = []
    for ids in tokenize_documents(documents, tokenizer, DocumentEnding(append_eos=append_eos)):
        if len(ids) >= num_tokens:
            rows.append(ids[:num_tokens].tolist())
        if len(rows) == most:
            break
    if len(rows) < 2:
        raise ValueError(f"Fewer than two documents have {num_tokens} tokens: ask for shorter texts.")
    return torch.tensor(rows)


def pairs_of(ids_BL: Tensor, num_before: int, num_after: int) -> tuple[Tensor, Tensor]:
    """Beginnings with the true continuations and with those of the next document, ids (B, num_before + num_after)."""
    true_BL = ids_BL[:, : num_before + num_after]
    return true_BL, torch.cat([true_BL[:, :num_before], true_BL.roll(-1, 0)[:, num_before:]], dim=1)


def scores_of(
    model, ids_BL: Tensor, num_after: int, num_samples: int, seed: int, bar: tqdm | None = None
) -> dict[str, Tensor]:
    """Of each text the means over the patches of its continuation, (B,): "energy", "Brier-1", "Brier-K"."""
    patch_size, parts = model.config.patch_size, []
    generator = torch.Generator(model.device).manual_seed(seed)
    for chunk_BL in ids_BL.split(TEXTS_AT_ONCE):
        scores = score_texts(model, chunk_BL, num_samples=num_samples, generator=generator)
        assert scores.energy is not None and scores.brier is not None
        last = slice(-(num_after // patch_size), None)
        brier_BK = scores.brier[:, last].mean(1)
        parts.append(torch.stack([scores.energy[:, last].mean(1), brier_BK[:, 0], brier_BK[:, -1]]))
        if bar is not None:
            bar.update(len(chunk_BL))
    return dict(zip(("energy", "Brier-1", "Brier-K"), torch.cat(parts, dim=1), strict=True))


def share_ranked_rightly(true_B: Tensor, wrong_B: Tensor) -> float:
    return ((true_B > wrong_B).float() + 0.5 * (true_B == wrong_B)).mean().item()


def several(text: str) -> int:
    """For `type=` of an option that says how many of what is compared in pairs."""
    if positive(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 2.")
    return int(text)


def check_lengths(config, num_before: int, nums_after: list[int]) -> None:
    """
    Raises:
        ValueError: tokens that are no whole patches, or more than the model reads.
    """
    for tokens in (*nums_after, num_before):
        if tokens % config.patch_size:
            raise ValueError(f"{tokens} tokens are no whole number of patches of {config.patch_size}.")
    total, most = num_before + max(nums_after), config.max_position_embeddings * config.patch_size
    if total > most:
        raise ValueError(f"{num_before} + {max(nums_after)} tokens: the model reads at most {most}.")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm evaluate ranking", __doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a CALM")
    add_data_arguments(parser)
    parser.add_argument("--num_samples", type=several, nargs="+", default=[100], help="of each patch")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[8, 32], help="of a continuation")
    parser.add_argument("--tokens_before", type=positive, default=32)
    parser.add_argument("--num_pairs", type=several, default=200, help="at most")
    parser.add_argument("--seed", type=natural, default=0)
    args = parser.parse_args(argv)
    with known_errors():
        model, tokenizer = load_with_tokenizer(args.model)
        if not is_calm(model):
            raise ValueError(f"{args.model}: is no CALM; other models rank texts by their likelihood.")
        check_lengths(model.config, args.tokens_before, args.tokens)
        num_tokens = args.tokens_before + max(args.tokens)
        ids_BL = long_documents(open_documents(args), tokenizer, num_tokens, args.num_pairs, args.append_eos)
    rows = [(tokens, num) for tokens in args.tokens for num in args.num_samples]
    print("| tokens | samples N | pairs | energy | Brier-1 | Brier-K |\n|" + " --- |" * 6)
    with progress_bar(None, "Scoring", "text", total=2 * len(ids_BL) * len(rows)) as bar:
        for tokens, num_samples in rows:
            pairs = pairs_of(ids_BL, args.tokens_before, tokens)
            true, wrong = (scores_of(model, ids, tokens, num_samples, args.seed, bar) for ids in pairs)
            shares = " | ".join(f"{share_ranked_rightly(true[name], wrong[name]):.1%}" for name in true)
            say(f"| {tokens} | {num_samples} | {len(ids_BL)} | {shares} |")


if __name__ == "__main__":
    sys.exit(main())
