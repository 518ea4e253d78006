"""Lazy decoding: the same patches as decoding everything, from less work."""

from pathlib import Path

import fresh_process
import pytest
import torch
import torch.nn.functional as F
from memory_of_draws import memory_of_draws
from sampler_twins import table_of_pairs
from tiny import BOS, HEAD_TYPES, VOCAB_SIZE, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from calm_transformers.model import generation_calm_candidates, modeling_calm_autoencoder
from calm_transformers.model.generation_calm_candidates import LazyPool, PlainPool
from calm_transformers.model.generation_calm_samplers import (
    BlockPlan,
    PatchSampling,
    compared_pairs,
    exact_temperature_sample,
)

K, Z = 4, 16
NO_EOS = {"eos_token_id": None}


def repeating_model(head_type="energy", spread=0.1):
    """Candidates repeat, whole or in part: the latents hardly depend on the noise, and few tokens are possible."""
    model = tiny_model(head_type)
    with torch.no_grad():
        if head_type == "energy":
            model.head.out_proj.weight.mul_(spread)
            model.head.out_proj.bias.normal_(generator=torch.Generator().manual_seed(0))
        model.autoencoder.decoder.lm_head.weight[8:] *= 0.01
    return model


@pytest.fixture(scope="module")
def autoencoder():
    return repeating_model().autoencoder


