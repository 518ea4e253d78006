"""The GPU benchmark as a dry run on the CPU: all parts, resuming, and the time limit."""

import json
from itertools import product

import pytest
from commands import refusal

from calm_transformers.benchmarks import gpu, workloads
from calm_transformers.benchmarks.golden import HEAD_TYPES

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
CASES = [("calm-tiny", 1.0), ("calm-tiny", 0.5), ("transformer-tiny", 1.0)]
SMALL = """--pairs calm-tiny:transformer-tiny --batch_size 1 2 --prompt_length 8 --output_length 8 --repetitions 1
--block_size 16 --train_batch_size 2 --device cpu --dtype float32 --backend aot_eager"""


@pytest.fixture
def args(demo, monkeypatch):
    monkeypatch.setattr(gpu, "NUM_CANDIDATES", 8)
    monkeypatch.setattr(workloads, "DEMO_FOLDER", gpu.DEMO_FOLDER)
    return [*SMALL.split(), "--json", str(demo / "gpu.json")]


def run(args):
    assert gpu.main(args) == 0
    with open(args[-1]) as file:
        return json.load(file)["parts"]


@pytest.fixture
def stubs(monkeypatch):
    monkeypatch.setattr(gpu, "golden_rows", lambda device: [])
    monkeypatch.setattr(gpu, "demo_rows", lambda *_: [])
    monkeypatch.setattr(gpu, "training_rows", lambda *_: [])
    row = {"mode": "eager", "temperature": 1.0, "batch_size": 1, "tokens_per_second": 5.0, "low": 4.0, "high": 6.0}
    monkeypatch.setattr(gpu, "generation_row", lambda _, shape, *__, compiled: {"shape": shape, **row})


@pytest.mark.slow
def test_a_dry_run_measures_every_part(args, capsys):
    parts = run(args)
    rows = [row for name, rows in parts.items() if name.startswith("generation") for row in rows]
    found = {(row["mode"], row["batch_size"], row["shape"], row["temperature"]) for row in rows}
    assert found == {(mode, size, *case) for mode in ("eager", "compiled") for size in (1, 2) for case in CASES}
    assert len(rows) == 12 and all(row["low"] == row["tokens_per_second"] == row["high"] > 0 for row in rows)
    calm, llama = parts["training calm-tiny transformer-tiny"]
    (text,), goldens = parts["demo"], parts["goldens"]
    assert (calm["recipe"], llama["recipe"]) == ("calm-tiny", "transformer-tiny")
    assert calm["tokens_per_second"] > 0 and llama["tokens_per_second"] > 0
    assert text["text"].startswith(gpu.PROMPT)
    assert {(row["head"], row["dtype"]) for row in goldens} == set(product(HEAD_TYPES, TOLERANCES))
    assert all(0 <= row[name] <= TOLERANCES[row["dtype"]] for row in goldens for name in gpu.GOLDEN_OUTPUTS)
    printed = capsys.readouterr().out
    assert printed.count("\n| calm-tiny |") == 8 + 1 and "skipped" not in printed


def test_skipped_and_failed_parts_are_listed_and_measured_by_the_next_run(args, stubs, capsys, monkeypatch):
    assert not gpu.main(["--minutes", "0", *args])
    assert capsys.readouterr().out.count("skipped, out of time") == 15

    def fail(device):
        raise RuntimeError("out of\nmemory")

    with monkeypatch.context() as failing:
        failing.setattr(gpu, "golden_rows", fail)
        assert "goldens: RuntimeError: out of memory" in refusal(capsys, gpu.main, *args)
    monkeypatch.setattr(gpu, "generation_row", lambda *_, **__: pytest.fail("measured again"))
    assert len(run(args)) == 15
    assert "| calm-tiny | eager | 1 | 1 | 5 | 4 | 6 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--pairs", "calm-tiny"], "must be CALM:TRANSFORMER"),
        (["--pairs", "calm-tiny:calm-tiny"], "must be CALM:TRANSFORMER"),
        (["--device", "cuda"], "finds no GPU"),
        ([], "is not a report of this command"),
    ],
)
def test_invalid_options_keep_the_file(args, demo, capsys, more, message):
    (demo / "gpu.json").write_text("{}")
    assert message in refusal(capsys, gpu.main, *args, *more)
    assert (demo / "gpu.json").read_text() == "{}"
