"""Nothing that a caller holds is changed by a call; imports are in test_imports.py."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from evaluation_folder import tiny_llama
from tiny import VOCAB_SIZE, record_calls, seeded, tiny_model
from transformers import TrainingArguments

from calm_transformers.evaluation.models import brier_counts
from calm_transformers.training.auxiliary import WithAuxiliary
from calm_transformers.training.data import PatchCollator
from calm_transformers.training.trainer import CALMTrainer

MODELS = {"calm": lambda: tiny_model(patch_size=2), "llama": tiny_llama}


def held(model):
    """Copies of all that a caller may have set on a model: a value for each name."""
    return {
        "config": copy.deepcopy(vars(model.config)),
        "generation_config": copy.deepcopy(vars(model.generation_config)),
        "modes": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "methods": {name for name in vars(model) if callable(vars(model)[name])},
    }


def assert_unchanged(model, before):
    after = held(model)
    weights, before_weights = after.pop("weights"), dict(before).pop("weights")
    assert after == {name: value for name, value in before.items() if name != "weights"}
    assert all(torch.equal(weights[name], before_weights[name]) for name in before_weights)


def unusual(model, training):
    """With values that nobody would set anew by chance."""
    model.train(training)
    model.config.use_cache = False
    model.generation_config.update(temperature=0.25, do_sample=True, max_length=77)
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_counting_leaves_the_model_as_it_was_also_where_it_fails_midway(monkeypatch, kind, fails):
    model = unusual(MODELS[kind](), training=fails)
    blocks = torch.randint(VOCAB_SIZE, (3, 12), generator=seeded())
    kept, before = blocks.clone(), held(model)
    layer = (model.model.model if kind == "llama" and hasattr(model.model, "model") else model.model).layers[0]
    calls, forward = [], layer.forward

    def fail_later(*args, **kwargs):
        calls.append(1)
        if fails and len(calls) > 3:
            raise torch.OutOfMemoryError("as if")
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", fail_later)
        with pytest.raises(torch.OutOfMemoryError, match="as if") if fails else nullcontext():
            assert brier_counts(model, blocks).score().positions
    assert_unchanged(model, before)
    assert torch.equal(blocks, kept) and torch.is_grad_enabled()


def test_generating_changes_no_configuration(monkeypatch):
    """Nor while it runs: other threads may generate with the model."""
    model = unusual(tiny_model(patch_size=2), training=False)
    before, changed, original = held(model), [], type(model.config).__setattr__

    def note(config, name, value):
        changed.extend([name] if config is model.config else [])
        original(config, name, value)

    monkeypatch.setattr(type(model.config), "__setattr__", note)
    model.generate(torch.arange(3, 14).view(1, -1), do_sample=True, max_new_tokens=5)
    assert changed == []
    assert_unchanged(model, before)


BLOCKS = [{"input_ids": torch.arange(3, 19) + i} for i in range(4)]


def arguments(folder):
    steps = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "use_cpu": True}
    return TrainingArguments(output_dir=str(folder), **steps, **quiet)


@pytest.mark.parametrize("kind", ["llama", "with auxiliary loss"])
def test_training_leaves_configurations_arguments_and_data_as_they_were(tmp_path, monkeypatch, kind):
    """But for what save_pretrained writes down: the class and the type of the numbers."""
    model = tiny_llama() if kind == "llama" else tiny_model(patch_size=4)
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.float32
    trained = WithAuxiliary(model, 0.5) if kind == "with auxiliary loss" else model
    args = arguments(tmp_path)

    def uses(_, backbone, *inputs, use_cache=None, **kwargs):
        return use_cache, backbone.config.use_cache

    def state():
        return copy.deepcopy((model.config.to_dict(), args.to_dict(), vars(model.generation_config), str(BLOCKS)))

    caches = record_calls(monkeypatch, type(model.model), "forward", uses)
    before, collator = state(), PatchCollator(4, skip_first_patch=kind != "llama", pad_token_id=95)
    CALMTrainer(model=trained, args=args, train_dataset=BLOCKS, data_collator=collator).train()
    assert state() == before
    assert len(caches) >= 2 and set(caches) == {(False, True)}  # in the call; the configuration's all along
    checkpoint = tmp_path / "checkpoint-2"
    assert json.loads((checkpoint / "config.json").read_text())["use_cache"] is True
    assert torch.load(checkpoint / "training_args.bin", weights_only=False).output_dir == str(tmp_path)
