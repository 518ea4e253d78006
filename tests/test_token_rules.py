"""Logits processors within patches: a twin that decodes candidates by hand, rows alone and in company; refusals."""

import math

import pytest
import torch
from tiny import BOS, EOS, HEAD_TYPES, PAD, VOCAB_SIZE, tiny_model, tiny_tokenizer
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as upstream

from calm_transformers.model.generation_calm_randomness import StepRandomness
from calm_transformers.model.generation_calm_rules import TokenRules
from calm_transformers.model.generation_calm_samplers import BlockPlan, PatchSampling
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.serving.batcher import Batcher

pytestmark = pytest.mark.transformers

NUM_NEW = 11
PROMPT = [BOS, 20, 21, 22, 20, 30, 9]
LAWS = {
    "T = 1": {"temperature": 1.0},
    "batch": {"temperature": 0.5, "sampling_method": "batch"},
    "adaptive": {"temperature": 0.5},
    "exact": {"temperature": 0.5, "sampling_method": "exact"},
    "T = 0.7": {"temperature": 0.7},
    "T = 1.5": {"temperature": 1.5},
    "greedy": {"do_sample": False},
}


def exact_model(head_type="energy", patch_size=4, seed=0):
    """In float64, where the shape of a batch changes no token."""
    model = tiny_model(head_type, patch_size, seed).double()
    model.generation_config.update(do_sample=True)
    model.generation_config.num_candidates, model.generation_config._from_model_config = 12, False
    return model


@pytest.fixture(scope="module")
def model():
    return exact_model()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def write(model, prompt=PROMPT, seed=0, **settings):
    """The ids that `generate` writes after one prompt."""
    ids = torch.tensor([prompt], dtype=torch.long)
    settings = {"max_new_tokens": NUM_NEW, "generator": [seeded(seed)], **settings}
    return model.generate(ids, **settings)[0, len(prompt) :].tolist()


# The twin: one row, one candidate at a time, one position at a time


class PoolByHand:
    """A pool of patches that are decoded as upstream decodes a text: logits, processors, argmax.

    Each weighs e^(what its tokens' logits lost by the processors); of equal patches without rules, the first stands
    for all, equal ones with rules weigh what they weigh on average, and those far below the heaviest nothing.
    """

    has_factors = True

    def __init__(self, model, hidden_1D, randomness, text, processors, num_left):
        self.model, self.hidden_1D, self.randomness = model, hidden_1D, randomness
        self.text, self.processors, self.num_left = text, processors, num_left
        self.rows_B, self.patches, self.log_factors_BN = torch.tensor([0]), [], None

    def extend(self, rows_R, num_draws):
        assert not self.patches, "with rules all are drawn at once"
        noise = self.randomness.for_head(self.model.head, self.hidden_1D, self.rows_B, num_draws)
        latents_N1Z = self.model.head.sample(self.hidden_1D, num_samples=num_draws, **noise)
        ruled, factors = {}, []
        for latent_Z in latents_N1Z[:, 0]:
            logits_KV = self.model.autoencoder.decode(latent_Z[None])[0].float()
            plain = self.plain(logits_KV)
            ruled.setdefault(plain, self.decode(logits_KV))
            patch, factor = ruled[plain]
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
            ids.append(int(self.before_rules(ids, logits_V).argmax()))
        return tuple(ids[len(self.text) :])

    def before_rules(self, ids, logits_V):
        """A least length is no rule of the decoder's: it comes before."""
        least = [each for each in self.processors if isinstance(each, upstream.MinNewTokensLengthLogitsProcessor)]
        return upstream.LogitsProcessorList(least)(torch.tensor([ids]), logits_V[None].clone())[0]

    def decode(self, logits_KV):
        patch, factor = [], 0.0
        for logits_V in logits_KV:
            before_V = after_V = self.before_rules(self.text + patch, logits_V)
            if EOS not in patch and len(patch) < self.num_left:
                after_V = self.processors(torch.tensor([self.text + patch]), before_V[None].clone())[0]
                after_V = after_V.masked_fill(before_V == -torch.inf, -torch.inf)
            token = int(after_V.argmax())
            is_forced = int((after_V > -torch.inf).sum()) == 1
            factor += float((before_V if is_forced else after_V)[token] - before_V.max())
            patch.append(token)
        return tuple(patch), factor

    def classes(self, rows_R, pairs="all", noise_RN=None):
        return torch.tensor([[self.patches.index(patch) for patch in self.patches]])


