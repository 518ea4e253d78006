"""Lazy decoding of candidates: the same patches as eager decoding, from less work."""

from pathlib import Path

import fresh_process
import pytest
import torch
import torch.nn.functional as F
from memory_of_samples import memory_of_samples
from tiny import BOS, HEAD_TYPES, METHODS, VOCAB_SIZE, record_calls, seeded, tiny_model

from calm_transformers.model import generation_calm_candidates, kernels_calm, modeling_calm_autoencoder
from calm_transformers.model.generation_calm_algorithms import compared_pairs
from calm_transformers.model.generation_calm_candidates import CandidateBatch, LazyCandidateBatch
from calm_transformers.model.generation_calm_samplers import PatchSampling, StepRandomness

K, Z = 4, 16
NO_EOS = {"eos_token_id": None}


def repeating_model(head_type="energy"):
    """Returns a model whose candidates repeat: latents hardly depend on the noise, and few tokens are possible."""
    model = tiny_model(head_type)
    with torch.no_grad():
        if head_type == "energy":
            model.head.out_proj.weight.mul_(0.1)
            model.head.out_proj.bias.normal_(generator=seeded())
        model.autoencoder.decoder.lm_head.weight[8:] *= 0.01
    return model


@pytest.fixture(scope="module")
def autoencoder():
    return repeating_model().autoencoder


def some_latents(num_samples, num_rows):
    """Returns latents of which some are far apart and some close together."""
    generator = seeded()
    centres = torch.randn(3, num_rows, Z, generator=generator)
    which = torch.randint(3, (num_samples,), generator=generator)
    return centres[which] + 0.3 * torch.randn(num_samples, num_rows, Z, generator=generator)


def make_candidates(kind, autoencoder, latents_NBZ, num_samples=0, **options):
    """Returns candidates that are the given latents, in order, with `num_samples` of them drawn."""

    class Head:
        samples_tokens = False

        def sample(self, numbers_R1, num_samples, generator, temperature):
            return latents_NBZ[candidates.num_drawn :][:num_samples, numbers_R1[:, 0]]

    candidates = kind(Head(), torch.arange(latents_NBZ.shape[1])[:, None], StepRandomness(), autoencoder, **options)
    if num_samples:
        candidates.extend(candidates.rows_B, num_samples)
    return candidates


# The argmax over the vocabulary

STATES = torch.randn(37, 32, generator=seeded())
FORBIDDEN_KV = (torch.arange(VOCAB_SIZE) >= 5) | F.one_hot(torch.arange(K), VOCAB_SIZE).bool()


def logits(decoder, states):
    return decoder.final_states(states) @ decoder.lm_head.weight.T


@pytest.mark.parametrize("num_states, tile", [(1, 7), (2, 1), (16, 32), (37, 95), (37, 96), (2, 200)])
def test_tokens_are_the_argmax_at_every_tile_size(monkeypatch, autoencoder, num_states, tile):
    monkeypatch.setitem(kernels_calm.VOCABULARY_TILE, "cpu", tile)
    monkeypatch.setitem(kernels_calm.STATES_CHUNK_SIZE, "cpu", 20)
    decoder, states, positions = autoencoder.decoder, STATES[:num_states], torch.arange(num_states) % K
    logits_MV = logits(decoder, states)
    assert torch.equal(decoder.most_probable_tokens(states, positions), logits_MV.argmax(-1))
    expected = logits_MV.masked_fill(FORBIDDEN_KV[positions], -torch.inf).argmax(-1)
    assert torch.equal(decoder.most_probable_tokens(states, positions, FORBIDDEN_KV), expected)


