"""The hidden Markov language against enumeration: sums over all paths of places, in loops, on a small case.

Its best scores are those of an oracle that knows the laws, measured by the estimators of evaluation/."""

import itertools

import numpy as np
import pytest
import torch
from commands import refusal
from enumerable_laws import chi_square_p_value
from language_oracle import LANGUAGE, OTHER, Oracle, S, V, continuations

from calm_transformers.evaluation.ar_estimator import count_ar
from calm_transformers.evaluation.brier import brierlm
from calm_transformers.evaluation.calm_estimator import count_calm
from calm_transformers.experiments.language import HiddenMarkovLanguage, load, main, scored_beliefs, write
from calm_transformers.loading import load_tokenizer
from calm_transformers.training.tokenizer import SPECIAL_TOKENS

PREFIX = [2, 3, 2]
PARTS = {"train": (3, 50), "validation": (2, 20)}


def probability_by_loops(symbols, start=LANGUAGE.stationary) -> float:
    """Of the symbols, summed over all paths of places that begin by the law `start`."""
    moves, emissions = LANGUAGE.laws
    total = 0.0
    for path in itertools.product(range(S), repeat=len(symbols)):
        p = start[path[0]]
        for t, (place, symbol) in enumerate(zip(path, symbols, strict=True)):
            p *= emissions[place, symbol] * (moves[place, path[t + 1]] if t + 1 < len(path) else 1)
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
    whole = probability_by_loops(PREFIX)
    laws = {}
    for n in (1, 2, 3, 4):
        probabilities = [probability_by_loops([*PREFIX, *word]) / whole for word in words(n)]
        laws[n] = np.array(probabilities).reshape((V,) * n)
    return laws


# the laws


def test_every_row_of_the_laws_is_a_law_and_another_seed_has_others():
    for language in (LANGUAGE, HiddenMarkovLanguage(seed=39)):
        for law, size in zip(language.laws, (language.num_states, language.vocab_size), strict=True):
            assert law.shape == (language.num_states, size)
            assert (law >= 0).all() and np.allclose(law.sum(1), 1, atol=1e-12)
    assert np.abs(LANGUAGE.laws[0] - OTHER.laws[0]).max() > 0.1


def test_the_stationary_law_stays_as_it_is():
    for language in (LANGUAGE, HiddenMarkovLanguage(seed=39)):
        stationary = language.stationary
        assert stationary.sum() == pytest.approx(1) and stationary.min() > -1e-12
        np.testing.assert_allclose(stationary @ language.laws[0], stationary, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_continuations(belief, enumerated, n):
    found = continuations(LANGUAGE, belief, n)
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found, enumerated[n], rtol=1e-12)


def test_beliefs_are_conditional_laws():
    """P(place, symbols before it) / P(symbols before it), for every place and every length."""
    beliefs = LANGUAGE.beliefs(np.array([PREFIX]))[0]
    moves, emissions = LANGUAGE.laws
    np.testing.assert_allclose(beliefs[0], LANGUAGE.stationary)
    for t in range(1, len(PREFIX) + 1):
        joint = np.zeros(S)
        for path in itertools.product(range(S), repeat=t + 1):
            p = LANGUAGE.stationary[path[0]]
            for i in range(t):
                p *= emissions[path[i], PREFIX[i]] * moves[path[i], path[i + 1]]
            joint[path[-1]] += p
        np.testing.assert_allclose(beliefs[t], joint / probability_by_loops(PREFIX[:t]), rtol=1e-12)


def test_probability_of_every_word_and_of_its_beginnings(belief, enumerated):
    all_words = np.array(list(words(4)))
    found = LANGUAGE.probability(np.broadcast_to(belief, (len(all_words), S)), all_words)
    for n in (1, 2, 3, 4):
        np.testing.assert_allclose(found[:, n - 1], [enumerated[n][tuple(word[:n])] for word in all_words], rtol=1e-12)