@torch.no_grad()
def write_by_hand(model, processors, prompt=PROMPT, seed=0, num_new=NUM_NEW, **law):
    sampling = PatchSampling(**{"num_candidates": 12, "do_sample": True, **law})
    ids = model.pack_for_generation(torch.tensor([prompt]), bos_token=BOS)["input_ids"]
    generators, plan, new = [seeded(seed)], BlockPlan(), []
    while True:
        hidden_1D = model(input_ids=ids).last_hidden_state[:, -1]
        randomness = StepRandomness.of(generators)
        if not sampling.do_sample:
            randomness = model.greedy_randomness(sampling, hidden_1D)
        pool = PoolByHand(model, hidden_1D, randomness, prompt + new, processors, num_new - len(new))
        patch = pool.patches[int(sampling.choose(pool, randomness, plan)[0])]
        for token in patch:
            new.append(token)
            if token == EOS or len(new) == num_new:
                return new
        ids = torch.cat([ids, torch.tensor([patch])], dim=1)


def own_taste(ids, scores):
    """A processor of a user's own: likes a token that depends on the last two."""
    liked = (7 * ids[:, -1] + 3 * ids[:, -2]) % 90 + 3
    return scores.scatter_add(1, liked[:, None], torch.full_like(scores[:, :1], 4.0))


def allowed(row, ids):
    return [(int(ids[-1]) * 5 + int(ids[-2]) + i) % 90 + 3 for i in range(9)]


def rules_of(name, free, patch_size):
    """Settings that change the text `free`, and upstream's processors that they stand for."""
    across, within = [free[patch_size - 1], free[patch_size]], [free[0], free[1]]
    eos, few = torch.tensor([EOS]), list(range(9, 96))
    start = len(PROMPT)
    bias = {(free[2],): -9.0, tuple(across): -30.0, tuple(within): -30.0, (50,): 1.5}
    decay = (2, 3.0)
    cases = {
        "bad_words_ids": (
            {"bad_words_ids": [across, within, [free[2]]]},
            [upstream.NoBadWordsLogitsProcessor([across, within, [free[2]]], eos)],
        ),
        "bad word across the border": (
            {"bad_words_ids": [across]},
            [upstream.NoBadWordsLogitsProcessor([across], eos)],
        ),
        "suppress_tokens": (
            {"suppress_tokens": free[::2]},
            [upstream.SuppressTokensLogitsProcessor(free[::2], device="cpu")],
        ),
        "begin_suppress_tokens": (
            {"begin_suppress_tokens": free[:1]},
            [upstream.SuppressTokensAtBeginLogitsProcessor(free[:1], start, device="cpu")],
        ),
        "no_repeat_ngram_size": (
            {"no_repeat_ngram_size": 2, "suppress_tokens": few},
            [upstream.NoRepeatNGramLogitsProcessor(2), upstream.SuppressTokensLogitsProcessor(few, device="cpu")],
        ),
        "repetition_penalty": ({"repetition_penalty": 4.0}, [upstream.RepetitionPenaltyLogitsProcessor(4.0)]),
        "sequence_bias": ({"sequence_bias": bias}, [upstream.SequenceBiasLogitsProcessor(bias)]),
        "forced_eos_token_id": (
            {"forced_eos_token_id": 7},
            [upstream.ForcedEOSTokenLogitsProcessor(start + NUM_NEW, 7, device="cpu")],
        ),
        "exponential_decay_length_penalty": (
            {"exponential_decay_length_penalty": decay},
            [upstream.ExponentialDecayLengthPenalty(decay, eos, start)],
        ),
        "with min_new_tokens": (
            {"exponential_decay_length_penalty": decay, "min_new_tokens": 6},
            [
                upstream.MinNewTokensLengthLogitsProcessor(start, 6, eos, device="cpu"),
                upstream.ExponentialDecayLengthPenalty(decay, eos, start),
            ],
        ),
        "prefix_allowed_tokens_fn": (
            {"prefix_allowed_tokens_fn": allowed},
            [upstream.PrefixConstrainedLogitsProcessor(allowed, 1)],
        ),
        "of one's own": (
            {"logits_processor": upstream.LogitsProcessorList([own_taste])},
            [own_taste],
        ),
        "several": (
            {"repetition_penalty": 2.0, "bad_words_ids": [across], "logits_processor": [own_taste]},
            [
                upstream.RepetitionPenaltyLogitsProcessor(2.0),
                upstream.NoBadWordsLogitsProcessor([across], eos),
                own_taste,
            ],
        ),
    }
    return cases[name] if name else list(cases)


