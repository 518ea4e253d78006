"""Ranking of true and wrong continuations: perfect for a model that knows the text, chance for a random one."""

import json

import pytest
import torch
from commands import refusal
from tiny import tiny_model, tiny_tokenizer

from calm_transformers.evaluation import ranking
from calm_transformers.model.modeling_calm import CALMOutputWithPast

LETTERS = "abcdefghijkl"


@pytest.fixture
def texts(tmp_path):
    """Writes documents that repeat one letter; the fifth is too short for 24 tokens."""
    documents = [letter * (9 if i == 4 else 40) for i, letter in enumerate(LETTERS)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return tmp_path / "text.jsonl"


def deterministic(model, step=0):
    """Makes the model's next patch its last token again, shifted by `step` letters."""

    def last(input_ids, size):
        return input_ids[:, 1::2, None] * torch.ones(1, 1, size)

    def encode(input_ids):
        return last(input_ids, 16), torch.full_like(last(input_ids, 16), -40)

    def sample(context_mD, num_samples, generator):
        return (context_mD[:, :16] + step).expand(num_samples, -1, -1)

    model.forward = lambda input_ids, **_: CALMOutputWithPast(last_hidden_state=last(input_ids, 48))
    model.head.sample = sample
    model.autoencoder.decode_tokens = lambda latents: latents[..., :2].long()
    model.autoencoder.encode = encode
    return model


def table(capsys, *words):
    capsys.readouterr()
    assert ranking.main([str(word) for word in words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| tokens | samples N | pairs | energy | Brier-1 | Brier-K |"
    return [line.strip("| ").split(" | ") for line in lines[2:]]


@pytest.mark.parametrize(
    "step, sizes, expected",
    [
        (0, "--tokens 4 8 --tokens_before 16 --num_samples 2 5", ["11", *["100.0%"] * 3]),
        # It predicts the next letter, with which the wrong continuation starts. The last document's wrong continuation
        # is the first document, three letters back: Brier scores tie there.
        (1, "--tokens 2 --tokens_before 6 --num_samples 3 --num_pairs 4", ["4", "25.0%", "12.5%", "12.5%"]),
    ],
)
def test_a_model_that_predicts_the_true_or_the_wrong_text(monkeypatch, capsys, texts, step, sizes, expected):
    model = deterministic(tiny_model(patch_size=2), step)
    monkeypatch.setattr(ranking, "load_with_tokenizer", lambda name: (model, tiny_tokenizer()))
    rows = table(capsys, "--model", "calm", "--data", texts, *sizes.split())
    assert [row[2:] for row in rows] == [expected] * len(rows)
    assert [row[:2] for row in rows] == ([["2", "3"]] if step else [[t, n] for t in ("4", "8") for n in ("2", "5")])


def test_a_random_model_is_at_chance(capsys, folder):
    sizes = ["--tokens", 4, "--tokens_before", 8, "--num_samples", 20]
    arguments = ["--model", folder / "calm", "--data", folder / "text.jsonl.xz", *sizes]
    ((_, _, pairs, *accuracies),) = table(capsys, *arguments)
    assert pairs == "60" and all(20 < float(accuracy.removesuffix("%")) < 80 for accuracy in accuracies)
    assert table(capsys, *arguments) == [["4", "20", pairs, *accuracies]]
    assert table(capsys, *arguments, "--seed", 1) != [["4", "20", pairs, *accuracies]]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--tokens 3", "3 tokens: not divisible by the patch size 2."),
        ("--tokens_before 5", "5 tokens: not divisible by the patch size 2."),
        ("--tokens 8 100", "Fewer than two documents have 132 tokens: use shorter texts."),
        ("--tokens 1000000", "32 + 1000000 tokens: the model supports at most "),
        ("--num_samples 1", "argument --num_samples: 1: must be at least 2"),
        ("--num_pairs 1", "argument --num_pairs: 1: must be at least 2"),
        ("--model {}/ar", "{}/ar: is not a CALM; other models rank texts by likelihood"),
    ],
)
def test_errors(capsys, folder, options, message):
    words = ["--model", folder / "calm", "--data", folder / "text.jsonl.xz", *options.format(folder).split()]
    assert refusal(capsys, ranking.main, *words).startswith(message.format(folder))
