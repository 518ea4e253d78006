"""Fraction of the optimal BrierLM: 1 for an oracle, with or without a lossless autoencoder, and as enumerated for a
model of another language."""

import json

import numpy as np
import pytest
import torch
from commands import refusal
from language_oracle import LANGUAGE, OTHER, Oracle, S, V, continuation_probabilities, sample_ids
from tiny import tiny_model

from calm_transformers.evaluation.brier import brierlm
from calm_transformers.experiments import optimal_fraction
from calm_transformers.experiments.language import scored_beliefs, write_corpus
from calm_transformers.experiments.oracle_ablation import LanguageReader
from calm_transformers.training.tokenizer import SPECIAL_TOKENS

VOCAB_SIZE = V + len(SPECIAL_TOKENS)


def untrained_model():
    return tiny_model(vocab_size=VOCAB_SIZE, autoencoder_config={"vocab_size": VOCAB_SIZE}, pad_token_id=3)


class Lossless:
    """An autoencoder whose latents are the token ids."""

    class config:  # noqa: N801 - like that of a model
        patch_size = 4

    def encode(self, ids_BL):
        mean = ids_BL.unflatten(1, (-1, 4)).double()
        return mean, torch.full_like(mean, -10)

    def decode_tokens(self, latents):
        return latents.round().long()


@pytest.mark.parametrize(
    ("reader", "patch_size"),
    [*((Oracle(LANGUAGE, size), size) for size in (1, 2, 3, 4, 8)), (LanguageReader(LANGUAGE, Lossless()), 4)],
)
def test_an_oracle_and_a_lossless_autoencoder_reach_the_optimum(reader, patch_size):
    result = optimal_fraction.evaluate(reader, patch_size, LANGUAGE, sample_ids(500, 24), 4, batch_size=100)
    low, high = result["share_interval"]
    assert abs(result["share"] - 1) < high - low < 0.12  # four standard errors
    assert result["positions"] == 500 * (24 // patch_size - -(-4 // patch_size))


def test_the_loss_of_an_untrained_autoencoder_shows():
    """Replacing head and backbone does not hide the error of the autoencoder."""
    reader = LanguageReader(LANGUAGE, untrained_model().autoencoder)
    assert optimal_fraction.evaluate(reader, 4, LANGUAGE, sample_ids(50, 24), 4, batch_size=50)["share"] < 0.5


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_model_of_another_language_scores_as_enumerated(patch_size):
    """Mean Brier-1..4 over the positions, by enumeration of all continuations."""
    ids_BL, scores = sample_ids(8, 16), []
    beliefs = [scored_beliefs(language, ids_BL, patch_size).reshape(-1, S) for language in (LANGUAGE, OTHER)]
    for belief, other in zip(*beliefs, strict=True):
        models = (LANGUAGE, belief), (OTHER, other)
        pairs = [[continuation_probabilities(*model, n) for model in models] for n in (1, 2, 3, 4)]
        scores.append([2 * (p * q).sum() - (q * q).sum() for p, q in pairs])
    expected = np.mean(scores, axis=0)
    result = optimal_fraction.evaluate(Oracle(OTHER, patch_size), patch_size, LANGUAGE, ids_BL, 400, batch_size=4)
    np.testing.assert_allclose(result["brier"], expected, atol=0.01)
    np.testing.assert_allclose(result["best_brier"], LANGUAGE.optimal_brier(beliefs[0]).mean(0), rtol=1e-12)
    assert np.all(expected < np.array(result["best_brier"]) - 0.03)


def test_a_special_token_and_its_continuations_have_probability_0():
    ids_BL = sample_ids(5, 16)
    samples_BMN4 = torch.zeros(5, 3, 2, 4, dtype=torch.long)
    samples_BMN4[..., 0] = len(SPECIAL_TOKENS)
    sums, _ = optimal_fraction.brier_sums(LANGUAGE, ids_BL, samples_BMN4, 4)
    first = LANGUAGE.probability(scored_beliefs(LANGUAGE, ids_BL, 4), np.zeros((5, 3, 1), dtype=int))[..., 0]
    np.testing.assert_allclose(sums, np.stack([2 * first.sum(1) - 3, *[np.full(5, -3.0)] * 3], axis=1))


def test_the_interval_is_that_of_the_ratio():
    """A model with the same fraction in every block has no uncertainty, although the blocks differ tenfold."""
    optimal = np.outer(np.linspace(1, 10, 50), [0.4, 0.3, 0.2, 0.1])
    result = optimal_fraction.summarise(0.9 * optimal, optimal, positions=50)
    assert result["share"] == pytest.approx(0.9) and result["share_interval"] == pytest.approx([0.9, 0.9])
    assert result["brierlm"]["high"] > 1.2 * result["brierlm"]["low"]
    assert result["brierlm"]["value"] == pytest.approx(brierlm(torch.tensor(result["brier"])).item())


def test_the_command_scores_a_calm(tmp_path, capsys):
    write_corpus(LANGUAGE, tmp_path, {"validation": (20, 32)})
    untrained_model().save_pretrained(tmp_path / "calm")
    args = ["--model", str(tmp_path / "calm"), "--language", str(tmp_path), "--block_size", "32"]
    assert optimal_fraction.main([*args, "--max_positions", "70", "--json", str(tmp_path / "results.json")]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["positions"], result["blocks"]) == (70, 10)
    assert "at 70 positions" in capsys.readouterr().out
    error = refusal(capsys, optimal_fraction.main, *args, "--max_positions", "141")
    assert "has 20 blocks of 32 tokens, 141 positions need 21" in error
