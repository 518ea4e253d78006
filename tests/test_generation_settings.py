"""Every field of GenerationConfig is classified as used, harmless or unsupported, and behaves accordingly."""

from operator import attrgetter

import pytest
import torch
from tiny import BOS, tiny_model
from transformers import GenerationConfig, WatermarkingConfig

from calm_transformers.model import generation_calm_upstream as upstream
from calm_transformers.model.generation_calm_upstream import UNSUPPORTED_SETTINGS

pytestmark = pytest.mark.transformers

FIELDS = sorted(vars(GenerationConfig()))
PROMPT = torch.tensor([[BOS, 10, 11, 12, 13, 14]])
FAST = {"do_sample": True, "temperature": 0.5, "num_candidates": 20, "max_new_tokens": 8, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return tiny_model(attn_implementation="eager")  # which returns attentions


def generate(model, seed=0, **settings):
    torch.manual_seed(seed)
    return model.generate(**{"inputs": PROMPT, **FAST, **settings})


def test_every_field_is_classified():
    assert [name for name in FIELDS if name not in upstream.GENERATION_SETTINGS] == []


ids, shape, kind = torch.Tensor.tolist, attrgetter("shape"), type


def cache_room(result):
    return result.past_key_values.layers[0].keys.shape[-2]


def has(name):
    return lambda result: getattr(result, name) is not None


# Two values of a setting, other settings, and what differs between the results.
MANY = {"temperature": 1.0, "max_new_tokens": 24}
DICT = {"return_dict_in_generate": True}
STATIC = DICT | {"cache_implementation": "static"}
EMPTY = {"inputs": torch.empty(1, 0, dtype=torch.long), "do_sample": False}
EFFECTS = {
    "do_sample": ([False, True], {}, ids),
    "temperature": ([0.5, 1.0], {}, ids),
    "bos_token_id": ([BOS, 40], EMPTY, ids),
    "max_length": ([9, 10], {"max_new_tokens": None}, shape),
    "max_new_tokens": ([3, 4], {}, shape),
    "max_time": ([0.0, 1000.0], {}, shape),
    "num_return_sequences": ([1, 2], {}, shape),
    "use_cache": ([True, False], DICT, has("past_key_values")),
    "cache_implementation": (["dynamic", "static"], DICT, lambda result: kind(result.past_key_values)),
    "max_cache_len": ([40, 400], STATIC, cache_room),
    "output_attentions": ([True, False], DICT, has("attentions")),
    "output_hidden_states": ([True, False], DICT, has("hidden_states")),
    "return_dict_in_generate": ([True, False], {}, kind),
    "output_scores": ([True, False], DICT, has("scores")),
    "top_k": ([1, 0], MANY, ids),
    "top_p": ([0.01, 1.0], MANY, ids),
    "min_p": ([1.0, 0.0], MANY, ids),
}
OTHER_EFFECTS = {  # which depend on what is generated, or are more than the result
    *("cache_config", "remove_invalid_values"),  # the last is upstream's alone
    *("eos_token_id", "pad_token_id", "min_length", "min_new_tokens"),  # test_generation.py
    *("stop_strings", "prefill_chunk_size"),  # there, too
    *("compile_config", "disable_compile"),  # test_compiled.py
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),  # test_logits_processors.py
    *("suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty"),  # there, too
    *("forced_bos_token_id", "forced_eos_token_id"),  # and there
}


def test_every_used_field_has_an_effect_below():
    assert set(upstream.USED_SETTINGS) & set(FIELDS) == (set(EFFECTS) | OTHER_EFFECTS) & set(FIELDS)


@pytest.mark.parametrize("name", sorted(set(EFFECTS) & set(FIELDS)))
def test_a_used_field_has_an_effect(model, name):
    values, settings, observe = EFFECTS[name]
    one, same, other = (observe(generate(model, **settings, **{name: value})) for value in (values[0], *values))
    assert one == same != other


def test_a_quantized_cache_names_its_missing_package(model):
    for backend, package in (("quanto", "optimum-quanto"), ("hqq", "hqq")):
        with pytest.raises(ImportError, match=f"pip install {package}"):
            generate(model, cache_implementation="quantized", cache_config={"backend": backend})


@pytest.mark.skipif("max_cache_len" not in FIELDS, reason="this transformers has no max_cache_len")
def test_max_cache_len_counts_tokens(model):
    """K = 4: room for 400 tokens is room for 100 patches and one."""
    assert cache_room(generate(model, max_cache_len=400, **STATIC)) == 101


HARMLESS_VALUES = {
    **{"early_stopping": "never", "num_assistant_tokens_schedule": "heuristic", "speculation_type": "dflash"},
    **{"_commit_hash": "0" * 40, "transformers_version": "4.50.0", "decoder_start_token_id": 7},
    **{"length_penalty": 2.0, "assistant_ensemble_weight": 0.5, "diversity_penalty": 0.5},
}


@pytest.mark.parametrize("name", sorted(set(upstream.HARMLESS_SETTINGS) & set(FIELDS)))
def test_a_harmless_field_changes_nothing(model, name):
    config = GenerationConfig(**FAST)
    setattr(config, name, HARMLESS_VALUES.get(name, True))
    torch.manual_seed(0)
    assert torch.equal(model.generate(PROMPT, generation_config=config), generate(model))


UNSUPPORTED = sorted(set(UNSUPPORTED_SETTINGS) & set(FIELDS))
UNSUPPORTED_VALUES = {
    **{"force_words_ids": [[5]], "constraints": [object()], "dola_layers": "low"},
    **{"watermarking_config": WatermarkingConfig(), "encoder_no_repeat_ngram_size": 3},
    **dict.fromkeys(("num_beams", "num_beam_groups", "prompt_lookup_num_tokens", "assistant_early_exit"), 2),
    **dict.fromkeys(("output_logits", "token_healing", "is_assistant", "use_mtp"), True),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_field_raises_one_sentence_before_any_work(monkeypatch, model, name):
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: pytest.fail("work was done before the check"))
    with pytest.raises(ValueError) as error:
        generate(model, **{name: UNSUPPORTED_VALUES.get(name, 0.6)})
    message = str(error.value)
    assert message.startswith((f"{name}=", f"{name}: CALM", "CALM has no ")) and "\n" not in message
    assert len(message) < 250 and message.endswith(".")


@pytest.mark.parametrize("name", [name for name in UNSUPPORTED if UNSUPPORTED_SETTINGS[name][1:]])
def test_values_that_disable_an_unsupported_field_are_accepted(model, name):
    expected = generate(model)
    for value in UNSUPPORTED_SETTINGS[name][1:]:
        assert torch.equal(generate(model, **{name: value}), expected)
