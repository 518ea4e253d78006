"""The demo command: it continues a story, and refuses in one line what cannot be sampled."""

import pytest
from commands import ROOT, refusal
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from calm_transformers import generate as demo
from calm_transformers.training.tokenizer import save_tokenizer


@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperature", "3"], "temperature=3.0: sampling needs a temperature in (0, 2]"),
        (["--max_new_tokens", "many"], "argument --max_new_tokens: many: must be an integer of at least 1"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_the_model_is_loaded(capsys, monkeypatch, options, message):
    monkeypatch.setattr(demo, "pipeline", None)
    assert refusal(capsys, demo.main, ROOT, *options).startswith(message)


def test_what_the_model_cannot_do_is_refused(capsys):
    """Of too many positions upstream only warns, and the demo has silenced it."""
    stated = GenerationConfig.from_pretrained(ROOT).num_candidates
    error = refusal(capsys, demo.main, ROOT, "--temperature", "0.0005")
    assert error.startswith(f"num_candidates={stated} is too few for temperature=0.0005")
    error = refusal(capsys, demo.main, ROOT, "The cat sat", "--max_new_tokens", "1023")
    assert error.startswith("the prompt has 5 tokens and 1023 are to be written, but the model takes 1024 together")


def test_another_model_is_refused(capsys, tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    save_tokenizer(tiny_tokenizer(), tmp_path)
    assert refusal(capsys, demo.main, tmp_path) == f"{tmp_path} is no CALM."


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_tokenizer_that_is_none_is_named(capsys, tmp_path, content):
    tiny_model().save_pretrained(tmp_path)
    save_tokenizer(tiny_tokenizer(), tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    assert str(tmp_path) in refusal(capsys, demo.main, tmp_path)


def test_it_continues_the_prompt(capsys):
    assert demo.main([str(ROOT), "The cat sat", "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("The cat sat")
