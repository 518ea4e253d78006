"""A tiny Llama with its tokenizer, and an autoencoder whose tokenizer has one more token."""

from pathlib import Path

import torch
from training_helpers import RECIPES, train, write_corpus
from transformers import LlamaConfig, LlamaForCausalLM

from calm_transformers.loading import load_tokenizer
from calm_transformers.training.recipe import Recipe, load_recipe
from calm_transformers.training.tokenizer import save_tokenizer

NUM_KNOWN = 300  # vocabulary size of the Llama
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_llama(folder: Path, tokenizer: str | None, dtype=torch.float32, **changes) -> Path:
    torch.manual_seed(1)
    fields = {"vocab_size": NUM_KNOWN, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, **SIZES}
    llama = LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)  # so that biases and norms aren't constant
    llama.to(dtype).save_pretrained(folder)
    if tokenizer:
        save_tokenizer(load_tokenizer(tokenizer), folder)
    return folder


def make_workshop_of_one_more_token(folder: Path) -> dict:
    """Returns recipe fields of a CALM with the tokenizer of the Llama in `theirs` plus a new pad token."""
    corpus, theirs, ours = str(write_corpus(folder / "corpus.jsonl")), str(folder / "theirs"), str(folder / "ours")
    assert train("tokenizer", train_files=corpus, output_dir=theirs) == 0
    tokenizer = load_tokenizer(theirs)
    tokenizer.add_special_tokens({"pad_token": "<|one more|>"})
    assert tokenizer.pad_token_id == NUM_KNOWN
    make_llama(Path(theirs), tokenizer=None, num_key_value_heads=2)
    save_tokenizer(tokenizer, ours)
    data = {"train_files": corpus, "cache_dir": str(folder / "tokens"), "tokenizer": ours}
    autoencoder = str(folder / "autoencoder")
    assert train("autoencoder", **data, max_steps=2, output_dir=autoencoder) == 0
    return {**data, "autoencoder": autoencoder}


def recipe_of(workshop: dict, **fields) -> Recipe:
    return load_recipe(str(RECIPES / "calm.yaml"), {"output_dir": "runs/none", **workshop, **fields})


def refusal(capsys, **fields) -> str:
    assert train("calm", **fields) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")