def some_latents(num_draws, num_rows, seed=0, spread=0.3):
    """Some far apart, some close to another."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, num_rows, Z, generator=generator)
    which = torch.randint(3, (num_draws,), generator=generator)
    return centres[which] + spread * torch.randn(num_draws, num_rows, Z, generator=generator)


def pool_of(kind, autoencoder, latents_NBZ, **options):
    """A pool whose rows draw the given latent vectors, in order."""

    def draw(rows, num_draws):
        return latents_NBZ[pool.num_drawn :][:num_draws, rows]

    pool = kind(draw, torch.arange(latents_NBZ.shape[1]), autoencoder, **options)
    return pool


def full_pool(kind, autoencoder, latents_NBZ, **options):
    pool = pool_of(kind, autoencoder, latents_NBZ, **options)
    pool.extend(pool.rows_B, len(latents_NBZ))
    return pool


# The product with the vocabulary


def logits(autoencoder, states):
    return autoencoder.decoder.finish(states) @ autoencoder.decoder.lm_head.weight.T


@pytest.mark.parametrize("tile", [1, 7, 32, 95, 96, 200])
@pytest.mark.parametrize("num_states", [1, 2, 16, 37])
def test_tokens_are_the_argmax_whatever_the_tiles(monkeypatch, autoencoder, num_states, tile):
    monkeypatch.setitem(modeling_calm_autoencoder.VOCABULARY_TILE, "cpu", tile)
    monkeypatch.setitem(modeling_calm_autoencoder.STATES_AT_ONCE, "cpu", 20)
    states = torch.randn(num_states, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(num_states) % K
    plain = logits(autoencoder, states)
    assert torch.equal(autoencoder.read_tokens(states, positions), plain.argmax(-1))
    forbidden_KV = F.one_hot(torch.tensor([0, 1, 2, 3]), VOCAB_SIZE).bool()
    forbidden_KV[:, 5:] = True
    expected = plain.masked_fill(forbidden_KV[positions], -torch.inf).argmax(-1)
    assert torch.equal(autoencoder.read_tokens(states, positions, forbidden_KV), expected)


def test_of_equal_logits_the_lowest_id_wins(monkeypatch):
    monkeypatch.setitem(modeling_calm_autoencoder.VOCABULARY_TILE, "cpu", 10)
    model = tiny_model()
    with torch.no_grad():
        model.autoencoder.decoder.lm_head.weight.zero_()
        model.autoencoder.decoder.lm_head.weight[[25, 28, 40, 90]] = 1.0
    model.autoencoder.decoder.layers[1].mlp.down_proj.weight.data.zero_()
    ids = model.autoencoder.read_tokens(torch.tensor([[1.0] * 32, [-1.0] * 32]), torch.tensor([0, 1]))
    assert ids.tolist() == [25, 0]


@pytest.mark.parametrize("tile", [7, 96])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_of_equal_logits_in_bfloat16_the_first_wins_on_every_path(monkeypatch, head_type, tile):
    """Every row of the output matrix stands there twice: half the vocabulary is never written."""
    monkeypatch.setitem(modeling_calm_autoencoder.VOCABULARY_TILE, "cpu", tile)
    model = tiny_model(head_type).bfloat16()
    with torch.no_grad():
        model.autoencoder.decoder.lm_head.weight[VOCAB_SIZE // 2 :] = model.autoencoder.decoder.lm_head.weight[
            : VOCAB_SIZE // 2
        ]
    latents = model.head.sample(torch.randn(2, 48).bfloat16(), num_samples=200)
    states = model.autoencoder.decode_states(latents).flatten(0, -2)
    positions = torch.arange(len(states)) % K
    logits_MV = model.autoencoder.decode(latents).flatten(0, -2)
    first_M = (logits_MV == logits_MV.amax(-1, keepdim=True)).int().argmax(-1)
    assert (first_M < VOCAB_SIZE // 2).all()
    assert torch.equal(model.autoencoder.decode_tokens(latents).flatten(), first_M)
    assert torch.equal(model.autoencoder.read_tokens(states, positions), first_M)
    one_by_one = [model.autoencoder.read_tokens(states[i : i + 1], positions[i : i + 1]) for i in range(40)]
    assert torch.equal(torch.cat(one_by_one), first_M[:40])
    monkeypatch.setattr(modeling_calm_autoencoder, "is_plain_linear", lambda layer: False)
    assert torch.equal(model.autoencoder.read_tokens(states, positions), first_M)


@pytest.mark.parametrize("at_once", [1, 96, 1000, 10**6])
def test_a_layer_that_cannot_be_cut_is_read_as_a_whole(monkeypatch, autoencoder, at_once):
    """Quantised, offloaded or hooked: through the module, so that what it does beside its weight is done."""
    monkeypatch.setitem(modeling_calm_autoencoder.LOGITS_PER_CHUNK, "cpu", at_once)
    states, positions = torch.randn(37, 32, generator=torch.Generator().manual_seed(0)), torch.arange(37) % K
    forbidden_KV = F.one_hot(torch.tensor([0, 1, 2, 3]), VOCAB_SIZE).bool()
    expected = [autoencoder.read_tokens(states, positions, forbidden) for forbidden in (None, forbidden_KV)]
    replaced, autoencoder.decoder.lm_head.forward = autoencoder.decoder.lm_head.forward, lambda x: -replaced(x)
    assert torch.equal(autoencoder.read_tokens(states, positions), (-logits(autoencoder, states)).argmax(-1))
    del autoencoder.decoder.lm_head.forward
    calls = []
    hook = autoencoder.decoder.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        for ids, forbidden in zip(expected, (None, forbidden_KV), strict=True):
            assert torch.equal(autoencoder.read_tokens(states, positions, forbidden), ids)
    finally:
        hook.remove()
    assert len(calls) == 2 * -(-37 // max(1, at_once // VOCAB_SIZE))


# Equal patches


@pytest.mark.parametrize("few", [0, 8, 10**6])
@pytest.mark.parametrize("forbid", [False, True])
def test_candidates_are_equal_exactly_where_their_patches_are(monkeypatch, autoencoder, few, forbid):
    """In growing blocks, in each of which fewer rows draw."""
    monkeypatch.setattr(generation_calm_candidates, "FEW_TOKENS", few)
    forbidden_KV = torch.arange(VOCAB_SIZE).expand(K, -1) % 3 == 0 if forbid else None
    latents = some_latents(25, 5)
    lazy, plain = (pool_of(kind, autoencoder, latents, forbidden_KV=forbidden_KV) for kind in (LazyPool, PlainPool))
    for rows, num_draws in [([0, 1, 2, 3, 4], 6), ([0, 2, 4], 6), ([4], 12), ([4], 1)]:
        rows = torch.tensor(rows)
        for pool in (lazy, plain):
            pool.extend(rows, num_draws)
        patches = autoencoder.decode_tokens(latents[: lazy.num_drawn, rows], forbidden_KV).transpose(0, 1).tolist()
        expected = [[row.index(patch) for patch in row] for row in patches]
        assert lazy.classes(rows).tolist() == plain.classes(rows).tolist() == expected
        last = torch.full_like(rows, lazy.num_drawn - 1)
        assert lazy.tokens(rows, last).tolist() == plain.tokens(rows, last).tolist() == [row[-1] for row in patches]
    assert len({tuple(patch) for patch in patches[0]}) < 25, "some repeat"


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("temperature", [1 / 2, 1 / 3])
def test_pairs_that_are_asked_for_are_equal_exactly_where_their_patches_are(
    monkeypatch, autoencoder, temperature, few
):
    monkeypatch.setattr(generation_calm_candidates, "FEW_TOKENS", few)
    latents = some_latents(29, 3, spread=0.05)
    lazy, plain = (pool_of(kind, autoencoder, latents) for kind in (LazyPool, PlainPool))
    for rows, num_draws in [([0, 1, 2], 9), ([0, 2], 20)]:
        rows, word = torch.tensor(rows), compared_pairs(temperature)
        for pool in (lazy, plain):
            pool.extend(rows, num_draws)
        equal = [
            classes[:, :, None] == classes[:, None] for classes in (pool.classes(rows, word) for pool in (lazy, plain))
        ]
        pairs = table_of_pairs(word, lazy.num_drawn)
        assert torch.equal(equal[0] & pairs, equal[1] & pairs)
        assert not equal[1][:, pairs].all() and (equal[1] & pairs).sum() > len(rows) * lazy.num_drawn, "some repeat"


@pytest.mark.parametrize("temperature", [1 / 2, 1 / 3])
def test_the_exact_sampler_makes_the_choices_of_decoding_everything(autoencoder, temperature):
    """Of the same draws, in rows that accept and in rows that fall back."""
    which = torch.randint(2, (8, 200), generator=torch.Generator().manual_seed(0))
    latents, results = some_latents(1, 2)[0, which] + 0.01 * some_latents(8, 200), []
    for kind in (LazyPool, PlainPool):
        pool = pool_of(kind, autoencoder, latents)
        plan = BlockPlan()
        plan.note([4])
        generator = torch.Generator().manual_seed(0)
        index, exact, num_draws = exact_temperature_sample(pool, temperature, 8, generator, plan)
        results.append((index, pool.tokens(pool.rows_B, index), exact, num_draws))
    for lazy, plain in zip(*results, strict=True):
        assert torch.equal(lazy, plain)
    assert exact[num_draws == 8].any() and not exact.all() and (num_draws == 4).any()


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.5, "sampling_method": "batch"},
    {"temperature": 0.5},
    {"temperature": 0.7},
    {"temperature": 1 / 3},
    {"temperature": 0.4, "sampling_method": "exact"},
    {"do_sample": False},
    {"temperature": 0.5, "min_new_tokens": 6, "eos_token_id": 5},
]


@pytest.mark.parametrize(
    "head_type, settings, dtype",
    [
        *(("energy", settings, torch.float32) for settings in SETTINGS),
        *((head_type, {"temperature": 0.5}, torch.bfloat16) for head_type in HEAD_TYPES),
        *((head_type, {"temperature": 0.7}, torch.float32) for head_type in HEAD_TYPES if head_type != "energy"),
    ],
    ids=str,
)
def test_the_text_is_that_of_decoding_everything(head_type, settings, dtype):
    model = repeating_model(head_type).to(dtype)
    prompts = torch.tensor([[BOS, 10, 11], [BOS, 12, 13], [BOS, 14, 15]])
    texts = []
    for lazy in (True, False):
        torch.manual_seed(0)
        common = {"do_sample": True, "num_candidates": 20, "max_new_tokens": 24, "lazy_decoding": lazy, **NO_EOS}
        texts.append(model.generate(prompts, attention_mask=torch.ones_like(prompts), **common | settings))
        state = torch.random.get_rng_state()
    assert torch.equal(*texts)
    assert torch.equal(state, torch.random.get_rng_state())


def test_lazy_decoding_is_chosen_on_a_cpu_and_can_be_switched_off():
    model = tiny_model()
    kinds = [type(model.new_pool(None, torch.arange(1), PatchSampling(lazy_decoding=x))) for x in (None, True, False)]
    assert kinds == [LazyPool, LazyPool, PlainPool]


# Memory


class LargestTensor(TorchDispatchMode):
    """Counts the bytes of the largest tensor that is made while it is active."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("temperature", [1 / 2, 1 / 3, 0.7])
