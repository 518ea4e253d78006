"""Loading a repository in a fresh, offline process through every Auto class and the pipeline, without a warning."""

import fresh_process
import pytest
from model_copies import PROMPT, ROOT, assert_carries_its_code, sample_text, weights_digest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE

CLASSES = ["CALMConfig", "CALMModel", "CALMForCausalLM"]


def load_every_way(folder, copy):
    """In a fresh process: loads a repository in every way, says what came out, and saves it in `copy`."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert weights_digest(backbone) == weights_digest(model.model)

    torch.manual_seed(0)
    MODEL = folder
    # The model card's snippet.
    outputs = pipeline(
        "text-generation", MODEL, trust_remote_code=True, torch_dtype=torch.bfloat16, device_map="auto"
    )("The key to life is", max_new_tokens=20, do_sample=True)

    model.save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    return {
        "classes": [type(part).__name__ for part in (config, backbone, model)],
        "weights": weights_digest(model),
        "text": sample_text(model, tokenizer),
        "snippet": outputs[0]["generated_text"],
    }


def character_tokenizer():
    """A token for each of 92 characters, and the special tokens of the golden checkpoints: 96 in all."""
    names = ["<unk>", "<s>", "</s>", *map(chr, range(ord(" "), ord(" ") + 92)), "[PAD]"]
    tokenizer = Tokenizer(BPE({name: id for id, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    tokenizer.decoder = Fuse()
    return tokenizer


def check_loads_every_way(folder, home):
    """Returns what `load_every_way` saw, and the folder of the copy that it saved."""
    copy = home / "copy"
    loaded = fresh_process.call(load_every_way, home, folder=str(folder), copy=str(copy))
    assert loaded.complaints == []
    assert loaded.result["classes"] == CLASSES
    assert loaded.result["text"].startswith(PROMPT) and loaded.result["snippet"].startswith(PROMPT)
    assert_carries_its_code(copy)
    return loaded.result, copy


@pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the root holds no trained model yet")
def test_the_root_loads(tmp_path):
    check_loads_every_way(ROOT, tmp_path / "home")


def test_a_saved_model_and_a_copy_of_its_copy_load_alike(tmp_path):
    from tiny import tiny_config, tiny_model, tiny_tokenizer

    saved = tmp_path / "saved"
    tiny_model(tiny_config()).save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)
    assert_carries_its_code(saved)
    first, copy = check_loads_every_way(saved, tmp_path / "first")
    second, _ = check_loads_every_way(copy, tmp_path / "second")
    assert second == first


def test_a_converted_checkpoint_loads(tmp_path):
    from calm.convert_checkpoint import main

    published = ROOT / "tests/fixtures/energy_k4"
    character_tokenizer().save(str(tmp_path / "tokenizer.json"))
    sources = ["--calm", published / "calm", "--autoencoder", published / "autoencoder", "--tokenizer", tmp_path]
    assert main([*map(str, sources), "--output", str(tmp_path / "converted")]) == 0
    assert_carries_its_code(tmp_path / "converted")
    check_loads_every_way(tmp_path / "converted", tmp_path / "home")


def test_a_complaint_about_our_model_would_be_seen():
    stderr = (
        "Loading weights: 100%|#####| 21/21 [00:00<00:00, 18744.50it/s]\n"
        "Some weights of CALMForCausalLM were not initialized from the model checkpoint\n"
        "Device set to use cpu\n"
    )
    [complaint] = fresh_process.FreshCall(None, stderr).complaints
    assert complaint.startswith("Some weights of CALMForCausalLM")
