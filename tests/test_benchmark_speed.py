"""`make speed`: parts that are measured once, and tables that come to stand between their marks."""

import json
import re

import pytest
from commands import refusal
from model_copies import ROOT

from calm_transformers.benchmarks import generation, speed


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """Copies of the documents, a folder for the parts, and a benchmark that takes no time."""
    (tmp_path / "docs").mkdir()
    for name in ("docs/guide.md", "docs/speed.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    monkeypatch.setattr(speed, "GUIDE", tmp_path / "docs/guide.md")
    monkeypatch.setattr(speed, "SPEED", tmp_path / "docs" / "speed.md")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def fake_rows(words):
    options = generation.parse_options(words)
    assert len(options.temperature) == len(options.batch_size) == 1
    for workload in options.workload:
        yield {
            **{"shape": options.shape[0], "workload": workload, "temperature": options.temperature[0]},
            **{"batch_size": options.batch_size[0], "dtype": options.dtype, "num_candidates": 200, "repetitions": 3},
            **{
                "tokens_per_second": 12.34,
                "tokens_per_second_range": [11.0, 13.0],
                "baseline_tokens_per_second": 6.17,
            },
            **{"ratio": 2.0, "draws": 200.0, "peak_over_weights": None, "step_ms": 10.0, "device_name": "a machine"},
            **{f"{part}_ms": 2.0 for part in ("backbone", "head", "decode", "selection", "other")},
            **{"baseline": options.baseline, "threads": 2, "torch": "2", "transformers": "5", "date": "2026-12-01"},
        }


def run(documents):
    return speed.main(["--demo", str(documents), "--folder", str(documents / "parts")])


def test_tables_and_picture(documents, monkeypatch):
    calls = []

    def benchmark(words):
        calls.append(words)
        generation.parse_options(words).json.write_text(json.dumps(list(fake_rows(words))))
        return 0

    monkeypatch.setattr(generation, "main", benchmark)
    assert run(documents) == 0 and len(calls) == len(speed.PARTS) == 16
    assert run(documents) == 0 and len(calls) == 16  # nothing is measured twice
    readme, details = ((documents / name).read_text() for name in ("docs/guide.md", "docs/speed.md"))
    assert readme.count("| 12.3 (11.0 – 13.0) | 6.2 | **2.00** | 2.00 | 2.00 | 2, 2, 2, 2 | 200 | – |") == 8
    assert details.count("| 12.3 | 6.2 | 2.00 | 10.0 |") == 3 * 8 + 4
    for name, text in (("docs/guide.md", readme), ("docs/speed.md", details)):  # the rest stays
        mark = r"(?s)<!-- make speed -->.*<!-- until here -->"
        assert re.sub(mark, "", text) == re.sub(mark, "", (ROOT / name).read_text())
    assert (documents / "docs" / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_cut_short_goes_on(documents, monkeypatch):
    done = []

    def benchmark(words):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(words)
        generation.parse_options(words).json.write_text(json.dumps(list(fake_rows(words))))
        return 0

    monkeypatch.setattr(generation, "main", benchmark)
    before = (documents / "docs/guide.md").read_text()
    assert run(documents) == 130
    assert (documents / "docs/guide.md").read_text() == before
    assert len(list((documents / "parts").glob("*.json"))) == 3


def test_a_benchmark_that_refuses_ends_it(documents, monkeypatch, capsys):
    monkeypatch.setattr(generation, "main", lambda words: 2)
    words = ["--demo", str(documents), "--folder", str(documents / "parts")]
    assert "float32-T0.5-batch1 could not be measured" in refusal(capsys, speed.main, *words)


def test_a_document_without_marks_is_left_as_it_is(tmp_path):
    (tmp_path / "text.md").write_text("no marks")
    with pytest.raises(ValueError, match="between which the table goes"):
        speed.put(tmp_path / "text.md", "table")
    assert (tmp_path / "text.md").read_text() == "no marks"
