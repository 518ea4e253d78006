"""A hidden Markov language: text without end whose best possible score is known exactly.

    python -m calm_transformers.experiments.language --output DIR

A hidden state is at one of S places. At each step it emits one of V symbols, by a law of its place, and moves on, by
another. Both laws are drawn from a seed and are sparse, so the symbols hang together over many steps. Whoever knows
the laws can say of every position how probable each continuation is, and no model can have a higher Brier-n there than

    sum_x P(x | the tokens before)^2

(evaluation/brier.py: 2 P(y) - sum P(x)^2, of which the mean over y is this where the law is the true one).

Axes: S hidden states, V symbols, B blocks or documents, L tokens, n = 1..4 tokens of a continuation, X continuations.
"..." stands for any leading axes.
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from math import ceil
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calm_transformers.command_line import Parser, command, known_errors, natural, positive
from calm_transformers.evaluation.brier import MAX_N
from calm_transformers.files import atomic_write
from calm_transformers.progress import progress_bar
from calm_transformers.training.tokenizer import PAD, SPECIAL_TOKENS, save_tokenizer, with_special_tokens

FIRST_SYMBOL = 0x4E00  # the symbols are CJK ideographs in order: 20,000 characters that no normalisation touches
LANGUAGE_FILE = "language.json"  # which language a folder holds


@dataclass(frozen=True)
class HiddenMarkovLanguage:
    """The language of a seed.

    Args:
        num_states: S.
        vocab_size: V, symbols.
        transition_concentration: of the Dirichlet law that each place's moves are drawn from; the smaller the sparser.
        emission_concentration: of that of each place's symbols.
        seed: of both laws.
    """

    num_states: int = 24
    vocab_size: int = 64
    transition_concentration: float = 0.04
    emission_concentration: float = 0.015
    seed: int = 0

    @cached_property
    def laws(self) -> tuple[np.ndarray, np.ndarray]:
        """Moves (S, S) and emissions (S, V), float64; rows sum to 1."""
        S, V = self.num_states, self.vocab_size
        rng = np.random.default_rng(self.seed)
        moves = _dirichlet_rows(rng, S, S, self.transition_concentration)
        return moves, _dirichlet_rows(rng, S, V, self.emission_concentration)

    @cached_property
    def stationary(self) -> np.ndarray:
        """(S,): the law of the place at which a text begins; it stays the same from step to step."""
        moves = self.laws[0]
        system = np.vstack([moves.T - np.eye(len(moves)), np.ones(len(moves))])
        return np.linalg.lstsq(system, np.append(np.zeros(len(moves)), 1.0), rcond=None)[0]

    def sample(self, num_documents: int, length: int, seed: int) -> np.ndarray:
        """(B, L) symbols 0 … V − 1 of independent texts; each begins in the stationary law."""
        moves, emissions = (np.cumsum(law, axis=1) for law in self.laws)
        rng = np.random.default_rng([self.seed, 1, seed])
        state = _drawn(np.cumsum(self.stationary)[None].repeat(num_documents, 0), rng)
        symbols = np.empty((num_documents, length), dtype=np.int64)
        for t in progress_bar(range(length), f"Writing {num_documents} texts", "token"):
            symbols[:, t] = _drawn(emissions[state], rng)
            state = _drawn(moves[state], rng)
        return symbols

    def beliefs(self, symbols_BL: np.ndarray) -> np.ndarray:
        """(B, L + 1, S): entry t is the law of the place that emits symbol t, given the symbols before it."""
        moves, emissions = self.laws
        beliefs = np.empty((*symbols_BL.shape[:-1], symbols_BL.shape[-1] + 1, self.num_states))
        beliefs[:, 0] = self.stationary
        for t in range(symbols_BL.shape[1]):
            joint = beliefs[:, t] * emissions[:, symbols_BL[:, t]].T
            beliefs[:, t + 1] = joint / joint.sum(-1, keepdims=True) @ moves
        return beliefs

    def likely_continuations(self, belief: np.ndarray, length: int, least: float) -> tuple[np.ndarray, np.ndarray]:
        """Those continuations of a belief (S,) that are at least so probable, in order: symbols (X, length) and
        probabilities (X,). The others are never made, so that X and not V^length is what it costs."""
        moves, emissions = self.laws
        symbols_Xn, places_XS, probability_X = np.empty((1, 0), dtype=np.int64), belief[None], np.ones(1)
        for _ in range(length):
            probability_XV = places_XS @ emissions
            kept, symbol = np.nonzero(probability_XV >= least)
            symbols_Xn, probability_X = np.column_stack([symbols_Xn[kept], symbol]), probability_XV[kept, symbol]
            places_XS = (places_XS[kept] * emissions.T[symbol]) @ moves
        return symbols_Xn, probability_X

    def probability(self, belief: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """(..., n): probability of the first 1 … n symbols (..., n) after beliefs (..., S)."""
        moves, emissions = self.laws
        result = np.empty(symbols.shape)
        for n in range(symbols.shape[-1]):
            belief = belief * np.moveaxis(emissions[:, symbols[..., n]], 0, -1)
            result[..., n] = belief.sum(-1)
            belief = belief @ moves
        return result

    @cached_property
    def pair_operators(self) -> list[np.ndarray]:
        """Entry n − 1, (S, S): probability that two independent continuations from places i and j agree for n symbols.

        Two that agree have emitted one symbol each, the same, and go on from where each of them moved:
        u_n = E Eᵀ ∘ (T u_{n−1} Tᵀ), u_0 = 1.
        """
        moves, emissions = self.laws
        operators = [np.ones((self.num_states, self.num_states))]
        for _ in range(MAX_N):
            operators.append(emissions @ emissions.T * (moves @ operators[-1] @ moves.T))
        return operators[1:]

    def best_brier(self, belief: np.ndarray) -> np.ndarray:
        """(..., 4): the highest Brier-1..4 that any law has on average after beliefs (..., S), sum_x P(x)²."""
        return np.stack([(belief @ u * belief).sum(-1) for u in self.pair_operators], axis=-1)

    # as text

    def text(self, symbols: np.ndarray) -> str:
        return "".join(chr(FIRST_SYMBOL + symbol) for symbol in symbols)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One symbol a token. Ids: the special tokens of our other tokenizers, then the symbols in order; no BOS is
        put before a text."""
        symbols = [chr(FIRST_SYMBOL + symbol) for symbol in range(self.vocab_size)]
        vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *symbols])}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
        words.add_special_tokens(list(SPECIAL_TOKENS))
        words.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
        words.decoder = decoders.Fuse()
        return with_special_tokens(words)

    def symbols(self, ids):
        """Token ids of the tokenizer → symbols; negative where the token is none. Arrays or tensors."""
        return ids - len(SPECIAL_TOKENS)

    def ids(self, symbols):
        """Symbols → token ids of the tokenizer. Arrays or tensors."""
        return symbols + len(SPECIAL_TOKENS)


