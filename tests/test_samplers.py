"""Distributions of the temperature samplers: P^(1/T)/Z on distributions small enough to enumerate."""

# B rows of candidates, N samples, K tokens per patch, V outcomes (patches) of an enumerable distribution

import itertools
import math

import enumerable_distributions as enumerable
import pytest
import torch
from enumerable_distributions import StubBatch, chi_square_p_value, flat, outcomes_from, peaked, tempered, zipf
from reference_samplers import first_attempt_by_loops, published_probs_by_loops, table_of_pairs
from tiny import seeded

from calm_transformers.model import generation_calm_algorithms as algorithms
from calm_transformers.model import generation_calm_samplers as samplers
from calm_transformers.model.generation_calm_algorithms import first_occurrences
from calm_transformers.model.generation_calm_samplers import RepetitionAttempts, exact_temperature_sample

TEMPERATURES = (1.0, 0.9, 0.7, 0.5, 0.4, 1 / 3, 0.25)
SIGNIFICANCE = 1e-3


def classes_of(outcomes_BN: torch.Tensor) -> torch.Tensor:
    return first_occurrences(outcomes_BN[..., None])


def choice_probabilities(outcomes_BN: torch.Tensor, temperature: float) -> torch.Tensor:
    return algorithms.candidate_log_weights(classes_of(outcomes_BN), temperature).double().softmax(-1)


def sample_exactly(probs_BV, temperature, max_samples, seed):
    """Returns outcomes, whether they are exact, and numbers of samples (B,)."""
    batch, attempts = StubBatch(probs_BV, seeded(seed)), RepetitionAttempts(temperature)
    attempts.first_block = 4
    index_B, is_exact_B = exact_temperature_sample(batch, attempts, max_samples, seeded(seed + 1))
    return batch.outcomes(index_B), is_exact_B, batch.num_samples_B


@pytest.mark.parametrize("method", ["all pairs", "sorting"])
class TestFirstOccurrences:
    @pytest.fixture(autouse=True)
    def set_max_comparisons(self, method, monkeypatch):
        most = 2**30 if method == "all pairs" else 0
        monkeypatch.setattr(algorithms, "MAX_COMPARISONS", {"cpu": most, "other": most})

    @pytest.mark.parametrize("patch_size", [1, 4])
    def test_equals_loops(self, patch_size):
        patches = torch.randint(2, (5, 30, patch_size), generator=seeded())
        classes = first_occurrences(patches)
        for b, row in enumerate(patches.tolist()):
            assert classes[b].tolist() == [row.index(patch) for patch in row]
            assert algorithms.occurrence_counts(classes)[b].tolist() == [row.count(patch) for patch in row]

    def test_patches_too_large_to_pack_into_one_integer(self):
        # 128257^8 > 2^135: base-V packing modulo 2^64 would confuse patches that differ in the first tokens only.
        base = torch.randint(128257, (8,), generator=seeded())
        patches = base.repeat(1, 17, 1)
        for position in range(8):
            patches[0, 1 + position, position] = (base[position] + 1) % 128257
            patches[0, 9 + position, position] = (base[position] + 65536) % 128257
        assert first_occurrences(patches).tolist() == [list(range(17))]
        ids = torch.tensor([[[2**31 - 1], [0], [2**31 - 1]]], dtype=torch.int32)
        assert first_occurrences(ids).tolist() == [[0, 1, 0]]