RULES = rules_of(None, [10] * NUM_NEW, 2)


@pytest.mark.parametrize(
    "rule, law", [*((rule, "adaptive") for rule in RULES), *(("several", law) for law in LAWS if law != "adaptive")]
)
def test_text_is_what_decoding_by_hand_gives(model, rule, law):
    check_against_twin(model, rule, LAWS[law])


@pytest.mark.parametrize("head_type", HEAD_TYPES)
@pytest.mark.parametrize("patch_size, rule", [(2, "several"), (4, "with min_new_tokens")])
def test_text_of_every_head_is_what_decoding_by_hand_gives(head_type, patch_size, rule):
    check_against_twin(exact_model(head_type, patch_size, seed=2), rule, LAWS["adaptive"])


def check_against_twin(model, rule, law):
    free = write(model, **law, suppress_tokens=[EOS])
    settings, processors = rules_of(rule, free, model.config.patch_size)
    expected = write_by_hand(model, upstream.LogitsProcessorList(processors), **law)
    for lazy in (True, False):
        assert write(model, **law, **settings, lazy_decoding=lazy) == expected
    recorded = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=NUM_NEW,
        generator=[seeded()],
        return_dict_in_generate=True,
        output_scores=True,
        **law,
        **settings,
    )
    assert recorded.sequences[0, len(PROMPT) :].tolist() == expected
    assert expected != write(model, **law)  # the rule had something to say


def test_one_generator_for_all_rows_and_lazy_or_not(model):
    ids, settings = torch.tensor([PROMPT, PROMPT[::-1]]), {"repetition_penalty": 4.0, "temperature": 0.5}
    lazy, plain = (
        model.generate(ids, max_new_tokens=12, generator=seeded(), lazy_decoding=lazy, **settings)
        for lazy in (True, False)
    )
    assert torch.equal(lazy, plain) and not torch.equal(
        plain, model.generate(ids, max_new_tokens=12, generator=seeded(), temperature=0.5)
    )


def test_a_rule_that_says_nothing_leaves_the_batch_rule(model):
    """With rules all candidates are weighed, whatever the method."""
    for name, law in LAWS.items():
        law_by_weight = law if name == "T = 1" else {**law, "sampling_method": "batch"}
        expected = write(model, **law_by_weight, **({"top_k": 12} if name == "T = 1" else {}))
        assert write(model, **law, logits_processor=[lambda ids, scores: scores]) == expected


def test_a_first_token_is_forced_after_a_prompt_of_one_only(model):
    forced = [upstream.ForcedBOSTokenLogitsProcessor(44)]
    expected = write_by_hand(model, upstream.LogitsProcessorList(forced), prompt=[BOS], temperature=0.5)
    assert expected[0] == 44 == write(model, [BOS], temperature=0.5, forced_bos_token_id=44)[0]
    assert write(model, [BOS], temperature=0.5, forced_bos_token_id=44) == expected
    assert write(model, [], temperature=0.5, forced_bos_token_id=44) == expected
    batch = {"temperature": 0.5, "sampling_method": "batch"}
    assert write(model, **batch, forced_bos_token_id=44) == write(model, **batch)


