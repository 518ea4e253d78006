"""The temperature samplers as laws: P^(1/T)/Z on distributions small enough to enumerate."""

# B rows of a pool, N draws, K tokens per patch, V outcomes (patches) of an enumerable distribution

import itertools
import math
import random

import pytest
import torch
from enumerable_distributions import (
    FixedPlan,
    StubPool,
    chi_square_p_value,
    flat,
    outcomes_from,
    peaked,
    seeded,
    sharpened,
    total_variation,
    zipf,
)
from sampler_twins import first_attempt_by_loops, published_laws_by_loops, table_of_pairs

from calm_transformers.model import generation_calm_algorithms
from calm_transformers.model.generation_calm_algorithms import (
    candidate_log_weights,
    first_accepted_attempt,
    first_occurrences,
    inverse_temperature,
    occurrence_counts,
    repetition_log_weights,
)
from calm_transformers.model.generation_calm_samplers import (
    BlockSchedule,
    batch_temperature_select,
    check_num_candidates,
    exact_temperature_sample,
    most_frequent_patch,
)

TEMPERATURES = (1.0, 0.9, 0.7, 0.5, 0.4, 1 / 3, 0.25)
SIGNIFICANCE = 1e-3


def classes_of(outcomes_BN: torch.Tensor) -> torch.Tensor:
    return first_occurrences(outcomes_BN[..., None])


def choice_probabilities(outcomes_BN: torch.Tensor, temperature: float) -> torch.Tensor:
    return candidate_log_weights(classes_of(outcomes_BN), temperature).double().softmax(-1)


def batch_law(outcomes_BN: torch.Tensor, temperature: float, num_outcomes: int) -> torch.Tensor:
    """Mean over pools of the probability that the batch rule chooses each outcome; shape (V,)."""
    law_V = torch.zeros(num_outcomes, dtype=torch.float64)
    choice_BN = choice_probabilities(outcomes_BN, temperature)
    return law_V.scatter_add_(0, outcomes_BN.flatten(), choice_BN.flatten()) / len(outcomes_BN)


def sample_exactly(law_BV, temperature, max_draws, seed):
    """Outcomes, whether they are exact, and numbers of draws (B,)."""
    pool = StubPool(law_BV, seeded(seed))
    index_B, is_exact_B = exact_temperature_sample(pool, temperature, max_draws, seeded(seed + 1), FixedPlan(4))
    return pool.outcomes(index_B), is_exact_B, pool.num_draws_B


