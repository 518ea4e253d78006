"""The demo model in miniature: every phase runs, an interrupted run resumes, every file is written."""

import json
import lzma
import random

import pytest
from commands import refusal
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from calm_transformers.model.configuration_calm import CALMConfig
from calm_transformers.training import demo_model, trainer
from calm_transformers.training.demo_model import FILES, WEIGHTS, main, phases, write
from calm_transformers.training.recipe import load_recipe, parse_command_line

STEPS = 2


@pytest.fixture
def corpus(tmp_path):
    folder, rng = tmp_path / "corpus", random.Random(0)
    folder.mkdir()
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(600)]
    for part in ("train", "validation"):
        lines = "".join(json.dumps({"text": " ".join(rng.choices(words, k=30))}) + "\n" for _ in range(80))
        (folder / f"tinystories-{part}.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    return folder


@pytest.mark.slow
def test_an_interrupted_run_resumes_and_writes_a_model_that_generates(corpus, tmp_path, monkeypatch, capsys):
    """Interrupted at the backbone's first checkpoint; test_training_resume.py kills runs at other moments."""
    args = ["--corpus", corpus, "--runs", tmp_path / "runs", "--output", tmp_path / "output", "--max_steps", STEPS]
    save = trainer.CALMTrainer._save_checkpoint

    def interrupted(self, *args):
        save(self, *args)
        if "demo-backbone" in self.args.output_dir:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer.CALMTrainer, "_save_checkpoint", interrupted)
        assert main([str(arg) for arg in args]) == 130
    assert not (tmp_path / "output").exists()
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 0
    printed = capsys.readouterr().out
    assert "train tokenizer" not in printed and "resuming from checkpoint-1" in printed
    output = tmp_path / "output"
    settings, config = GenerationConfig.from_pretrained(output), CALMConfig.from_pretrained(output)
    assert (settings.temperature, settings.num_candidates, settings.sampling_method) == (0.5, 200, "auto")
    assert (config.head_type, config.vocab_size) == ("token_chain", 1024)
    ids = AutoTokenizer.from_pretrained(output)("abc", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert model.generate(**ids, max_new_tokens=4, num_candidates=4).shape[1] <= ids["input_ids"].shape[1] + 4
    trained, written = load_file(tmp_path / "runs" / "demo" / WEIGHTS), load_file(output / WEIGHTS)
    assert all((trained[key] == written[key]).all() for key in trained)
    assert main([str(arg) for arg in args]) == 0  # finished phases change nothing
    assert all((value == written[key]).all() for key, value in load_file(output / WEIGHTS).items())


def test_zero_steps_raise_and_a_failed_phase_ends_the_run(tmp_path, capsys):
    args = ["--corpus", tmp_path / "nowhere", "--runs", tmp_path / "runs"]
    error = refusal(capsys, main, *args, "--max_steps", "0")
    assert error.startswith("argument --max_steps: 0: must be an integer of at least 1")
    assert refusal(capsys, main, *args).endswith("tinystories-train.jsonl.xz: no such file or folder.")


def test_the_weights_are_copied_last_and_each_file_atomically(tmp_path, monkeypatch):
    model, output = tmp_path / "model", tmp_path / "output"
    for folder, content in ((model, "new"), (output, "old")):
        folder.mkdir()
        for name in (*FILES, "modeling_calm.py"):
            (folder / name).write_text(f"{content} {name}")
    copy = demo_model.shutil.copyfile

    def full_disk(source, target):
        if source.name == WEIGHTS:
            target.write_text("half")
            raise OSError(28, "No space left on device", str(target))
        copy(source, target)

    monkeypatch.setattr(demo_model.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(model, output)
    assert (output / WEIGHTS).read_text() == f"old {WEIGHTS}" and (output / FILES[0]).read_text() == f"new {FILES[0]}"
    monkeypatch.setattr(demo_model.shutil, "copyfile", copy)
    write(model, output)
    assert all((output / name).read_text() == f"new {name}" for name in (*FILES, "modeling_calm.py"))


def test_the_phases_change_only_paths_of_their_recipes(tmp_path):
    """With the default folder a phase sets only its recipe's values, except for the text."""
    for kind, _, name, *args in phases(tmp_path, demo_model.Path("runs")):
        recipe, base = load_recipe(name, parse_command_line(args)), load_recipe(name)
        assert (recipe.kind, recipe.model, recipe.output_dir) == (kind, base.model, base.output_dir)
        assert {**recipe.training, "output_dir": ""} == {**base.training, "output_dir": ""}
