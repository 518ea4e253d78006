"""Tiny models with tokenizers, and a text, for the tests of the evaluation commands."""

import json
import lzma
from pathlib import Path

import torch
from tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

DOCUMENTS, DOCUMENT_TOKENS = 60, 21  # BOS and 20 characters


def tiny_llama(seed=0, **overrides):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    fields = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, "initializer_range": 0.5, **sizes, **overrides}
    return LlamaForCausalLM(LlamaConfig(**fields)).eval()


def make_folder(folder):
    """Writes `calm` (K = 2), `ar`, `run` with checkpoints of an AR model, and `text.jsonl.xz`."""
    run = ((f"run/checkpoint-{step}", tiny_llama(step)) for step in (1, 2, 3))
    for name, model in (("calm", tiny_model(patch_size=2)), ("ar", tiny_llama()), *run):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    with lzma.open(folder / "text.jsonl.xz", "wt") as file:
        for i in range(DOCUMENTS):
            text = "".join(chr(ord("a") + i * j % 26) for j in range(DOCUMENT_TOKENS - 1))
            file.write(json.dumps({"text": text}) + "\n")
    return folder


def evaluations(folder) -> dict[str, list[str]]:
    """Returns module → arguments of all evaluation commands that run a model."""
    data = ["--data", str(folder / "text.jsonl.xz")]
    calm = ["--model", str(folder / "calm")]
    return {
        "brier_lm": [*calm, *data, "--block_size", "24", "--max_positions", "100"],
        "autoencoder_report": [*calm, *data],
        "invented_words": [*calm, "--text", data[1], "--num_texts", "2", "--max_new_tokens", "8"],
    }


EVALUATIONS = list(evaluations(Path()))
