"""The moving average of the weights: it is exported and evaluated, also after a resume."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import losses_of, train

from calm_transformers.training.average import WeightAverage

DECAY, STEPS = 0.7, 4
EVERY_STEP = {"max_steps": STEPS, "save_steps": 1, "save_total_limit": STEPS, "eval_strategy": "no"}


def assert_averaged(found: dict, folder: Path, name: str) -> None:
    """Compares with the average of the checkpoints' weights, computed step by step."""
    weights = [load_file(folder / f"checkpoint-{step}" / name) for step in range(1, STEPS + 1)]
    average = weights[0]
    for later in weights[1:]:
        average = {key: DECAY * average[key] + (1 - DECAY) * later[key] for key in average}
    assert found.keys() == average.keys()
    assert max((found[key] - average[key]).abs().max() for key in found) < 1e-6


def test_the_export_is_the_average_also_through_a_resume(workshop, tmp_path):
    fields = {**workshop, **EVERY_STEP, "auxiliary_weight": 0.5, "ema_decay": DECAY, "output_dir": str(tmp_path)}
    assert train("calm", **fields) == 0
    whole, last = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert_averaged(whole, tmp_path, "model.safetensors")
    assert any((whole[key] - last[key]).abs().max() > 1e-4 for key in whole)
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert train("calm", **fields) == 0
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_evaluation_uses_the_average_and_training_does_not(workshop, tmp_path):
    fields = {**workshop, **EVERY_STEP, "eval_strategy": "steps", "eval_steps": 2}
    for name, own in {"plain": {}, "average": {"ema_decay": DECAY}}.items():
        assert train("calm", **fields, **own, output_dir=str(tmp_path / name)) == 0
    assert losses_of(tmp_path / "plain", "loss") == losses_of(tmp_path / "average", "loss")
    plain, average = (losses_of(tmp_path / name, "eval_loss") for name in ("plain", "average"))
    assert len(plain) == len(average) == 2 and plain != average


def test_the_adapter_is_averaged_too(workshop, tmp_path):
    assert train("calm", **workshop, output_dir=str(tmp_path / "start")) == 0
    (tmp_path / "adapter.yaml").write_text("kind: calm")
    data = {key: workshop[key] for key in ("train_files", "cache_dir", "tokenizer")}
    fields = {**data, **EVERY_STEP, "block_size": 32, "warmup_steps": 0, "learning_rate": 1e-2, "ema_decay": DECAY}
    own = {"init_from": str(tmp_path / "start"), "lora_rank": 2, "output_dir": str(tmp_path / "run")}
    assert train("calm", str(tmp_path / "adapter.yaml"), **fields, **own) == 0
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert_averaged(found, tmp_path / "run", "adapter_model.safetensors")


def test_the_average_of_half_precision_weights_is_float32():
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    callback = WeightAverage(0.99)
    callback.on_train_begin(None, None, None, model=model)
    for value in (1.0, 2.0):
        torch.nn.init.constant_(model.weight, value)
        callback.on_step_end(None, None, None, model=model)
    (average,) = callback.average.module.parameters()
    assert average.dtype == torch.float32 and average.item() == pytest.approx(0.99 * 1 + 0.01 * 2)
    with callback.average_parameters(model):
        assert model.weight.item() == 1.0078125  # the nearest value in bfloat16
    assert model.weight.item() == 2 and model.weight.dtype == torch.bfloat16
