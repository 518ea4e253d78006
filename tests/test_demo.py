"""The demo command: it continues a story, and refuses in one line what cannot be sampled."""

import json
import re
import sys
from functools import partialmethod

import pytest
import torch
from commands import ROOT, refusal
from evaluation_folder import tiny_llama
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from calm_transformers import generate as demo
from calm_transformers.generate import main
from calm_transformers.loading import load_calm, load_tokenizer
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


def test_stdout_has_only_the_text_of_generate_and_stderr_its_patches(capsys):
    assert demo.main([str(ROOT), "The cat sat", "--max_new_tokens", "9", "--seed", "3"]) == 0
    printed = capsys.readouterr()
    model, tokenizer = load_calm(str(ROOT), "cpu")
    prompt = tokenizer("The cat sat", return_tensors="pt")
    torch.manual_seed(3)
    ids = model.generate(**prompt, do_sample=True, temperature=0.5, max_new_tokens=9)[0].tolist()
    new = ids[prompt["input_ids"].shape[1] :]
    assert printed.out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    _, title, patches, last = printed.err.splitlines()
    texts = tokenizer.batch_decode([new[i : i + 2] for i in range(0, 9, 2)])
    assert "patches of 2 tokens" in title and patches == "|".join(texts)
    assert re.fullmatch(rf"9 tokens in 5 patches · \d+ tokens/s · see more: calm app {re.escape(str(ROOT))}", last)


def test_patches_are_tinted_on_a_terminal_with_colours_and_special_tokens_are_legible(monkeypatch):
    tokenizer = load_tokenizer(ROOT)
    generated = tokenizer, tokenizer("Oh a\nb<|eos|>")["input_ids"], 4, 2
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    tinted, tints = demo.format_patches(*generated), [f"\x1b[38;5;16;48;5;{tint}m" for tint in demo.TINTS]
    assert tinted.endswith(f"\n{tints[0]} a↵\x1b[0m{tints[1]}b<|eos|>\x1b[0m\n4 tokens in 2 patches")
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert "\n a↵|b<|eos|>\n" in demo.format_patches(*generated)


def test_the_demo_model_is_found_from_any_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--demo", "The cat sat", "--max_new_tokens", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("The cat sat") and printed.err.endswith(f"see more: calm app {ROOT}\n")
    for words in (["--demo", ROOT], ["some/model", "a prompt", "--demo"]):
        assert "MODEL and --demo exclude each other" in refusal(capsys, demo.main, *words)
    assert "MODEL or --demo is required" in refusal(capsys, demo.main)
    monkeypatch.setattr(demo, "ROOT", tmp_path)  # as of an installed wheel
    error = refusal(capsys, demo.main, "--demo")
    assert error.startswith("--demo: the installed package holds no weights; run calm generate FOLDER with a clone")


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
