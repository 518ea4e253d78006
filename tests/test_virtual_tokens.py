"""PEFT's prompt tuning, p-tuning and prefix tuning on a CALM: generation and training with virtual tokens."""

import peft
import pytest
import torch
from text_and_loss import moved_by_training
from tiny import BOS, PAD, exact_model, padded, seeded, tiny_model
from transformers import CompileConfig

pytestmark = pytest.mark.transformers

K = 4
ROWS = [[BOS, 40, 41, 42, 43, 44, 45, 46, 47, 48], [BOS, 50, 51, 52], [BOS, 60, 61, 62, 63, 64, 65]]
SAMPLE = {"do_sample": True, "temperature": 0.5, "num_candidates": 20, "max_new_tokens": 12, "eos_token_id": None}
KINDS = ["prompt", "p-tuning", "prefix", "projected prefix"]


def config_of(kind: str, num_virtual_tokens: int = 8):
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": num_virtual_tokens}
    return {
        "prompt": lambda: peft.PromptTuningConfig(**common),
        "p-tuning": lambda: peft.PromptEncoderConfig(**common, encoder_hidden_size=16),
        "prefix": lambda: peft.PrefixTuningConfig(**common),
        "projected prefix": lambda: peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=16),
    }[kind]()


def adapted(kind: str, num_virtual_tokens: int = 8, **overrides) -> peft.PeftModel:
    torch.manual_seed(1)
    model = peft.get_peft_model(exact_model(**overrides), config_of(kind, num_virtual_tokens)).double().eval()
    with torch.no_grad():
        [p.normal_(std=0.5) for p in model.prompt_encoder.parameters()]
    return model


def generators(count: int) -> list[torch.Generator]:
    return [seeded(seed) for seed in range(count)]


def ids_of(model, row: list[int] = ROWS[0], **kwargs) -> list:
    settings = {**SAMPLE, "generator": generators(1), **kwargs}
    return model.generate(input_ids=torch.tensor([row]), **settings)[:, len(row) :].tolist()


@torch.no_grad()
def ids_by_hand(adapter: peft.PeftModel, row: list[int]) -> list:
    """Generates without cache or `generate`: each step is a forward pass over virtual tokens and all ids."""
    model, (generator,) = adapter.get_base_model(), generators(1)
    ids = torch.tensor([[PAD] * (-len(row) % K) + row])
    width = ids.shape[1]
    sampling = model.patch_sampling(do_sample=True, temperature=0.5, num_candidates=20)
    while ids.shape[1] < width + SAMPLE["max_new_tokens"]:
        virtual = adapter.get_prompt(1)
        if isinstance(virtual, torch.Tensor):
            embeds = torch.cat([virtual, model.get_input_embeddings()(ids)], dim=1)
            hidden = model(inputs_embeds=embeds).last_hidden_state
        else:
            hidden = model(ids, past_key_values=virtual).last_hidden_state
        ids = torch.cat([ids, model.sample_patches(hidden[:, -1], sampling, [generator]).patches], dim=1)
    return ids[:, width:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_generate_equals_a_loop_without_cache(kind, tmp_path):
    """Alone and in a batch, with other prefills and caches, saved and loaded, disabled."""
    model, plain = adapted(kind), exact_model()
    alone = [ids_of(model, row, generator=[generators(3)[b]])[0] for b, row in enumerate(ROWS)]
    assert [alone[0]] == ids_by_hand(model, ROWS[0]) != ids_of(plain)
    for settings in ({}, {"prefill_chunk_size": K}, {"cache_implementation": "static"}):
        together = model.generate(**padded(ROWS), **SAMPLE, **settings, generator=generators(3))
        assert together[:, 10:].tolist() == alone
    with model.disable_adapter():
        assert ids_of(model) == ids_of(plain)
    model.save_pretrained(tmp_path)
    assert ids_of(peft.PeftModel.from_pretrained(exact_model(), tmp_path).double()) == [alone[0]]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_unsupported_settings_raise_and_leave_the_model_unchanged(kind):
    model = adapted(kind)
    for settings, message in [
        ({"use_cache": False}, "use_cache=False: virtual tokens"),
        ({"cache_implementation": "static", "compile_config": CompileConfig()}, "compile_config: virtual tokens"),
        ({"num_candidate": 3}, "num_candidate"),
    ]:
        with pytest.raises(ValueError, match=message):
            ids_of(model, **settings)
    assert ids_of(model.get_base_model()) == ids_of(exact_model())


def test_virtual_tokens_must_be_whole_patches():
    model = adapted("prompt", num_virtual_tokens=6)
    with pytest.raises(ValueError, match="num_virtual_tokens=6: must be divisible by patch_size=4"):
        ids_of(model)
    ids = torch.tensor([ROWS[0][:8]])
    with pytest.raises(ValueError, match="got 14 tokens per row.*virtual tokens count, too"):
        model(input_ids=ids, labels=ids)


@pytest.mark.parametrize("overrides", [{"num_virtual_tokens": 3}, {"num_key_value_heads": 2}], ids=str)
def test_virtual_tokens_of_a_prefix_are_keys_and_values_of_patches(overrides):
    model = adapted("prefix", **overrides)
    assert ids_of(model) == ids_by_hand(model, ROWS[0])


def test_each_task_has_its_own_virtual_tokens():
    options = {"num_virtual_tokens": K, "num_tasks": 2, "prompt_tuning_init": "RANDOM"}
    config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(exact_model(), config).double().eval()
    with torch.no_grad():
        [p.normal_(std=0.5) for p in model.prompt_encoder.parameters()]
    both = model.generate(**padded([ROWS[0]] * 2), task_ids=torch.tensor([0, 1]), **SAMPLE, generator=generators(2))
    for task in (0, 1):
        alone = ids_of(model, task_ids=torch.tensor([task]), generator=[generators(2)[task]])
        assert both[task, 10:].tolist() == alone[0]
    assert ids_of(model, task_ids=torch.tensor([0])) != ids_of(model, task_ids=torch.tensor([1]))


def test_another_replaced_method_raises_an_error():
    model = tiny_model()
    model.prepare_inputs_for_generation = lambda *args, **kwargs: {}
    with pytest.raises(ValueError, match="was replaced"):
        ids_of(model)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_loss_is_that_of_the_same_inputs_by_hand(kind):
    """Rows of unequal length. With virtual tokens before it, a row's first patch is a target."""
    adapter, ids = adapted(kind, head_type="token_chain"), torch.randint(3, 95, (2, 12))
    mask = torch.tensor([[1] * 12, [1] * 8 + [0] * 4])
    loss = adapter(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    model, virtual, terms = adapter.get_base_model(), adapter.get_prompt(1), []
    for b, length in enumerate((12, 8)):
        row = ids[b : b + 1, :length]
        if kind == "prompt":
            embeds = torch.cat([virtual, model.get_input_embeddings()(row)], dim=1)
            own = torch.cat([row.new_full((1, 8), -100), row], dim=1)
            terms.append(model(inputs_embeds=embeds, labels=own).loss * (length // K))
        else:
            terms.append(model(row, past_key_values=adapter.get_prompt(1), labels=row).loss * (length // K - 1))
    assert torch.allclose(loss, torch.stack(terms).sum() / (5 if kind == "prompt" else 3))


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_virtual_tokens_alone_and_the_loss_falls(kind):
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_model("token_chain"), config_of(kind)).train()
    ids = torch.randint(3, 95, (4, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    moved, first, last = moved_by_training(model, 15, 0.05, **inputs)
    assert last < 0.95 * first and moved and all(name.startswith("prompt_encoder.") for name in moved)
