"""Logits processors within patches: a twin that decodes candidates by hand, rows alone and in company; refusals."""

import math

import pytest
import torch
from tiny import BOS, EOS, HEAD_TYPES, PAD, VOCAB_SIZE, tiny_model
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor, NoBadWordsLogitsProcessor

from calm_transformers.model.generation_calm_samplers import BlockSchedule, PatchSampling
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
    output = model.generate(ids, **settings)
    return getattr(output, "sequences", output)[0, len(prompt) :].tolist()


# The twin: one row, one candidate at a time, one position at a time


class PoolByHand:
    """A pool of patches that are decoded as upstream decodes a text: logits, processors, argmax.

    Each weighs e^(what its tokens' logits lost by the processors); of equal patches without rules, the first stands
    for all, equal ones with rules weigh what they weigh on average, and those far below the heaviest nothing.
    """

    has_processors = True

    def __init__(self, model, hidden_1D, randomness, text, processors, num_left):
        self.model, self.hidden_1D, self.randomness = model, hidden_1D, randomness
        self.text, self.processors, self.num_left = text, processors, num_left
        self.rows_B, self.patches, self.processor_log_weights_BN = torch.tensor([0]), [], None

    def extend(self, rows_R, num_draws):
        assert not self.patches, "with rules all are drawn at once"
        noise = self.randomness.head_noise(self.model.head, self.hidden_1D, self.rows_B, num_draws)
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
        self.processor_log_weights_BN = torch.tensor([[f if f >= max(means) - 10 else -math.inf for f in means]])

    def plain(self, logits_KV):
        ids = list(self.text)
        for logits_V in logits_KV:
            ids.append(int(self.before_rules(ids, logits_V).argmax()))
        return tuple(ids[len(self.text) :])

    def before_rules(self, ids, logits_V):
        """A least length is no rule of the decoder's: it comes before."""
        least = [each for each in self.processors if isinstance(each, MinNewTokensLengthLogitsProcessor)]
        return LogitsProcessorList(least)(torch.tensor([ids]), logits_V[None].clone())[0]

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

    def compare(self, rows_R, pairs="all", noise_RN=None):
        return torch.tensor([[self.patches.index(patch) for patch in self.patches]])


@torch.no_grad()
def write_by_hand(model, processors, prompt=PROMPT, seed=0, num_new=NUM_NEW, **law):
    sampling = PatchSampling(**{"num_candidates": 12, "do_sample": True, **law})
    ids = model.pack_for_generation(torch.tensor([prompt]), bos_token=BOS)["input_ids"]
    generators, plan, new = [seeded(seed)], BlockSchedule(), []
    while True:
        hidden_1D = model(input_ids=ids).last_hidden_state[:, -1]
        randomness = model.step_randomness(sampling, generators, hidden_1D)
        pool = PoolByHand(model, hidden_1D, randomness, prompt + new, processors, num_new - len(new))
        index_1, _ = sampling.choose(pool, randomness, plan)
        patch = pool.patches[int(index_1)]
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


def rules_of(free, patch_size):
    """Of each name settings that change the text `free`."""
    across, within = [free[patch_size - 1], free[patch_size]], [free[0], free[1]]
    decay = {"exponential_decay_length_penalty": (2, 3.0)}
    return {
        "bad words": {"bad_words_ids": [across, within, [free[2]]]},
        "bad word across the border": {"bad_words_ids": [across]},
        "suppressed": {"suppress_tokens": free[::2]},
        "suppressed at the begin": {"begin_suppress_tokens": free[:1]},
        "no repetition": {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(9, 96))},
        "penalty": {"repetition_penalty": 4.0},
        "bias": {"sequence_bias": {(free[2],): -9.0, tuple(across): -30.0, tuple(within): -30.0, (50,): 1.5}},
        "forced end": {"forced_eos_token_id": 7},
        "decay": decay,
        "decay and a least length": decay | {"min_new_tokens": 6},
        "allowed": {"prefix_allowed_tokens_fn": allowed},
        "of one's own": {"logits_processor": [own_taste]},
        "several": {"repetition_penalty": 2.0, "bad_words_ids": [across], "logits_processor": [own_taste]},
    }


def processors_of(model, prompt, prefix_allowed_tokens_fn=None, logits_processor=(), **settings):
    """Upstream's own for one text, and those that are given."""
    config = GenerationConfig(**{"num_beams": 1, "num_return_sequences": 1, **settings})
    config.max_length, config._eos_token_tensor = len(prompt) + NUM_NEW, torch.tensor([EOS])
    own = LogitsProcessorList(logits_processor)
    return GenerationMixin._get_logits_processor(
        model, config, len(prompt), None, prefix_allowed_tokens_fn, own, device="cpu"
    )


RULES = list(rules_of([10] * NUM_NEW, 2))


@pytest.mark.parametrize(
    "rule, law", [*((rule, "adaptive") for rule in RULES), *(("several", law) for law in LAWS if law != "adaptive")]
)
def test_text_is_what_decoding_by_hand_gives(model, rule, law):
    check_against_twin(model, rule, LAWS[law])


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_text_of_every_head_is_what_decoding_by_hand_gives(head_type):
    patch_size, rule = (2, "several") if head_type == "token_chain" else (4, "decay and a least length")
    check_against_twin(exact_model(head_type, patch_size, seed=2), rule, LAWS["adaptive"])


