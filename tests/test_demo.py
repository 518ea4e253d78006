"""The demo command: it continues a story, and refuses in one line what cannot be sampled."""

import pytest
from commands import ROOT, refusal
from evaluation_folder import tiny_llama
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from calm_transformers import generate as demo
from calm_transformers.training.tokenizer import save_tokenizer


def test_what_cannot_be_sampled_is_refused_before_the_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(demo, "pipeline", None)
    error = refusal(capsys, demo.main, ROOT, "--temperature", "3")
    assert error.startswith("temperature=3.0: sampling needs a temperature in (0, 2]")


def test_what_the_model_cannot_do_is_refused(capsys):
    """Of too many positions upstream only warns, and the demo has silenced it."""
    stated = GenerationConfig.from_pretrained(ROOT).num_candidates
    error = refusal(capsys, demo.main, ROOT, "--temperature", "0.0005")
    assert error.startswith(f"num_candidates={stated} is too few for temperature=0.0005")
    error = refusal(capsys, demo.main, ROOT, "The cat sat", "--max_new_tokens", "1023")
    assert error.startswith("the prompt has 5 tokens and 1023 are to be written, but the model takes 1024 together")


def test_another_model_is_refused(capsys, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
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
