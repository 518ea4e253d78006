"""Autoencoder report, prompt alignment and invented words, on models with known results."""

import json
import math

import pytest
import torch
from commands import main_of, refusal
from evaluation_folder import EVALUATIONS, evaluations, tiny_llama
from tiny import tiny_model, tiny_tokenizer

from calm_transformers.evaluation import autoencoder_report, invented_words
from calm_transformers.evaluation.autoencoder_report import noise_accuracy


class SignAutoencoder(torch.nn.Module):
    """Maps two binary tokens to two latents +1 or -1: noise of size s flips a token with P(s * noise > 1)."""

    def encoder(self, input_ids):
        latents = 2.0 * input_ids.unflatten(1, (-1, 2)) - 1
        return latents, torch.full_like(latents, -1.0)

    def decode_tokens(self, latents):
        return (latents > 0).long()


def test_noise_accuracy_of_a_known_autoencoder():
    patches = torch.randint(2, (4000, 2), generator=torch.Generator().manual_seed(0))
    clean, noisy = noise_accuracy(SignAutoencoder(), patches, sigmas=(0.0, 1.0))
    assert clean == {"sigma": 0.0, "token_accuracy": 1, "patch_accuracy": 1}
    assert noisy["token_accuracy"] == pytest.approx(0.8413, abs=0.01)  # P(standard normal < 1)
    assert noisy["patch_accuracy"] == pytest.approx(0.8413**2, abs=0.02)


@pytest.mark.parametrize("kind", ["calm", "autoencoder"])
def test_autoencoder_report_command(folder, tmp_path, capsys, kind):
    model = folder / kind
    if kind == "autoencoder":
        model = tmp_path / kind
        tiny_model(patch_size=2).autoencoder.save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
    out = tmp_path / "out.json"
    options = ["--max_patches", "100", "--json", str(out)]
    autoencoder_report.main(["--model", str(model), "--data", str(folder / "text.jsonl.xz"), *options])
    result = json.loads(out.read_text())
    assert result["patches"] == 100 and result["latent_size"] == 16
    assert [row["sigma"] for row in result["noise"]] == list(autoencoder_report.SIGMAS)
    assert "100 patches" in capsys.readouterr().out


def test_invented_words_are_not_in_the_reference_text():
    known = invented_words.vocabulary_of(["Lily's mom said: \u201cGo!\u201d", "She didn\u2019t."])
    assert known == {"lily's", "mom", "said", "go", "she", "didn't"}
    new, count = invented_words.invented(["Mom sayed, didn't she? go 123 awa"], known)  # the last may be truncated
    assert (new, count) == (["sayed"], 5)


@pytest.mark.parametrize(("kind", "hottest"), [("calm", 1.0), ("ar", 3.0)])
def test_invented_words_command(folder, tmp_path, capsys, kind, hottest):
    """Other models may use a higher temperature than a CALM, which is limited to (0, 2]."""
    out = tmp_path / "out.json"
    size = ["--num_texts", "2", "--max_new_tokens", "30", "--temperature", "0.5", str(hottest), "--prompt", "ab"]
    options = [*size, "--num_candidates", "5", "--json", str(out), "--judge", str(folder / "ar")]
    invented_words.main(["--model", str(folder / kind), "--text", str(folder / "text.jsonl.xz"), *options])
    rows = json.loads(out.read_text())
    assert [row["temperature"] for row in rows] == [0.5, hottest]
    assert all(row["invented"] == len(row["examples"]) <= row["words"] for row in rows)
    assert capsys.readouterr().out.count("|\n") == 4
    assert all(-20 < row["judge"] < 0 for row in rows)


def test_the_judge_counts_the_continuation_alone():
    tokenizer, judge = tiny_tokenizer(), tiny_llama()
    judge.lm_head.weight.data.zero_()  # uniform over 96 tokens, which are characters
    texts = ["one", "two and more"]
    found = invented_words.log_likelihood(judge, tokenizer, "Once", texts)
    assert found == pytest.approx(-math.log(96))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("invented_words", "--judge {}/calm", "--judge {}/calm: CALM has no logits"),
        ("invented_words", "--temperature 0.5 3", "temperature=3.0: sampling needs a temperature in (0, 2]"),
        ("invented_words", "--temperature 0", "--temperature 0: must be positive"),
        ("invented_words", "--num_candidates 1 --temperature 0.5", "num_candidates=1 is too few for temperature=0.5"),
        ("invented_words", "--text missing.txt", "missing.txt: no such file"),
    ],
)
def test_errors(folder, capsys, name, options, message):
    command = main_of(f"calm_transformers.evaluation.{name}")
    words = [*evaluations(folder)[name], *options.format(folder).split()]
    assert refusal(capsys, command, *words).startswith(message.format(folder))


@pytest.mark.parametrize("name", [name for name in EVALUATIONS if name != "brier_lm"])  # which uses accelerate
def test_a_gpu_is_used_if_available(folder, name, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    command = main_of(f"calm_transformers.evaluation.{name}")
    assert "device cuda: " in refusal(capsys, command, *evaluations(folder)[name])
