"""The hidden Markov language against enumeration: sums over all paths of places, in loops, on a small case.

Its best scores are those of an oracle that knows the laws, measured by the estimators of evaluation/."""

import itertools

import numpy as np
import pytest
import torch
from commands import refusal
from enumerable_distributions import chi_square_p_value
from language_oracle import LANGUAGE, OTHER, Oracle, S, V, continuations, ids_of

from calm_transformers.evaluation.ar_estimator import brier_counts_ar
from calm_transformers.evaluation.brier import brierlm
from calm_transformers.evaluation.calm_estimator import brier_counts_calm
from calm_transformers.experiments.language import HiddenMarkovLanguage, load, main, scored_beliefs, write
from calm_transformers.loading import load_tokenizer
from calm_transformers.training.tokenizer import SPECIAL_TOKENS

PREFIX = [2, 3, 2]
PARTS = {"train": (3, 50), "validation": (2, 20)}


def probability_by_loops(symbols, start=LANGUAGE.stationary, end=None) -> float:
    """Of the symbols, summed over all paths of places that begin by the law `start` (and lead to the place `end`)."""
    moves, emissions = LANGUAGE.laws
    total = 0.0
    for path in itertools.product(range(S), repeat=len(symbols) + (end is not None)):
        p = start[path[0]] * (end is None or path[-1] == end)
        for t, symbol in enumerate(symbols):
            p *= emissions[path[t], symbol] * (moves[path[t], path[t + 1]] if t + 1 < len(path) else 1)
        total += p
    return total


def words(n):
    return itertools.product(range(V), repeat=n)


@pytest.fixture(scope="module")
def belief():
    """About the place after the prefix."""
    return LANGUAGE.beliefs(np.array([PREFIX]))[0, -1]


@pytest.fixture(scope="module")
def enumerated():
    """n → (V, …, V): how probable each continuation of the prefix is, by Bayes from whole texts."""
    whole, laws = probability_by_loops(PREFIX), {}
    for n in (1, 2, 3, 4):
        probabilities = [probability_by_loops([*PREFIX, *word]) / whole for word in words(n)]
        laws[n] = np.array(probabilities).reshape((V,) * n)
    return laws


# the laws


@pytest.mark.parametrize("language", [LANGUAGE, HiddenMarkovLanguage(seed=39)])
def test_laws_sum_to_one_and_the_stationary_one_stays_as_it_is(language):
    for law, size in zip(language.laws, (language.num_states, language.vocab_size), strict=True):
        assert law.shape == (language.num_states, size)
        assert (law >= 0).all() and np.allclose(law.sum(1), 1, atol=1e-12)
    stationary = language.stationary
    assert stationary.sum() == pytest.approx(1) and stationary.min() > -1e-12
    np.testing.assert_allclose(stationary @ language.laws[0], stationary, atol=1e-12)


