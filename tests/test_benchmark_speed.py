"""`make speed`: parts are measured once, and tables inserted between their markers."""

import json
import re

import pytest
from commands import ROOT, refusal

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
    """Copies the documents to a folder, and points the command at them."""
    (tmp_path / "docs").mkdir()
    for name in ("docs/guide.md", "docs/speed.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    monkeypatch.setattr(speed, "GUIDE", tmp_path / "docs/guide.md")
    monkeypatch.setattr(speed, "SPEED", tmp_path / "docs/speed.md")
    return tmp_path


def args(documents):
    return ["--folder", str(documents / "parts")]


def test_an_interrupted_run_resumes_and_writes_tables_and_plot(documents, monkeypatch):
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
    before = (documents / "docs/guide.md").read_text()
    assert speed.main(args(documents)) == 130
    assert (documents / "docs/guide.md").read_text() == before and len(list((documents / "parts").iterdir())) == 3
    for _ in range(2):  # no part is measured twice
        assert speed.main(args(documents)) == 0 and len(calls) == 1 + len(speed.PARTS) == 23
    guide, details = ((documents / name).read_text() for name in ("docs/guide.md", "docs/speed.md"))
    assert guide.count("| 12.3 (11.0 – 13.0) | 6.2 | **2.00** | 2.00 | 2.00 | 2, 2, 2, 2 | 200 | – |") == 8
    assert details.count("| 12.3 | 6.2 | 2.00 | 10.0 |") == 3 * 8 + 4
    markers = r"(?s)<!-- make speed -->.*<!-- until here -->"
    for name, text in (("docs/guide.md", guide), ("docs/speed.md", details)):  # the rest is unchanged
        assert re.sub(markers, "", text) == re.sub(markers, "", (ROOT / name).read_text())
    assert (documents / "docs/speed.png").read_bytes().startswith(b"\x89PNG")


def test_errors(documents, monkeypatch, capsys):
    monkeypatch.setattr(generation, "main", lambda args: 2)
    error = refusal(capsys, speed.main, *args(documents))
    assert "float32-fast-baseline-distilled-batch1 could not be measured" in error
    (documents / "text.md").write_text("no markers")
    with pytest.raises(ValueError, match="has no markers"):
        speed.replace_table(documents / "text.md", "table")
    assert (documents / "text.md").read_text() == "no markers"
