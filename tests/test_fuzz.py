"""Random configurations and settings of `generate`: what was promised, or an error of one sentence before any work."""

import dataclasses
import functools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import EOS, HEAD_TYPES, PAD, VOCAB_SIZE, seeded, tiny_model, tiny_tokenizer
from transformers import GenerationConfig, LlamaConfig, PreTrainedConfig
from transformers.generation.streamers import BaseStreamer

from calm_transformers import CALMAutoencoderConfig, CALMConfig
from calm_transformers.model.generation_calm_samplers import PatchSampling

pytestmark = [pytest.mark.transformers, pytest.mark.fuzz]

ids = st.integers(0, VOCAB_SIZE - 1)
counts = st.integers(0, 9)
VALUES = {  # likely ones; the others get those of `ANY`
    **dict.fromkeys(("do_sample", "use_cache", "lazy_decoding", "return_dict_in_generate"), st.booleans()),
    **dict.fromkeys(("output_scores", "output_hidden_states", "renormalize_logits"), st.booleans()),
    **dict.fromkeys(("top_p", "min_p"), st.floats(0, 1)),
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "min_length", "top_k"), counts),
    **dict.fromkeys(("no_repeat_ngram_size", "prefill_chunk_size"), counts),
    "max_length": st.integers(1, 20),
    "temperature": st.floats(0.2, 2),
    "num_candidates": st.integers(1, 40),
    "sampling_method": st.sampled_from(["batch", "adaptive", "exact"]),
    "num_return_sequences": st.integers(1, 3),
    "eos_token_id": st.one_of(ids, st.just(-1), st.lists(ids, min_size=1, max_size=4)),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id"), ids),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), st.lists(ids, min_size=1, max_size=4)),
    "bad_words_ids": st.lists(st.lists(ids, min_size=1, max_size=3), min_size=1, max_size=3),
    "sequence_bias": st.lists(
        st.tuples(st.lists(ids, min_size=1, max_size=3), st.floats(-9, 9)).map(list), min_size=1
    ),
    "repetition_penalty": st.floats(0.5, 3),
    "exponential_decay_length_penalty": st.tuples(counts, st.floats(0.5, 2)),
    "stop_strings": st.lists(st.text("abl ", min_size=1, max_size=2), min_size=1, max_size=3),
    "cache_implementation": st.sampled_from(["static", "dynamic", "offloaded", "sliding_window"]),
}
ANY = st.one_of(
    st.none(),
    *(st.booleans(), st.integers(-3, 9), st.integers(10**9, 10**30), st.floats(-3, 3), st.lists(st.integers(-2, 99))),
    st.sampled_from(["", "x", math.nan, math.inf, {}, object()]),
)
SMALL_OR_TOO_LARGE = ANY.filter(lambda value: type(value) is not int or not 9 < value < 2**63)
BACKBONE = {field.name for field in dataclasses.fields(LlamaConfig)} - vars(PreTrainedConfig()).keys()
FIELDS = {CALMConfig: sorted({*CALMConfig.__annotations__, *BACKBONE})}
FIELDS[CALMAutoencoderConfig] = sorted(CALMAutoencoderConfig.__annotations__)
SETTINGS = sorted({*vars(GenerationConfig()), *PatchSampling.option_names()} - {"generation_kwargs"})


@given(st.data(), st.sampled_from(list(FIELDS)), st.sampled_from(HEAD_TYPES))
def test_a_configuration_is_as_given_or_an_error_of_one_sentence(data, kind, head_type):
    fields = data.draw(st.dictionaries(st.sampled_from(FIELDS[kind]), ANY, min_size=1, max_size=3))
    fields |= {"head_type": head_type} if kind is CALMConfig and "head_type" not in fields else {}
    try:
        config = kind(**fields)
    except ValueError as error:
        assert "\n" not in str(error) and any(name in str(error).replace(" ", "_") for name in fields), error
        return
    for name, value in fields.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        is_optional = value is None or (name, type(value)) in (("eos_token_id", list), ("autoencoder_config", dict))
        assert is_optional or is_number or isinstance(value, type(getattr(kind(), name))), (name, value)
    assert kind.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


