"""The share of the best score: an oracle has all of it, another law exactly what enumeration says, and parts of a
model that are replaced by the oracle lose nothing."""

import json

import numpy as np
import pytest
import torch
from language_oracle import LANGUAGE, OTHER, Oracle, S, V, continuations
from tiny import tiny_model

from calm_transformers.evaluation.brier import brierlm
from calm_transformers.experiments import share
from calm_transformers.experiments.language import scored_beliefs, write
from calm_transformers.experiments.replacements import TruthReader
from calm_transformers.training.tokenizer import SPECIAL_TOKENS

IDS = V + len(SPECIAL_TOKENS)


def ids_of(num_blocks, length, seed=2):
    return torch.from_numpy(LANGUAGE.ids(LANGUAGE.sample(num_blocks, length, seed)))


def exact_brier(ids_BL, patch_size, other):
    """Brier-1..4 of another language's law on average over the positions, by enumeration of all continuations."""
    beliefs = [scored_beliefs(language, ids_BL, patch_size).reshape(-1, S) for language in (LANGUAGE, other)]
    scores = []
    for mine, its in zip(*beliefs, strict=True):
        laws = [(continuations(LANGUAGE, mine, n), continuations(other, its, n)) for n in (1, 2, 3, 4)]
        scores.append([2 * (p * q).sum() - (q * q).sum() for p, q in laws])
    return np.mean(scores, axis=0)


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 8])
def test_an_oracle_has_all_of_it(patch_size):
    result = share.measure(Oracle(LANGUAGE, patch_size), patch_size, LANGUAGE, ids_of(500, 24), 4, batch_size=100)
    low, high = result["share_interval"]
    assert abs(result["share"] - 1) < high - low < 0.12  # four standard errors
    assert result["positions"] == 500 * (24 // patch_size - -(-4 // patch_size))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_another_law_has_what_enumeration_says(patch_size):
    ids_BL = ids_of(8, 16)
    expected = exact_brier(ids_BL, patch_size, OTHER)
    result = share.measure(Oracle(OTHER, patch_size), patch_size, LANGUAGE, ids_BL, 400, batch_size=4)
    np.testing.assert_allclose(result["brier"], expected, atol=0.01)
    best = LANGUAGE.best_brier(scored_beliefs(LANGUAGE, ids_BL, patch_size)).mean((0, 1))
    np.testing.assert_allclose(result["best_brier"], best, rtol=1e-12)
    assert np.all(expected < best - 0.03)


def test_a_special_token_has_no_chance():
    """And nor has what comes after it."""
    ids_BL = ids_of(5, 16)
    drawn_BMN4 = torch.zeros(5, 3, 2, 4, dtype=torch.long)
    drawn_BMN4[..., 0] = len(SPECIAL_TOKENS)
    sums, _ = share.brier_terms(LANGUAGE, ids_BL, drawn_BMN4, 4)
    first = LANGUAGE.probability(scored_beliefs(LANGUAGE, ids_BL, 4), np.zeros((5, 3, 1), dtype=int))[..., 0]
    np.testing.assert_allclose(sums, np.stack([2 * first.sum(1) - 3, *[np.full(5, -3.0)] * 3], axis=1))


def test_the_interval_is_of_the_ratio():
    """Blocks that differ tenfold in how well they can be predicted leave the share of a model certain that has the
    same part of each."""
    best = np.outer(np.linspace(1, 10, 50), [0.4, 0.3, 0.2, 0.1])
    result = share.summary(0.9 * best, best, positions=50)
    assert result["share"] == pytest.approx(0.9) and result["share_interval"] == pytest.approx([0.9, 0.9])
    assert result["brierlm"]["high"] > 1.2 * result["brierlm"]["low"]
    assert result["brierlm"]["value"] == pytest.approx(brierlm(torch.tensor(result["brier"])).item())


def test_the_truth_through_an_autoencoder_that_forgets_is_below_it():
    """The autoencoder is random, so hardly anything comes back: replacing the other parts cannot hide it."""
    model = tiny_model(vocab_size=IDS, autoencoder_config={"vocab_size": IDS}, pad_token_id=3)
    reader = TruthReader(LANGUAGE, model.autoencoder)
    result = share.measure(reader, 4, LANGUAGE, ids_of(50, 24), 4, batch_size=50)
    assert result["share"] < 0.5


class Faithful:
    """An autoencoder without fault: its latents are the tokens themselves."""

    class config:  # noqa: N801 - as a model's
        patch_size = 4

    def encode(self, ids_BL):
        mean = ids_BL.unflatten(1, (-1, 4)).double()
        return mean, torch.full_like(mean, -10)

    def decode_tokens(self, latents):
        return latents.round().long()


def test_the_truth_through_a_faithful_autoencoder_has_all_of_it():
    result = share.measure(TruthReader(LANGUAGE, Faithful()), 4, LANGUAGE, ids_of(500, 24), 4, batch_size=100)
    low, high = result["share_interval"]
    assert abs(result["share"] - 1) < high - low < 0.12


def test_the_command_scores_a_calm(tmp_path, capsys):
    write(LANGUAGE, tmp_path, {"validation": (20, 32)})
    model = tiny_model(vocab_size=IDS, autoencoder_config={"vocab_size": IDS}, pad_token_id=3)
    model.save_pretrained(tmp_path / "calm")
    words = ["--model", str(tmp_path / "calm"), "--language", str(tmp_path), "--block_size", "32"]
    assert share.main([*words, "--max_positions", "70", "--json", str(tmp_path / "share.json")]) == 0
    result = json.loads((tmp_path / "share.json").read_text())
    assert (result["positions"], result["blocks"]) == (70, 10)
    assert "at 70 positions" in capsys.readouterr().out
    assert share.main([*words, "--max_positions", "141"]) == 2
    assert "has 20 blocks of 32 tokens, 141 positions are in 21" in capsys.readouterr().err
