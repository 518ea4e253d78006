"""A hidden Markov language, whose optimal Brier-n is known exactly at every position.

    python -m calm_transformers.experiments.language --output DIR

A hidden Markov model with S states emits one of V symbols per step. Its transition and emission matrices are sampled
from a seed and are sparse, so that symbols depend on each other over many steps. The forward algorithm gives the
probability of every continuation, and no model can have a higher expected Brier-n at a position than

    sum_x P(x | preceding tokens)^2

(evaluation/brier.py: the mean over y ~ P of 2 P(y) - sum_x P(x)^2).

Axes: S hidden states, V symbols, B blocks or documents, L tokens, M scored positions, n = 1..4 tokens of a
continuation, X continuations. "..." is any leading axes.
"""

from __future__ import annotations

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

from calm_transformers.command_line import Parser, command, known_errors, positive, seed_number
from calm_transformers.evaluation.brier import MAX_N
from calm_transformers.files import new_folder
from calm_transformers.progress import progress_bar
from calm_transformers.training.tokenizer import PAD, SPECIAL_TOKENS, save_tokenizer, with_special_tokens

FIRST_SYMBOL = 0x4E00  # the symbols are CJK ideographs in order: 20,000 characters that no normalisation touches
LANGUAGE_FILE = "language.json"  # the language and the splits of a corpus folder


@dataclass(frozen=True)
class HiddenMarkovLanguage:
    """A hidden Markov model with sparse random transition and emission matrices."""

    num_states: int = 24  # S
    vocab_size: int = 64  # V
    transition_concentration: float = 0.04  # of the Dirichlet distribution of each row; smaller is sparser
    emission_concentration: float = 0.015
    seed: int = 0

    @classmethod
    def load(cls, folder: Path) -> HiddenMarkovLanguage:
        """Loads the language of a folder written by `write_corpus`."""
        fields = json.loads((folder / LANGUAGE_FILE).read_text(encoding="utf-8"))
        fields.pop("parts")
        return cls(**fields)

    @cached_property
    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """Transition (S, S) and emission (S, V) probabilities, float64; rows sum to 1."""
        S, V = self.num_states, self.vocab_size
        rng = np.random.default_rng(self.seed)
        transitions = _sample_dirichlet_rows(rng, S, S, self.transition_concentration)
        return transitions, _sample_dirichlet_rows(rng, S, V, self.emission_concentration)

    @cached_property
    def stationary(self) -> np.ndarray:
        """Stationary distribution p = p T of the hidden state, (S,); also that of a document's first state."""
        transitions, _ = self.matrices
        system = np.vstack([transitions.T - np.eye(len(transitions)), np.ones(len(transitions))])
        return np.linalg.lstsq(system, np.append(np.zeros(len(transitions)), 1.0), rcond=None)[0]

    def sample(self, num_documents: int, length: int, seed: int) -> np.ndarray:
        """Samples independent documents: symbols 0 … V − 1, (B, L)."""
        transitions, emissions = (np.cumsum(matrix, axis=1) for matrix in self.matrices)
        rng = np.random.default_rng([self.seed, 1, seed])
        states = _sample_rows(np.cumsum(self.stationary)[None].repeat(num_documents, 0), rng)
        symbols = np.empty((num_documents, length), dtype=np.int64)
        for t in progress_bar(range(length), f"Sampling {num_documents} documents", "token"):
            symbols[:, t] = _sample_rows(emissions[states], rng)
            states = _sample_rows(transitions[states], rng)
        return symbols

    def beliefs(self, symbols_BL: np.ndarray) -> np.ndarray:
        """Returns belief states (B, L + 1, S): entry t is P(state that emits symbol t | symbols before t)."""
        transitions, emissions = self.matrices
        beliefs = np.empty((*symbols_BL.shape[:-1], symbols_BL.shape[-1] + 1, self.num_states))
        beliefs[:, 0] = self.stationary
        for t in range(symbols_BL.shape[1]):
            joint = beliefs[:, t] * emissions[:, symbols_BL[:, t]].T
            beliefs[:, t + 1] = joint / joint.sum(-1, keepdims=True) @ transitions
        return beliefs

    def likely_continuations(
        self, belief: np.ndarray, length: int, min_probability: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Enumerates the continuations of a belief (S,) with at least `min_probability`, in lexicographic order.

        Returns symbols (X, length) and probabilities (X,). Less likely prefixes are pruned, so the cost grows with X.
        """
        transitions, emissions = self.matrices
        symbols_Xn, states_XS, probability_X = np.empty((1, 0), dtype=np.int64), belief[None], np.ones(1)
        for _ in range(length):
            probability_XV = states_XS @ emissions
            parent, symbol = np.nonzero(probability_XV >= min_probability)
            symbols_Xn, probability_X = np.column_stack([symbols_Xn[parent], symbol]), probability_XV[parent, symbol]
            states_XS = (states_XS[parent] * emissions.T[symbol]) @ transitions
        return symbols_Xn, probability_X

    def probability(self, belief: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """Returns the probabilities (..., n) of the first 1 … n symbols (..., n) given beliefs (..., S)."""
        transitions, emissions = self.matrices
        result = np.empty(symbols.shape)
        for n in range(symbols.shape[-1]):
            belief = belief * np.moveaxis(emissions[:, symbols[..., n]], 0, -1)
            result[..., n] = belief.sum(-1)
            belief = belief @ transitions
        return result

    @cached_property
    def collision_matrices(self) -> list[np.ndarray]:
        """Entry n − 1, (S, S): probability that continuations sampled from states i and j agree on n symbols.

        u_n = E Eᵀ ∘ (T u_{n−1} Tᵀ), u_0 = 1, with transitions T and emissions E.
        """
        transitions, emissions = self.matrices
        matrices = [np.ones((self.num_states, self.num_states))]
        for _ in range(MAX_N):
            matrices.append(emissions @ emissions.T * (transitions @ matrices[-1] @ transitions.T))
        return matrices[1:]

    def optimal_brier(self, belief: np.ndarray) -> np.ndarray:
        """Returns the optimal expected Brier-1..4 (..., 4) given beliefs (..., S): sum_x P(x)²."""
        return np.stack([(belief @ u * belief).sum(-1) for u in self.collision_matrices], axis=-1)

    def to_text(self, symbols: np.ndarray) -> str:
        return "".join(chr(FIRST_SYMBOL + symbol) for symbol in symbols)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Builds a tokenizer with one token per symbol, after the usual special tokens; it adds no BOS."""
        symbols = [chr(FIRST_SYMBOL + symbol) for symbol in range(self.vocab_size)]
        vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *symbols])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        return with_special_tokens(tokenizer)

    def to_symbols(self, ids):
        """Converts token ids (array or tensor) to symbols; special tokens become negative."""
        return ids - len(SPECIAL_TOKENS)

    def to_ids(self, symbols):
        """Converts symbols (array or tensor) to token ids."""
        return symbols + len(SPECIAL_TOKENS)


