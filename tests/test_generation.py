"""Generation under upstream `generate`: lengths, stopping, batches, prompts, determinism, and invalid arguments."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from test_fuzz import Tokens
from tiny import BOS, EOS, HEAD_TYPES, PAD, VOCAB_SIZE, padded, record_calls, seeded, tiny_model, tiny_tokenizer
from transformers import CompileConfig, DynamicCache, StoppingCriteriaList

from calm_transformers.model import generation_calm
from calm_transformers.model.generation_calm_candidates import PatchSample

pytestmark = pytest.mark.transformers

PROMPT = torch.tensor([[BOS, 10, 11, 12, 13, 14]])
FAST = {"do_sample": True, "temperature": 0.5, "num_candidates": 20}
NO_EOS = {"eos_token_id": None}
GREEDY = {"do_sample": False, "num_candidates": 30, **NO_EOS}
OFTEN = torch.tensor([EOS, 7, 30, *tiny_tokenizer()("abl owxyz", add_special_tokens=False)["input_ids"]])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def generate(model, prompt=PROMPT, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.generate(prompt, **{**FAST, **kwargs})


@pytest.mark.parametrize("new_tokens", [1, 4, 5, 11])
def test_max_new_tokens_exactly(model, new_tokens):
    for lengths in ({"max_new_tokens": new_tokens}, {"max_length": 6 + new_tokens}):
        output = generate(model, **lengths, **NO_EOS)
        assert output.shape == (1, 6 + new_tokens)
        assert torch.equal(output[:, :6], PROMPT)


@pytest.mark.parametrize("eos, length, pad", [(EOS, 12, PAD), ([EOS, 50], 11, 60)], ids=str)
def test_eos_within_a_patch_stops_and_pads(monkeypatch, model, eos, length, pad):
    """Row 0 stops at the second token of its second patch and isn't sampled again, row 1 in its third."""
    first, second = [20, 21, 22, 23, 24, EOS, 25, 26], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, EOS]
    steps = iter([[first[:4], second[:4]], [first[4:], second[4:8]], [second[8:]]])

    def sample_patches(hidden_RD, *args):
        patches_RK = torch.tensor(next(steps))
        assert len(hidden_RD) == len(patches_RK)
        return PatchSample(patches_RK, is_exact=False)

    monkeypatch.setattr(model, "sample_patches", sample_patches)
    output = generate(model, PROMPT.repeat(2, 1), max_new_tokens=20, eos_token_id=eos, pad_token_id=pad)
    assert output[:, 6:].tolist() == [first[:6] + [pad] * (length - 6), second[:length]]


def never(ids, scores, **kwargs):
    """A user's criterion that never stops a sequence: all criteria are then evaluated after each token."""
    return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("settings", [NO_EOS, {"eos_token_id": [EOS, 7, 30]}, {"stop_strings": ["ab", "l", "o w"]}])
@pytest.mark.parametrize("patch_size, num_rows", [(1, 3), (4, 1), (5, 3)])
def test_stopping_criteria_by_patch_end_sequences_where_those_by_token_do(settings, patch_size, num_rows):
    model, lengths = tiny_model(patch_size=patch_size), set()
    with torch.no_grad():
        model.autoencoder.decoder.lm_head.weight[~torch.isin(torch.arange(VOCAB_SIZE), OFTEN)] = 0
    common = {"max_new_tokens": 30, "temperature": 1.0, "tokenizer": tiny_tokenizer(), **settings}
    for seed in range(5):
        outputs, streamers = [], [Tokens(), Tokens()]
        for more, streamer in zip(([], [never]), streamers, strict=True):
            own = {"stopping_criteria": StoppingCriteriaList(more), "streamer": streamer if num_rows == 1 else None}
            outputs.append(generate(model, PROMPT.repeat(num_rows, 1), seed, **common, **own))
        assert torch.equal(*outputs)
        lengths.add(outputs[0].shape[1])
        if num_rows == 1:
            assert streamers[0].tokens == streamers[1].tokens == [*outputs[0][0].tolist(), "end"]
    assert settings is NO_EOS or len(lengths) > 1


