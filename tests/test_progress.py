"""Long commands show progress bars if stderr is a terminal, and none in a pipe."""

import io
import re
import sys
from importlib import import_module

import pytest
from evaluation_folder import evaluations
from training_helpers import train, write_corpus
from transformers.utils import logging

from calm_transformers.progress import print_above_bars, progress_bar

BARS = {
    "autoencoder_report": {"Loading weights", "Decoding"},
    "brier_lm": {"Loading weights", "BrierLM"},
    "invented_words": {"Loading weights", "Reading", "Generating"},
}


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def completed(self) -> set[str]:
        """Returns the descriptions of the bars that reached 100 %, with a rate."""
        return set(re.findall(r"([^\r\n]*?): +100%\|[^|]*\| .*?<00:00, .*?/", self.getvalue()))


def on_terminal(monkeypatch) -> Terminal:
    logging.enable_progress_bar()  # as in a new process
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


@pytest.mark.parametrize("name", BARS)
def test_an_evaluation_shows_bars_only_on_a_terminal(folder, monkeypatch, capsys, name):
    main = import_module(f"calm_transformers.evaluation.{name}").main
    terminal = on_terminal(monkeypatch)
    assert main(evaluations(folder)[name]) == 0
    assert terminal.completed() >= BARS[name]
    monkeypatch.undo()
    printed = capsys.readouterr().out
    assert main(evaluations(folder)[name]) == 0
    assert capsys.readouterr() == (printed, "")


def test_training_shows_its_steps_and_an_error_on_its_own_line(tmp_path, monkeypatch):
    terminal = on_terminal(monkeypatch)
    corpus, tokenizer = str(write_corpus(tmp_path / "corpus.jsonl")), str(tmp_path / "tokenizer")
    assert train("tokenizer", train_files=corpus, output_dir=tokenizer) == 0
    fields = {"train_files": corpus, "tokenizer": tokenizer, "cache_dir": str(tmp_path / "tokens")}
    fields |= {"eval_strategy": "no", "max_steps": 2}
    assert train("ar", **fields, output_dir=str(tmp_path / "run")) == 0
    done = terminal.completed()
    assert {"Reading text for BPE", "Tokenising, train"} <= done and "2/2 [00:00<00:00" in terminal.getvalue()
    wild = {"learning_rate": 1e30, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    assert train("ar", **fields, **wild, output_dir=str(tmp_path / "wild")) == 2
    assert re.search(r"\]\s*\nerror: step ", terminal.getvalue())


def test_a_line_is_printed_above_the_bar_of_the_first_process(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress_bar(None, "Working", "piece", 10, initial=9) as bar:
        print_above_bars("a line", file=sys.stderr)
        bar.update()
    assert "9/10 [00:00<?" in terminal.getvalue() and "\ra line\n" in terminal.getvalue()
    shown = terminal.getvalue()
    monkeypatch.setenv("RANK", "1")
    assert list(progress_bar(range(3), "Working", "piece")) == [0, 1, 2] and terminal.getvalue() == shown
