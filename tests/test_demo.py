"""The demo command: it continues a story, and refuses in one line what cannot be sampled."""

import pytest
from commands import refusal
from transformers import GenerationConfig

from calm import demo


@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperature", "3"], "temperature=3.0: sampling needs a temperature in (0, 2]"),
        (["--temperature", "0"], "temperature=0.0: sampling needs a temperature in (0, 2]"),
        (["--max_new_tokens", "0"], "argument --max_new_tokens: 0: must be a whole number of at least 1"),
        (["--max_new_tokens", "-3"], "argument --max_new_tokens: -3: must be a whole number of at least 1"),
        (["--max_new_tokens", "many"], "argument --max_new_tokens: many: must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_the_model_is_loaded(capsys, monkeypatch, options, message):
    monkeypatch.setattr(demo, "pipeline", None)
    assert refusal(capsys, demo.main, *options).startswith(message)


def test_a_temperature_that_the_model_s_candidates_are_too_few_for_is_refused(capsys):
    error = refusal(capsys, demo.main, "--temperature", "0.0005")
    stated = GenerationConfig.from_pretrained(demo.MODEL).num_candidates
    assert error.startswith(f"num_candidates={stated} is too few for temperature=0.0005")


def test_it_continues_the_prompt(capsys):
    assert demo.main(["The cat sat", "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("The cat sat")
