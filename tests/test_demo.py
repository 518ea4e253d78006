"""The demo command: it continues a story, and refuses in one line what cannot be sampled."""

import json
from functools import partialmethod

import pytest
from commands import ROOT, refusal
from evaluation_folder import tiny_llama
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from calm_transformers import generate as demo
from calm_transformers.generate import main
from calm_transformers.loading import load_calm
from calm_transformers.serving.batcher import Batcher
from calm_transformers.training.tokenizer import save_tokenizer


def test_what_cannot_be_sampled_is_refused_before_the_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(demo, "load_calm", None)
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
    assert refusal(capsys, demo.main, tmp_path) == f"{tmp_path} is no CALM: its model_type is 'llama'."


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_tokenizer_that_is_none_is_named(capsys, tmp_path, content):
    tiny_model().save_pretrained(tmp_path)
    save_tokenizer(tiny_tokenizer(), tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    assert str(tmp_path) in refusal(capsys, demo.main, tmp_path)


def test_it_continues_the_prompt(capsys):
    assert demo.main([str(ROOT), "The cat sat", "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("The cat sat")


def test_prompts_of_a_file_are_continued_and_an_interrupted_run_writes_the_rest(tmp_path, capsys, monkeypatch):
    prompts = [f"{'Once ' * (i % 3)}upon a time {i}" for i in range(7)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    words = [ROOT, "--input", tmp_path / "in.jsonl", "--max_new_tokens", 8, "--max_rows", 2, "--seed", 5, "--output"]

    def run(name):
        assert not main([str(word) for word in (*words, tmp_path / name)])
        return (tmp_path / name).read_bytes()

    monkeypatch.setattr(Batcher, "__init__", partialmethod(Batcher.__init__, max_waiting=1))
    whole = run("whole")
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["prompt"] for line in lines] == prompts and [line["seed"] for line in lines] == list(range(5, 12))
    for length in (0, len(whole) // 2, len(whole) - 1, len(whole)):
        (tmp_path / "part").write_bytes(whole[:length])
        assert run("part") == whole
    with Batcher(*load_calm(str(ROOT), "cpu")) as batcher:
        result = batcher.submit(prompts[4], max_new_tokens=8, temperature=0.5, seed=9).result()
    assert (lines[4]["text"], lines[4]["finish_reason"]) == (result.text, result.finish_reason)
    (tmp_path / "other").write_text('{"prompt": "another"}\n')
    error = refusal(capsys, main, *words, tmp_path / "other")
    assert "holds other texts than of these prompts and this --seed" in error
    words[words.index("--seed") + 1] = 6
    assert "of these prompts and this --seed" in refusal(capsys, main, *words, tmp_path / "whole")
    assert "belong together" in refusal(capsys, main, *words[:-1])
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a" * 5000}))
    assert "prompt 1: the prompt has" in refusal(capsys, main, *words, tmp_path / "long")
