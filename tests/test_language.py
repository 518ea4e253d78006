"""The hidden Markov language against enumeration: loops over all paths of hidden states, on a small case.

test_evaluation_estimators.py compares what an oracle scores."""

import itertools

import numpy as np
import pytest
import torch
from commands import refusal
from enumerable_distributions import chi_square_p_value
from language_oracle import LANGUAGE, OTHER, Oracle, S, V, continuation_probabilities, sample_ids

from calm_transformers.evaluation.ar_estimator import brier_counts_ar
from calm_transformers.evaluation.calm_estimator import brier_counts_calm
from calm_transformers.experiments.language import HiddenMarkovLanguage, main, scored_beliefs, write_corpus
from calm_transformers.loading import load_tokenizer
from calm_transformers.training.tokenizer import SPECIAL_TOKENS

PREFIX = [2, 3, 2]
SPLITS = {"train": (3, 50), "validation": (2, 20)}


def probability_by_loops(symbols, start=LANGUAGE.stationary, end=None) -> float:
    """Sums over all paths of hidden states that start in the distribution `start` (and end in the state `end`)."""
    transitions, emissions = LANGUAGE.matrices
    total = 0.0
    for path in itertools.product(range(S), repeat=len(symbols) + (end is not None)):
        p = start[path[0]] * (end is None or path[-1] == end)
        for t, symbol in enumerate(symbols):
            p *= emissions[path[t], symbol] * (transitions[path[t], path[t + 1]] if t + 1 < len(path) else 1)
        total += p
    return total


def words(n):
    return itertools.product(range(V), repeat=n)


@pytest.fixture(scope="module")
def belief():
    return LANGUAGE.beliefs(np.array([PREFIX]))[0, -1]


@pytest.fixture(scope="module")
def enumerated():
    """n → probabilities (V, …, V) of the continuations of the prefix, by Bayes' rule from whole documents."""
    prefix_probability, result = probability_by_loops(PREFIX), {}
    for n in (1, 2, 3, 4):
        probabilities = [probability_by_loops([*PREFIX, *word]) / prefix_probability for word in words(n)]
        result[n] = np.array(probabilities).reshape((V,) * n)
    return result


@pytest.mark.parametrize("language", [LANGUAGE, HiddenMarkovLanguage(seed=39)])
def test_matrix_rows_sum_to_one_and_the_stationary_distribution_is_invariant(language):
    for matrix, size in zip(language.matrices, (language.num_states, language.vocab_size), strict=True):
        assert matrix.shape == (language.num_states, size)
        assert (matrix >= 0).all() and np.allclose(matrix.sum(1), 1, atol=1e-12)
    stationary = language.stationary
    assert stationary.sum() == pytest.approx(1) and stationary.min() > -1e-12
    np.testing.assert_allclose(stationary @ language.matrices[0], stationary, atol=1e-12)


