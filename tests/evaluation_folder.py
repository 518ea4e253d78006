"""A folder that the tests of the evaluation commands share: tiny models, each with a tokenizer, and a text."""

import json
import lzma

import pytest
import torch
from tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

DOCUMENTS, DOCUMENT_TOKENS = 60, 21  # BOS and 20 characters


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=64, initializer_range=0.5, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`calm` (K = 2), `ar`, and `text.jsonl.xz`."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name, model in (("calm", tiny_model(patch_size=2)), ("ar", tiny_llama())):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    with lzma.open(folder / "text.jsonl.xz", "wt") as file:
        for i in range(DOCUMENTS):
            text = "".join(chr(ord("a") + i * j % 26) for j in range(DOCUMENT_TOKENS - 1))
            file.write(json.dumps({"text": text}) + "\n")
    return folder
