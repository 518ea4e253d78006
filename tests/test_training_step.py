"""The training benchmark, and the FLOPs of a training step: the head processes the context once."""

import json

import torch
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from training_helpers import RECIPES

from calm_transformers.benchmarks import training_step
from calm_transformers.model.heads_calm import PatchTarget
from calm_transformers.training.cost import calm_cost


def test_a_benchmark_of_two_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_step, "NUM_TOKENS", 2000)
    recipes, path = [str(RECIPES / f"{kind}.yaml") for kind in ("calm", "ar")], tmp_path / "rows.json"
    words = ["--recipe", *recipes, "--num_steps", "2", "--json", str(path), "--vocab_size", "300"]
    assert training_step.main([*words, "--block_size", "64"]) == 0
    rows = json.loads(path.read_text())
    assert [row["recipe"] for row in rows] == recipes and {row["block_size"] for row in rows} == {64}
    assert all(row["tokens_per_second"] > 0 and row["mfu"] is None and row["data_wait"] < 1 for row in rows)
    assert capsys.readouterr().out.count(" | – | – | ") == 2


def test_each_block_of_the_head_processes_the_context_once():
    """Compares the head's training FLOPs with those of every linear layer for every sample."""
    model = tiny_model(num_samples=8)
    context, latents, head = torch.randn(5, 48), torch.randn(5, 16), model.head
    with FlopCounterMode(display=False) as counter:
        head.loss(context, PatchTarget(posterior=(latents, latents)))

    def flops(layer):
        return 2 * layer.weight.numel()

    repeated = flops(head.context_embed) + sum(flops(block.context_proj) for block in head.blocks)
    everything = 8 * sum(flops(layer) for layer in head.modules() if isinstance(layer, torch.nn.Linear))
    distances = 2 * 2 * 8 * 10 * 16  # N = 8 samples to S = 10 targets of size Z = 16, and their gradient
    assert counter.get_total_flops() == 5 * (everything - 7 * repeated + distances)
    counted = calm_cost(model.config, 64).train_flops["head"]  # 3 passes over patches of K = 4
    assert counter.get_total_flops() / 5 == counted * 4 / 3