# Rows in company


PROMPTS = [PROMPT, [BOS], [BOS, 33, 34, 35, 36], PROMPT + PROMPT, []]
SETTINGS = [
    {"repetition_penalty": 4.0},
    {"begin_suppress_tokens": list(range(3, 60))},
    {"forced_eos_token_id": 7},
    {"exponential_decay_length_penalty": (1, 2.0)},
    {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(9, 96))},
    {"bad_words_ids": [[token] for token in range(40, 70)]},
]


def padded(prompts, side):
    width = max(map(len, prompts))
    rows = [(p + [PAD] * (width - len(p)) if side == "right" else [PAD] * (width - len(p)) + p) for p in prompts]
    masks = [[1] * len(p) + [0] * (width - len(p)) for p in prompts]
    return torch.tensor(rows), torch.tensor(masks if side == "right" else [mask[::-1] for mask in masks])


@pytest.mark.parametrize("settings, side", list(zip(SETTINGS, ["left", "right"] * 3, strict=True)), ids=str)
def test_a_row_in_a_padded_batch_is_what_it_is_alone(model, settings, side):
    ids, mask = padded(PROMPTS, side)
    generators = [seeded(seed) for seed in range(len(PROMPTS))]
    settings = {"temperature": 0.5, **settings}
    texts = model.generate(ids, attention_mask=mask, generator=generators, max_new_tokens=NUM_NEW, **settings)
    for seed, (prompt, text) in enumerate(zip(PROMPTS, texts[:, ids.shape[1] :].tolist(), strict=True)):
        alone = write(model, prompt, seed, **settings)
        assert text == alone + [PAD] * (len(text) - len(alone))


def test_num_return_sequences_and_empty_prompts(model):
    settings = {"repetition_penalty": 4.0, "max_new_tokens": NUM_NEW, "temperature": 0.5}
    for prompt in (PROMPT, []):
        ids = torch.tensor([prompt, prompt], dtype=torch.long)
        generators = [seeded(seed) for seed in range(4)]
        texts = model.generate(ids, generator=generators, num_return_sequences=2, **settings)
        for seed, text in enumerate(texts[:, len(prompt) :].tolist()):
            alone = write(model, prompt, seed, **settings)
            assert text == alone + [PAD] * (len(text) - len(alone))


def test_a_function_of_rows_gets_the_rows_number_and_its_ids_without_padding(model):
    """Each row may write one token of its own; rows end at different lengths."""
    ids, mask = padded(PROMPTS, "left")
    seen = []

    def only(row, text):
        prompt = PROMPTS[row] or [BOS]
        assert text[: len(prompt)].tolist() == prompt
        new = text[len(prompt) :].tolist()
        assert new == [60 + row] * len(new)  # no padding, and nothing after an end
        seen.append(row)
        return [EOS] if len(new) == row + 2 else [60 + row]

    texts = model.generate(ids, attention_mask=mask, prefix_allowed_tokens_fn=only, max_new_tokens=20, temperature=0.5)
    for row, text in enumerate(texts[:, ids.shape[1] :].tolist()):
        expected = [60 + row] * (row + 2) + [EOS]
        assert text == expected + [PAD] * (len(text) - len(expected))
    assert set(seen) == set(range(len(PROMPTS)))


