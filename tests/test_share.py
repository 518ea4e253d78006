"""The share of the best score: an oracle has all of it, another law exactly what enumeration says, and parts of a
model that are replaced by the oracle lose nothing."""

import json

import numpy as np
import pytest
import torch
from commands import refusal
from language_oracle import LANGUAGE, OTHER, Oracle, S, V, continuations, ids_of
from tiny import tiny_model

from calm_transformers.evaluation.brier import brierlm
from calm_transformers.experiments import share
from calm_transformers.experiments.language import scored_beliefs, write
from calm_transformers.experiments.replacements import TruthReader
from calm_transformers.training.tokenizer import SPECIAL_TOKENS

IDS = V + len(SPECIAL_TOKENS)


def of_the_language():
    return tiny_model(vocab_size=IDS, autoencoder_config={"vocab_size": IDS}, pad_token_id=3)


class Faithful:
    """An autoencoder without fault: its latents are the tokens themselves."""

    class config:  # noqa: N801 - as a model's
        patch_size = 4

    def encode(self, ids_BL):
        mean = ids_BL.unflatten(1, (-1, 4)).double()
        return mean, torch.full_like(mean, -10)

    def decode_tokens(self, latents):
        return latents.round().long()


@pytest.mark.parametrize(
    ("reader", "patch_size"),
    [*((Oracle(LANGUAGE, size), size) for size in (1, 2, 3, 4, 8)), (TruthReader(LANGUAGE, Faithful()), 4)],
)
def test_an_oracle_and_the_truth_through_a_faithful_autoencoder_have_all_of_it(reader, patch_size):
    result = share.measure(reader, patch_size, LANGUAGE, ids_of(500, 24), 4, batch_size=100)
    low, high = result["share_interval"]
    assert abs(result["share"] - 1) < high - low < 0.12  # four standard errors
    assert result["positions"] == 500 * (24 // patch_size - -(-4 // patch_size))


def test_the_truth_through_an_autoencoder_that_forgets_is_below_it():
    """The autoencoder is random, so hardly anything comes back: replacing the other parts cannot hide it."""
    reader = TruthReader(LANGUAGE, of_the_language().autoencoder)
    assert share.measure(reader, 4, LANGUAGE, ids_of(50, 24), 4, batch_size=50)["share"] < 0.5


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_another_law_has_what_enumeration_says(patch_size):
    """Brier-1..4 on average over the positions, by enumeration of all continuations."""
    ids_BL, scores = ids_of(8, 16), []
    beliefs = [scored_beliefs(language, ids_BL, patch_size).reshape(-1, S) for language in (LANGUAGE, OTHER)]
    for mine, its in zip(*beliefs, strict=True):
        laws = [(continuations(LANGUAGE, mine, n), continuations(OTHER, its, n)) for n in (1, 2, 3, 4)]
        scores.append([2 * (p * q).sum() - (q * q).sum() for p, q in laws])
    expected = np.mean(scores, axis=0)
    result = share.measure(Oracle(OTHER, patch_size), patch_size, LANGUAGE, ids_BL, 400, batch_size=4)
    np.testing.assert_allclose(result["brier"], expected, atol=0.01)
    np.testing.assert_allclose(result["best_brier"], LANGUAGE.best_brier(beliefs[0]).mean(0), rtol=1e-12)
    assert np.all(expected < np.array(result["best_brier"]) - 0.03)


def test_a_special_token_has_no_chance_nor_has_what_comes_after_it():
    ids_BL = ids_of(5, 16)
    drawn_BMN4 = torch.zeros(5, 3, 2, 4, dtype=torch.long)
    drawn_BMN4[..., 0] = len(SPECIAL_TOKENS)
    sums, _ = share.brier_terms(LANGUAGE, ids_BL, drawn_BMN4, 4)
    first = LANGUAGE.probability(scored_beliefs(LANGUAGE, ids_BL, 4), np.zeros((5, 3, 1), dtype=int))[..., 0]
    np.testing.assert_allclose(sums, np.stack([2 * first.sum(1) - 3, *[np.full(5, -3.0)] * 3], axis=1))


def test_the_interval_is_of_the_ratio():
    """Blocks that differ tenfold leave the share of a model certain that has the same part of each."""
    best = np.outer(np.linspace(1, 10, 50), [0.4, 0.3, 0.2, 0.1])
    result = share.summary(0.9 * best, best, positions=50)
    assert result["share"] == pytest.approx(0.9) and result["share_interval"] == pytest.approx([0.9, 0.9])
    assert result["brierlm"]["high"] > 1.2 * result["brierlm"]["low"]
    assert result["brierlm"]["value"] == pytest.approx(brierlm(torch.tensor(result["brier"])).item())


def test_the_command_scores_a_calm(tmp_path, capsys):
    write(LANGUAGE, tmp_path, {"validation": (20, 32)})
    of_the_language().save_pretrained(tmp_path / "calm")
    words = ["--model", str(tmp_path / "calm"), "--language", str(tmp_path), "--block_size", "32"]
    assert share.main([*words, "--max_positions", "70", "--json", str(tmp_path / "share.json")]) == 0
    result = json.loads((tmp_path / "share.json").read_text())
    assert (result["positions"], result["blocks"]) == (70, 10)
    assert "at 70 positions" in capsys.readouterr().out
    error = refusal(capsys, share.main, *words, "--max_positions", "141")
    assert "has 20 blocks of 32 tokens, 141 positions are in 21" in error