@pytest.mark.parametrize("lazy", [True, False])
def test_min_new_tokens_bans_eos_until_then(lazy):
    """A decoder that prefers EOS everywhere, then token 50, gives EOS at the first position where it is allowed."""
    model = tiny_model()
    decoder = model.autoencoder.decoder
    with torch.no_grad():
        decoder.norm.weight.zero_()  # the same hidden state for every token, once a constant is added
        decoder.lm_head.weight.zero_()
        decoder.lm_head.weight[EOS], decoder.lm_head.weight[50] = 2, 1
    decoder.norm.register_forward_hook(lambda module, inputs, output: output + 1)
    for minimum in (0, 1, 4, 6):
        output = generate(model, max_new_tokens=12, min_new_tokens=minimum, lazy_decoding=lazy)
        assert output[0, 6:].tolist() == [50] * minimum + [EOS]
    assert generate(model, max_length=18, min_length=11, lazy_decoding=lazy)[0, 6:].tolist() == [50] * 5 + [EOS]


def test_custom_stopping_criteria_see_every_token(model):
    lengths = []

    def stop_at_nine(ids, scores, **kwargs):
        lengths.append(ids.shape[1])
        return torch.full((len(ids),), ids.shape[1] >= 9)

    output = generate(model, max_new_tokens=50, stopping_criteria=StoppingCriteriaList([stop_at_nine]), **NO_EOS)
    assert output.shape == (1, 9) and lengths == [7, 8, 9]


def test_no_length_warning_before_the_last_position(monkeypatch, model, caplog):
    """Of 4 patches, 16 tokens; one more and upstream's warning comes, so the test would see it."""
    monkeypatch.setattr(model.config, "max_position_embeddings", 4)
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):  # which commands set to errors alone
        for length, warned in ((16, False), (20, True)):
            transformers.logging.warning_once.cache_clear()
            generate(model, max_length=length, **NO_EOS)
            assert ("maximum length" in caplog.text) == warned


def test_default_length_counts_tokens_not_patches(monkeypatch, model):
    """With no length given upstream generates 20 tokens, or up to the last position: 16 patches are 64 tokens."""
    monkeypatch.setattr(model.config, "max_position_embeddings", 16)
    prompt = torch.full((1, 40), 10)
    assert generate(model, prompt, **NO_EOS).shape[1] == 60
    assert generate(model, torch.full((1, 55), 10), **NO_EOS).shape[1] == 64


def test_a_process_that_has_finished_keeps_running_for_the_others(monkeypatch, model):
    """Under FSDP all processes take the same number of steps; the sequence of the first to finish is unchanged."""
    expected = generate(model, max_new_tokens=3, **NO_EOS)
    steps = []

    def two_more_steps(finished, synced_gpus, device):
        steps.append(finished)
        return len(steps) <= 3

    monkeypatch.setattr(model, "_has_unfinished_sequences", two_more_steps)
    assert torch.equal(generate(model, max_new_tokens=3, synced_gpus=True, **NO_EOS), expected)
    assert steps == [False, True, True, True]


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_generation_is_reproducible_with_a_seed_or_a_generator(head_type):
    model = tiny_model(head_type)
    for kwargs in ({"temperature": 1.0}, *({"temperature": 0.7, "sampling_method": m} for m in ("batch", "exact"))):
        for own in (lambda seed: {"seed": seed}, lambda seed: {"generator": seeded(seed)}):
            one, same, other = (generate(model, max_new_tokens=16, **own(n), **kwargs) for n in (0, 0, 1))
            assert torch.equal(one, same) and not torch.equal(one, other)
        assert torch.equal(torch.get_rng_state(), seeded(0).get_state())  # of the calls with a generator


