"""Training initialised from a model: all weights, LoRA, another head, or a frozen backbone."""

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import changed_weights, train

from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.training.recipe import load_recipe
from calm_transformers.training.train import build_model

FAST = {
    **{"block_size": 32, "per_device_train_batch_size": 4, "max_steps": 3, "warmup_steps": 0, "logging_steps": 1},
    **{"eval_strategy": "no", "lr_scheduler_type": "constant"},
}


@pytest.fixture(scope="module")
def start(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    assert train("calm", **workshop, output_dir=str(folder)) == 0
    return folder


@pytest.fixture
def fields(workshop, start, tmp_path):
    """Fields of a recipe that is initialised from a model: no sizes, no autoencoder."""
    (tmp_path / "finetune.yaml").write_text("kind: calm")
    data = {key: workshop[key] for key in ("train_files", "cache_dir")}
    own = {"recipe": str(tmp_path / "finetune.yaml"), "init_from": str(start), "tokenizer": str(start)}
    return {**data, **own, **FAST, "output_dir": str(tmp_path / "run")}


@pytest.mark.parametrize("own, trained", [({}, {"model", "head"}), ({"freeze_backbone": "true"}, {"head"})])
def test_the_trained_parts(own, trained, fields, start, tmp_path):
    assert train("calm", **fields | own) == 0
    assert {key.split(".")[0] for key in changed_weights(start, tmp_path / "run")} == trained


def test_lora_changes_neither_base_nor_autoencoder_also_through_a_resume(fields, start, tmp_path):
    fields |= {"lora_rank": 2, "save_steps": 1}
    assert train("calm", **fields | {"max_steps": 2}) == 0
    assert train("calm", **fields) == 0
    file = "adapter/adapter_model.safetensors"
    adapter = load_file(tmp_path / "run" / file)
    assert adapter and not any("autoencoder" in key for key in adapter)
    # It is merged into the linear layers only.
    modules = CALMForCausalLM.from_pretrained(start).named_modules()
    linear = {f"{name}.weight" for name, module in modules if isinstance(module, torch.nn.Linear)}
    trained = {name for name in linear if not name.startswith("autoencoder")}
    assert changed_weights(start, tmp_path / "run") == trained

    assert train("calm", **fields | {"output_dir": str(tmp_path / "whole")}) == 0
    assert not changed_weights(tmp_path / "whole", tmp_path / "run", file)


def test_the_head_can_be_replaced(fields, start, tmp_path):
    fields |= {"head_type": "flow", "freeze_backbone": "true"}
    assert train("calm", **fields) == 0
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert CALMForCausalLM.from_pretrained(tmp_path / "run").config.head_type == "flow"
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("head."))


def test_a_new_head_has_the_dtype_of_its_model(fields, start, tmp_path):
    CALMForCausalLM.from_pretrained(start).bfloat16().save_pretrained(tmp_path / "half")
    recipe = load_recipe(fields["recipe"], {"init_from": str(tmp_path / "half"), "head_type": "flow"})
    model = build_model(recipe, tokenizer=None)
    assert len({parameter.dtype for parameter in model.parameters()}) == 1
    ids = torch.randint(20, (2, 16))
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