def check_against_twin(model, rule, law):
    settings = rules_of(write(model, **law, suppress_tokens=[EOS]), model.config.patch_size)[rule]
    expected = write_by_hand(model, processors_of(model, PROMPT, **settings), **law)
    for returned in ({}, {"lazy_decoding": False}, {"return_dict_in_generate": True, "output_scores": True}):
        assert write(model, **law, **settings, **returned) == expected
    assert expected != write(model, **law)  # the rule had something to say


def test_a_rule_that_says_nothing_leaves_the_batch_rule(model):
    """With rules all candidates are weighed, whatever the method."""
    for name, law in LAWS.items():
        law_by_weight = law if name == "T = 1" else {**law, "sampling_method": "batch"}
        expected = write(model, **law_by_weight, **({"top_k": 12} if name == "T = 1" else {}))
        assert write(model, **law, logits_processor=[lambda ids, scores: scores]) == expected


def test_a_first_token_is_forced_after_a_prompt_of_one_only(model):
    forced, law = {"forced_bos_token_id": 44}, {"temperature": 0.5, "sampling_method": "batch"}
    expected = write_by_hand(model, processors_of(model, [BOS], **forced), prompt=[BOS], **law)
    assert expected[0] == 44 and expected == write(model, [BOS], **law, **forced) == write(model, [], **law, **forced)
    assert write(model, **law, **forced) == write(model, **law)


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


@pytest.mark.parametrize(
    "settings", [{}, {"lazy_decoding": False, "temperature": 0.5}, {"synced_gpus": True}], ids=str
)
def test_no_rule_is_asked_about_what_follows_an_end(model, monkeypatch, settings):
    """Neither within a patch, nor when this process only keeps up with others."""

    def ends_soon(ids, scores):
        assert EOS not in ids
        forced = torch.full_like(scores, -torch.inf)
        forced[:, EOS if ids.shape[1] == len(PROMPT) + 5 else 40] = 0
        return forced

    if settings.get("synced_gpus"):
        steps = iter([True] * 4 + [False])
        monkeypatch.setattr(CALMForCausalLM, "_has_unfinished_sequences", lambda *_, **__: next(steps))
    assert write(model, logits_processor=[ends_soon], **settings) == [40] * 5 + [EOS]


def test_rules_that_leave_nothing_are_refused(model):
    with pytest.raises(ValueError, match="leave no token to write after a text of 7 tokens: loosen one of"):
        write(model, suppress_tokens=list(range(VOCAB_SIZE)), temperature=0.5)


def test_a_rule_in_generation_config_acts(model, tmp_path):
    """Also a batcher's."""
    model.save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    config.repetition_penalty = 4.0
    config.save_pretrained(tmp_path)
    loaded, law = CALMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64), {"temperature": 0.5}
    with_penalty = write(model, **law, repetition_penalty=4.0)
    assert write(loaded, **law) == with_penalty != write(model, **law)
    assert write(loaded, **law, repetition_penalty=1.0) == write(model, **law)
    with Batcher(loaded) as batcher:
        assert batcher.submit(PROMPT, seed=0, **law, max_new_tokens=NUM_NEW).result(30).tokens == with_penalty


def test_a_top_k_of_50_in_a_call_acts(model):
    """Upstream puts 50 where nobody asked for any."""
    law = {"temperature": 1.0, "num_candidates": 120}
    assert write(model, **law, top_k=50) != write(model, **law) == write(model, **law, top_k=None)


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
        good, bad = (batcher.submit(PROMPT, logits_processor=rule, **ask) for rule in ([own_taste], [fails]))
        none_left = batcher.submit(PROMPT, suppress_tokens=list(range(VOCAB_SIZE)), **ask)
        with pytest.raises(RuntimeError, match="my rule fails"):
            bad.result(30)
        with pytest.raises(ValueError, match="leave no token"):
            none_left.result(30)
        assert good.result(30).tokens == write(model, logits_processor=[own_taste])
        with pytest.raises(ValueError, match="penalty"):
            batcher.submit(PROMPT, repetition_penalty=-1.0, **ask)
        assert batcher.submit(PROMPT, **ask).result(30).tokens == write(model)


def test_custom_generate_gets_upstream_s_list(model):
    """Iterable, callable on ids and logits, and a caller's own list is asked as ours is."""
    rules = {"suppress_tokens": [5], "logits_processor": [NoBadWordsLogitsProcessor([[7]])]}
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    expected = model.generate(torch.tensor([PROMPT]), **rules, **settings)
    for wrap in (lambda processors: processors, LogitsProcessorList):

        def custom(model, input_ids, logits_processor, wrap=wrap, **kwargs):
            assert isinstance(logits_processor, LogitsProcessorList)
            logits = logits_processor(input_ids, torch.zeros(1, VOCAB_SIZE))
            assert (logits == -torch.inf).nonzero()[:, 1].tolist() == [5, 7]
            return model._sample(input_ids, wrap(logits_processor), **kwargs)

        ids = model.generate(torch.tensor([PROMPT]), custom_generate=custom, **rules, **settings)
        assert torch.equal(ids, expected)