@pytest.mark.parametrize("least", [0.0, 0.01])
def test_likely_continuations_are_those_and_in_order(belief, enumerated, least):
    symbols, probabilities = LANGUAGE.likely_continuations(belief, 3, least)
    expected = [word for word in words(3) if enumerated[3][word] >= least]
    assert symbols.tolist() == [list(word) for word in expected]
    np.testing.assert_allclose(probabilities, [enumerated[3][word] for word in expected], rtol=1e-12)
    assert len(expected) < V**3 or least == 0


def test_best_brier_is_the_sum_of_squares(belief, enumerated):
    squares = [(enumerated[n] ** 2).sum() for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(LANGUAGE.best_brier(belief), squares, rtol=1e-12)
    np.testing.assert_allclose(LANGUAGE.best_brier(np.stack([belief, belief]))[1], squares, rtol=1e-12)


def test_pair_operators_are_agreements_of_two_places():
    for n in (1, 2, 3, 4):
        law_of = [[probability_by_loops(word, start) for word in words(n)] for start in np.eye(S)]
        np.testing.assert_allclose(LANGUAGE.pair_operators[n - 1], np.array(law_of) @ np.array(law_of).T, rtol=1e-12)


# samples


@pytest.fixture(scope="module")
def texts():
    return torch.from_numpy(LANGUAGE.sample(40_000, 6, seed=0))


def test_a_sample_is_its_seeds(texts):
    again, other = LANGUAGE.sample(40_000, 6, seed=0), LANGUAGE.sample(40_000, 6, seed=1)
    assert np.array_equal(again, texts.numpy())
    assert not np.array_equal(other, again)


@pytest.mark.parametrize("position", [0, 5])
def test_a_symbol_is_as_frequent_as_the_stationary_law_says(texts, position):
    """At the first position and at a later one; another language's law is told from it."""
    laws = [torch.from_numpy(language.stationary @ language.laws[1]) for language in (LANGUAGE, OTHER)]
    assert chi_square_p_value(texts[:, position], laws[0]) > 1e-3
    assert chi_square_p_value(texts[:, position], laws[1]) < 1e-9


def test_what_follows_a_prefix_is_as_frequent_as_the_enumeration_says(texts, enumerated):
    follows = texts[(texts[:, :3] == torch.tensor(PREFIX)).all(1)][:, 3:5]
    assert len(follows) > 4000
    outcomes = follows[:, 0] * V + follows[:, 1]
    assert chi_square_p_value(outcomes, torch.from_numpy(enumerated[2]).flatten()) > 1e-3
    without_prefix = torch.from_numpy(continuations(LANGUAGE, LANGUAGE.stationary, 2)).flatten()
    assert chi_square_p_value(outcomes, without_prefix) < 1e-9


# the best scores


def ids_of(num_blocks, length, seed=2):
    return torch.from_numpy(LANGUAGE.ids(LANGUAGE.sample(num_blocks, length, seed)))


def counts_of(oracle, ids_BL):
    generator = torch.Generator().manual_seed(0)
    if oracle.patch_size is None:
        return count_ar(oracle, ids_BL, generator)
    return count_calm(oracle, ids_BL, oracle.patch_size, generator)


def best_of(ids_BL, patch_size):
    return LANGUAGE.best_brier(scored_beliefs(LANGUAGE, ids_BL, patch_size or 1)).mean((0, 1))


@pytest.mark.parametrize("patch_size", [None, 1, 2, 3, 4, 8])
def test_an_oracle_reaches_the_best_scores(patch_size):
    ids_BL = ids_of(2000, 48)
    score = counts_of(Oracle(LANGUAGE, patch_size), ids_BL).score()
    best = best_of(ids_BL, patch_size)
    for value, expected, (low, high) in zip(score.brier, best, score.brier_intervals, strict=True):
        assert abs(value - expected) < high - low  # four standard errors
    assert score.brierlm.low < brierlm(torch.tensor(best)) < score.brierlm.high < 1.15 * score.brierlm.low


@pytest.mark.parametrize("patch_size", [None, 1, 2, 3, 4, 8])
def test_best_scores_are_of_the_positions_that_are_scored(patch_size):
    """Of few short blocks, where a position more or less shows."""
    ids_BL, oracle = ids_of(3, 24), Oracle(LANGUAGE, patch_size)
    counts = counts_of(oracle, ids_BL)
    assert counts.positions_B.tolist() == [len(oracle.asked)] * 3
    ends = (np.array(oracle.asked) + 1) * (patch_size or 1)
    expected = LANGUAGE.best_brier(LANGUAGE.beliefs(LANGUAGE.symbols(ids_BL.numpy()))[:, ends]).mean((0, 1))
    np.testing.assert_allclose(best_of(ids_BL, patch_size), expected, rtol=1e-12)


def test_positions_of_what_is_no_text_are_refused():
    with pytest.raises(ValueError, match="whole patches of 4"):
        scored_beliefs(LANGUAGE, ids_of(1, 10), 4)
    with pytest.raises(ValueError, match="hold 4 tokens after one"):
        scored_beliefs(LANGUAGE, ids_of(1, 4), 1)
    with pytest.raises(ValueError, match="no symbols of the language"):
        scored_beliefs(LANGUAGE, torch.zeros(1, 8, dtype=torch.long), 4)
    sparse = HiddenMarkovLanguage(S, V, transition_concentration=0.001, emission_concentration=0.001)
    with pytest.raises(ValueError, match="never says"):
        scored_beliefs(sparse, ids_of(50, 24), 4)


# as text


def test_the_tokenizer_has_one_token_a_symbol_and_puts_nothing_before_a_text(tmp_path):
    write(LANGUAGE, tmp_path, PARTS)
    symbols = LANGUAGE.sample(1, 30, seed=0)[0]
    for tokenizer in (LANGUAGE.tokenizer(), load_tokenizer(tmp_path)):
        assert len(tokenizer) == len(SPECIAL_TOKENS) + V
        assert tokenizer.padding_side == "left" and tokenizer.pad_token in SPECIAL_TOKENS
        ids = tokenizer(LANGUAGE.text(symbols)).input_ids
        assert ids == LANGUAGE.ids(symbols).tolist()
        assert LANGUAGE.symbols(np.array(ids)).tolist() == symbols.tolist()
        assert tokenizer.decode(ids) == LANGUAGE.text(symbols)


def test_the_last_symbol_of_the_largest_vocabulary_is_a_token_of_its_own():
    language = HiddenMarkovLanguage(2, 1000)
    symbols = np.array([999, 0, 999])
    ids = language.tokenizer()(language.text(symbols)).input_ids
    assert language.symbols(np.array(ids)).tolist() == symbols.tolist()


def files_of(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_folder_says_which_language_it_is(tmp_path):
    write(LANGUAGE, tmp_path, PARTS)
    assert load(tmp_path) == LANGUAGE
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == PARTS["train"][0]
    with pytest.raises(OSError, match="language.json"):
        load(tmp_path / "elsewhere")


def test_a_kill_leaves_nothing_and_the_next_run_writes_it_whole(tmp_path, monkeypatch):
    def text(self, symbols):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(HiddenMarkovLanguage, "text", text)
        with pytest.raises(KeyboardInterrupt):
            write(LANGUAGE, tmp_path / "killed", PARTS)
    assert not list((tmp_path / "killed").iterdir())
    write(LANGUAGE, tmp_path / "killed", PARTS)
    assert {"train.jsonl", "validation.jsonl", "language.json"} < set(files_of(tmp_path / "killed"))


def test_the_command_leaves_a_finished_folder_as_it_is_and_refuses_another_language_in_it(tmp_path, capsys):
    words = ["--output", str(tmp_path), "--train_documents", "1", "--validation_documents", "2"]
    assert main(words) == 0
    before = files_of(tmp_path)
    assert len(before["validation.jsonl"][0].decode().splitlines()) == 2
    assert main(words) == 0
    assert files_of(tmp_path) == before
    for other in (["--seed", "1"], ["--validation_documents", "3"]):
        assert "another language" in refusal(capsys, main, *words, *other)
    assert files_of(tmp_path) == before