def test_beliefs_are_conditional_laws():
    """P(place, symbols before it) / P(symbols before it), for every place and every length."""
    for t, found in enumerate(LANGUAGE.beliefs(np.array([PREFIX]))[0]):
        joint = np.array([probability_by_loops(PREFIX[:t], end=place) for place in range(S)])
        np.testing.assert_allclose(found, joint / joint.sum(), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_continuations(belief, enumerated, n):
    """All of them, and the likely ones in order; the probability of each; and their agreement, the best score."""
    np.testing.assert_allclose(continuations(LANGUAGE, belief, n), enumerated[n], rtol=1e-12)
    symbols, probabilities = LANGUAGE.likely_continuations(belief, n, least=0.01)
    likely = [word for word in words(n) if enumerated[n][word] >= 0.01]
    assert symbols.tolist() == [list(word) for word in likely] and (len(likely) < V**n or n < 3)
    np.testing.assert_allclose(probabilities, [enumerated[n][word] for word in likely], rtol=1e-12)
    all_words = np.array(list(words(4)))
    found = LANGUAGE.probability(np.broadcast_to(belief, (len(all_words), S)), all_words)
    np.testing.assert_allclose(found[:, n - 1], [enumerated[n][tuple(word[:n])] for word in all_words], rtol=1e-12)
    best = LANGUAGE.best_brier(np.stack([LANGUAGE.stationary, belief]))[1, n - 1]
    assert best == pytest.approx((enumerated[n] ** 2).sum(), rel=1e-12)


# samples


@pytest.fixture(scope="module")
def texts():
    return torch.from_numpy(LANGUAGE.sample(40_000, 6, seed=0))


def test_a_sample_is_its_seeds(texts):
    assert np.array_equal(LANGUAGE.sample(40_000, 6, seed=0), texts.numpy())
    assert not np.array_equal(LANGUAGE.sample(40_000, 6, seed=1), texts.numpy())


def test_what_stands_somewhere_is_as_frequent_as_the_enumeration_says(texts, enumerated):
    """The first symbol and the last by the stationary law, and two after the prefix; other laws are told from it."""
    stationary, other = (each.stationary @ each.laws[1] for each in (LANGUAGE, OTHER))
    follows = texts[(texts[:, :3] == torch.tensor(PREFIX)).all(1)][:, 3:5]
    without_prefix = continuations(LANGUAGE, LANGUAGE.stationary, 2)
    for outcomes, law, wrong in (
        (texts[:, 0], stationary, other),
        (texts[:, 5], stationary, other),
        (follows[:, 0] * V + follows[:, 1], enumerated[2], without_prefix),
    ):
        assert len(outcomes) > 4000
        assert chi_square_p_value(outcomes, torch.from_numpy(law).flatten()) > 1e-3
        assert chi_square_p_value(outcomes, torch.from_numpy(wrong).flatten()) < 1e-9


# the best scores


def counts_of(oracle, ids_BL):
    generator = torch.Generator().manual_seed(0)
    if oracle.patch_size is None:
        return brier_counts_ar(oracle, ids_BL, generator)
    return brier_counts_calm(oracle, ids_BL, oracle.patch_size, generator)


@pytest.mark.parametrize("patch_size", [None, 1, 2, 3, 4, 8])
def test_an_oracle_reaches_the_best_scores(patch_size):
    ids_BL = ids_of(2000, 48)
    score = counts_of(Oracle(LANGUAGE, patch_size), ids_BL).score()
    best = LANGUAGE.best_brier(scored_beliefs(LANGUAGE, ids_BL, patch_size or 1)).mean((0, 1))
    for value, expected, (low, high) in zip(score.brier, best, score.brier_intervals, strict=True):
        assert abs(value - expected) < high - low  # four standard errors
    assert score.brierlm.low < brierlm(torch.tensor(best)) < score.brierlm.high < 1.15 * score.brierlm.low


@pytest.mark.parametrize("patch_size", [None, 1, 2, 3, 4, 8])
def test_best_scores_are_of_the_positions_that_are_scored(patch_size):
    """Of few short blocks, where a position more or less shows."""
    ids_BL, oracle = ids_of(3, 24), Oracle(LANGUAGE, patch_size)
    assert counts_of(oracle, ids_BL).positions_B.tolist() == [len(oracle.asked)] * 3
    ends = (np.array(oracle.asked) + 1) * (patch_size or 1)
    expected = LANGUAGE.beliefs(LANGUAGE.symbols(ids_BL.numpy()))[:, ends]
    np.testing.assert_allclose(scored_beliefs(LANGUAGE, ids_BL, patch_size or 1), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("ids_BL", "patch_size", "message"),
    [
        (ids_of(1, 10), 4, "whole patches of 4"),
        (ids_of(1, 4), 1, "hold 4 tokens after one"),
        (torch.zeros(1, 8, dtype=torch.long), 4, "no symbols of the language"),
        (ids_of(50, 24), 4, "never says"),
    ],
)
def test_positions_of_what_is_no_text_are_refused(ids_BL, patch_size, message):
    sparse = HiddenMarkovLanguage(S, V, transition_concentration=0.001, emission_concentration=0.001)
    with pytest.raises(ValueError, match=message):
        scored_beliefs(sparse, ids_BL, patch_size)


# as text


def test_the_tokenizer_has_one_token_a_symbol_and_puts_nothing_before_a_text(tmp_path):
    write(LANGUAGE, tmp_path, PARTS)
    large = HiddenMarkovLanguage(2, 1000)
    sample = LANGUAGE.sample(1, 30, seed=0)[0]
    for language, tokenizer, symbols in (
        (LANGUAGE, LANGUAGE.tokenizer(), sample),
        (LANGUAGE, load_tokenizer(tmp_path), sample),
        (large, large.tokenizer(), np.array([999, 0, 999])),
    ):
        assert len(tokenizer) == len(SPECIAL_TOKENS) + language.vocab_size
        assert tokenizer.padding_side == "left" and tokenizer.pad_token in SPECIAL_TOKENS
        ids = tokenizer(language.text(symbols)).input_ids
        assert ids == language.ids(symbols).tolist()
        assert language.symbols(np.array(ids)).tolist() == symbols.tolist()
        assert tokenizer.decode(ids) == language.text(symbols)


def files_of(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_what_is_written_is_loaded(tmp_path):
    write(LANGUAGE, tmp_path, PARTS)
    assert load(tmp_path) == LANGUAGE
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == PARTS["train"][0]
    with pytest.raises(OSError, match="language.json"):
        load(tmp_path / "elsewhere")


def test_the_command_leaves_a_finished_folder_as_it_is_and_refuses_another_language_in_it(tmp_path, capsys):
    words = ["--output", str(tmp_path), "--train_documents", "1", "--validation_documents", "2"]
    assert main(words) == 0
    before = files_of(tmp_path)
    assert len(before["validation.jsonl"][0].decode().splitlines()) == 2
    assert main(words) == 0
    for other in (["--seed", "1"], ["--validation_documents", "3"]):
        assert "another language" in refusal(capsys, main, *words, *other)
    assert files_of(tmp_path) == before