@pytest.mark.parametrize("cache", [None, "static"])
def test_eight_threads_generate_the_sequences_of_one(model, cache):
    def text(seed):
        settings = {"max_length": 26 + seed, "cache_implementation": cache, **NO_EOS}
        return generate(model, generator=seeded(seed), **settings)

    expected = [text(seed) for seed in range(8)]
    before = model.config.to_dict()
    with ThreadPoolExecutor(8) as threads:
        sequences = threads.map(text, range(8))
        assert all(torch.equal(*pair) for pair in zip(sequences, expected, strict=True))
    assert model.config.to_dict() == before


UNCHANGING = [
    *({"use_cache": False}, {"cache_implementation": "static"}, {"pad_token_id": EOS}),  # which is no prompt's filler
    *({"prompt": PROMPT.to(integer)} for integer in (torch.int32, torch.uint8)),
]


@pytest.mark.parametrize("settings", UNCHANGING, ids=str)
def test_neither_cache_nor_pad_token_nor_integer_type_changes_a_sequence(model, settings):
    output = generate(model, max_new_tokens=14, **GREEDY, **settings)
    assert output.dtype == torch.long and torch.equal(output, generate(model, max_new_tokens=14, **GREEDY))


def test_padding_does_not_change_a_row(model):
    alone, padding = generate(model, max_new_tokens=9, **GREEDY)[0, 6:], torch.full((1, 5), 7)  # whatever it holds
    for parts in ((padding, PROMPT), (PROMPT, padding)):
        ids = torch.cat(parts, dim=1)
        output = generate(model, ids, attention_mask=(ids != 7).long(), max_new_tokens=9, **GREEDY)
        assert torch.equal(output[0, 11:], alone)


def test_empty_prompts_start_from_bos(model):
    kwargs = GREEDY | {"max_new_tokens": 6}
    from_bos = generate(model, torch.tensor([[BOS]]), **kwargs)[0, 1:]
    torch.manual_seed(0)
    assert torch.equal(model.generate(**kwargs)[0, 1:], from_bos)
    assert torch.equal(generate(model, torch.empty(1, 0, dtype=torch.long), **kwargs)[0], from_bos)
    batch, mask = torch.tensor([[10, 11], [PAD, PAD]]), torch.tensor([[1, 1], [0, 0]])
    assert torch.equal(generate(model, batch, attention_mask=mask, **kwargs)[1, 2:], from_bos)
    nothing = torch.empty(2, 0)  # floats, as a tokenizer makes of empty texts
    for more in ({}, {"attention_mask": nothing.long()}):
        assert torch.equal(generate(model, nothing, **more, **kwargs), from_bos.repeat(2, 1))
        assert len(generate(model, nothing, num_return_sequences=2, max_new_tokens=6, **more)) == 4


