"""Figures of the bundled weights in README and docs: each has its command and is as new as the weights."""

import re
import shlex
import sys

import pytest
from commands import COMMANDS, ROOT, main_of

main_of("docs.stale_figures")
stale_figures = sys.modules["docs.stale_figures"]
FIGURES = stale_figures.all_figures()


def text_of(document: str) -> str:
    """Returns a document as one line, without marks of code, quotations and line continuations."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return " ".join(re.sub(r"`|\\\n|^> ", " ", text, flags=re.MULTILINE).split())


@pytest.mark.parametrize("figures", FIGURES, ids=lambda figures: figures.what)
def test_the_document_contains_the_figures_and_a_valid_command(figures, capsys):
    text, words = text_of(figures.document), shlex.split(figures.command)
    assert [quote for quote in figures.quotes if " ".join(quote.split()) not in text] == []
    assert figures.quotes and figures.command in text
    (module,) = [name for name, prog in COMMANDS.items() if words[: len(prog.split())] == prog.split()]
    with pytest.raises(SystemExit):
        main_of(module)(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    is_training = module == "calm_transformers.training.train"  # --help doesn't list the fields of recipes
    fields = {"--recipe", "--dry_run", "--init_from"} if is_training else set()
    assert {word for word in words if word.startswith("--")} <= known | fields


def test_no_figure_is_older_than_the_weights():
    """If this fails, the bundled weights have changed: measure the listed figures again (docs/figures.yaml)."""
    assert stale_figures.stale(FIGURES, stale_figures.digits_of(stale_figures.WEIGHTS)) == []


def test_other_weights_make_every_figure_stale(monkeypatch, tmp_path, capsys):
    assert stale_figures.main([]) == 0
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(stale_figures, "WEIGHTS", tmp_path / "model.safetensors")
    capsys.readouterr()
    assert stale_figures.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FIGURES) and all(f.command in line for f, line in zip(FIGURES, lines, strict=True))
