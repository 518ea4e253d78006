"""`make speed`: parts are measured once, and the table inserted between its markers."""

import json
import re

import pytest
from commands import refusal

from calm_transformers.benchmarks import generation, speed

RESULTS = {
    **{"num_candidates": 200, "repetitions": 3, "ratio": 2.0, "draws": 200.0, "peak_over_weights": None},
    **{"tokens_per_second": 12.34, "tokens_per_second_range": [11.0, 13.0], "baseline_tokens_per_second": 6.17},
    **{f"{part}_ms": 2.0 for part in generation.PARTS},
    **{"step_ms": 10.0, "device_name": "a machine", "threads": 2, "torch": "2", "transformers": "5"},
    **{"date": "2026-12-01"},
}


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """Copies the page to a folder, and points the command at it."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/speed.md").write_text(speed.PAGE.read_text())
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    monkeypatch.setattr(speed, "PAGE", tmp_path / "docs/speed.md")
    return tmp_path


def args(documents):
    return ["--folder", str(documents / "parts")]


def test_an_interrupted_run_resumes_and_writes_table_and_plot(documents, monkeypatch):
    calls = []

    def benchmark(args):
        """Writes stub rows; is interrupted at the fourth part."""
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        options = generation.parse_options(args)
        (temperature,), (batch_size,), (shape,) = options.temperature, options.batch_size, options.shape
        settings = {"shape": shape, "temperature": temperature, "batch_size": batch_size, "dtype": options.dtype}
        rows = [{**RESULTS, **settings, "workload": w, "baseline": options.baseline} for w in options.workload]
        options.json.write_text(json.dumps(rows))

    monkeypatch.setattr(generation, "main", benchmark)
    page = documents / "docs/speed.md"
    before = page.read_text()
    assert speed.main(args(documents)) == 130
    assert page.read_text() == before and len(list((documents / "parts").iterdir())) == 3
    for _ in range(2):  # no part is measured twice
        assert speed.main(args(documents)) == 0 and len(calls) == 1 + len(speed.PARTS) == 23
    assert page.read_text().count("| 12.3 | 6.2 | 2.00 | 10.0 |") == 3 * 8 + 4
    markers = r"(?s)<!-- make speed -->.*<!-- until here -->"
    assert re.sub(markers, "", page.read_text()) == re.sub(markers, "", before)  # the rest is unchanged
    assert (documents / "docs/speed.png").read_bytes().startswith(b"\x89PNG")


def test_errors(documents, monkeypatch, capsys):
    monkeypatch.setattr(generation, "main", lambda args: 2)
    error = refusal(capsys, speed.main, *args(documents))
    assert "float32-fast-baseline-distilled-batch1 could not be measured" in error
    (documents / "text.md").write_text("no markers")
    with pytest.raises(ValueError, match="has no markers"):
        speed.replace_table(documents / "text.md", "table")
    assert (documents / "text.md").read_text() == "no markers"