def test_no_rule_is_asked_about_what_follows_an_end(model, monkeypatch):
    """Neither within a patch, nor when this process only keeps up with others."""
    num_asked = 0

    def ends_soon(ids, scores):
        nonlocal num_asked
        num_asked += 1
        assert EOS not in ids
        forced = torch.full_like(scores, -torch.inf)
        forced[:, EOS if ids.shape[1] == len(PROMPT) + 5 else 40] = 0
        return forced

    assert write(model, logits_processor=[ends_soon]) == [40] * 5 + [EOS]
    assert write(model, logits_processor=[ends_soon], lazy_decoding=False, temperature=0.5) == [40] * 5 + [EOS]
    asked_before, num_asked, steps = num_asked, 0, iter([True] * 4 + [False])
    monkeypatch.setattr(CALMForCausalLM, "_has_unfinished_sequences", lambda *_, **__: next(steps))
    assert write(model, logits_processor=[ends_soon]) == [40] * 5 + [EOS]
    assert 0 < num_asked < asked_before


# Refusals


def test_rules_that_leave_nothing_are_refused(model):
    def nothing_after_one(ids, scores):
        return scores.masked_fill(torch.tensor(ids.shape[1] > len(PROMPT)), -torch.inf)

    with pytest.raises(ValueError, match="leave no token to write after a text of 8 tokens: loosen one of"):
        write(model, logits_processor=[nothing_after_one], temperature=0.5)


def test_compiled_steps_are_refused(model):
    with pytest.raises(ValueError, match="compile_config: compiled steps ask no logits processors"):
        write(model, repetition_penalty=2.0, compile_config=CompileConfig(), cache_implementation="static")


def test_lengths_and_sampling_alone_ask_no_rules(model, monkeypatch):
    monkeypatch.setattr(TokenRules, "decode", lambda *_: pytest.fail("asked rules"))
    write(model, temperature=0.5, min_new_tokens=3)


# Configurations


@pytest.fixture
def stated(model, tmp_path):
    """A model as it is loaded from a folder whose generation_config.json states more."""

    def load(**fields):
        model.save_pretrained(tmp_path)
        config = GenerationConfig.from_pretrained(tmp_path)
        for name, value in fields.items():
            setattr(config, name, value)
        config.save_pretrained(tmp_path)
        return CALMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)

    return load


def test_a_rule_in_generation_config_acts(model, stated):
    with_penalty = write(model, temperature=0.5, repetition_penalty=4.0)
    loaded = stated(repetition_penalty=4.0)
    assert write(loaded, temperature=0.5) == with_penalty != write(model, temperature=0.5)
    assert write(loaded, temperature=0.5, repetition_penalty=1.0) == write(model, temperature=0.5)
    with Batcher(loaded) as batcher:
        assert (
            batcher.submit(PROMPT, seed=0, temperature=0.5, max_new_tokens=NUM_NEW).result(30).tokens == with_penalty
        )


@pytest.mark.parametrize("top_k, acts", [(50, True), (7, True), (None, False)])
def test_a_top_k_in_a_configuration_acts_and_upstream_s_default_does_not(model, stated, top_k, acts):
    loaded, law = stated(top_k=top_k), {"temperature": 1.0, "num_candidates": 120}
    free, cut = (write(model, **law, top_k=k) for k in (0, top_k or 0))
    assert write(loaded, **law) == (cut if acts else free)
    assert (cut != free) == acts


def test_a_top_k_of_50_in_a_call_acts(model):
    law = {"temperature": 1.0, "num_candidates": 120}
    recorded = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=8, return_dict_in_generate=True, output_scores=True, top_k=50, **law
    )
    assert all((step.weights > 0).sum() <= 50 < step.counts.sum() for step in recorded.scores)
    assert write(model, **law, top_k=50) != write(model, **law)
    assert write(model, **law, top_k=None) == write(model, **law)


# Continuous batching


def test_a_batcher_writes_what_generate_writes(model):
    settings = [
        {"repetition_penalty": 4.0},
        {},
        {"logits_processor": [own_taste], "bad_words_ids": [[40], [41]]},
        {"sequence_bias": {(50,): 3.0}},
        {"exponential_decay_length_penalty": (1, 2.0), "min_new_tokens": 6},
        {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(9, 96))},
        {"forced_eos_token_id": 7},
        {},
    ]
    laws = list(LAWS.values())
    asked = [(PROMPTS[i % len(PROMPTS)], i, {**laws[i % len(laws)], **settings[i % len(settings)]}) for i in range(16)]
    with Batcher(model, max_rows=5) as batcher:
        futures = [batcher.submit(p, seed=i, max_new_tokens=NUM_NEW, **options) for p, i, options in asked]
        for (prompt, seed, options), future in zip(asked, futures, strict=True):
            assert future.result(60).tokens == write(model, prompt, seed, **options)


