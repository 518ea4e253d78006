"""The trained tokenizer has any size and is reversible; tokenizers load without a prompt to trust code."""

import json
import shutil
from pathlib import Path

import pytest
from training_helpers import WORDS, train
from transformers import AutoTokenizer, LlamaConfig

from calm_transformers.loading import load_tokenizer
from calm_transformers.training.tokenizer import SPECIAL_TOKENS, filler_token_id, save_tokenizer, train_bpe

TEXTS = [" ".join(WORDS), "  two  spaces\n\n\tand tabs, 1234567 and ünïcödé 猫 🐈", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe(TEXTS * 3, vocab_size=290), folder)
    return AutoTokenizer.from_pretrained(folder)


def test_size_special_tokens_and_padding(tokenizer):
    assert len(tokenizer) == 290
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == list(SPECIAL_TOKENS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert filler_token_id(tokenizer) == 0
    batch = tokenizer(["a", TEXTS[0]], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0][0] == 3 and batch["attention_mask"][0][0] == 0  # on the left


@pytest.mark.parametrize("text", [*TEXTS, "never seen: żółw \x00 ﷽"])
def test_decoding_restores_any_text_after_one_bos(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1 and ids.count(1) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_vocabulary_too_small_or_too_large_for_the_text_raises():
    for size, why in ((259, "must be at least 260"), ("all", "must be at least 260"), (5000, "the text yields only")):
        with pytest.raises(ValueError, match=f"vocab_size={size!r}: {why}"):
            train_bpe(TEXTS, size)


@pytest.fixture
def no_prompt(monkeypatch):
    """transformers asks at the terminal before it runs code of a folder."""
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(prompt))


@pytest.mark.transformers
def test_a_tokenizer_with_model_code_or_of_another_class_loads_without_a_prompt(workshop, tmp_path, no_prompt):
    """Training with an autoencoder's tokenizer doesn't ask either."""
    autoencoder = Path(shutil.copytree(workshop["autoencoder"], tmp_path / "autoencoder"))
    config = json.loads((autoencoder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_calm.CALMAutoencoderConfig"}
    (autoencoder / "config.json").write_text(json.dumps(config))
    (autoencoder / "configuration_calm.py").write_text('raise RuntimeError("code of the folder ran")\n')
    llama = tmp_path / "llama"
    LlamaConfig().save_pretrained(llama)
    save_tokenizer(train_bpe(TEXTS * 9, 270), llama)
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    (llama / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    for folder in (autoencoder, llama):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.decode(tokenizer("the cat")["input_ids"], skip_special_tokens=True) == "the cat"
        assert type(tokenizer).__name__.startswith("GPT2Tokenizer") == (folder == llama)
    fields = {key: workshop[key] for key in ("train_files", "cache_dir")}
    own = {"autoencoder": str(autoencoder), "max_steps": 1, "output_dir": str(tmp_path / "run")}
    assert train("calm", **fields, **own) == 0


@pytest.mark.transformers
def test_a_tokenizer_with_custom_code_raises(workshop, tmp_path, capsys, no_prompt):
    folder = tmp_path / "custom"
    folder.mkdir()
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    fields = {key: workshop[key] for key in ("train_files", "cache_dir")}
    assert train("ar", **fields, tokenizer=str(folder), output_dir=str(tmp_path / "run")) == 2
    assert f"error: tokenizer {folder}: cannot be read: " in capsys.readouterr().err
