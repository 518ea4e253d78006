"""Truncations and T > 1: hand values, upstream's warpers, compiled and eager, and the distributions of choices."""

import functools
import math
from functools import partial

import pytest
import torch
from choice_distributions import DISTRIBUTIONS, SampleSets, plug_in_weights, target_distribution
from enumerable_distributions import chi_square_p_value, tempered, total_variation, warpers_of
from tiny import seeded

from calm_transformers.model import generation_calm_algorithms as algorithms
from calm_transformers.model.generation_calm_algorithms import NO_TRUNCATION, Truncation, candidate_weights, truncated
from calm_transformers.model.generation_calm_samplers import RepetitionAttempts

TRUNCATIONS = [
    *(Truncation(top_k=1), Truncation(top_k=5), Truncation(top_p=0.0), Truncation(top_p=0.95)),
    *(Truncation(min_p=0.05), Truncation(min_p=1.0), Truncation(top_p=0.5, min_p=0.5)),
    *(Truncation(top_k=30, top_p=0.9, min_p=0.1), NO_TRUNCATION),
]


def repeated(*counts):
    """Returns first occurrences (1, N) of samples that repeat `counts` times."""
    return torch.cat([torch.full((count,), sum(counts[:i])) for i, count in enumerate(counts)])[None]


def by_patch(weights_1N, counts):
    """Returns the weight of each patch of `repeated(*counts)`."""
    return [float(weights_1N[0, sum(counts[:i])]) for i in range(len(counts))]


class TestTruncated:
    @pytest.mark.parametrize("truncation", TRUNCATIONS)
    @pytest.mark.parametrize("size", [1, 2, 500])
    def test_keeps_what_upstream_s_warpers_keep(self, truncation, size):
        logits_BN = 3 * torch.randn(20, size, generator=seeded(size))
        warped_BN = warpers_of(truncation)(None, logits_BN)
        kept_BN = truncated(logits_BN.softmax(-1), truncation)
        assert torch.equal(kept_BN > 0, warped_BN > -math.inf)
        assert (kept_BN > 0).any(-1).all()
        torch.testing.assert_close(kept_BN / kept_BN.sum(-1, keepdim=True), warped_BN.softmax(-1))

    def test_ties_keep_the_earlier(self):
        equal = torch.full((1, 10), 0.1)
        for truncation in (Truncation(top_k=3), Truncation(top_p=0.3), Truncation(top_p=0.21)):
            assert (truncated(equal, truncation)[0] > 0).tolist() == [True] * 3 + [False] * 7
        assert (truncated(equal, Truncation(min_p=1.0)) > 0).all()

    @pytest.mark.parametrize("threshold", [0.05, 0.1, 0.25, 0.5, 0.9])
    def test_exact_edges(self, threshold):
        """top_p keeps exactly 20·n·top_p of 20·n equal patches; min_p keeps a count of min_p times the largest."""
        for size in range(20, 201, 20):
            weights = candidate_weights(torch.arange(size)[None], 1.0, Truncation(top_p=threshold))
            assert int((weights > 0).sum()) == round(threshold * size)
            counts = (size, round(threshold * size), round(threshold * size) - 1)
            weights = candidate_weights(repeated(*counts), 1.0, Truncation(min_p=threshold))
            assert int((weights > 0).sum()) == 2


class TestWeights:
    @pytest.mark.parametrize(
        "temperature, truncation", [(0.5, Truncation(top_k=2)), (1.5, NO_TRUNCATION), (1.0, Truncation(top_p=0.7))]
    )
    def test_choices_follow_the_weights(self, temperature, truncation):
        first_1N = repeated(1, 4, 2, 3, 2, 1, 2)
        weights_1N = candidate_weights(first_1N, temperature, truncation)
        noise_BN = torch.empty(20_000, first_1N.shape[1]).exponential_(generator=seeded())
        chosen = algorithms.sample_by_weight(first_1N.expand(20_000, -1), noise_BN, temperature, truncation)
        assert not (weights_1N[0, chosen] == 0).any()
        kept = weights_1N[0].nonzero()[:, 0]
        index, probs = torch.searchsorted(kept, chosen), weights_1N[0, kept].double()
        assert chi_square_p_value(index, probs / probs.sum()) > 1e-3

    @pytest.mark.parametrize(
        "counts, f1, f2", [((1, 1, 1, 2, 5), 3, 1), ((1, 1, 1, 1), 4, 0), ((1, 2, 2), 1, 2), ((3, 4), 0, 0)]
    )
    @pytest.mark.parametrize("temperature", [1.25, 2.0])
    def test_unseen_patches_by_hand(self, counts, f1, f2, temperature):
        """Chao's f1 (f1 − 1) / (2 (f2 + 1)) unseen patches of weight C(0, 1/T) are shared among the f1 singletons."""
        s = 1 / temperature
        unseen = f1 * (f1 - 1) / (2 * (f2 + 1)) / (math.gamma(s + 1) * math.gamma(1 - s))
        seen = [math.gamma(c + 1) / (math.gamma(s + 1) * math.gamma(c - s + 1)) for c in counts]
        expected = [w + (unseen / f1 if c == 1 else 0) for w, c in zip(seen, counts, strict=True)]
        found = by_patch(candidate_weights(repeated(*counts), temperature), counts)
        assert found == pytest.approx([w / sum(expected) for w in expected], rel=1e-5)

    def test_algorithm_1_needs_t_below_1(self):
        with pytest.raises(ValueError, match="Algorithm 1 sharpens; above 1 patches are chosen by weight"):
            RepetitionAttempts(1.5)


