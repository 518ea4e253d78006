"""PEFT's LoRA, DoRA and IA3 on a CALM: what they write and what they train; virtual tokens: test_virtual_tokens.py."""

import peft
import pytest
import torch
from text_and_loss import moved_by_training, text_and_loss
from tiny import tiny_model

from calm_transformers.model.modeling_calm import CALMForCausalLM

pytestmark = pytest.mark.transformers

NOT_THE_AUTOENCODER = r"autoencoder\..*"


def config_of(kind: str, *, is_new: bool = False):
    """A configuration as documented; unless it is new, its weights already say something."""
    common = {"task_type": "CAUSAL_LM", "exclude_modules": NOT_THE_AUTOENCODER}
    if kind == "ia3":
        targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        return peft.IA3Config(**common, **targets, init_ia3_weights=is_new)
    lora = {"r": 4, "target_modules": "all-linear", "use_dora": kind == "dora", "init_lora_weights": is_new}
    return peft.LoraConfig(**common, **lora)


def adapted(kind: str, **kwargs) -> peft.PeftModel:
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_model().double(), config_of(kind, **kwargs)).eval().double()
    if kind == "ia3" and not kwargs:  # its random start is far from 1, where it does nothing
        with torch.no_grad():
            [p.normal_(mean=1, std=0.5) for name, p in model.named_parameters() if "ia3_" in name]
    return model


def text_of(model) -> list:
    return text_and_loss(model)[0]


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
class TestAdapters:
    def test_it_changes_the_text_until_it_is_switched_off_also_merged_saved_and_loaded(self, kind, tmp_path):
        model, plain_text = adapted(kind), text_of(tiny_model().double())
        text = text_of(model)
        assert text != plain_text
        with model.disable_adapter():
            assert text_of(model) == plain_text
        model.save_pretrained(tmp_path)
        loaded = tiny_model().double()
        loaded.load_adapter(str(tmp_path))
        for each in (loaded, peft.PeftModel.from_pretrained(tiny_model().double(), tmp_path)):
            assert text_of(each.double()) == text
        merged = model.merge_and_unload()
        assert type(merged) is CALMForCausalLM and not any("lora" in n or "ia3" in n for n in merged.state_dict())
        assert text_of(merged) == text

    def test_training_moves_the_adapter_alone_and_the_loss_falls(self, kind):
        torch.manual_seed(1)
        model = peft.get_peft_model(tiny_model(), config_of(kind, is_new=True)).train()
        ids, weights = torch.randint(3, 95, (4, 16)), set(model.state_dict())
        moved, first, last = moved_by_training(model, 10, 0.02, input_ids=ids, labels=ids)
        assert last < 0.99 * first
        assert moved == {name for name in weights if "lora_" in name or "ia3_" in name}
        assert not any("autoencoder" in name for name in moved) and any(".head." in name for name in moved)


def test_all_linear_alone_enters_the_autoencoder_where_nothing_is_trained():
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    inside = [p for name, p in model.named_parameters() if "autoencoder" in name and "lora_" in name]
    assert inside, "the documented exclude_modules is for nothing"
    assert not any(p.requires_grad for p in model.train().get_base_model().autoencoder.parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if ".model.layers." in name and "lora_" in name)