def test_a_rule_that_fails_ends_its_own_text_alone(model):
    def fails(ids, scores):
        if ids.shape[1] > len(PROMPT) + 5:
            raise RuntimeError("my rule fails")
        return scores

    with Batcher(model, max_rows=3) as batcher:
        ask = {"max_new_tokens": NUM_NEW, "seed": 0}
        good, bad, other = (
            batcher.submit(PROMPT, logits_processor=rule, **ask) for rule in ([own_taste], [fails], [])
        )
        with pytest.raises(RuntimeError, match="my rule fails"):
            bad.result(30)
        assert good.result(30).tokens == write(model, logits_processor=[own_taste])
        assert other.result(30).tokens == write(model)
        none_left = batcher.submit(PROMPT, suppress_tokens=list(range(96)), **ask)
        with pytest.raises(ValueError, match="leave no token"):
            none_left.result(30)
        with pytest.raises(ValueError, match="penalty"):
            batcher.submit(PROMPT, repetition_penalty=-1.0, **ask)
        assert batcher.submit(PROMPT, **ask).result(30).tokens == write(model)
        assert batcher.stats().failed == 2


def test_a_stop_string_and_a_rule_in_one_text(model):
    tokenizer = tiny_tokenizer()
    with Batcher(model, tokenizer) as batcher:
        ask = {"seed": 0, "max_new_tokens": 40, "ignore_eos": True, "suppress_tokens": list(range(30, 96))}
        whole = batcher.submit("Hello", **ask).result(30)
        assert all(token < 30 for token in whole.tokens)
        stop = whole.text[9:11]
        assert batcher.submit("Hello", stop=stop, **ask).result(30).text == whole.text[: whole.text.index(stop)]


@pytest.mark.parametrize("wrong", [lambda ids, scores: scores, ["x"], "x"], ids=["a function", "a list", "a text"])
def test_what_is_no_list_of_processors_is_refused(model, wrong):
    with pytest.raises(ValueError, match="logits_processor=.*: must be a list of processors, as logits_processor="):
        model.generate(torch.tensor([PROMPT]), max_new_tokens=4, logits_processor=wrong)


# What upstream hands on


def test_custom_generate_gets_upstream_s_list(model):
    """Iterable, callable on ids and logits, and a caller's own list is asked as ours is."""
    rules = {"suppress_tokens": [5], "logits_processor": [upstream.NoBadWordsLogitsProcessor([[7]])]}
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    expected = model.generate(torch.tensor([PROMPT]), **rules, **settings)
    for wrap in (lambda processors: processors, LogitsProcessorList):
        seen = []

        def custom(model, input_ids, logits_processor, wrap=wrap, seen=seen, **kwargs):
            seen.append(logits_processor)
            logits = logits_processor(input_ids, torch.zeros(1, VOCAB_SIZE))
            assert (logits == -torch.inf).nonzero()[:, 1].tolist() == [5, 7]
            return model._sample(input_ids, wrap(logits_processor), **kwargs)

        ids = model.generate(torch.tensor([PROMPT]), custom_generate=custom, **rules, **settings)
        assert torch.equal(ids, expected) and isinstance(seen[0], LogitsProcessorList)
        kinds = {upstream.SuppressTokensLogitsProcessor, upstream.NoBadWordsLogitsProcessor}
        assert {type(each) for each in seen[0]} == kinds
    nothing = model._get_logits_processor(model._prepare_generation_config(None)[0], 6)
    assert isinstance(nothing, LogitsProcessorList) and not nothing
