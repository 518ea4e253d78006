"""How often a CALM's scores of texts (`model.score`) rank the true continuation of a text above another text's.

    python -m calm.evaluation.ranking --model MODEL --data FILE --num_samples 16 100

Each document gives a beginning and its continuation, of whole patches; the wrong one is the same place of the next
document. Chance is 50 %. A score that ties counts half.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from calm.command_line import Parser, command, known_errors, positive
from calm.evaluation.blocks import add_data_arguments, open_documents
from calm.evaluation.models import is_calm, load_causal_lm
from calm.training.tokenizer import load_tokenizer

TEXTS_AT_ONCE = 32


def pairs_of(documents, tokenizer, num_before: int, num_after: int, num_pairs: int) -> tuple[Tensor, Tensor]:
    """Beginnings with the true continuations and with those of the next document, ids (B, L) each.

    Raises:
        ValueError: fewer than two documents are long enough.
    """
    rows = []
    for document in documents:
        ids = tokenizer(document)["input_ids"]
        if len(ids) >= num_before + num_after:
            rows.append(ids[: num_before + num_after])
        if len(rows) == num_pairs:
            break
    if len(rows) < 2:
        raise ValueError(f"Fewer than two documents have {num_before + num_after} tokens: ask for shorter texts.")
    true_BL = torch.tensor(rows)
    return true_BL, torch.cat([true_BL[:, :num_before], true_BL.roll(-1, 0)[:, num_before:]], dim=1)


def scores_of(
    model, ids_BL: Tensor, num_after: int, num_samples: int, seed: int, batch: int = 32
) -> dict[str, Tensor]:
    """Of each text the means over the patches of its continuation, (B,): "energy", "Brier-1", "Brier-K"."""
    patch_size, parts = model.config.patch_size, []
    generator = torch.Generator(model.device).manual_seed(seed)
    for chunk_BL in ids_BL.split(TEXTS_AT_ONCE):
        scores = model.score(chunk_BL, num_samples=num_samples, generator=generator)
        last = slice(-(num_after // patch_size), None)
        brier_BK = scores.brier[:, last].mean(1)
        parts.append(torch.stack([scores.energy[:, last].mean(1), brier_BK[:, 0], brier_BK[:, -1]]))
    names = ("energy", "Brier-1", f"Brier-{patch_size}")
    return dict(zip(names, torch.cat(parts, dim=1), strict=True))


def share_ranked_rightly(true_B: Tensor, wrong_B: Tensor) -> float:
    return ((true_B > wrong_B).float() + 0.5 * (true_B == wrong_B)).mean().item()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m calm.evaluation.ranking", __doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a CALM")
    add_data_arguments(parser)
    parser.add_argument("--num_samples", type=positive, nargs="+", default=[100])
    parser.add_argument("--tokens", type=positive, nargs="+", default=[8, 32], help="of a continuation")
    parser.add_argument("--tokens_before", type=positive, default=32)
    parser.add_argument("--num_pairs", type=positive, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with known_errors(ValueError, OSError):
        model = load_causal_lm(args.model)
        if not is_calm(model):
            raise ValueError(f"{args.model}: is no CALM; other models rank texts by their likelihood.")
        for tokens in (*args.tokens, args.tokens_before):
            if tokens % model.config.patch_size:
                raise ValueError(f"{tokens} tokens are no whole number of patches of {model.config.patch_size}.")
        documents = list(open_documents(args))
        tokenizer = load_tokenizer(args.model)
        pairs = {t: pairs_of(documents, tokenizer, args.tokens_before, t, args.num_pairs) for t in args.tokens}
    rows = [(tokens, num) for tokens in args.tokens for num in args.num_samples]
    print("| tokens | samples N | pairs | " + " | ".join(("energy", "Brier-1", "Brier-K")) + " |\n|" + " --- |" * 6)
    for tokens, num_samples in tqdm(rows, unit="row", disable=None):
        true, wrong = (scores_of(model, ids, tokens, num_samples, args.seed) for ids in pairs[tokens])
        shares = " | ".join(f"{share_ranked_rightly(true[name], wrong[name]):.1%}" for name in true)
        tqdm.write(f"| {tokens} | {num_samples} | {len(pairs[tokens][0])} | {shares} |", file=sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
