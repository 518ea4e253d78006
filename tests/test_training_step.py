"""The training-step benchmark: its numbers are consistent, and the head processes the context once."""

import json

import pytest
import torch
from commands import refusal
from tiny import tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from calm_transformers.benchmarks import meters, training_step
from calm_transformers.model.heads_calm import PatchTarget
from calm_transformers.training.cost import calm_cost

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
ARGUMENTS = ["--device", "cpu", "--dtype", "float32", "--batch_size", "2", "--block_size", "16", "--repetitions", "2"]


@pytest.fixture
def shapes(monkeypatch):
    """Tiny models by the names of their heads, and "llama"; the machine's FLOP rate is measured fast."""
    llama = LlamaConfig(vocab_size=96, **SIZES)
    monkeypatch.setattr(training_step, "model_config", lambda name: llama if name == "llama" else tiny_config(name))
    monkeypatch.setitem(meters.MATMUL_SIZE, "cpu", 32)


def test_the_whole_command(shapes, tmp_path, capsys):
    path = tmp_path / "figures.json"
    training_step.main(["--shape", "energy", "flow", "llama", *ARGUMENTS, "--json", str(path)])
    report = json.loads(path.read_text())
    assert [row["shape"] for row in report["steps"]] == ["energy", "flow", "llama"]
    for row in report["steps"]:
        low, high = row["step_ms_range"]
        assert 0 < low <= row["step_ms"] <= high
        assert row["tokens_per_second"] == pytest.approx(1000 * 32 / row["step_ms"])
        assert row["mfu"] == pytest.approx(1000 * row["flops"] / row["step_ms"] / report["flop_rate"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| energy", "| flow", "| llama"]
    assert len({line.count("|") for line in lines[:5]}) == 1


@pytest.mark.slow
def test_bfloat16_and_compiled(shapes, monkeypatch, tmp_path):
    """The eager backend skips the code generation, which takes minutes; loading the compiler takes seconds."""
    monkeypatch.setattr(training_step, "COMPILE_BACKEND", "eager")
    path = tmp_path / "figures.json"
    training_step.main(["--shape", "energy", *ARGUMENTS, "--dtype", "bfloat16", "--compile", "--json", str(path)])
    (row,) = json.loads(path.read_text())["steps"]
    assert row["compile"] and row["step_ms"] > 0
    torch.compiler.reset()


def test_bad_options_are_refused_before_any_work(shapes, monkeypatch, capsys):
    monkeypatch.setattr(training_step, "peak_flop_rate", None)  # the first work
    for options, complaint in {
        ("--block_size", "18"): "--block_size 18: energy needs",
        ("--block_size", "4"): "--block_size 4: energy needs",
        ("--json", "nowhere/figures.json"): "its folder does not exist",
    }.items():
        assert complaint in refusal(capsys, training_step.main, "--shape", "energy", *ARGUMENTS, *options)


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
