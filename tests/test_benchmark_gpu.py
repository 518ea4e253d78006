"""The command for a lent GPU, as a dry run on the CPU: all parts, resumed, and never over its time."""

import json
from itertools import product

import pytest
from commands import refusal
from test_benchmark_generation import demo  # noqa: F401 (a fixture)

from calm_transformers.benchmarks import gpu
from calm_transformers.benchmarks.golden import HEAD_TYPES

# ruff: noqa: F811 (pytest hands the fixture over under its own name)

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
LAWS = [("calm-tiny", 1.0), ("calm-tiny", 0.5), ("transformer-tiny", 1.0)]


@pytest.fixture
def run(demo, monkeypatch):
    """Runs the command on tiny shapes, and returns what its file holds."""
    monkeypatch.setattr(gpu, "NUM_CANDIDATES", 8)
    small = ["--pairs", "calm-tiny:transformer-tiny", "--batch_size", "1", "2", "--prompt_length", "8"]
    small += ["--output_length", "8", "--repetitions", "1", "--block_size", "16", "--train_batch_size", "2"]
    words = [
        *small,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--backend",
        "aot_eager",
        "--json",
        str(demo / "gpu.json"),
    ]

    def call(*more):
        assert gpu.main([*words, *more]) == 0
        return json.loads((demo / "gpu.json").read_text())["parts"]

    call.words = words
    return call


@pytest.fixture
def stubs(monkeypatch):
    """Parts that take no time."""
    monkeypatch.setattr(gpu, "golden_rows", lambda device: [])
    monkeypatch.setattr(gpu, "demo_text", lambda *_: [])
    monkeypatch.setattr(gpu, "training_rows", lambda *_: [])
    row = {"mode": "eager", "temperature": 1.0, "batch_size": 1, "tokens_per_second": 5.0, "low": 4.0, "high": 6.0}
    monkeypatch.setattr(gpu, "generation_row", lambda _, shape, *__: {"shape": shape, **row})


@pytest.mark.slow
def test_a_dry_run_makes_every_part(run, capsys):
    parts = run()
    rows = [row for name, rows in parts.items() if name.startswith("generation") for row in rows]
    found = {(row["mode"], row["batch_size"], row["shape"], row["temperature"]) for row in rows}
    assert found == {(mode, size, *law) for mode in ("eager", "compiled") for size in (1, 2) for law in LAWS}
    assert len(rows) == 12 and all(row["low"] == row["tokens_per_second"] == row["high"] > 0 for row in rows)
    calm, llama = parts["training calm-tiny transformer-tiny"]
    (text,), goldens = parts["demo"], parts["goldens"]
    assert (calm["shape"], llama["shape"]) == ("calm-tiny", "transformer-tiny") and calm["mfu"] > 0
    assert text["text"].startswith(gpu.PROMPT)
    assert {(row["head"], row["dtype"]) for row in goldens} == set(product(HEAD_TYPES, TOLERANCES))
    assert all(0 <= row[name] <= TOLERANCES[row["dtype"]] for row in goldens for name in gpu.GOLDEN_OUTPUTS)
    printed = capsys.readouterr().out
    assert printed.count("\n| calm-tiny |") == 8 + 2 and "left out" not in printed


def test_what_the_time_does_not_allow_is_named_and_made_by_the_next_run(run, stubs, capsys, monkeypatch):
    assert not gpu.main([*run.words, "--minutes", "0"])
    left_out = capsys.readouterr().out.count("left out, as the time was over")
    assert left_out == 15
    assert len(run()) == 15 and "| calm-tiny | eager | 1 | 1 | 5 | 4 | 6 |" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "generation_row", lambda *_: pytest.fail("it was measured already"))
    assert len(run()) == 15


def test_a_part_that_fails_costs_no_other(run, stubs, capsys, monkeypatch):
    def fails(device):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(gpu, "golden_rows", fails)
    assert "goldens: RuntimeError: out of memory" in refusal(capsys, gpu.main, *run.words)
    monkeypatch.setattr(gpu, "golden_rows", lambda device: [])
    assert len(run()) == 15


def test_a_file_that_cannot_be_continued_is_left_alone(run, demo, capsys):
    (demo / "gpu.json").write_text("{}")
    assert "is no report of this command" in refusal(capsys, gpu.main, *run.words)
    assert (demo / "gpu.json").read_text() == "{}"


@pytest.mark.parametrize("pair", ["calm-tiny", "transformer-tiny:calm-tiny", "calm-tiny:calm-tiny"])
def test_a_pair_must_be_one(run, capsys, pair):
    assert "must be CALM:TRANSFORMER" in refusal(capsys, gpu.main, *run.words, "--pairs", pair)


def test_without_a_gpu_it_says_so(run, capsys):
    assert "finds no GPU" in refusal(capsys, gpu.main, *run.words, "--device", "cuda")