@pytest.mark.parametrize("way", ["all pairs at once", "sorted"])
class TestClasses:
    @pytest.fixture(autouse=True)
    def size_that_is_compared_at_once(self, way, monkeypatch):
        most = 2**30 if way == "all pairs at once" else 0
        monkeypatch.setattr(generation_calm_algorithms, "MAX_COMPARISONS", {"cpu": most, "other": most})

    @pytest.mark.parametrize("patch_size", [1, 4])
    def test_equals_loops(self, patch_size):
        patches = torch.randint(2, (5, 30, patch_size), generator=seeded())
        classes = first_occurrences(patches)
        for b, row in enumerate(patches.tolist()):
            assert classes[b].tolist() == [row.index(patch) for patch in row]
            assert occurrence_counts(classes)[b].tolist() == [row.count(patch) for patch in row]

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
        """Probability of each patch, given how often each was seen."""
        draws = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        probabilities = choice_probabilities(draws[None], temperature)[0]
        return torch.zeros(len(counts), dtype=torch.float64).scatter_add_(0, draws, probabilities).tolist()

    def test_hand_worked_between_whole_exponents(self):
        # s = 3/2: C(1, s) = 4/(3 pi), C(2, s) = 16/(3 pi), C(3, s) = 32/(3 pi)
        assert repetition_log_weights(3, 1.5).exp().tolist() == pytest.approx(
            [0] + [x / math.pi for x in (4 / 3, 16 / 3, 32 / 3)]
        )
        assert self.choice([3, 2, 1], 2 / 3) == pytest.approx([8 / 13, 4 / 13, 1 / 13])

    def test_falls_back_to_smaller_exponents(self):
        assert self.choice([1, 1, 1, 1], 0.5) == pytest.approx([1 / 4] * 4)
        assert self.choice([2, 2, 1, 1], 1 / 3) == pytest.approx([1 / 2, 1 / 2, 0, 0])
        assert self.choice([2, 1, 1, 1], 0.28) == pytest.approx([1, 0, 0, 0])

    @pytest.mark.parametrize("n", [1, 2, 3, 4])
    def test_is_the_published_rule_at_one_over_n(self, n):
        for law in (peaked(10), zipf(10), zipf(1000), flat(10), flat(1000)):
            for num_draws in (4, 20, 200):
                outcomes = outcomes_from(law, 10, num_draws, seed=num_draws)
                ours = torch.zeros(10, len(law), dtype=torch.float64)
                ours.scatter_add_(1, outcomes, choice_probabilities(outcomes, 1 / n))
                torch.testing.assert_close(ours, published_laws_by_loops(outcomes, n, len(law)), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("exponent", [1.1, 1.5, 2.5, 3.9])
    def test_estimates_algorithm_1s_series_without_bias(self, exponent):
        # p^n (1-p)^k has the unbiased estimate C(N-n-k, c-n) / C(N, c); the coefficients are those of (1-q)^alpha.
        num_draws, n = 12, math.floor(exponent)
        weights = repetition_log_weights(num_draws, exponent).exp()
        for count in range(n, num_draws + 1):
            coefficient, estimate = 1.0, 0.0
            for k in range(num_draws - n + 1):
                estimate += coefficient * math.comb(num_draws - n - k, count - n) / math.comb(num_draws, count)
                coefficient *= (k - (exponent - n)) / (k + 1)
            assert float(weights[count] / weights[num_draws]) == pytest.approx(estimate, abs=1e-12)

    def test_tiny_temperatures_neither_overflow_nor_lose_the_law(self):
        assert self.choice([200], 1 / 200) == [1.0]
        # C(1100, 1000) / C(1099, 1000) = 1100 / 100, both far above the largest float
        assert self.choice([1100, 1099], 1e-3) == pytest.approx([11 / 12, 1 / 12], rel=1e-3)


class TestBatchRule:
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_total_variation_on_two_outcomes_without_noise(self, temperature):
        """Every pool of two outcomes is one of N + 1 counts, so that both laws are exact sums."""
        for num_draws in (5, 20, 200):
            pools = (torch.arange(num_draws) >= torch.arange(num_draws + 1)[:, None]).long()
            hits = torch.arange(num_draws + 1, dtype=torch.float64)
            for p in (0.5, 0.55, 0.7, 0.9, 0.99):
                law = torch.tensor([p, 1 - p], dtype=torch.float64)
                weight = torch.distributions.Binomial(num_draws, law[0]).log_prob(hits).exp()
                first_wins = (choice_probabilities(pools, temperature) * (pools == 0)).sum(-1)
                target = sharpened(law, temperature)[0]
                ours = abs(float((weight * first_wins).sum() - target))

                floor, ceiling = math.floor(1 / temperature + 1e-9), math.ceil(1 / temperature - 1e-9)
                rules = {floor, round(1 / temperature)} | ({ceiling} if num_draws == 200 else set())
                for n in rules:
                    published_wins = published_laws_by_loops(pools, n, 2)[:, 0]
                    assert ours <= abs(float((weight * published_wins).sum() - target)) + 1e-6


class TestAlgorithm1:
    @pytest.mark.parametrize("exponent", [1, 1.25, 1.9, 2, 2.5, 3, 4, 4.3])
    @pytest.mark.parametrize("circular", [False, True])
    def test_equals_algorithm_1_draw_by_draw(self, exponent, circular):
        draws = torch.multinomial(zipf(6), 300 * 40, replacement=True, generator=seeded()).view(300, 40)
        uniforms = torch.rand(300, 40, generator=seeded(1))
        start = first_accepted_attempt(classes_of(draws), uniforms, 1 / exponent, circular)
        accepted = start < 40
        for b in range(300):
            expected = first_attempt_by_loops(draws[b].tolist(), uniforms[b].tolist(), exponent, circular)
            assert (int(start[b]) if accepted[b] else None) == expected
        assert accepted.any() and (exponent < 2 or not accepted.all())

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    @pytest.mark.parametrize(
        "law, num_rows", [(peaked(2, 0.9), 1000), (zipf(10), 1000), (zipf(300), 400)], ids=["two", "10", "300"]
    )
    def test_law(self, law, num_rows, temperature):
        outcomes, exact, _ = sample_exactly(law.expand(num_rows, -1), temperature, 2**15, seed=2)
        assert exact.all()
        assert chi_square_p_value(outcomes, sharpened(law, temperature)) > SIGNIFICANCE

    @pytest.mark.parametrize("law", [zipf(1000), flat(1000)], ids=["zipf", "flat"])
    def test_law_of_the_accepted_is_exact_at_any_bound(self, law):
        # An accepted attempt takes n draws whatever it accepts, so that at T = 1/n a bound cannot prefer a patch.
        outcomes, exact, _ = sample_exactly(law.expand(5000, -1), 0.5, 64, seed=4)
        assert 0.02 < exact.double().mean() < 0.98
        assert chi_square_p_value(outcomes[exact], sharpened(law, 0.5)) > SIGNIFICANCE

    def test_each_row_keeps_its_own_law(self):
        laws = torch.stack((zipf(10), zipf(10).flip(0), flat(10), peaked(10, 0.9))).repeat(2000, 1)
        for temperature in (0.5, 0.7):
            outcomes, *_ = sample_exactly(laws, temperature, 1024, seed=8)
            for i in range(4):
                assert chi_square_p_value(outcomes[i::4], sharpened(laws[i], temperature)) > SIGNIFICANCE

    @pytest.mark.parametrize("temperature", [0.5, 0.7])
    def test_the_law_stays_from_step_to_step(self, temperature):
        """Blocks are sized by the steps before, the law of a step is the same whatever they were."""
        plan, law, first_blocks, outcomes = BlockSchedule(), zipf(10), set(), []
        generator = seeded(12)
        for _ in range(100):
            pool = StubPool(law.expand(40, -1), generator)
            index, exact = exact_temperature_sample(pool, temperature, 2**15, generator, plan)
            assert exact.all()
            outcomes.append(pool.outcomes(index))
            first_blocks.add(pool.extended[0][1])
        assert chi_square_p_value(torch.cat(outcomes), sharpened(law, temperature)) > SIGNIFICANCE
        assert len(first_blocks) > 1


class TestFallback:
    """Algorithm 1 bounded at N draws with the pool as its fallback, against the batch rule on the same N draws."""

    @pytest.mark.parametrize("num_outcomes, num_draws", [(2, 9), (3, 7), (6, 5)])
    @pytest.mark.parametrize("n", [2, 3, 4])
    def test_total_variation_over_every_sequence_of_draws(self, num_outcomes, num_draws, n):
        sequences = torch.tensor(list(itertools.product(range(num_outcomes), repeat=num_draws)))
        uniforms = torch.zeros_like(sequences).float()
        start = first_accepted_attempt(classes_of(sequences), uniforms, 1 / n)
        batch = choice_probabilities(sequences, 1 / n)
        first = torch.nn.functional.one_hot(start, num_draws + 1)[:, :num_draws].double()
        bounded = torch.where((start < num_draws)[:, None], first, batch)
        for law in (peaked(num_outcomes), zipf(num_outcomes), peaked(num_outcomes, 0.9)):
            sequence_weight = law[sequences].prod(-1, keepdim=True)
            errors = []
            for choice in (bounded, batch):
                reached = torch.zeros(num_outcomes, dtype=torch.float64)
                reached.scatter_add_(0, sequences.flatten(), (sequence_weight * choice).flatten())
                errors.append(total_variation(reached, sharpened(law, 1 / n)))
            assert errors[0] <= errors[1] + 1e-7

    @pytest.mark.parametrize("temperature", [0.9, 0.7])
    def test_total_variation_where_most_of_the_difficulty_is_rare_patches(self, temperature):
        """Zipf with 1000 outcomes in 10 classes of about equal mass, within which the errors have one sign."""
        law, batch_size = zipf(1000), 4000
        target = sharpened(law, temperature)
        classes = (target.cumsum(0) * 10).long().clamp(max=9)

        def by_class(law_V):
            return torch.zeros(10, dtype=torch.float64).scatter_add_(0, classes, law_V)

        batch_error = total_variation(
            by_class(batch_law(outcomes_from(law, 500, 200), temperature, 1000)), by_class(target)
        )
        outcomes, _, num_draws = sample_exactly(law.expand(batch_size, -1), temperature, 200, seed=10)
        reached = torch.bincount(outcomes, minlength=1000).double() / batch_size
        noise = 0.5 * float((by_class(target) / batch_size).sqrt().sum())
        assert total_variation(by_class(reached), by_class(target)) <= batch_error + 1.5 * noise
        assert num_draws.double().mean() < 150

    @pytest.mark.parametrize("temperature, is_promised", [(0.5, True), (1 / 3, True), (0.7, False)])
    def test_all_distinct_is_uniform_and_where_1_over_t_is_whole_known_before(self, temperature, is_promised):
        """Also where the pool comes in blocks."""
        pool = StubPool(stream_BN=torch.arange(20).expand(2000, -1))
        index, exact = exact_temperature_sample(pool, temperature, 20, seeded())
        promised = [noise.argmin(-1) for _, noise in pool.asked if noise is not None]
        assert len(promised) == is_promised
        if is_promised:
            assert not exact.any() and torch.equal(promised[0], index)
            assert chi_square_p_value(pool.outcomes(index), flat(20)) > SIGNIFICANCE

    @pytest.mark.parametrize("temperature", [1, 1 / 2, 1 / 3, 0.4])
    def test_nothing_but_the_pairs_asked_for_decides_an_attempt(self, temperature):
        """Draws that no attempt compares look different: the same is chosen, of the same draws."""
        stream = outcomes_from(zipf(6), 300, 16)
        plain, by_pairs = (
            exact_temperature_sample(kind(stream_BN=stream), temperature, 16, seeded(1))
            for kind in (StubPool, PoolOfPairs)
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, by_pairs, strict=True))
        assert temperature == 1 or not plain[1].all()


