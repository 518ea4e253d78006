"""Continuous batching: a sequence's tokens don't depend on the batch; sequences start, end, fail and are counted."""

from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from functools import partial
from unittest.mock import Mock

import fresh_process
import model_copies
import peft
import pytest
import torch
from server_process import wait_for
from test_logits_processors import favour_one
from tiny import BOS, EOS, HEAD_TYPES, METHODS, exact_model, record_calls, seeded, tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.serving.batcher import Batcher, BatcherClosed, QueueFull
from calm_transformers.serving.engine import Engine, SlotCache

SAMPLING_SETTINGS = [
    *METHODS.values(),
    {"temperature": 0.4, "sampling_method": "exact"},
    {"do_sample": False, "repetition_penalty": 4.0},
    {"temperature": 0.5, "sampling_method": "batch", "sequence_bias": {(50,): 3.0}},
    {"temperature": 0.5, "logits_processor": [favour_one], "bad_words_ids": [[40], [41]]},
    {"temperature": 1.5, "exponential_decay_length_penalty": (1, 2.0), "min_new_tokens": 6},
    {"temperature": 0.5, "sampling_method": "exact", "no_repeat_ngram_size": 2, "suppress_tokens": list(range(9, 96))},
    {"temperature": 0.7, "forced_eos_token_id": 7},
]
PROMPTS = ["Hello you", "a", "the quick brown fox jumps over the lazy dog", "zz z", ""]
ENDLESS = {"max_new_tokens": 4000, "ignore_eos": True}
wait_until = partial(wait_for, "the condition", seconds=20)