@functools.cache
def model_of(head_type):
    return tiny_model(head_type).double()


@st.composite
def calls(draw):
    head_type = draw(st.sampled_from(HEAD_TYPES))
    batch, length = draw(st.sampled_from([1, 1, 2, 3, 5, 0])), draw(st.integers(0, 12))
    prompt = torch.randint(3, PAD, (batch, length), generator=seeded(draw(st.integers(0, 99))))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)))
    names = draw(st.lists(st.sampled_from(SETTINGS), max_size=4, unique=True))
    settings = {"do_sample": True, "num_candidates": 12, "max_new_tokens": 9}
    for name in names:
        likely = draw(st.integers(0, 3)) and name in VALUES
        is_length = name in ("max_new_tokens", "max_length")  # nobody waits for a text of 10⁹ tokens
        settings[name] = draw(VALUES[name] if likely else SMALL_OR_TOO_LARGE if is_length else ANY)
    return head_type, prompt, mask.view(batch, length).long(), settings


class Tokens(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


@given(calls(), st.sampled_from(["again", "alone", "streamed", "reversed", "cache"]))
def test_a_text_or_one_sentence_before_any_work(call, relation):
    """A text is that of another call: the same one, each row's, a streamed one, reversed rows', an uncached one."""
    head_type, prompt, mask, settings = call
    model, length, n = model_of(head_type), prompt.shape[1], settings.get("num_return_sequences", 1)

    def generate(rows, **more):
        count = n if isinstance(n, int) and n in range(1, 10) else 1
        generators = [seeded(9 * row + i) for row in rows for i in range(count)]
        options = {"attention_mask": mask[rows], "generator": generators, "tokenizer": tiny_tokenizer()}
        output = model.generate(prompt[rows], **options, **settings, **more)
        output = output if isinstance(output, torch.Tensor) else output["sequences"]
        return output.view(len(rows), -1, output.shape[1])

    rows, work = list(range(len(prompt))), []
    hook = model.model.register_forward_pre_hook(lambda *_: work.append(1))
    try:
        output = generate(rows)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        is_late = bool(work) and "The logits processors leave no token" not in str(error)  # known once they act
        assert not is_late and "\n" not in str(error).strip(), repr(error)
        named = (*settings, "batch", "bos_token_id", "stop string")
        assert any(name in str(error) for name in named), repr(error)
        return
    finally:
        hook.remove()
    new, pad = output[:, :, length:], settings.get("pad_token_id", PAD)
    assert output.dtype == torch.long and (output[:, :, :length] == prompt[:, None]).all()
    assert new.shape[-1] <= (settings["max_new_tokens"] if settings["max_new_tokens"] is not None else 20)
    eos = torch.tensor(settings.get("eos_token_id", EOS) if settings.get("eos_token_id", EOS) is not None else -1)
    has_ended = torch.isin(new, eos).long().cumsum(-1) - torch.isin(new, eos).long() > 0
    assert isinstance(pad, int) is False or (new[has_ended] == pad).all()
    if relation == "streamed":
        if output.shape[:2] == (1, 1):
            generate(rows, streamer=(streamer := Tokens()))
            assert streamer.tokens == [*output.flatten().tolist(), "end"]
    elif relation == "alone":
        for row in rows:
            (alone,) = generate([row])
            assert torch.equal(alone, output[row, :, : alone.shape[-1]])
    elif relation == "cache":
        if "use_cache" not in settings and not any("cache" in name for name in settings):
            assert torch.equal(generate(rows, use_cache=False), output)
    else:
        order = rows if relation == "again" else rows[::-1]
        assert torch.equal(generate(order), output[order])
