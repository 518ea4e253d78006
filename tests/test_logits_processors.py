"""Logits processors within patches, against a reference that decodes candidates token by token; batches; errors."""

import math

import pytest
import torch
from tiny import BOS, EOS, HEAD_TYPES, METHODS, PAD, VOCAB_SIZE, exact_model, padded, seeded
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor, NoBadWordsLogitsProcessor

from calm_transformers.model.generation_calm_samplers import PatchSampling
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.serving.batcher import Batcher

pytestmark = pytest.mark.transformers

NUM_NEW = 11
PROMPT = [BOS, 20, 21, 22, 20, 30, 9]


@pytest.fixture(scope="module")
def model():
    return exact_model(num_candidates=12)


def write(model, prompt=PROMPT, seed=0, **settings):
    ids = torch.tensor([prompt], dtype=torch.long)
    settings = {"max_new_tokens": NUM_NEW, "generator": [seeded(seed)], **settings}
    output = model.generate(ids, **settings)
    return getattr(output, "sequences", output)[0, len(prompt) :].tolist()


# The reference: one row, one candidate at a time, one position at a time


class ReferenceCandidates:
    """Candidates decoded as upstream decodes a sequence: logits, processors, argmax.

    Each has weight e^(what its tokens' logits lost by the processors). Of patches equal without processors the first
    stands for all; patches equal with them have their mean weight; those far below the heaviest have none.
    """

    has_processors = True

    def __init__(self, model, hidden_1D, randomness, text, processors, num_left):
        self.model, self.hidden_1D, self.randomness = model, hidden_1D, randomness
        self.text, self.processors, self.num_left = text, processors, num_left
        self.rows_B, self.patches, self.log_factors_BN = torch.tensor([0]), [], None

    def extend(self, rows_R, num_samples):
        assert not self.patches, "with logits processors all are drawn at once"
        noise = self.randomness.noise_arguments(self.model.head, self.hidden_1D, self.rows_B, num_samples)
        samples_N = self.model.head.sample(self.hidden_1D, num_samples=num_samples, **noise)[:, 0]
        is_tokens, autoencoder = self.model.head.samples_tokens, self.model.autoencoder
        decoded, factors = {}, []
        for sample in samples_N:
            latent_1Z = autoencoder.encode(sample[None])[0][0] if is_tokens else sample[None]
            logits_KV = autoencoder.decode(latent_1Z)[0].float()
            plain = tuple(sample.tolist()) if is_tokens else self.plain(logits_KV)
            decoded.setdefault(plain, self.decode(logits_KV))
            patch, factor = decoded[plain]
            self.patches.append(patch)
            factors.append(factor)
        means = []
        for patch in self.patches:
            own = [math.exp(f) for p, f in zip(self.patches, factors, strict=True) if p == patch]
            means.append(math.log(sum(own) / len(own)) if sum(own) else -math.inf)
        self.log_factors_BN = torch.tensor([[f if f >= max(means) - 10 else -math.inf for f in means]])

    def plain(self, logits_KV):
        ids = list(self.text)
        for logits_V in logits_KV:
            ids.append(int(self.with_min_length(ids, logits_V).argmax()))
        return tuple(ids[len(self.text) :])

    def with_min_length(self, ids, logits_V):
        """Applies a minimum length, which is no processor of the decoder's: it comes before."""
        least = [each for each in self.processors if isinstance(each, MinNewTokensLengthLogitsProcessor)]
        return LogitsProcessorList(least)(torch.tensor([ids]), logits_V[None].clone())[0]

    def decode(self, logits_KV):
        patch, factor = [], 0.0
        for logits_V in logits_KV:
            before_V = after_V = self.with_min_length(self.text + patch, logits_V)
            if EOS not in patch and len(patch) < self.num_left:
                after_V = self.processors(torch.tensor([self.text + patch]), before_V[None].clone())[0]
                after_V = after_V.masked_fill(before_V == -torch.inf, -torch.inf)
            token = int(after_V.argmax())
            is_forced = int((after_V > -torch.inf).sum()) == 1
            factor += float((before_V if is_forced else after_V)[token] - before_V.max())
            patch.append(token)
        return tuple(patch), factor

    def compare(self, rows_R, pairs="all", noise_RN=None):
        return torch.tensor([[self.patches.index(patch) for patch in self.patches]])


@torch.no_grad()
def write_by_hand(model, processors, prompt=PROMPT, seed=0, num_new=NUM_NEW, **options):
    method = PatchSampling(**{"num_candidates": 12, "do_sample": True, **options})
    ids = model.pack_for_generation(torch.tensor([prompt]), bos_token=BOS)["input_ids"]
    generators, new = [seeded(seed)], []
    while True:
        hidden_1D = model(input_ids=ids).last_hidden_state[:, -1]
        randomness = model.step_randomness(method, generators, hidden_1D)
        candidates = ReferenceCandidates(model, hidden_1D, randomness, prompt + new, processors, num_new - len(new))
        index_1, _ = method.choose(candidates, randomness)
        patch = candidates.patches[int(index_1)]
        for token in patch:
            new.append(token)
            if token == EOS or len(new) == num_new:
                return new
        ids = torch.cat([ids, torch.tensor([patch])], dim=1)


