"""Every field of `PatchSampling` is an option of `generate`, with no list of them in this file."""

import typing
from dataclasses import fields

import pytest
import torch
from tiny import BOS, record_calls, tiny_model
from transformers import GenerationConfig

from calm_transformers.loading import generation_defaults
from calm_transformers.model import generation_calm_upstream
from calm_transformers.model.generation_calm_samplers import PatchSampling

OPTIONS = [option for option in fields(PatchSampling) if option.name in PatchSampling.option_names()]
PROMPT = torch.tensor([[BOS, 5, 6, 7]])
pytestmark = pytest.mark.transformers


def another_value(option):
    kind = typing.get_type_hints(PatchSampling)[option.name]
    kinds = [kind, *typing.get_args(kind)]
    if bool in kinds:
        return not option.default
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)[-1]
    if kind is int:
        return option.default - 1 if option.default else 7
    return option.default / 2 if option.default else 0.25


def sampling_used(monkeypatch, model, **arguments):
    """Returns the `PatchSampling` that `generate` passes to `sample_patches`."""
    with monkeypatch.context() as patch:
        seen = record_calls(patch, model, "sample_patches", lambda _, hidden_RD, sampling, *__: sampling)
        model.generate(PROMPT, max_new_tokens=4, eos_token_id=None, **arguments)
    (sampling,) = seen
    return sampling


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
@pytest.mark.parametrize("source", ["argument", "generation_config", "model's"])
def test_every_field_is_an_option_of_generate(monkeypatch, option, source):
    model, value = tiny_model(), another_value(option)
    settings = {"do_sample": True, option.name: value}
    expected, default = (PatchSampling(**each).for_head(model.head) for each in (settings, {}))
    assert expected != default
    if source == "argument":
        assert sampling_used(monkeypatch, model, **settings) == expected
    elif source == "generation_config":
        assert sampling_used(monkeypatch, model, generation_config=GenerationConfig(**settings)) == expected
    else:
        model.generation_config = GenerationConfig(**settings)
        assert sampling_used(monkeypatch, model) == expected
        if option.default is not None:  # an argument takes precedence over the model's
            assert sampling_used(monkeypatch, model, **{option.name: option.default}) == default


def test_generation_defaults_of_a_bundle_are_loaded():
    model = tiny_model()
    stated = GenerationConfig(**generation_defaults(model.config))
    assert PatchSampling.from_generation_config(stated) == PatchSampling(temperature=0.5)


def test_too_many_samples_per_step_raise_before_any_work(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: pytest.fail("work was done before the check"))
    message = "patches a step: at most 4194304 fit"
    for settings in ({"num_candidates": 10**8}, {"num_return_sequences": 10**5}):
        with pytest.raises(ValueError, match=message):
            model.generate(PROMPT, do_sample=True, temperature=0.5, **settings)
    with pytest.raises(ValueError, match=message):
        PatchSampling(temperature=0.5, num_candidates=10**6, sampling_method="exact")
    assert PatchSampling(num_candidates=10**8).takes_single_sample  # T = 1 takes one sample


@pytest.mark.parametrize("top_k", [49, 50, None])
def test_top_k_is_the_requested_one(monkeypatch, top_k):
    model, config = tiny_model(), GenerationConfig(do_sample=True, top_k=top_k)
    assert sampling_used(monkeypatch, model, generation_config=config).top_k == (top_k or 0)
    assert sampling_used(monkeypatch, model, do_sample=True, top_k=top_k).top_k == (top_k or 0)
    model.generation_config = config
    assert sampling_used(monkeypatch, model).top_k == (top_k or 0) == model.patch_sampling().top_k


def test_unknown_fields_of_a_generation_config_are_warned_of(monkeypatch):
    model, warnings = tiny_model(), []
    monkeypatch.setattr(generation_calm_upstream.logger, "warning_once", warnings.append)
    settings = {"do_sample": True, "sampling_method": "batch", "num_candidates": 5}
    sampling_used(monkeypatch, model, generation_config=GenerationConfig(**settings))
    assert not warnings
    config = GenerationConfig(**settings, num_candidate=9, prompt_alignment="left", nothing=None)
    sampling_used(monkeypatch, tiny_model(), generation_config=config)
    assert warnings == ["The generation configuration has num_candidate, prompt_alignment, which CALM doesn't read."]


@pytest.mark.parametrize("name", ["do_sample", "lazy_decoding"])
def test_a_switch_of_another_type_is_named(name):
    with pytest.raises(ValueError, match=rf"{name}=\[\]: must be True or False"):
        PatchSampling(**{name: []})
