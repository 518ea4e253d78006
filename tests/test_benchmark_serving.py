"""The benchmark of servers: its arithmetic by hand, and a run of it over tiny models."""

import importlib.util
import json

import commands
import pytest
from server_process import save_tiny_model
from tiny import VOCAB_SIZE, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from calm_transformers.benchmarks import serving
from calm_transformers.benchmarks.serving import Round, as_table, line_of


def test_lines_by_hand():
    rounds = [Round(100, 10, [0.1, 0.3]), Round(300, 10, [0.2, 0.4]), Round(200, 10, [0.2, 0.2])]
    line = line_of("a", 2, rounds)
    assert [line[name] for name in ("tokens_per_second", "least", "most", "first_token_p50")] == [20, 10, 30, 0.2]
    assert line["first_token_p99"] == pytest.approx(0.4 - 0.05 * 0.1)
    lines = [line_of("a", 1, [Round(50, 10, [0.1])]), line, line_of("b", 2, rounds)]
    table = as_table(lines).splitlines()[2:]
    assert table[0] == "| a | 1 | 5.0 (5.0 – 5.0) | 1.00 | 100, 100 |"
    assert table[1] == "| a | 2 | 20.0 (10.0 – 30.0) | 4.00 | 200, 395 |"
    assert table[2].startswith("| b | 2 |") and " – |" in table[2]


@pytest.fixture
def llama_folder(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, eos_token_id=None, **sizes))
    model.generation_config.update(do_sample=True)
    model.save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def run(tmp_path, *options):
    save_tiny_model(tmp_path / "calm")
    figures = tmp_path / "figures.json"
    small = ["--clients", "1", "3", "--requests", "2", "--max_tokens", "10", "--repetitions", "2"]
    assert serving.main(["--model", str(tmp_path / "calm"), *small, "--json", str(figures), *options]) == 0
    return json.loads(figures.read_text())


@pytest.mark.slow
def test_a_run(tmp_path, capsys):
    lines = run(tmp_path)
    assert [line["clients"] for line in lines] == [1, 3]
    assert all(line["tokens_per_second"] > 0 and line["first_token_p99"] > 0 for line in lines)
    assert capsys.readouterr().out.count("calm_transformers.serving.serve") == 2


@pytest.mark.slow
def test_a_run_beside_upstreams_server(tmp_path, llama_folder):
    lines = run(tmp_path, "--baseline", str(llama_folder), "--no_upstream_batching")
    assert [line["server"].partition(":")[0] for line in lines] == [
        "calm_transformers.serving.serve",
        "transformers serve",
    ] * 2


def test_a_round_of_clients(monkeypatch):
    """Each client asks for its texts by seeds of its own."""
    seeds = []
    monkeypatch.setattr(serving, "stream_text", lambda *words: (seeds.append(words[-1]) or 10, 0.5))
    found = serving.run_round(None, clients=3, requests=2, max_tokens=10, temperature=0.5)
    assert (found.tokens, found.first_token_seconds) == (60, [0.5] * 6) and len(set(seeds)) == 6


def test_what_is_missing_is_named_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "`transformers serve` needs fastapi" in commands.refusal(
        capsys, serving.main, "--baseline", "transformer-s"
    )