def favour_one(ids, scores):
    """A user-defined processor: favours a token that depends on the last two."""
    liked = (7 * ids[:, -1] + 3 * ids[:, -2]) % 90 + 3
    return scores.scatter_add(1, liked[:, None], torch.full_like(scores[:, :1], 4.0))


def allowed(row, ids):
    return [(int(ids[-1]) * 5 + int(ids[-2]) + i) % 90 + 3 for i in range(9)]


def processor_settings(free, patch_size):
    """Returns, by name, settings that change the sequence `free`."""
    across, within = [free[patch_size - 1], free[patch_size]], [free[0], free[1]]
    decay = {"exponential_decay_length_penalty": (2, 3.0)}
    return {
        "bad words": {"bad_words_ids": [across, within, [free[2]]]},
        "bad word across the boundary": {"bad_words_ids": [across]},
        "suppressed": {"suppress_tokens": free[::2]},
        "suppressed at the beginning": {"begin_suppress_tokens": free[:1]},
        "no repetition": {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(9, 96))},
        "penalty": {"repetition_penalty": 4.0},
        "bias": {"sequence_bias": {(free[2],): -9.0, tuple(across): -30.0, tuple(within): -30.0, (50,): 1.5}},
        "forced end": {"forced_eos_token_id": 7},
        "decay": decay,
        "decay and a minimum length": decay | {"min_new_tokens": 6},
        "allowed": {"prefix_allowed_tokens_fn": allowed},
        "user-defined": {"logits_processor": [favour_one]},
        "several": {"repetition_penalty": 2.0, "bad_words_ids": [across], "logits_processor": [favour_one]},
    }


def processors_of(model, prompt, prefix_allowed_tokens_fn=None, logits_processor=(), **settings):
    """Returns upstream's processors for one sequence, and those that are given."""
    config = GenerationConfig(**{"num_beams": 1, "num_return_sequences": 1, **settings})
    config.max_length, config._eos_token_tensor = len(prompt) + NUM_NEW, torch.tensor([EOS])
    own = prefix_allowed_tokens_fn, LogitsProcessorList(logits_processor)
    return GenerationMixin._get_logits_processor(model, config, len(prompt), None, *own, device="cpu")


PROCESSORS = list(processor_settings([10] * NUM_NEW, 2))


@pytest.mark.parametrize(
    "kind, method",
    [*((kind, "adaptive") for kind in PROCESSORS), *(("several", name) for name in METHODS if name != "adaptive")],
)
def test_sequences_equal_those_of_the_reference(model, kind, method):
    check_against_reference(model, kind, METHODS[method])


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_sequences_of_every_head_equal_those_of_the_reference(head_type):
    patch_size, kind = (2, "several") if head_type == "token_chain" else (4, "decay and a minimum length")
    model = exact_model(head_type, patch_size, seed=2, num_candidates=12)
    check_against_reference(model, kind, {"temperature": 0.5, "sampling_method": "adaptive"})


def check_against_reference(model, kind, method):
    settings = processor_settings(write(model, **method, suppress_tokens=[EOS]), model.config.patch_size)[kind]
    expected = write_by_hand(model, processors_of(model, PROMPT, **settings), **method)
    for returned in ({}, {"lazy_decoding": False}, {"return_dict_in_generate": True, "output_scores": True}):
        assert write(model, **method, **settings, **returned) == expected
    assert expected != write(model, **method)  # the processor has an effect


def test_a_processor_without_effect_leaves_the_batch_method(model):
    """With logits processors all candidates are weighed, whatever the method."""
    for name, method in METHODS.items():
        by_weight = method if name == "T = 1" else {**method, "sampling_method": "batch"}
        expected = write(model, **by_weight, **({"top_k": 12} if name == "T = 1" else {}))
        assert write(model, **method, logits_processor=[lambda ids, scores: scores]) == expected


def test_forced_bos_acts_only_after_a_prompt_of_one_token(model):
    bos, method = {"forced_bos_token_id": 44}, {"temperature": 0.5, "sampling_method": "batch"}
    expected = write_by_hand(model, processors_of(model, [BOS], **bos), prompt=[BOS], **method)
    assert expected[0] == 44 and expected == write(model, [BOS], **method, **bos) == write(model, [], **method, **bos)
    assert write(model, **method, **bos) == write(model, **method)


PROMPTS = [PROMPT, [BOS], [BOS, 33, 34, 35, 36], PROMPT + PROMPT, []]
WIDTH = 2 * len(PROMPT)
SETTINGS = [
    {"repetition_penalty": 4.0},
    {"begin_suppress_tokens": list(range(3, 60))},
    {"forced_eos_token_id": 7},
    {"exponential_decay_length_penalty": (1, 2.0)},
    {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(9, 96))},
    {"bad_words_ids": [[token] for token in range(40, 70)]},
]


