"""Loading a repository in a fresh, offline process through every Auto class and the pipeline, without a warning."""

import json

import fresh_process
import pytest
from model_copies import PROMPT, ROOT, assert_carries_its_code, load_every_way
from tiny import tiny_model, tiny_tokenizer

from calm.convert_checkpoint import convert

CLASSES = ["CALMConfig", "CALMModel", "CALMForCausalLM"]


def check_loads_every_way(folder, home):
    """Returns what `load_every_way` saw, and the folder of the copy that it saved."""
    copy = home / "copy"
    loaded = fresh_process.call(load_every_way, home, folder=str(folder), copy=str(copy))
    assert loaded.complaints == []
    assert loaded.result["classes"] == CLASSES
    assert loaded.result["text"].startswith(PROMPT) and loaded.result["snippet"].startswith(PROMPT)
    assert_carries_its_code(copy)
    return loaded.result, copy


def generation_settings(folder):
    settings = json.loads((folder / "generation_config.json").read_text())
    return {name: value for name, value in settings.items() if name != "transformers_version"}


@pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the root holds no trained model yet")
def test_the_root_loads(tmp_path):
    _, copy = check_loads_every_way(ROOT, tmp_path / "home")
    assert generation_settings(copy) == generation_settings(ROOT)


def test_a_saved_model_and_a_copy_of_its_copy_load_alike(tmp_path):
    saved = tmp_path / "saved"
    tiny_model().save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)
    assert_carries_its_code(saved)
    first, copy = check_loads_every_way(saved, tmp_path / "first")
    second, _ = check_loads_every_way(copy, tmp_path / "second")
    assert second == first


def test_a_converted_checkpoint_loads(tmp_path):
    published, tokenizer, converted = ROOT / "tests/fixtures/energy_k4", tmp_path / "tokenizer", tmp_path / "converted"
    tiny_tokenizer().save_pretrained(tokenizer)
    convert(str(published / "calm"), str(published / "autoencoder"), converted, str(tokenizer))
    assert_carries_its_code(converted)
    _, copy = check_loads_every_way(converted, tmp_path / "home")
    assert generation_settings(copy) == generation_settings(converted)


def test_a_complaint_about_our_model_would_be_seen():
    stderr = (
        "Loading weights: 100%|#####| 21/21 [00:00<00:00, 18744.50it/s]\n"
        "Some weights of CALMForCausalLM were not initialized from the model checkpoint\n"
        "Device set to use cpu\n"
    )
    [complaint] = fresh_process.FreshCall(None, stderr).complaints
    assert complaint.startswith("Some weights of CALMForCausalLM")