def _sample_dirichlet_rows(rng: np.random.Generator, rows: int, size: int, concentration: float) -> np.ndarray:
    """Samples a matrix (rows, size) whose rows follow a symmetric Dirichlet distribution."""
    # In log space, by G(a) = G(a + 1) · U^(1/a): small gamma variates underflow, and a row would be 0 / 0.
    logs = np.log(rng.gamma(concentration + 1, size=(rows, size))) + np.log(rng.random((rows, size))) / concentration
    weights = np.exp(logs - logs.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def _sample_rows(cumulative: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Samples one index per row of cumulative probabilities."""
    thresholds = rng.random((len(cumulative), 1)) * cumulative[:, -1:]
    return (cumulative <= thresholds).sum(1)


def scored_beliefs(language: HiddenMarkovLanguage, ids_BL: torch.Tensor, patch_size: int) -> np.ndarray:
    """Returns the belief states (B, M, S) at the positions that `calm_transformers.evaluation` scores.

    Positions are the ends of patches (K = 1 for an autoregressive model), except the last ones, whose continuation
    would leave the block. Tokens before the block are unknown to the model, hence to the belief.
    """
    length = ids_BL.shape[1]
    last_position = length - ceil(MAX_N / patch_size) * patch_size
    if length % patch_size or last_position < patch_size:
        raise ValueError(
            f"blocks of {length} tokens: must be divisible by the patch size {patch_size} and longer by at least "
            f"{MAX_N} tokens."
        )
    symbols_BL = language.to_symbols(ids_BL.numpy())
    if symbols_BL.min() < 0 or symbols_BL.max() >= language.vocab_size:
        raise ValueError("the blocks hold tokens that are no symbols of the language.")
    with np.errstate(invalid="ignore"):
        beliefs_BMS = language.beliefs(symbols_BL)[:, patch_size : last_position + 1 : patch_size]
    if np.isnan(beliefs_BMS).any():
        raise ValueError("the blocks are not from this language: they have probability 0 in it.")
    return beliefs_BMS


def write_corpus(language: HiddenMarkovLanguage, folder: Path, splits: dict[str, tuple[int, int]]) -> None:
    """Writes a tokenizer, a file SPLIT.jsonl per split, and language.json with all settings.

    Args:
        language: to sample from.
        folder: to create.
        splits: name → number of documents, and tokens per document.
    """
    settings = json.dumps({**asdict(language), "parts": splits}, indent=2) + "\n"
    with new_folder(folder) as temporary:
        for seed, (name, (num_documents, length)) in enumerate(splits.items()):
            with (temporary / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for symbols in language.sample(num_documents, length, seed):
                    file.write(json.dumps({"text": language.to_text(symbols)}, ensure_ascii=False) + "\n")
        save_tokenizer(language.tokenizer(), temporary)
        (temporary / LANGUAGE_FILE).write_text(settings, encoding="utf-8")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm_transformers.experiments.language", __doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    parser.add_argument("--num_states", type=positive, default=24)
    parser.add_argument("--vocab_size", type=positive, default=64)
    parser.add_argument("--seed", type=seed_number, default=39, help="of the language (default: 39)")
    parser.add_argument("--train_documents", type=positive, default=256, help="of 65,536 tokens each")
    parser.add_argument("--validation_documents", type=positive, default=3300, help="of 256 tokens each")
    args = parser.parse_args(argv)
    language = HiddenMarkovLanguage(args.num_states, args.vocab_size, seed=args.seed)
    splits = {"train": (args.train_documents, 2**16), "validation": (args.validation_documents, 2**8)}
    with known_errors(ValueError, OSError):
        write_corpus(language, args.output, splits)
    print(f"{args.output}: a tokenizer, train.jsonl and validation.jsonl")


if __name__ == "__main__":
    sys.exit(main())