@pytest.mark.parametrize("tile", [7, 96])
@torch.no_grad()
def test_equal_bfloat16_logits_give_the_first_token_on_every_path(monkeypatch, tile):
    """The output matrix holds every row twice: the second half of the vocabulary is never chosen."""
    monkeypatch.setitem(kernels_calm.VOCABULARY_TILE, "cpu", tile)
    model = tiny_model().bfloat16()
    decoder = model.autoencoder.decoder
    decoder.lm_head.weight[VOCAB_SIZE // 2 :] = decoder.lm_head.weight[: VOCAB_SIZE // 2]
    latents = model.head.sample(torch.randn(2, 48).bfloat16(), num_samples=200)
    states = decoder.expand(latents).flatten(0, -2)
    positions = torch.arange(len(states)) % K
    logits_MV = model.autoencoder.decode(latents).flatten(0, -2)
    first_M = (logits_MV == logits_MV.amax(-1, keepdim=True)).int().argmax(-1)
    assert (first_M < VOCAB_SIZE // 2).all()
    assert torch.equal(model.autoencoder.decode_tokens(latents).flatten(), first_M)
    assert torch.equal(decoder.most_probable_tokens(states, positions), first_M)
    one_by_one = [decoder.most_probable_tokens(states[i : i + 1], positions[i : i + 1]) for i in range(40)]
    assert torch.equal(torch.cat(one_by_one), first_M[:40])
    monkeypatch.setattr(modeling_calm_autoencoder, "is_plain_linear", lambda layer: False)
    assert torch.equal(decoder.most_probable_tokens(states, positions), first_M)


@pytest.mark.parametrize("chunk_size", [1, 1000, 10**6])
def test_a_layer_that_cannot_be_tiled_is_called_as_a_module(monkeypatch, autoencoder, chunk_size):
    """Quantised, offloaded or hooked layers are called, so that their hooks and replaced forwards run."""
    monkeypatch.setitem(modeling_calm_autoencoder.LOGITS_CHUNK_SIZE, "cpu", chunk_size)
    decoder, positions = autoencoder.decoder, torch.arange(37) % K
    layer, forward, expected = decoder.lm_head, decoder.lm_head.forward, -logits(decoder, STATES)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda x: -forward(x))
        assert torch.equal(decoder.most_probable_tokens(STATES, positions), expected.argmax(-1))
    allowed = expected.masked_fill(FORBIDDEN_KV[positions], -torch.inf)
    with layer.register_forward_hook(lambda layer, args, output: -output):
        assert torch.equal(decoder.most_probable_tokens(STATES, positions, FORBIDDEN_KV), allowed.argmax(-1))


@pytest.mark.parametrize("few, forbid", [(0, True), (8, False), (10**6, True)])
def test_candidates_are_equal_exactly_where_their_patches_are(monkeypatch, autoencoder, few, forbid):
    """Samples are drawn in growing blocks, in each of which fewer rows draw."""
    monkeypatch.setattr(generation_calm_candidates, "FEW_TOKENS", few)
    forbidden_KV = torch.arange(VOCAB_SIZE).expand(K, -1) % 3 == 0 if forbid else None
    latents, kinds = some_latents(25, 5), (LazyCandidateBatch, CandidateBatch)
    lazy, eager = (make_candidates(kind, autoencoder, latents, forbidden_KV=forbidden_KV) for kind in kinds)
    for rows, num_samples in [([0, 1, 2, 3, 4], 6), ([0, 2, 4], 6), ([4], 12), ([4], 1)]:
        rows = torch.tensor(rows)
        for candidates in (lazy, eager):
            candidates.extend(rows, num_samples)
        patches = autoencoder.decode_tokens(latents[: lazy.num_drawn, rows], forbidden_KV).transpose(0, 1).tolist()
        expected = [[row.index(patch) for patch in row] for row in patches]
        assert lazy.compare(rows).tolist() == eager.compare(rows).tolist() == expected
        last = torch.full_like(rows, lazy.num_drawn - 1)
        for candidates in (lazy, eager):
            assert candidates.decode_chosen(rows, last).tolist() == [row[-1] for row in patches]
    assert len({tuple(patch) for patch in patches[0]}) < 25, "some repeat"


SETTINGS = [*METHODS.values(), {"temperature": 0.5, "min_new_tokens": 6, "eos_token_id": 5}]
SETTINGS += [{"temperature": 0.4, "sampling_method": "exact"}]


@pytest.mark.parametrize(
    "head_type, settings, dtype",
    [
        *(("energy", settings, torch.float32) for settings in SETTINGS),
        *((head_type, {"temperature": 0.5}, torch.bfloat16) for head_type in HEAD_TYPES),
        *((head_type, {"temperature": 0.7}, torch.float32) for head_type in HEAD_TYPES if head_type != "energy"),
    ],
    ids=str,
)
def test_lazy_and_eager_decoding_generate_the_same_sequences(head_type, settings, dtype):
    model = repeating_model(head_type).to(dtype)
    prompts = torch.tensor([[BOS, 10, 11], [BOS, 12, 13], [BOS, 14, 15]])
    sequences = []
    for lazy in (True, False):
        torch.manual_seed(0)
        common = {"do_sample": True, "num_candidates": 20, "max_new_tokens": 24, "lazy_decoding": lazy, **NO_EOS}
        sequences.append(model.generate(prompts, attention_mask=torch.ones_like(prompts), **common | settings))
        state = torch.random.get_rng_state()
    assert torch.equal(*sequences)
    assert torch.equal(state, torch.random.get_rng_state())


def test_lazy_decoding_is_the_default_on_a_cpu_and_can_be_disabled():
    model = tiny_model()
    for lazy, kind in ((None, LazyCandidateBatch), (True, LazyCandidateBatch), (False, CandidateBatch)):
        settings = PatchSampling(lazy_decoding=lazy)
        assert type(model.new_candidates(torch.zeros(1, 48), StepRandomness(), settings)) is kind


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory as Linux tells it")
@pytest.mark.parametrize("temperature", [1 / 2, 0.7])
def test_ten_thousand_samples_of_a_row_stay_within_100_mb(tmp_path, temperature):
    """Beyond their latents, so without a table of all pairs; with an allocator that keeps no freed memory."""
    settings = {"num_samples": 10_000, "temperature": temperature}
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    memory = fresh_process.call(memory_of_samples, tmp_path, environment, **settings).result
    assert memory is None or 10 < memory < 100


@pytest.mark.parametrize("temperature, tokens", [(1 / 2, 8 + 2 * 3), (1 / 3, 9 + 3 * 3)])
def test_only_candidates_that_may_have_a_duplicate_are_decoded(monkeypatch, autoencoder, temperature, tokens):
    """Candidates 0, 2, 3, 4 and 7 are equal: at T = 1/2 2 and 3 are compared, at T = 1/3 3 and 4 as well."""
    monkeypatch.setattr(generation_calm_candidates, "FEW_TOKENS", 0)
    token_N = torch.tensor([7, 11, 7, 7, 7, 15, 16, 7, 18])
    monkeypatch.setattr(LazyCandidateBatch, "decode_at", lambda self, rows, draws, positions: token_N[draws])
    work = record_calls(monkeypatch, LazyCandidateBatch, "decode_at", lambda tokens, *_: len(tokens))
    candidates = make_candidates(LazyCandidateBatch, autoencoder, torch.zeros(9, 1, Z), 9)
    candidates.compare(candidates.rows_B, compared_pairs(temperature))
    assert sum(work) == tokens
    assert candidates.compare(candidates.rows_B).tolist() == [[0, 1, 0, 0, 0, 5, 6, 0, 8]]


def test_the_choice_among_distinct_candidates_needs_no_second_matmul(monkeypatch):
    """One vocabulary matmul decodes both the last tokens, which all differ, and the patch that is then chosen."""
    monkeypatch.setattr(generation_calm_candidates, "FEW_TOKENS", 0)
    monkeypatch.setattr(LazyCandidateBatch, "decode_at", lambda self, rows, draws, positions: draws + 40 * positions)
    work = record_calls(monkeypatch, LazyCandidateBatch, "decode_at", lambda tokens, *_: len(tokens))
    sampling = PatchSampling(temperature=0.5, num_candidates=16)
    sample = tiny_model().sample_patches(torch.randn(2, 48), sampling, seeded())
    assert work == [2 * (16 + K - 1)]
    assert torch.equal(sample.patches - sample.patches[:, :1], 40 * torch.arange(K).expand(2, -1))