def test_no_table_of_all_pairs_is_made(temperature):
    """10,000 draws of one row that hardly ever accepts, and then the whole pool told apart."""
    latents = 5 * torch.randn(10_000, 1, Z, generator=torch.Generator().manual_seed(0))
    pool = pool_of(LazyPool, tiny_model().autoencoder, latents)
    with LargestTensor() as largest:
        _, _, num_draws = exact_temperature_sample(pool, temperature, 10_000, torch.Generator().manual_seed(0))
        pool.classes(pool.rows_B)
    assert num_draws > 8000
    assert largest.bytes <= 10_000 * K * 64 * 4  # of each token the widest layer; a table of bools is 100 MB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory as Linux tells it")
@pytest.mark.parametrize("temperature", [1 / 2, 0.7])
def test_ten_thousand_draws_of_a_row_stay_within_100_mb(tmp_path, temperature):
    """Beyond their latent vectors, in a process of their own, whose allocator keeps no large piece that is free."""
    settings = {"num_draws": 10_000, "temperature": temperature}
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    memory = fresh_process.call(memory_of_draws, tmp_path, environment, **settings).result
    assert memory is None or 10 < memory < 100


# Work


def test_distinct_candidates_cost_one_token_each_and_one_patch(monkeypatch):
    """Last tokens that all differ: nothing else is read but the rest of the chosen patch."""
    monkeypatch.setattr(generation_calm_candidates, "FEW_TOKENS", 0)
    work, read = [], LazyPool.read

    def distinct(self, rows, draws, positions):
        work.append(len(rows))
        assert read(self, rows, draws, positions).shape == rows.shape
        return draws + 10 * positions

    monkeypatch.setattr(LazyPool, "read", distinct)
    pool = full_pool(LazyPool, tiny_model().autoencoder, torch.randn(30, 2, Z))
    assert pool.classes(pool.rows_B).tolist() == [list(range(30))] * 2
    assert work == [2 * 30]
    assert pool.tokens(pool.rows_B, torch.tensor([3, 7])).tolist() == [[3, 13, 23, 33], [7, 17, 27, 37]]
    assert work == [2 * 30, 2 * 3]


