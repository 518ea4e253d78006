"""Tokenizers load without a question and without code from their folder, a CALM's too."""

import json
import re
from pathlib import Path

import pytest
import tokenizer_loads
from fresh_process import call
from training_helpers import RECIPES, train
from transformers import LlamaConfig

from calm.training.tokenizer import save_tokenizer, train_bpe

ROOT = Path(__file__).parents[1]
TEXT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def calm(workshop, tmp_path_factory):
    """A trained CALM whose code, were it run, would fail."""
    folder = tmp_path_factory.mktemp("calm")
    assert train("calm", **workshop, max_steps=1, eval_strategy="no", output_dir=str(folder)) == 0
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    (folder / "configuration_calm.py").write_text('raise RuntimeError("code of the folder ran")\n')
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """An ordinary model with a tokenizer of a class of its own."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig().save_pretrained(folder)
    save_tokenizer(train_bpe([TEXT * 9], 270), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    return folder


@pytest.mark.parametrize("kind", ["calm", "plain", "llama"])
def test_a_tokenizer_of_any_folder_loads_without_a_question(kind, workshop, calm, llama, tmp_path):
    folder = {"calm": calm, "plain": workshop["tokenizer"], "llama": llama}[kind]
    done = call(tokenizer_loads.load, tmp_path, folder=str(folder), text=TEXT)
    loaded = done.result
    assert done.complaints == []
    assert loaded["questions"] == []
    assert loaded["decoded"] == TEXT
    assert loaded["class"].startswith("GPT2Tokenizer") == (kind == "llama")


@pytest.mark.parametrize("field", ["tokenizer", "init_from", "autoencoder"])
def test_training_with_the_tokenizer_of_a_calm_asks_nothing(field, workshop, calm, tmp_path):
    fields = {"max_steps": 1, "eval_strategy": "no", "output_dir": tmp_path / "run"}
    fields |= {key: workshop[key] for key in ("train_files", "cache_dir")}
    kind = "ar" if field == "tokenizer" else "calm"
    where = calm
    if field == "autoencoder":  # the folder of an autoencoder, as a CALM's in that code lies there
        where = tmp_path / "autoencoder"
        where.mkdir()
        for file in Path(workshop["autoencoder"]).iterdir():
            if file.is_file():
                (where / file.name).write_bytes(file.read_bytes())
        settings = json.loads((where / "config.json").read_text())
        settings["auto_map"] = {"AutoConfig": "configuration_calm.CALMAutoencoderConfig"}
        (where / "config.json").write_text(json.dumps(settings))
        (where / "configuration_calm.py").write_text('raise RuntimeError("code of the folder ran")\n')
    fields[field] = where
    arguments = ["--recipe", str(RECIPES / f"{kind}.yaml")]
    arguments += [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
    done = call(tokenizer_loads.train, tmp_path / "home", arguments=[kind, *arguments])
    assert done.result == {"code": 0, "questions": []}, done.stderr


def test_a_tokenizer_that_is_code_itself_is_refused_in_a_sentence(workshop, tmp_path, capsys):
    folder = tmp_path / "custom"
    folder.mkdir()
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    fields = {key: workshop[key] for key in ("train_files", "cache_dir")}
    assert train("ar", **fields, tokenizer=str(folder), output_dir=str(tmp_path / "run")) == 2
    assert f"error: tokenizer {folder}: cannot be read: " in capsys.readouterr().err


def test_no_command_loads_a_tokenizer_in_another_way():
    ways = re.compile(r"(AutoTokenizer|PreTrainedTokenizer\w*)\.from_pretrained")
    files = [f for part in ("training", "evaluation", "benchmarks", "experiments") for f in (ROOT / part).glob("*.py")]
    assert [f.name for f in files if ways.search(f.read_text())] == ["tokenizer.py"]