def test_beliefs_are_conditional_distributions():
    """P(state, preceding symbols) / P(preceding symbols), for every state and every length."""
    for t, found in enumerate(LANGUAGE.beliefs(np.array([PREFIX]))[0]):
        joint = np.array([probability_by_loops(PREFIX[:t], end=state) for state in range(S)])
        np.testing.assert_allclose(found, joint / joint.sum(), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_continuations(belief, enumerated, n):
    """All of them, the likely ones in order, the probability of each, and the optimal score."""
    np.testing.assert_allclose(continuation_probabilities(LANGUAGE, belief, n), enumerated[n], rtol=1e-12)
    symbols, probabilities = LANGUAGE.likely_continuations(belief, n, min_probability=0.01)
    likely = [word for word in words(n) if enumerated[n][word] >= 0.01]
    assert symbols.tolist() == [list(word) for word in likely] and (len(likely) < V**n or n < 3)
    np.testing.assert_allclose(probabilities, [enumerated[n][word] for word in likely], rtol=1e-12)
    all_words = np.array(list(words(4)))
    found = LANGUAGE.probability(np.broadcast_to(belief, (len(all_words), S)), all_words)
    np.testing.assert_allclose(found[:, n - 1], [enumerated[n][tuple(word[:n])] for word in all_words], rtol=1e-12)
    optimal = LANGUAGE.optimal_brier(np.stack([LANGUAGE.stationary, belief]))[1, n - 1]
    assert optimal == pytest.approx((enumerated[n] ** 2).sum(), rel=1e-12)


@pytest.fixture(scope="module")
def samples():
    return torch.from_numpy(LANGUAGE.sample(40_000, 6, seed=0))


def test_samples_are_determined_by_the_seed(samples):
    assert np.array_equal(LANGUAGE.sample(40_000, 6, seed=0), samples.numpy())
    assert not np.array_equal(LANGUAGE.sample(40_000, 6, seed=1), samples.numpy())


def test_sample_frequencies_match_enumeration(samples, enumerated):
    """First and last symbol, and the two after the prefix; the test also rejects wrong distributions."""
    stationary, other = (each.stationary @ each.matrices[1] for each in (LANGUAGE, OTHER))
    follows = samples[(samples[:, :3] == torch.tensor(PREFIX)).all(1)][:, 3:5]
    without_prefix = continuation_probabilities(LANGUAGE, LANGUAGE.stationary, 2)
    for outcomes, expected, wrong in (
        (samples[:, 0], stationary, other),
        (samples[:, 5], stationary, other),
        (follows[:, 0] * V + follows[:, 1], enumerated[2], without_prefix),
    ):
        assert len(outcomes) > 4000
        assert chi_square_p_value(outcomes, torch.from_numpy(expected).flatten()) > 1e-3
        assert chi_square_p_value(outcomes, torch.from_numpy(wrong).flatten()) < 1e-9


@pytest.mark.parametrize("patch_size", [None, 1, 2, 3, 4, 8])
def test_optimal_scores_use_the_scored_positions(patch_size):
    """With few short blocks, where an off-by-one position would show."""
    ids_BL, oracle = sample_ids(3, 24), Oracle(LANGUAGE, patch_size)
    generator = torch.Generator().manual_seed(0)
    if patch_size is None:
        counts = brier_counts_ar(oracle, ids_BL, generator)
    else:
        counts = brier_counts_calm(oracle, ids_BL, patch_size, generator)
    assert counts.positions_B.tolist() == [len(oracle.positions)] * 3
    ends = (np.array(oracle.positions) + 1) * (patch_size or 1)
    expected = LANGUAGE.beliefs(LANGUAGE.to_symbols(ids_BL.numpy()))[:, ends]
    np.testing.assert_allclose(scored_beliefs(LANGUAGE, ids_BL, patch_size or 1), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("ids_BL", "patch_size", "message"),
    [
        (sample_ids(1, 10), 4, "divisible by the patch size 4"),
        (sample_ids(1, 4), 1, "longer by at least 4 tokens"),
        (torch.zeros(1, 8, dtype=torch.long), 4, "no symbols of the language"),
        (sample_ids(50, 24), 4, "have probability 0"),
    ],
)
def test_scored_beliefs_reject_invalid_blocks(ids_BL, patch_size, message):
    sparse = HiddenMarkovLanguage(S, V, transition_concentration=0.001, emission_concentration=0.001)
    with pytest.raises(ValueError, match=message):
        scored_beliefs(sparse, ids_BL, patch_size)


def test_the_tokenizer_has_one_token_per_symbol_and_adds_no_bos(tmp_path):
    write_corpus(LANGUAGE, tmp_path, SPLITS)
    large = HiddenMarkovLanguage(2, 1000)
    sample = LANGUAGE.sample(1, 30, seed=0)[0]
    for language, tokenizer, symbols in (
        (LANGUAGE, LANGUAGE.tokenizer(), sample),
        (LANGUAGE, load_tokenizer(tmp_path), sample),
        (large, large.tokenizer(), np.array([999, 0, 999])),
    ):
        assert len(tokenizer) == len(SPECIAL_TOKENS) + language.vocab_size
        assert tokenizer.padding_side == "left" and tokenizer.pad_token in SPECIAL_TOKENS
        ids = tokenizer(language.to_text(symbols)).input_ids
        assert ids == language.to_ids(symbols).tolist()
        assert language.to_symbols(np.array(ids)).tolist() == symbols.tolist()
        assert tokenizer.decode(ids) == language.to_text(symbols)


def read_files(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_load_reads_a_written_corpus(tmp_path):
    write_corpus(LANGUAGE, tmp_path, SPLITS)
    assert HiddenMarkovLanguage.load(tmp_path) == LANGUAGE
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == SPLITS["train"][0]
    with pytest.raises(OSError, match="language.json"):
        HiddenMarkovLanguage.load(tmp_path / "elsewhere")


def test_the_command_keeps_a_finished_corpus(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--train_documents", "1", "--validation_documents", "2"]
    assert main(arguments) == 0
    before = read_files(tmp_path)
    assert len(before["validation.jsonl"][0].decode().splitlines()) == 2
    assert "exists already" in refusal(capsys, main, *arguments)
    assert read_files(tmp_path) == before