def test_tokens_are_read_once(monkeypatch, autoencoder):
    """However the candidates come in blocks, and the chosen patch included, no token is read twice."""
    seen, read = set(), LazyPool.read

    def once(self, *index):
        triples = list(zip(*(i.tolist() for i in index), strict=True))
        assert seen.isdisjoint(triples) and len(set(triples)) == len(triples)
        seen.update(triples)
        return read(self, *index)

    monkeypatch.setattr(LazyPool, "read", once)
    pool = pool_of(LazyPool, autoencoder, some_latents(40, 2))
    for num_draws in (4, 4, 8, 24):
        pool.extend(pool.rows_B, num_draws)
        pool.classes(pool.rows_B)
    pool.tokens(pool.rows_B, torch.tensor([39, 38]))
    assert 2 * 40 < len(seen) < 2 * 40 * K


def test_one_candidate_is_decoded_once_in_full(monkeypatch, autoencoder):
    work, read = [], LazyPool.read
    monkeypatch.setattr(
        LazyPool, "read", lambda self, rows, *index: work.append(len(rows)) or read(self, rows, *index)
    )
    latents = some_latents(1, 3)
    pool = full_pool(LazyPool, autoencoder, latents)
    assert pool.classes(pool.rows_B).tolist() == [[0]] * 3 and work == []
    patches = pool.tokens(pool.rows_B, torch.zeros(3, dtype=torch.long))
    assert torch.equal(patches, autoencoder.decode_tokens(latents)[0]) and work == [3 * K]


@pytest.mark.parametrize("temperature, tokens", [(1 / 2, 8 + 2 * 3), (1 / 3, 9 + 3 * 3)])
def test_only_candidates_that_may_equal_one_they_are_compared_with_are_read(
    monkeypatch, autoencoder, temperature, tokens
):
    """Candidates 0, 2, 3, 4 and 7 are equal: at T = 1/2 2 and 3 are compared, at T = 1/3 3 and 4 as well."""
    monkeypatch.setattr(generation_calm_candidates, "FEW_TOKENS", 0)
    work, token_N = [], torch.tensor([7, 11, 7, 7, 7, 15, 16, 7, 18])
    monkeypatch.setattr(LazyPool, "read", lambda self, _, draws, __: work.append(len(draws)) or token_N[draws])
    pool = full_pool(LazyPool, autoencoder, torch.zeros(9, 1, Z))
    pool.classes(pool.rows_B, compared_pairs(temperature))
    assert sum(work) == tokens
    assert pool.classes(pool.rows_B).tolist() == [[0, 1, 0, 0, 0, 5, 6, 0, 8]]


def test_the_choice_among_distinct_candidates_needs_no_second_product(monkeypatch):
    """The whole step reads the vocabulary once: last tokens that all differ, and the patch that is then chosen."""
    model, work = tiny_model(), []
    monkeypatch.setattr(generation_calm_candidates, "FEW_TOKENS", 0)

    def distinct(self, rows, draws, positions):
        work.append(len(rows))
        return draws + 40 * positions

    monkeypatch.setattr(LazyPool, "read", distinct)
    sampling = PatchSampling(temperature=0.5, num_candidates=30)
    plan = BlockPlan()
    plan.note([30])
    patches_RK = model.next_patches(torch.randn(2, 48), sampling, torch.Generator().manual_seed(0), plan=plan)
    assert work == [2 * (30 + K - 1)]
    assert torch.equal(patches_RK - patches_RK[:, :1], 40 * torch.arange(K).expand(2, -1))