def _dirichlet_rows(rng: np.random.Generator, rows: int, size: int, concentration: float) -> np.ndarray:
    """Drawn by logarithms: at small concentrations gamma variates underflow, and a row would be 0 / 0."""
    # G(a) = G(a + 1) · U^(1/a)
    logs = np.log(rng.gamma(concentration + 1, size=(rows, size))) + np.log(rng.random((rows, size))) / concentration
    weights = np.exp(logs - logs.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def _drawn(cumulative: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index of each row of cumulative probabilities."""
    chance = rng.random((len(cumulative), 1)) * cumulative[:, -1:]
    return (cumulative <= chance).sum(1)


def scored_beliefs(language: HiddenMarkovLanguage, ids_BL: torch.Tensor, patch_size: int) -> np.ndarray:
    """(B, M, S): the beliefs at the positions of blocks at which `calm_transformers.evaluation` scores a model.

    These are the ends of patches (K = 1 for a model that reads token by token), without the last ones, whose
    continuation would end in the next block. A model that reads a block knows nothing before it.

    Raises:
        ValueError: the blocks are no text of the language, are no whole number of patches, or too short.
    """
    length = ids_BL.shape[1]
    last = length - ceil(MAX_N / patch_size) * patch_size
    if length % patch_size or last < patch_size:
        raise ValueError(
            f"blocks of {length} tokens: must be whole patches of {patch_size}, and hold {MAX_N} tokens after one."
        )
    symbols_BL = language.symbols(ids_BL.numpy())
    if symbols_BL.min() < 0 or symbols_BL.max() >= language.vocab_size:
        raise ValueError("the blocks hold tokens that are no symbols of the language.")
    with np.errstate(invalid="ignore"):
        beliefs_BMS = language.beliefs(symbols_BL)[:, patch_size : last + 1 : patch_size]
    if np.isnan(beliefs_BMS).any():
        raise ValueError("the blocks are no text of this language: it never says what stands there.")
    return beliefs_BMS


def write(language: HiddenMarkovLanguage, folder: Path, parts: dict[str, tuple[int, int]]) -> None:
    """A folder with the language's tokenizer, its text, a file PART.jsonl for each part, and language.json, which says
    what it is. A folder that is there stays as it is.

    Args:
        language: which.
        folder: made.
        parts: name → documents, and tokens of each.

    Raises:
        ValueError: the folder is there, and holds something else.
    """
    contents = json.dumps({**asdict(language), "parts": parts}, indent=2) + "\n"
    if folder.exists() and any(folder.iterdir()):
        marker = folder / LANGUAGE_FILE
        if not marker.exists() or marker.read_text(encoding="utf-8") != contents:
            raise ValueError(f"{folder} holds another language or other parts of it: remove it, or choose another.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder) as aside:
        aside.mkdir()
        for seed, (name, (number, length)) in enumerate(parts.items()):
            with (aside / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for symbols in language.sample(number, length, seed):
                    file.write(json.dumps({"text": language.text(symbols)}, ensure_ascii=False) + "\n")
        save_tokenizer(language.tokenizer(), aside)
        (aside / LANGUAGE_FILE).write_text(contents, encoding="utf-8")


def load(folder: Path) -> HiddenMarkovLanguage:
    """The language of a folder that `write` made.

    Raises:
        OSError: it has no language.json.
    """
    fields = json.loads((folder / LANGUAGE_FILE).read_text(encoding="utf-8"))
    fields.pop("parts")
    return HiddenMarkovLanguage(**fields)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm_transformers.experiments.language", __doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder that is made")
    parser.add_argument("--num_states", type=positive, default=24)
    parser.add_argument("--vocab_size", type=positive, default=64)
    parser.add_argument("--seed", type=natural, default=39, help="of the laws; default: 39, see docs/experiments.md")
    parser.add_argument("--train_documents", type=positive, default=256, help="of 65,536 tokens")
    parser.add_argument("--validation_documents", type=positive, default=3300, help="of 256 tokens")
    args = parser.parse_args(argv)
    language = HiddenMarkovLanguage(args.num_states, args.vocab_size, seed=args.seed)
    parts = {"train": (args.train_documents, 2**16), "validation": (args.validation_documents, 2**8)}
    with known_errors(ValueError, OSError):
        write(language, args.output, parts)
    print(f"{args.output}: a tokenizer, train.jsonl and validation.jsonl")


if __name__ == "__main__":
    sys.exit(main())