@pytest.mark.parametrize(
    "backend, temperature, truncation",
    [
        ("aot_eager", 0.5, NO_TRUNCATION),
        ("aot_eager", 1.5, Truncation(5, 0.9, 0.05)),
        pytest.param("inductor", 1.5, Truncation(5, 0.9, 0.05), marks=pytest.mark.slow),
    ],
)
def test_the_compiled_choice_equals_the_eager_one(backend, temperature, truncation):
    first_BN = algorithms.first_occurrences(torch.randint(30, (16, 60, 1), generator=seeded()))
    noise_BN = torch.empty(16, 60).exponential_(generator=seeded(1))
    choose = partial(algorithms.sample_by_weight, temperature=temperature, truncation=truncation)
    torch._dynamo.reset()  # the limit on recompilations counts per code object
    compiled = torch.compile(choose, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(specialize_float=True):  # as generation_calm_compiled.py does
        chosen_B = compiled(first_BN, noise_BN)
    assert torch.equal(chosen_B, choose(first_BN, noise_BN))


@functools.cache
def sample_sets(name, num_samples):
    return SampleSets(DISTRIBUTIONS[name], 2000, num_samples)


class TestChoiceDistribution:
    """Total variation between the choice's distribution and the target, below bounds that a wrong method exceeds."""

    @pytest.mark.parametrize(
        "name, num_samples, temperature, bound",
        [("zipf(20)", 50, 1.5, 0.012), ("zipf(1000)", 1000, 2.0, 0.09), ("peaked(50)", 200, 2.0, 0.012)],
    )
    def test_flattened(self, name, num_samples, temperature, bound):
        samples, target = sample_sets(name, num_samples), target_distribution(DISTRIBUTIONS[name], temperature)

        def distance(weight_fn):
            return total_variation(samples.choice_distribution(weight_fn), target)

        assert distance(partial(candidate_weights, temperature=temperature)) < bound
        assert distance(partial(plug_in_weights, temperature=temperature)) > bound
        assert distance(partial(candidate_weights, temperature=1.0)) > bound  # not flattened

    @pytest.mark.parametrize(
        "name, num_samples, temperature, truncation, bound",
        [
            ("zipf(100)", 1000, 1.0, Truncation(top_k=5), 0.04),
            ("zipf(1000)", 200, 0.5, Truncation(top_k=5), 0.05),
            ("zipf(100)", 200, 0.5, Truncation(top_p=0.9), 0.035),
            ("zipf(100)", 200, 1.0, Truncation(min_p=0.1), 0.15),
            ("zipf(100)", 1000, 1.5, Truncation(top_k=5), 0.06),
        ],
    )
    def test_truncated(self, name, num_samples, temperature, truncation, bound):
        samples = sample_sets(name, num_samples)
        target = target_distribution(DISTRIBUTIONS[name], temperature, truncation)

        def distance(**settings):
            return total_variation(samples.choice_distribution(partial(candidate_weights, **settings)), target)

        assert distance(temperature=temperature, truncation=truncation) < bound
        assert distance(temperature=temperature) > bound  # not truncated
        other = 1.0 if temperature != 1 else 0.5
        assert distance(temperature=other, truncation=truncation) > bound


class TestTargetDistribution:
    def test_by_hand(self):
        probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        top_2 = Truncation(top_k=2)
        torch.testing.assert_close(target_distribution(probs, 1.0, top_2), torch.tensor([0.625, 0.375, 0.0]).double())
        torch.testing.assert_close(target_distribution(probs, 0.5), (probs**2 / 0.38))
        torch.testing.assert_close(target_distribution(probs, 2.0), tempered(probs, 2.0))
        assert by_patch(plug_in_weights(repeated(4, 1), 2.0), (4, 1)) == pytest.approx([2 / 3, 1 / 3])
        ties = torch.tensor([0.4, 0.2, 0.2, 0.2], dtype=torch.float64)  # each of the three is kept equally often
        torch.testing.assert_close(target_distribution(ties, 1.0, top_2), torch.tensor([6, 1, 1, 1]).double() / 9)
