"""Tiny recipes, a demo model and recorded candidates with many duplicates, in place of the benchmarks' real ones."""

import json

import numpy as np
import torch
from tiny import VOCAB_SIZE, tiny_model

from calm_transformers.benchmarks import workloads
from calm_transformers.training import recipe

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64}
ATTENTION = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
RECIPES = {
    "calm-tiny": ("calm", {**SIZES, **ATTENTION, "latent_size": 16, "noise_size": 8, "num_mlp_layers": 2}),
    "autoencoder": ("autoencoder", {**SIZES, "latent_size": 16}),
    "transformer-tiny": ("ar", {**SIZES, **ATTENTION}),
}


def make_demo(folder, monkeypatch):
    """Saves a CALM whose latents hardly depend on the noise, and with all tokens as EOS; returns its folder."""
    for name, (kind, fields) in RECIPES.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"kind": kind, "model": fields}))
    monkeypatch.setattr(recipe, "RECIPE_FOLDER", folder)
    patches = np.full((16, 80, 4), 3, dtype=np.uint16)
    patches[..., 0] += np.random.default_rng(0).integers(2, size=(16, 80), dtype=np.uint16)
    np.savez(folder / "candidates.npz", patches=patches)
    monkeypatch.setattr(workloads, "RECORDING", folder / "candidates.npz")
    monkeypatch.setattr(workloads, "DEMO_FOLDER", folder / "demo")
    model = tiny_model()
    with torch.no_grad():
        model.head.out_proj.weight.mul_(0.1)
        model.head.out_proj.bias.normal_(generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = list(range(VOCAB_SIZE))
    model.save_pretrained(folder / "demo")
    return folder / "demo"
