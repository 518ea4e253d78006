"""Checkpoints and model are copied to a URL while training; a copy that was cut short is known as incomplete."""

import filecmp
import shutil
import threading
import time

import pytest
from commands import refusal
from fsspec.implementations.local import LocalFileSystem
from training_helpers import RECIPES, train
from transformers import AutoModelForCausalLM

from calm_transformers.training.train import main
from calm_transformers.training.trainer import find_damage
from calm_transformers.training.upload import Upload


@pytest.fixture
def fields(workshop, tmp_path):
    own = {"output_dir": tmp_path / "run", "upload_to": f"file://{tmp_path}/copy", "eval_strategy": "no"}
    return {**workshop, **own, "max_steps": 4, "save_steps": 2}


@pytest.mark.parametrize("seconds", [0, 0.1])
def test_checkpoints_and_model_are_copied_and_another_machine_resumes(fields, tmp_path, monkeypatch, capsys, seconds):
    put = LocalFileSystem.put_file
    monkeypatch.setattr(LocalFileSystem, "put_file", lambda *args: (time.sleep(seconds), put(*args)))
    assert train("calm", **fields, save_total_limit=1) == 0
    run, copy = tmp_path / "run", tmp_path / "copy"
    files = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    assert {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()} >= files
    _, *differing = filecmp.cmpfiles(run, copy, files, shallow=False)
    assert differing == [[], []] and find_damage(copy / "checkpoint-4") is None
    AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
    shutil.rmtree(run)
    (run / "checkpoint-4").mkdir(parents=True)  # never finished
    assert train("calm", **fields | {"max_steps": 6}, resume="never") == 2
    assert train("calm", **fields | {"max_steps": 6, "learning_rate": 9}) == 2
    assert "copy holds checkpoints of another training (learning_rate" in capsys.readouterr().err
    assert train("calm", **fields | {"max_steps": 6}) == 0
    assert "restoring checkpoint-4" in (printed := capsys.readouterr().out) and "resuming from checkpoint-4" in printed
    assert find_damage(copy / "checkpoint-6") is None and (copy / "trainer_state.json").exists()
    assert not list(run.glob("_upload-*"))


def test_a_url_with_another_training_is_refused_and_left_as_it_is(fields, tmp_path, capsys):
    assert train("calm", **fields) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    for step in (2, 4):  # only the finished model is left
        shutil.rmtree(tmp_path / "copy" / f"checkpoint-{step}")
    assert train("calm", **fields | {"output_dir": tmp_path / "other", "seed": 9}) == 2
    assert "copy holds checkpoints of another training (seed 42 -> 9)" in capsys.readouterr().err
    left = [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    assert (tmp_path / "copy" / "trainer_state.json") in left and all(
        files[path] == path.read_bytes() for path in left
    )


def test_a_url_does_not_look_complete_while_its_model_is_trained_again(saved):
    (saved / "recipe.yaml").write_text("kind: calm")
    (saved / "copy").mkdir()
    (saved / "copy" / "trainer_state.json").write_text("of an earlier model")
    Upload(str(saved / "copy")).begin(saved / "recipe.yaml")
    assert [path.name for path in (saved / "copy").iterdir()] == ["recipe.yaml"]


def fail_at(monkeypatch, is_failing) -> None:
    put = LocalFileSystem.put_file

    def put_file(self, source, target, **kwargs):
        if is_failing(target):
            raise OSError("no space left")
        put(self, source, target, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)


def test_a_failed_copy_of_a_checkpoint_is_incomplete_and_reported(fields, tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, lambda target: target.endswith("checkpoint-2/optimizer.pt"))
    assert train("calm", **fields) == 0
    assert "checkpoint-2 was not uploaded to file://" in capsys.readouterr().out
    damage = [find_damage(tmp_path / "copy" / f"checkpoint-{step}") for step in (2, 4)]
    assert damage == ["was not finished", None]


def test_a_model_that_cannot_be_copied_is_an_error(fields, monkeypatch, capsys):
    fail_at(monkeypatch, lambda target: target.endswith("copy/model.safetensors"))
    words = [word for name, value in fields.items() for word in (f"--{name}", value)]
    error = refusal(capsys, main, "calm", "--recipe", RECIPES / "calm.yaml", *words)
    assert error.startswith("the model is in ") and error.endswith("no space left")


@pytest.mark.parametrize("url", ["nowhere://bucket/run", "/dev/null/run"])
def test_a_url_that_cannot_be_written_is_refused_before_training(fields, url, capsys):
    words = [word for name, value in (fields | {"upload_to": url}).items() for word in (f"--{name}", value)]
    assert f"upload_to {url}: cannot be written" in refusal(
        capsys, main, "calm", "--recipe", RECIPES / "calm.yaml", *words
    )


@pytest.fixture
def saved(tmp_path):
    """A folder with three saved checkpoints."""
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("trainer_state.json", "weights"):
            (folder / name).write_text(f"{name} {step}")
    return tmp_path


def test_of_waiting_checkpoints_only_the_newest_is_copied(saved, monkeypatch):
    upload = Upload(str(saved / "copy"))
    started, resumed = threading.Event(), threading.Event()
    put = LocalFileSystem.put_file
    monkeypatch.setattr(LocalFileSystem, "put_file", lambda *args: (started.set(), resumed.wait(), put(*args)))
    copies = [upload.start(saved / "checkpoint-1")]
    started.wait()
    copies += [upload.start(saved / f"checkpoint-{step}") for step in (2, 3)]
    resumed.set()
    assert [copy.result() for copy in copies] == [None] * 3
    assert sorted(path.name for path in (saved / "copy").iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_a_second_copy_that_fails_leaves_no_complete_one(saved, monkeypatch):
    upload = Upload(str(saved / "copy"))
    assert upload.start(saved / "checkpoint-1").result() is None
    fail_at(monkeypatch, lambda target: target.endswith("weights"))
    assert str(upload.start(saved / "checkpoint-1").result()) == "no space left"
    assert not (saved / "copy" / "checkpoint-1" / "trainer_state.json").exists()
