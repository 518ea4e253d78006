"""The serving benchmark: its statistics by hand, and a run with tiny models."""

import importlib.util
import json

import commands
import pytest

from calm_transformers.benchmarks import serving
from calm_transformers.benchmarks.serving import Round, as_table, summarise_rounds

OURS, UPSTREAM = "calm serve", "transformers serve"


def test_lines_by_hand():
    rounds = [Round(100, 10, [0.1, 0.3]), Round(300, 10, [0.2, 0.4]), Round(200, 10, [0.2, 0.2])]
    line = summarise_rounds("a", 0.5, 2, rounds)
    assert [line[name] for name in ("tokens_per_second", "least", "most", "first_token_p50")] == [20, 10, 30, 0.2]
    assert line["first_token_p99"] == pytest.approx(0.4 - 0.05 * 0.1)
    single = summarise_rounds("a", 0.5, 1, [Round(50, 10, [0.1])])
    table = as_table([single, line, summarise_rounds("b", 0.5, 2, rounds)]).splitlines()[2:]
    assert table[0] == "| a | 0.5 | 1 | 5.0 (5.0 – 5.0) | 1.00 | 100, 100 |"
    assert table[1] == "| a | 0.5 | 2 | 20.0 (10.0 – 30.0) | 4.00 | 200, 395 |"
    assert table[2].startswith("| b | 0.5 | 2 |") and " – |" in table[2]


@pytest.mark.slow
def test_a_run_with_transformers_serve(folder, tiny_folder, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    small = ["--clients", "1", "3", "--requests", "2", "--max_tokens", "10", "--repetitions", "2"]
    baseline = ["--baseline", str(folder / "ar"), "--temperature", "1", "0.5"]
    assert serving.main(["--model", str(tiny_folder), *small, "--json", str(figures), *baseline]) == 0
    lines = json.loads(figures.read_text())
    found = [(line["temperature"], line["clients"], line["server"].partition(":")[0]) for line in lines]
    assert found == [(t, clients, name) for t in (1, 0.5) for clients in (1, 3) for name in (OURS, UPSTREAM)]
    assert all(line["tokens_per_second"] > 0 and line["first_token_p99"] > 0 for line in lines)
    assert capsys.readouterr().out.count(OURS) == 4


def test_each_request_of_a_round_has_its_own_seed(monkeypatch):
    seeds = []
    monkeypatch.setattr(serving, "stream_text", lambda *words: (seeds.append(words[-1]) or 10, 0.5))
    found = serving.run_round(None, clients=3, requests=2, max_tokens=10, temperature=0.5)
    assert (found.tokens, found.first_token_seconds) == (60, [0.5] * 6) and len(set(seeds)) == 6


def test_missing_packages_are_an_error_before_the_run(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = commands.refusal(capsys, serving.main, "--baseline", "transformer-s")
    assert "`transformers serve` needs fastapi" in error


def test_a_recipe_is_saved_with_a_head_distilled_for_the_temperature(capsys):
    error = commands.refusal(capsys, serving.main, "--model", "calm-m:distilled", "--temperature", "1")
    assert ":distilled needs a --temperature between 0 and 1, not 1." in error