class PoolOfPairs(StubPool):
    """Tells equal only the draws that are compared, and those that follow from them."""

    def compare(self, rows_R, pairs="all", noise_RN=None):
        outcomes = self.outcomes_BN[rows_R]
        linked = (outcomes[:, :, None] == outcomes[:, None]) & table_of_pairs(pairs, outcomes.shape[1])
        for _ in range(outcomes.shape[1].bit_length()):  # equal to one that is equal to a third
            linked = (linked.float() @ linked.float()) > 0
        return linked.int().argmax(-1)


def test_the_most_frequent_of_equals_the_first_seen():
    draws = torch.tensor([[3, 5, 5, 1], [9, 2, 9, 2], [2, 9, 9, 2], [8, 7, 6, 5]])
    assert most_frequent_patch(StubPool(stream_BN=draws), 4).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 0.7])
def test_the_generator_fixes_the_choice(temperature):
    """Where there is none, the global seed."""
    stream, laws = outcomes_from(zipf(1000), 50, 40), zipf(50).expand(50, -1)

    def sample(generator, seed):
        by_batch_rule = batch_temperature_select(StubPool(stream_BN=stream), temperature, 40, generator)
        return torch.cat((by_batch_rule, sample_exactly(laws, temperature, 20, seed)[0]))

    state, random_state = torch.random.get_rng_state(), random.getstate()
    assert torch.equal(sample(seeded(1), 1), sample(seeded(1), 1))
    assert not torch.equal(sample(seeded(1), 1), sample(seeded(2), 2))
    assert torch.equal(state, torch.random.get_rng_state()) and random_state == random.getstate()
    chosen = [sample(torch.manual_seed(5) and None, 1) for _ in range(2)]
    assert torch.equal(*chosen)


@pytest.mark.parametrize(
    "num_candidates, temperature, sentence",
    [
        *((200, t, r"in \(0, 2\]") for t in (0, -1, 2.0001, math.nan, math.inf, None, "0.5", True)),
        *((n, 1.0, "positive whole number") for n in (0, -3, 2.5, None, True)),
        *((n, t, f"at least {least}") for n, t, least in ((1, 0.9, 2), (2, 0.4, 3), (99, 0.01, 100))),
    ],
)
def test_refusals_come_before_any_draw(num_candidates, temperature, sentence):
    pool = StubPool(flat(2)[None])
    for method in (batch_temperature_select, exact_temperature_sample):
        with pytest.raises(ValueError, match=sentence):
            method(pool, temperature, num_candidates)
    assert pool.extended == []


def test_rounded_temperatures_mean_whole_exponents():
    assert inverse_temperature(0.33333334) == 3
    assert inverse_temperature(float(torch.tensor(1 / 49))) == 49
    assert inverse_temperature(0.3) == pytest.approx(10 / 3)
    check_num_candidates(3, 0.3333333)