@pytest.mark.parametrize("chunk_size", [1, 7, 12])
def test_chunked_prefill_gives_the_same_sequence(monkeypatch, model, chunk_size):
    """Chunks are whole patches, at least one; in a batch with padding."""
    prompts = padded([list(range(50, 58)), list(range(20, 42))])
    kwargs = GREEDY | {"max_new_tokens": 10, "attention_mask": prompts["attention_mask"]}
    expected = generate(model, prompts["input_ids"], **kwargs)
    lengths = record_calls(monkeypatch, model.model, "forward", lambda _, **inputs: inputs["input_ids"].shape[1])
    assert torch.equal(generate(model, prompts["input_ids"], prefill_chunk_size=chunk_size, **kwargs), expected)
    size = max(4, chunk_size // 4 * 4)
    assert lengths == [min(size, 24 - start) for start in range(0, 24, size)] + [4, 4]


def test_invalid_arguments_raise_before_any_work(monkeypatch, model):
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: pytest.fail("work was done before the check"))
    for kwargs, message in (
        ({"top_p": 1.5}, r"top_p=1.5: must be a fraction, in \[0, 1\]"),
        ({"top_k": -1}, "top_k=-1: must be an integer, of patches"),
        ({"min_p": float("nan")}, "min_p=nan: must be a fraction"),
        ({"bad_words_ids": [5]}, "bad_words_ids"),
        ({"repetition_penalty": -1.0}, "penalty"),
        ({"temperature": 0.2, "num_candidates": 4}, "num_candidates=4 is too few for temperature=0.2.*at least 5"),
        ({"sampling_method": "best"}, "sampling_method='best'"),
        ({"inputs_embeds": torch.zeros(1, 6, 48)}, "inputs_embeds.*pass input_ids instead"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask of shape \(1, 5\)"),
        ({"candidates": 5}, "candidates"),
        ({"inputs": PROMPT[0]}, r"a tensor of shape \(6,\): it takes ids as a tensor of shape \(batch, length\)"),
        ({"inputs": PROMPT.float()}, "ids of type torch.float32: token ids are integers"),
        ({"inputs": PROMPT.bool()}, "ids of type torch.bool: token ids are integers"),
        ({"inputs": [[1, 2]]}, "generate.. got list: it takes ids as a tensor"),
        ({"generator": 5}, "generator=5: must be a torch.Generator"),
        ({"attention_mask": [[1] * 6]}, "attention_mask that is a list"),
        ({"logits_processor": lambda ids, scores: scores}, "logits_processor=.*: must be a list of processors"),
        ({"logits_processor": ["x"]}, "logits_processor=.*: must be a list of processors"),
        ({"inputs": torch.empty(0, 4, dtype=torch.long)}, "empty batch"),
        *(({"inputs": torch.tensor([[10, x]])}, f"token id {x}, outside the vocabulary 0 … 95") for x in (96, -1)),
        *(({"prefill_chunk_size": size}, f"prefill_chunk_size={size!r}: must be a positive") for size in (0, 2.5)),
        ({"compile_config": CompileConfig()}, 'with a cache of fixed size; add cache_implementation="static"'),
    ):
        inputs = {} if "inputs_embeds" in kwargs else {"inputs": PROMPT}
        with pytest.raises(ValueError, match=message):
            model.generate(**{**inputs, **FAST, "max_new_tokens": 4, **kwargs})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_an_empty_cache_is_used(model, name):
    settings, cache = {"max_new_tokens": 8, **NO_EOS}, DynamicCache()
    assert torch.equal(generate(model, **settings, **{name: cache}), generate(model, **settings))
    assert cache.get_seq_length() == 3  # two patches of prompt and the first new one


def test_other_unsupported_inputs_raise_an_error(monkeypatch, model):
    with pytest.raises(ValueError, match="no assisted generation"):
        generate(model, assistant_model=model)
    cache = model(PROMPT[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled cache"):
        generate(model, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="no continuous batching"):
        model.generate_batch([[1, 2]])
    assert not hasattr(model, "init_continuous_batching")  # transformers serve asks so, and then generates
    assert not hasattr(model, "continuous_batching_context_manager")
    monkeypatch.setattr(model.generation_config, "bos_token_id", None)
    with pytest.raises(ValueError, match="empty prompt, and bos_token_id"):
        generate(model, torch.empty(1, 0, dtype=torch.long))


@pytest.mark.parametrize("prompts", [[[BOS, 5, 6, 7], [PAD, BOS, BOS, 8]], [[PAD, PAD, BOS, BOS]]])
def test_a_second_bos_is_warned_of(monkeypatch, model, prompts):
    warnings = []
    monkeypatch.setattr(generation_calm.logger, "warning_once", warnings.append)
    for given in (torch.tensor([[BOS, 5, BOS, BOS], [PAD, PAD, PAD, BOS]]), torch.tensor(prompts)):
        assert warnings == []
        generate(model, given, attention_mask=(given != PAD).long(), max_new_tokens=4)
    (warning,) = warnings
    assert "begins with two BOS tokens" in warning