def generate_alone(model, prompt, seed, **settings):
    ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt])
    output = model.generate(ids, generator=[seeded(seed)], **settings)
    return output[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def model():
    return exact_model()


@pytest.fixture
def batcher(model):
    with Batcher(model, tiny_tokenizer(), max_rows=3, max_waiting=4, max_draws=100) as batcher:
        yield batcher


# Equal to `generate`


@pytest.mark.transformers
@pytest.mark.parametrize("head_type, patch_size", [*((head, 4) for head in HEAD_TYPES), ("energy", 1), ("energy", 2)])
def test_sequences_of_many_settings_equal_generate_for_each_alone(head_type, patch_size):
    model, tokenizer = exact_model(head_type, patch_size), tiny_tokenizer()
    requests = []
    for i, settings in enumerate(SAMPLING_SETTINGS):
        requests.append((PROMPTS[i % len(PROMPTS)], i, {**settings, "max_new_tokens": 3 + 4 * (i % 5)}))
    with Batcher(model, tokenizer, max_rows=4, max_waiting=20, prefill_chunk_size=8) as batcher:
        futures = [batcher.submit(prompt, seed=seed, **settings) for prompt, seed, settings in requests]
        for (prompt, seed, settings), future in zip(requests, futures, strict=True):
            result = future.result(60)
            assert result.tokens == generate_alone(model, prompt, seed, **settings)
            assert result.text == tokenizer.decode(result.tokens, skip_special_tokens=True)
            assert result.finish_reason == ("stop" if result.tokens[-1] == EOS else "length")
        assert batcher.stats().finished == len(requests) and batcher.stats().running == 0


def test_prompts_of_many_lengths_are_prefilled_in_few(model, monkeypatch):
    """oneDNN keeps memory for each."""
    seen = record_calls(monkeypatch, Engine, "_forward", lambda _, *args: args[2].shape[1])
    with Batcher(model, max_rows=1) as batcher:
        for ids in [list(range(10, 11 + 4 * n)) for n in range(1, 16)]:
            tokens = batcher.submit(ids, temperature=1.0, seed=3, max_new_tokens=6).result(60).tokens
            assert tokens == generate_alone(model, ids, 3, temperature=1.0, max_new_tokens=6)
    assert set(seen) == {*range(1, 9), 10, 12, 14, 16}


def test_long_prompts_are_prefilled_in_chunks_first_come_first_served_while_others_generate(model):
    """A sequence that moves to a freed slot doesn't move up in the order."""
    deltas = []
    with Batcher(model, tiny_tokenizer(), max_rows=5, prefill_chunk_size=8) as batcher:

        def submit(prompt, name):
            return batcher.submit(prompt, temperature=1.0, on_piece=lambda _: deltas.append(name), **ENDLESS)

        futures = [submit("ab", "short")]
        wait_until(lambda: len(deltas) > 1)
        deltas.clear()
        first = batcher.submit("abc", max_new_tokens=12, ignore_eos=True, temperature=1.0)
        futures += [submit("x" * 79, number) for number in range(3)]
        wait_until(lambda: 2 in deltas)
        assert first.done()
        [future.cancel() for future in futures]
    starts = [deltas.index(number) for number in range(3)]
    num_before = [deltas[:start].count("short") for start in starts]
    assert starts == sorted(starts) and all(n >= 10 * (i + 1) - 2 for i, n in enumerate(num_before)), num_before


def test_a_seed_or_its_generator_reproduces_a_text_and_a_random_seed_is_returned(batcher):
    def write(**own):
        settings = {"max_new_tokens": 40, "temperature": 0.5, "ignore_eos": True}
        return batcher.submit("once", **settings, **own).result(60)

    assert write(generator=seeded(7)).text == write(seed=7).text != write(seed=8).text
    unseeded, other = write(), write()
    assert unseeded.text != other.text and write(seed=unseeded.seed).text == unseeded.text


def test_a_temperature_turns_sampling_on():
    with Batcher(tiny_model()) as batcher:  # do_sample=False in its generation configuration
        for more, num_texts in (({"temperature": 1.0}, 2), ({}, 1)):
            texts = [batcher.submit([BOS], seed=seed, max_new_tokens=20, **more).result().tokens for seed in (0, 1)]
            assert len(set(map(tuple, texts))) == num_texts


def test_a_text_ends_before_a_stop_string_and_at_an_eos_inside_a_patch(batcher, model):
    settings = {"max_new_tokens": 60, "temperature": 0.5, "seed": 3, "ignore_eos": True}
    whole = batcher.submit("once", **settings).result(60)
    stop = whole.text[9:12]
    cut = batcher.submit("once", stop=["nowhere to be found", stop], **settings).result(60)
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    settings = {"min_new_tokens": 30, "max_new_tokens": 60, "temperature": 1.0}
    ended = batcher.submit("once", seed=3, **settings).result(60)
    assert EOS not in ended.tokens[:30] and ended.tokens == generate_alone(model, "once", 3, **settings)


def test_a_stream_yields_the_text_patch_by_patch(batcher):
    settings = {"max_new_tokens": 23, "seed": 1, "ignore_eos": True}
    whole = batcher.submit("once", **settings).result(60)
    deltas = list(batcher.stream("once", **settings))
    assert [len(delta.tokens) for delta in deltas] == [4] * 5 + [3]
    assert "".join(delta.text for delta in deltas) == whole.text
    assert sum((delta.tokens for delta in deltas), []) == whole.tokens


def test_the_queue_is_bounded_and_cancelled_requests_leave_the_batch_within_a_patch_or_the_queue(batcher):
    steps = []
    future = batcher.submit("once", on_piece=steps.append, **ENDLESS)
    wait_until(lambda: len(steps) > 3)
    future.cancel()
    num_steps = len(steps)
    wait_until(lambda: batcher.stats().running == 0)
    assert len(steps) <= num_steps + 1
    with pytest.raises(CancelledError):
        future.result()
    stream = batcher.stream("once", **ENDLESS)
    next(stream)
    stream.close()
    wait_until(lambda: batcher.stats().running == 0)
    running = [batcher.submit("once", **ENDLESS) for _ in range(3)]
    waiting = batcher.submit("once", max_new_tokens=4000)
    wait_until(lambda: batcher.stats().waiting == 1)
    waiting.cancel()
    wait_until(lambda: batcher.stats().waiting == 0)
    assert batcher.stats().running == 3
    running += [batcher.submit("once", **ENDLESS) for _ in range(4)]
    with pytest.raises(QueueFull, match="7 of 7 places are taken, 1 more are needed"):
        batcher.submit("once", max_new_tokens=4)
    [future.cancel() for future in running]
    wait_until(lambda: batcher.stats().running == 0)
    assert batcher.stats().cancelled == 10
    assert batcher.submit("once", max_new_tokens=4).result(60).tokens


def test_a_failed_step_ends_its_requests_and_later_ones_succeed(monkeypatch, batcher):
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_forward_last_patches", Mock(side_effect=RuntimeError("out of memory")))
        futures = [batcher.submit("once", max_new_tokens=20) for _ in range(2)]
        for future in futures:
            with pytest.raises(RuntimeError, match="out of memory"):
                future.result(60)
    assert len(batcher.submit("once", max_new_tokens=20, ignore_eos=True).result(60).tokens) == 20


@pytest.mark.parametrize("on_piece, temperature", [(Mock(side_effect=RuntimeError("no thanks")), 0.7), (None, 1.0)])
def test_a_failing_callback_or_sampling_ends_only_its_own_requests(monkeypatch, model, batcher, on_piece, temperature):
    sample_patches = model.sample_patches

    def fail_at_1(hidden, sampling, *others, **named):
        if sampling.temperature == 1:
            raise RuntimeError("no thanks")
        return sample_patches(hidden, sampling, *others, **named)

    monkeypatch.setattr(model, "sample_patches", fail_at_1)
    settings = {"max_new_tokens": 20, "seed": 3, "ignore_eos": True}
    other = batcher.submit("once", temperature=0.5, **settings)
    with pytest.raises(RuntimeError, match="no thanks"):
        batcher.submit("once", temperature=temperature, on_piece=on_piece, **settings).result(60)
    assert len(other.result(60).tokens) == 20 and batcher.stats().failed == 1


@pytest.mark.parametrize("lengths, is_dead", [((4000, 4000, 4000, 4000), True), ((400, 400, 4000), False)])
def test_an_error_in_removing_a_sequence_ends_all_requests(monkeypatch, model, lengths, is_dead):
    """Between steps, for a cancelled sequence, it ends the thread, too; in a step, for a finished one, it doesn't."""
    monkeypatch.setattr(SlotCache, "copy_slot", Mock(side_effect=RuntimeError("the device is gone")))
    with Batcher(model, tiny_tokenizer(), max_rows=3) as batcher:
        futures = [batcher.submit("once", max_new_tokens=n, ignore_eos=True, temperature=1.0) for n in lengths]
        wait_until(lambda: batcher.stats().running == 3)
        if is_dead:
            futures.pop(0).cancel()
        _, unfinished = wait(futures, timeout=60)
        assert not unfinished and batcher.stats().running == 0 and batcher.is_open != is_dead
        assert {str(future.exception()) for future in futures} == {"the device is gone"}
        if is_dead:
            with pytest.raises(BatcherClosed):
                batcher.submit("once")


def test_invalid_arguments_raise_an_error(batcher):
    for settings, sentence in (
        ({"max_new_tokens": "9"}, "max_new_tokens='9': must be an integer of at least 1"),
        ({"temperature": "0.5"}, "temperature='0.5': sampling needs a temperature in"),
        ({"logits_processor": max}, "max.*: must be a list of processors, as"),
        ({"prompt": 3}, "prompt=3: must be a string or token ids"),
        ({"max_new_tokens": 10**6}, "The prompt has 5 tokens and max_new_tokens=1000000: their sum may be at most"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1: must be an integer of at least 0"),
        ({"seed": 0.5}, "seed=0.5: must be a 64-bit integer"),
        ({"seed": 1, "generator": torch.Generator()}, "a seed or a generator, not both"),
        ({"typical_p": 0.5}, "typical_p: unknown option"),
        ({"prompt": [1.5]}, "holds 1.5: token ids are integers"),
        ({"prompt": "\ud800"}, "a lone surrogate at character 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            batcher.submit(**{"prompt": "once", **settings})


@pytest.mark.parametrize("name, value", [("max_rows", 0), ("max_waiting", -1), ("prefill_chunk_size", 0)])
def test_invalid_limits_raise_an_error(model, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: must (be at least 1|not be negative)"):
        Batcher(model, **{name: value})


def test_without_a_tokenizer_prompts_and_results_are_ids(model):
    with Batcher(model) as batcher:
        result = batcher.submit(torch.tensor([BOS, 40, 41]), max_new_tokens=8, seed=0).result(60)
        again = batcher.submit([BOS, 40, 41], max_new_tokens=8, seed=0).result(60)
        assert result.text is None and result.tokens == again.tokens
        assert [delta.text for delta in batcher.stream([BOS], max_new_tokens=4, ignore_eos=True)] == [None]
        for settings in ({"prompt": "text"}, {"prompt": [BOS], "stop": "a"}):
            with pytest.raises(ValueError, match="tokenizer: Batcher"):
                batcher.submit(**settings)


@pytest.mark.transformers
def test_unsupported_models_raise_an_error():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    flexible, scaling = tiny_model(), {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    flexible.config._attn_implementation = "flex_attention"
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=2)
    for model, sentence in (
        (LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)), "LlamaForCausalLM is not supported"),
        (flexible, "attn_implementation='flex_attention'"),
        (tiny_model(rope_scaling=scaling), "rope_type='dynamic'"),
        (peft.get_peft_model(tiny_model(), virtual), "doesn't support virtual tokens"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Batcher(model.eval())


# Lifecycle, threads and adapters


def test_closing_finishes_or_cancels_requests(model):
    batcher = Batcher(model, tiny_tokenizer())
    futures = [batcher.submit("once", max_new_tokens=20, ignore_eos=True) for _ in range(3)]
    batcher.close()
    assert all(len(future.result().tokens) == 20 for future in futures) and not batcher.is_open
    with pytest.raises(BatcherClosed):
        batcher.submit("once")
    batcher = Batcher(model, tiny_tokenizer(), max_rows=2)
    futures = [batcher.submit("once", **ENDLESS) for _ in range(4)]
    batcher.close(cancel=True, wait=False)
    assert all(future.cancelled() for future in futures)
    batcher.close()
    with pytest.raises(ZeroDivisionError), Batcher(model, tiny_tokenizer()) as batcher:
        future = batcher.submit("once", **ENDLESS)
        1 / 0  # noqa: B018
    assert future.cancelled()


def test_threads_may_submit_at_the_same_time(model):
    with Batcher(model, tiny_tokenizer(), max_rows=4, max_waiting=100) as batcher, ThreadPoolExecutor(20) as threads:
        submit = lambda seed: batcher.submit("once", seed=seed, max_new_tokens=12).result(60).tokens  # noqa: E731
        tokens, stats = list(threads.map(submit, range(20))), batcher.stats()
    assert tokens == [generate_alone(model, "once", seed, max_new_tokens=12) for seed in range(20)]
    assert stats.finished == 20 and stats.new_tokens == sum(map(len, tokens))
    assert stats.prompt_tokens == 20 * 5 and stats.steps < stats.new_tokens and stats.busy_seconds > 0


@pytest.mark.transformers
def test_a_model_with_an_adapter(model):
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(exact_model(), lora)
    ids, settings = torch.tensor([[BOS, 40, 41, 42]]), {"max_new_tokens": 16, "eos_token_id": None}
    expected = adapted.generate(input_ids=ids, generator=[seeded()], **settings)[0, 4:]
    with Batcher(adapted) as batcher:
        result = batcher.submit(ids[0], seed=0, max_new_tokens=16, ignore_eos=True).result(60)
    assert result.tokens == expected.tolist() != generate_alone(model, ids[0].tolist(), 0, **settings)


@pytest.mark.slow
@pytest.mark.transformers
def test_a_model_with_remote_code_generates_the_same(tmp_path):
    exact_model().save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    tokens = fresh_process.call(model_copies.generate_by_batcher, tmp_path / "home", folder=folder).result
    assert tokens == generate_alone(CALMForCausalLM.from_pretrained(folder), [BOS, 40], 7, max_new_tokens=20)