class TestWeights:
    @staticmethod
    def choice(counts, temperature):
        samples = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        probabilities = choice_probabilities(samples[None], temperature)[0]
        return torch.zeros(len(counts), dtype=torch.float64).scatter_add_(0, samples, probabilities).tolist()

    def test_falls_back_to_smaller_exponents(self):
        assert self.choice([1, 1, 1, 1], 0.5) == pytest.approx([1 / 4] * 4)
        assert self.choice([2, 2, 1, 1], 1 / 3) == pytest.approx([1 / 2, 1 / 2, 0, 0])
        assert self.choice([2, 1, 1, 1], 0.28) == pytest.approx([1, 0, 0, 0])

    @pytest.mark.parametrize("n", [1, 2, 3, 4])
    def test_is_the_published_rule_at_one_over_n(self, n):
        for probs in (peaked(10), zipf(10), zipf(1000), flat(10), flat(1000)):
            for num_samples in (4, 20, 200):
                outcomes = outcomes_from(probs, 10, num_samples, seed=num_samples)
                ours = torch.zeros(10, len(probs), dtype=torch.float64)
                ours.scatter_add_(1, outcomes, choice_probabilities(outcomes, 1 / n))
                torch.testing.assert_close(ours, published_probs_by_loops(outcomes, n, len(probs)), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("exponent", [1.1, 1.5, 2.5, 3.9])
    def test_estimates_algorithm_1s_series_without_bias(self, exponent):
        # p^n (1-p)^k has the unbiased estimate C(N-n-k, c-n) / C(N, c); the coefficients are those of (1-q)^alpha.
        num_samples, n = 12, math.floor(exponent)
        weights = algorithms.repetition_log_weights(num_samples, exponent).exp()
        for count in range(n, num_samples + 1):
            coefficient, estimate = 1.0, 0.0
            for k in range(num_samples - n + 1):
                estimate += coefficient * math.comb(num_samples - n - k, count - n) / math.comb(num_samples, count)
                coefficient *= (k - (exponent - n)) / (k + 1)
            assert float(weights[count] / weights[num_samples]) == pytest.approx(estimate, abs=1e-12)

    def test_tiny_temperatures_neither_overflow_nor_lose_precision(self):
        assert self.choice([200], 1 / 200) == [1.0]
        # C(1100, 1000) / C(1099, 1000) = 1100 / 100, both far above the largest float
        assert self.choice([1100, 1099], 1e-3) == pytest.approx([11 / 12, 1 / 12], rel=1e-3)


class TestBatchRule:
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_total_variation_on_two_outcomes_without_noise(self, temperature):
        """N samples of two outcomes have one of N + 1 counts, so that both distributions are exact sums."""
        for num_samples in (5, 20, 200):
            sample_sets = (torch.arange(num_samples) >= torch.arange(num_samples + 1)[:, None]).long()
            counts = torch.arange(num_samples + 1, dtype=torch.float64)
            for p in (0.5, 0.55, 0.7, 0.9, 0.99):
                probs = torch.tensor([p, 1 - p], dtype=torch.float64)
                weight = torch.distributions.Binomial(num_samples, probs[0]).log_prob(counts).exp()
                first_wins = (choice_probabilities(sample_sets, temperature) * (sample_sets == 0)).sum(-1)
                target = tempered(probs, temperature)[0]
                ours = abs(float((weight * first_wins).sum() - target))

                floor, ceiling = math.floor(1 / temperature + 1e-9), math.ceil(1 / temperature - 1e-9)
                exponents = {floor, round(1 / temperature)} | ({ceiling} if num_samples == 200 else set())
                for n in exponents:
                    published_wins = published_probs_by_loops(sample_sets, n, 2)[:, 0]
                    assert ours <= abs(float((weight * published_wins).sum() - target)) + 1e-6


class TestAlgorithm1:
    @pytest.mark.parametrize("exponent", [1, 1.25, 1.9, 2, 2.5, 3, 4, 4.3])
    @pytest.mark.parametrize("circular", [False, True])
    def test_equals_algorithm_1_sample_by_sample(self, exponent, circular):
        samples = torch.multinomial(zipf(6), 300 * 40, replacement=True, generator=seeded()).view(300, 40)
        uniforms = torch.rand(300, 40, generator=seeded(1))
        start = algorithms.first_accepted_attempt(classes_of(samples), uniforms, 1 / exponent, circular)
        accepted = start < 40
        for b in range(300):
            expected = first_attempt_by_loops(samples[b].tolist(), uniforms[b].tolist(), exponent, circular)
            assert (int(start[b]) if accepted[b] else None) == expected
        assert accepted.any() and (exponent < 2 or not accepted.all())

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    @pytest.mark.parametrize("probs", [peaked(2, 0.9), zipf(10), zipf(300)], ids=["two", "10", "300"])
    def test_distribution(self, probs, temperature):
        num_rows = 1000 if len(probs) < 300 else 400
        outcomes, exact, _ = sample_exactly(probs.expand(num_rows, -1), temperature, 2**15, seed=2)
        assert exact.all()
        assert chi_square_p_value(outcomes, tempered(probs, temperature)) > SIGNIFICANCE

    @pytest.mark.parametrize("probs", [zipf(1000), flat(1000)], ids=["zipf", "flat"])
    def test_accepted_samples_are_exact_at_any_limit(self, probs):
        # An accepted attempt takes n samples whatever it accepts, so that at T = 1/n a limit cannot prefer a patch.
        outcomes, exact, _ = sample_exactly(probs.expand(5000, -1), 0.5, 64, seed=4)
        assert 0.02 < exact.double().mean() < 0.98
        assert chi_square_p_value(outcomes[exact], tempered(probs, 0.5)) > SIGNIFICANCE


class TestFallback:
    """Algorithm 1 limited to N samples, with the batch rule as its fallback, against the batch rule alone."""

    @pytest.mark.parametrize("num_outcomes, num_samples", [(2, 9), (3, 7), (6, 5)])
    @pytest.mark.parametrize("n", [2, 3, 4])
    def test_total_variation_over_every_sequence_of_samples(self, num_outcomes, num_samples, n):
        sequences = torch.tensor(list(itertools.product(range(num_outcomes), repeat=num_samples)))
        uniforms = torch.zeros_like(sequences).float()
        start = algorithms.first_accepted_attempt(classes_of(sequences), uniforms, 1 / n)
        batch = choice_probabilities(sequences, 1 / n)
        first = torch.nn.functional.one_hot(start, num_samples + 1)[:, :num_samples].double()
        bounded = torch.where((start < num_samples)[:, None], first, batch)
        for probs in (peaked(num_outcomes), zipf(num_outcomes), peaked(num_outcomes, 0.9)):
            sequence_weight = probs[sequences].prod(-1, keepdim=True)
            errors = []
            for choice in (bounded, batch):
                reached = torch.zeros(num_outcomes, dtype=torch.float64)
                reached.scatter_add_(0, sequences.flatten(), (sequence_weight * choice).flatten())
                errors.append(enumerable.total_variation(reached, tempered(probs, 1 / n)))
            assert errors[0] <= errors[1] + 1e-7

    @pytest.mark.parametrize("temperature", [0.9, 0.7])
    def test_total_variation_with_many_rare_patches(self, temperature):
        """Zipf with 1000 outcomes in 10 classes of about equal mass, within which the errors have one sign."""
        probs, batch_size = zipf(1000), 4000
        target = tempered(probs, temperature)
        classes = (target.cumsum(0) * 10).long().clamp(max=9)

        def by_class(probs_V):
            return torch.zeros(10, dtype=torch.float64).scatter_add_(0, classes, probs_V)

        samples, batch = outcomes_from(probs, 500, 200), torch.zeros(1000, dtype=torch.float64)
        batch.scatter_add_(0, samples.flatten(), choice_probabilities(samples, temperature).flatten() / 500)
        batch_error = enumerable.total_variation(by_class(batch), by_class(target))
        outcomes, _, num_samples = sample_exactly(probs.expand(batch_size, -1), temperature, 200, seed=10)
        reached = torch.bincount(outcomes, minlength=1000).double() / batch_size
        noise = 0.5 * float((by_class(target) / batch_size).sqrt().sum())
        assert enumerable.total_variation(by_class(reached), by_class(target)) <= batch_error + 1.5 * noise
        assert num_samples.double().mean() < 150

    @pytest.mark.parametrize("temperature, is_predicted", [(0.5, True), (1 / 3, True), (0.7, False)])
    def test_all_distinct_is_uniform_and_predicted_at_integer_exponents(self, temperature, is_predicted):
        """Also where samples are drawn in blocks."""
        candidates = StubBatch(stream_BN=torch.arange(20).expand(2000, -1))
        index, exact = exact_temperature_sample(candidates, RepetitionAttempts(temperature), 20, seeded())
        predicted_index = [noise.argmin(-1) for _, noise in candidates.compared if noise is not None]
        assert len(predicted_index) == is_predicted
        if is_predicted:
            assert not exact.any() and torch.equal(predicted_index[0], index)
            assert chi_square_p_value(candidates.outcomes(index), flat(20)) > SIGNIFICANCE

    @pytest.mark.parametrize("temperature", [1, 1 / 2, 1 / 3, 0.4])
    def test_only_the_compared_pairs_decide_an_attempt(self, temperature):
        """Treating pairs that no attempt compares as different changes no choice."""
        stream = outcomes_from(zipf(6), 300, 16)
        batches = (StubBatch(stream_BN=stream), PairwiseCandidates(stream_BN=stream))
        attempts = RepetitionAttempts(temperature)
        plain, by_pairs = (exact_temperature_sample(batch, attempts, 16, seeded(1)) for batch in batches)
        assert all(torch.equal(a, b) for a, b in zip(plain, by_pairs, strict=True))
        assert temperature == 1 or not plain[1].all()


class PairwiseCandidates(StubBatch):
    """Reports as equal only the pairs that are compared, and those that follow from them."""

    def compare(self, rows_R, pairs="all", noise_RN=None):
        outcomes = self.outcomes_BN[rows_R]
        linked = (outcomes[:, :, None] == outcomes[:, None]) & table_of_pairs(pairs, outcomes.shape[1])
        for _ in range(outcomes.shape[1].bit_length()):  # transitive closure
            linked = (linked.float() @ linked.float()) > 0
        return linked.int().argmax(-1)


def test_most_frequent_patch_breaks_ties_by_the_first_seen():
    samples = torch.tensor([[3, 5, 5, 1], [9, 2, 9, 2], [2, 9, 9, 2], [8, 7, 6, 5]])
    assert samplers.most_frequent_patch(StubBatch(stream_BN=samples), 4).tolist() == [1, 0, 0, 0]


def test_invalid_arguments_raise_before_any_sampling():
    for num_candidates, temperature, message in (
        *((200, t, r"in \(0, 2\]") for t in (0, -1, 2.0001, math.nan, math.inf, None, "0.5", True)),
        *((n, 1.0, "positive integer") for n in (0, -3, 2.5, None, True)),
        *((n, t, f"at least {least}") for n, t, least in ((1, 0.9, 2), (2, 0.4, 3), (99, 0.01, 100))),
    ):
        candidates = StubBatch(flat(2)[None])
        with pytest.raises(ValueError, match=message):
            samplers.batch_temperature_select(candidates, temperature, num_candidates)
        with pytest.raises(ValueError, match=message):
            samplers.PatchSampling(temperature=temperature, num_candidates=num_candidates)
        assert candidates.extended == []


def test_rounded_temperatures_have_integer_exponents():
    for temperature, exponent in ((0.33333334, 3), (float(torch.tensor(1 / 49)), 49), (0.3, pytest.approx(10 / 3))):
        assert algorithms.inverse_temperature(temperature) == exponent
    samplers.check_num_candidates(3, 0.3333333)