@pytest.mark.parametrize("settings, side", list(zip(SETTINGS, ["left", "right"] * 3, strict=True)), ids=str)
def test_a_row_is_the_same_alone_and_in_a_padded_batch(model, settings, side):
    generators = [seeded(seed) for seed in range(len(PROMPTS))]
    settings = {"temperature": 0.5, **settings}
    sequences = model.generate(**padded(PROMPTS, side), generator=generators, max_new_tokens=NUM_NEW, **settings)
    for seed, (prompt, text) in enumerate(zip(PROMPTS, sequences[:, WIDTH:].tolist(), strict=True)):
        alone = write(model, prompt, seed, **settings)
        assert text == alone + [PAD] * (len(text) - len(alone))


def test_prefix_allowed_tokens_fn_gets_the_row_index_and_its_ids_without_padding(model):
    """Each row may generate one token of its own; rows end at different lengths."""
    seen = []

    def only(row, text):
        prompt = PROMPTS[row] or [BOS]
        assert text[: len(prompt)].tolist() == prompt
        new = text[len(prompt) :].tolist()
        assert new == [60 + row] * len(new)  # no padding, and nothing after an end
        seen.append(row)
        return [EOS] if len(new) == row + 2 else [60 + row]

    rows = model.generate(**padded(PROMPTS), prefix_allowed_tokens_fn=only, max_new_tokens=20, temperature=0.5)
    for row, text in enumerate(rows[:, WIDTH:].tolist()):
        expected = [60 + row] * (row + 2) + [EOS]
        assert text == expected + [PAD] * (len(text) - len(expected))
    assert set(seen) == set(range(len(PROMPTS)))


@pytest.mark.parametrize(
    "settings", [{}, {"lazy_decoding": False, "temperature": 0.5}, {"synced_gpus": True}], ids=str
)
def test_no_processor_is_called_after_eos(model, monkeypatch, settings):
    """Neither within a patch, nor where this process only waits for others (synced_gpus)."""

    def ends_soon(ids, scores):
        assert EOS not in ids
        forced = torch.full_like(scores, -torch.inf)
        forced[:, EOS if ids.shape[1] == len(PROMPT) + 5 else 40] = 0
        return forced

    if settings.get("synced_gpus"):
        steps = iter([True] * 4 + [False])
        monkeypatch.setattr(CALMForCausalLM, "_has_unfinished_sequences", lambda *_, **__: next(steps))
    assert write(model, logits_processor=[ends_soon], **settings) == [40] * 5 + [EOS]


def test_processors_that_leave_no_token_raise_an_error(model):
    with pytest.raises(ValueError, match="leave no token to write after a text of 7 tokens: loosen one of"):
        write(model, suppress_tokens=list(range(VOCAB_SIZE)), temperature=0.5)


def test_a_processor_of_the_generation_config_acts(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    config.repetition_penalty = 4.0
    config.save_pretrained(tmp_path)
    loaded, method = CALMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64), {"temperature": 0.5}
    with_penalty = write(model, **method, repetition_penalty=4.0)
    assert write(loaded, **method) == with_penalty != write(model, **method)
    assert write(loaded, **method, repetition_penalty=1.0) == write(model, **method)
    with Batcher(loaded) as batcher:
        assert batcher.submit(PROMPT, seed=0, **method, max_new_tokens=NUM_NEW).result(30).tokens == with_penalty


def test_a_failing_processor_ends_its_own_request_alone(model):
    def fails(ids, scores):
        if ids.shape[1] > len(PROMPT) + 5:
            raise RuntimeError("my processor fails")
        return scores

    with Batcher(model, max_rows=3) as batcher:
        settings = {"max_new_tokens": NUM_NEW, "seed": 0}
        good, bad = (batcher.submit(PROMPT, logits_processor=each, **settings) for each in ([favour_one], [fails]))
        none_left = batcher.submit(PROMPT, suppress_tokens=list(range(VOCAB_SIZE)), **settings)
        with pytest.raises(RuntimeError, match="my processor fails"):
            bad.result(30)
        with pytest.raises(ValueError, match="leave no token"):
            none_left.result(30)
        assert good.result(30).tokens == write(model, logits_processor=[favour_one])
        with pytest.raises(ValueError, match="penalty"):
            batcher.submit(PROMPT, repetition_penalty=-1.0, **settings)
        assert batcher.submit(PROMPT, **settings).result(30).tokens == write(model)


def test_custom_generate_gets_a_logits_processor_list(model):
    """Iterable and callable on ids and logits; a list that the caller passes on is used as ours is."""
    processors = {"suppress_tokens": [5], "logits_processor": [NoBadWordsLogitsProcessor([[7]])]}
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    expected = model.generate(torch.tensor([PROMPT]), **processors, **settings)
    for wrap in (lambda processors: processors, LogitsProcessorList):

        def custom(model, input_ids, logits_processor, wrap=wrap, **kwargs):
            assert isinstance(logits_processor, LogitsProcessorList)
            logits = logits_processor(input_ids, torch.zeros(1, VOCAB_SIZE))
            assert (logits == -torch.inf).nonzero()[:, 1].tolist() == [5, 7]
            return model._sample(input_ids, wrap(logits_processor), **kwargs)

        ids = model.generate(torch.tensor([PROMPT]), custom_generate=custom, **processors, **settings)
        assert torch.equal(ids, expected)
