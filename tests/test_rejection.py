"""Rejection sampling from a head that knows probabilities: against enumerated distributions, and in `generate`."""

import math

import pytest
import torch
from enumerable_distributions import chi_square_p_value, warpers_of
from tiny import seeded, tiny_model

from calm_transformers.model.generation_calm_algorithms import NO_TRUNCATION
from calm_transformers.model.generation_calm_samplers import PatchSampling

V, SIZE, NUM_SAMPLES = 12, 48, 2000
SIGNIFICANCE = 1e-4


def model_of_chain(patch_size, seed=0):
    """Returns a model of V tokens."""
    sizes = {"vocab_size": V, "pad_token_id": 0, "autoencoder_config": {"vocab_size": V}}
    model = tiny_model("token_chain", patch_size, seed, **sizes)
    with torch.no_grad():
        model.head.chain.lm_head.weight.mul_(2)
    return model


def hidden_state(seed=3):
    return torch.randn(1, SIZE, generator=seeded(seed))


@torch.no_grad()
def enumerate_patches(head, hidden, temperature, truncation=NO_TRUNCATION):
    """Returns the probabilities (V^K,) of P^(1/T) / Z on the patches of kept tokens, in float64.

    Upstream's warpers tell which tokens a truncation keeps; P is computed patch by patch, from logits of the whole
    patch at once, which the sampler doesn't use.
    """
    patch_size = head.patch_size
    patches = torch.cartesian_prod(*[torch.arange(V)] * patch_size).view(-1, patch_size)
    logits = head.chain.teacher_forced(hidden.expand(len(patches), -1), patches)
    log_p, warpers = logits.double().log_softmax(-1), warpers_of(truncation)
    kept = torch.stack([warpers(None, logits[:, k] / temperature) for k in range(patch_size)], dim=1) > -math.inf
    of_patch = log_p.gather(-1, patches[..., None])[..., 0].sum(-1) / temperature
    is_kept = kept.gather(-1, patches[..., None])[..., 0].all(-1)
    return of_patch.masked_fill(~is_kept, -math.inf).softmax(-1)


def numbers_of(patches):
    return sum(patches[:, k] * V ** (patches.shape[1] - 1 - k) for k in range(patches.shape[1]))


def p_value(patches, target):
    """Returns the p-value of patches (N, K), none of which may have probability 0."""
    index = target.nonzero()[:, 0]
    numbers = torch.searchsorted(index, numbers_of(patches))
    assert (index[numbers.clamp(max=len(index) - 1)] == numbers_of(patches)).all()
    return chi_square_p_value(numbers, target[index])


@torch.no_grad()
def sample(model, hidden, sampling, one_block=False):
    return model.sample_patches(hidden.expand(NUM_SAMPLES, -1), sampling, seeded(), one_block=one_block)


CASES = [(2, {"temperature": 0.5}), (2, {"temperature": 1.5}), (2, {"temperature": 0.7, "top_p": 0.8})]
CASES += [(3, {"temperature": 0.5})]
SLOW_CASES = [(2, {"temperature": 0.7}), (2, {"temperature": 2.0}), (2, {"temperature": 1.0, "top_k": 3})]
SLOW_CASES += [(3, {"temperature": 1 / 3}), (3, {"temperature": 1.3, "min_p": 0.2})]


@pytest.mark.parametrize("one_block", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "patch_size, options", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_samples_follow_the_enumerated_distribution(patch_size, options, one_block):
    """Where a row accepted one; that of tokens tempered one by one, without rejection, is told apart."""
    model, hidden = model_of_chain(patch_size), hidden_state()
    sampling = PatchSampling(num_candidates=400, **options)
    drawn = sample(model, hidden, sampling, one_block)
    assert drawn.is_exact.float().mean() > (0.4 if one_block else 0.995)
    target = enumerate_patches(model.head, hidden, sampling.temperature, sampling.truncation)
    assert p_value(drawn.patches[drawn.is_exact], target) > SIGNIFICANCE
    settings = sampling.temperature, sampling.truncation
    with torch.no_grad():
        tokens, _ = model.head.propose(hidden, 200 * NUM_SAMPLES, *settings, generator=seeded(1))
    assert p_value(tokens[:, 0], target) < SIGNIFICANCE / 10


def test_after_the_last_try_patches_are_weighed():
    """At four tries in place of hundreds some rows accept none; they still come close to the target."""
    model, hidden = model_of_chain(3), hidden_state()
    drawn = sample(model, hidden, PatchSampling(temperature=0.35, num_candidates=4))
    target = enumerate_patches(model.head, hidden, 0.35)
    assert 0.05 < (~drawn.is_exact).float().mean()
    frequency = torch.bincount(numbers_of(drawn.patches), minlength=V**3) / NUM_SAMPLES
    untempered = enumerate_patches(model.head, hidden, 1.0)
    distance, distance_at_1 = ((p - target).abs().sum() / 2 for p in (frequency, untempered))
    assert distance < 0.5 * distance_at_1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_greedy_takes_the_mode(patch_size, seed):
    model, hidden = model_of_chain(patch_size), hidden_state(seed)
    patches = sample(model, hidden, PatchSampling(do_sample=False)).patches
    assert set(numbers_of(patches).tolist()) == {int(enumerate_patches(model.head, hidden, 1.0).argmax())}


def test_auto_is_rejection_for_heads_that_know_probabilities_alone():
    assert tiny_model("token_chain").patch_sampling(temperature=0.5).sampling_method == "rejection"
    energy = tiny_model("energy")
    assert energy.patch_sampling(temperature=0.5).sampling_method == "adaptive"
    with pytest.raises(ValueError, match="EnergyHead knows no probabilities"):
        energy.patch_sampling(temperature=0.5, sampling_method="rejection")
    with pytest.raises(ValueError, match="EnergyHead knows no probabilities"):
        energy.generate(torch.tensor([[3, 4, 5, 6]]), do_sample=True, sampling_method="rejection", max_new_tokens=4)


def test_scores_are_the_tries_and_logits_processors_weigh_them():
    model, ids = tiny_model("token_chain"), torch.tensor([[3, 4, 5, 6]])
    settings = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 8}
    outputs = model.generate(ids, **settings, output_scores=True, return_dict_in_generate=True)
    for scores, patch in zip(outputs.scores, outputs.sequences[0, 4:].split(4), strict=True):
        assert torch.equal(scores.patches[0, scores.chosen[0]], patch)
        torch.testing.assert_close(scores.weights.sum(-1), torch.ones(1))
    banned = outputs.sequences[0, 4].item()
    assert banned not in model.generate(ids, **settings, bad_words_ids=[[banned]])[0, 4:].tolist()
