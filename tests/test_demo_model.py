"""The demo model made anew, in miniature: every phase runs, a run that was killed goes on, every file is written."""

import contextlib
import dataclasses
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import refusal
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from calm.configuration_calm import CALMConfig
from calm.training import demo_model
from calm.training.demo_model import FILES, UNFINISHED, WEIGHTS, main, phases, write

STEPS = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = ["".join(rng.choice(letters, size=rng.integers(2, 8))) for _ in range(600)]
    for part in ("train", "validation"):
        texts = (" ".join(rng.choice(words, size=30)) for _ in range(80))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"tinystories-{part}.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    return folder


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    """What a run left that was killed at the backbone's first checkpoint, and given again; and what that printed.

    Slow: the recipes are the real ones, and the killed process imports transformers anew.
    """
    folder = tmp_path_factory.mktemp("made")
    words = ["--corpus", corpus, "--runs", folder / "runs", "--output", folder / "output", "--max_steps", STEPS]
    words = [str(word) for word in words]
    run = [sys.executable, "-m", "calm.training.demo_model", *words]
    path = os.pathsep.join(filter(None, sys.path))
    with (folder / "log").open("w") as log:
        killed = subprocess.Popen(run, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path})
        try:
            deadline = time.monotonic() + 300
            while not (folder / "runs" / "demo-backbone" / "checkpoint-1" / "trainer_state.json").exists():
                assert killed.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.01)
        finally:
            killed.send_signal(signal.SIGKILL)
            killed.wait()
    assert not (folder / "output").exists()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(words) == 0
    return folder, words, printed.getvalue()


def test_a_killed_run_goes_on_where_it_was(made):
    _, _, printed = made
    assert printed.count("finished before") == 2  # tokenizer, autoencoder
    assert "resuming from checkpoint-1" in printed
    assert printed.splitlines()[-1].endswith(f"{', '.join(FILES)}")


def test_every_file_is_there_and_makes_a_model_that_writes(made):
    folder, _, _ = made
    output = folder / "output"
    assert set(FILES) <= {path.name for path in output.iterdir()}
    assert not list(output.glob(f"*{UNFINISHED}"))
    settings = GenerationConfig.from_pretrained(output)
    assert (settings.temperature, settings.num_candidates, settings.sampling_method) == (0.5, 200, "adaptive")
    config = CALMConfig.from_pretrained(output)
    assert (config.head_type, config.vocab_size) == ("token_chain", 1024)
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    ids = tokenizer("abc", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, num_candidates=4).shape[1] <= ids["input_ids"].shape[1] + 4
    trained = load_file(folder / "runs" / "demo" / WEIGHTS)
    written = load_file(output / WEIGHTS)
    assert all((trained[key] == written[key]).all() for key in trained)


def test_a_finished_run_does_nothing(made, capsys):
    folder, words, _ = made
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(words) == 0
    assert capsys.readouterr().out.count("finished before") == 4
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_what_another_recipe_trained_is_refused(made, capsys):
    _, words, _ = made
    error = refusal(capsys, main, *words[:-1], STEPS + 1)
    assert "demo-autoencoder was trained by another recipe than demo-autoencoder is now" in error


def test_a_dry_run_lists_the_phases_and_makes_nothing(corpus, tmp_path, capsys):
    assert main(["--corpus", str(corpus), "--runs", str(tmp_path / "runs"), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.endswith(": to do") for line in lines[:4])
    assert "train_calm --recipe demo-backbone" in lines[2] and "--init_from" in lines[3]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("max_steps", [0, -1])
def test_no_steps_are_refused(tmp_path, capsys, max_steps):
    error = refusal(capsys, main, "--corpus", tmp_path, "--runs", tmp_path / "runs", "--max_steps", max_steps)
    assert error.startswith(f"argument --max_steps: {max_steps}: must be a whole number of at least 1")


def test_a_failed_phase_ends_the_run(tmp_path, capsys):
    capsys.readouterr()
    assert main(["--corpus", str(tmp_path / "nowhere"), "--runs", str(tmp_path / "runs")]) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("1/4 python -m calm.training.train_tokenizer")
    assert printed.err.endswith("tinystories-train.jsonl.xz: no such file or folder.\n")
    assert printed.err.count("\n") == 1


def test_the_weights_come_last_and_each_file_whole(tmp_path, monkeypatch):
    model, output = tmp_path / "model", tmp_path / "output"
    model.mkdir()
    for name in FILES:
        (model / name).write_text(f"new {name}")
    output.mkdir()
    (output / WEIGHTS).write_text("old")
    monkeypatch.setattr(demo_model, "code_files", lambda: [])
    copy = demo_model.shutil.copyfile

    def full_disk(source, target):
        if source.name == WEIGHTS:
            target.write_text("half")
            raise OSError(28, "No space left on device", str(target))
        copy(source, target)

    monkeypatch.setattr(demo_model.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(model, output)
    assert (output / WEIGHTS).read_text() == "old"
    monkeypatch.setattr(demo_model.shutil, "copyfile", copy)
    assert write(model, output) == [WEIGHTS]
    assert all((output / name).read_text() == f"new {name}" for name in FILES)


def test_the_phases_by_hand_are_the_recipes_own(tmp_path):
    """With the default folder a phase says nothing that its recipe doesn't say, but for the text."""
    for phase in phases(tmp_path, demo_model.Path("runs")):
        recipe = phase.recipe()
        if recipe and recipe.kind != "tokenizer":
            stated = demo_model.load_recipe(recipe.name)
            data = dataclasses.replace(recipe.data, train_files=[], validation_files=[])
            assert (data, recipe.model, recipe.training) == (stated.data, stated.model, stated.training)
