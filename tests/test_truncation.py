"""Truncations and T > 1: hand values, upstream's warpers, compiled and eager, and the laws that choices come to."""

import functools
import math
from functools import partial

import pytest
import torch
from enumerable_distributions import StubPool, chi_square_p_value, seeded, sharpened, total_variation, zipf
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from calm_transformers.benchmarks import truncation as report
from calm_transformers.benchmarks.truncation import LAWS, Pools, meant_law, plug_in_weights
from calm_transformers.model.generation_calm_algorithms import (
    NO_TRUNCATION,
    Truncation,
    candidate_weights,
    first_occurrences,
    sample_by_weight,
    truncated,
)
from calm_transformers.model.generation_calm_samplers import (
    batch_temperature_select,
    exact_temperature_sample,
)

TRUNCATIONS = [
    Truncation(top_k=1),
    Truncation(top_k=5),
    Truncation(top_p=0.0),
    Truncation(top_p=0.95),
    Truncation(min_p=0.05),
    Truncation(min_p=1.0),
    Truncation(top_k=30, top_p=0.9, min_p=0.1),
    Truncation(top_p=0.5, min_p=0.5),
    NO_TRUNCATION,
]


def classes_of(*counts):
    """Class ids (1, N) of draws that repeat so often."""
    return torch.cat([torch.full((count,), sum(counts[:i])) for i, count in enumerate(counts)])[None]


def by_patch(weights_1N, counts):
    """The weight of each patch of `classes_of(*counts)`."""
    return [float(weights_1N[0, sum(counts[:i])]) for i in range(len(counts))]


class TestTruncated:
    @pytest.mark.parametrize("truncation", TRUNCATIONS)
    @pytest.mark.parametrize("size", [1, 2, 500])
    def test_keeps_what_upstream_s_warpers_keep(self, truncation, size):
        logits_BN = 3 * torch.randn(20, size, generator=seeded(size))
        warped_BN = logits_BN
        if truncation.top_k:
            warped_BN = TopKLogitsWarper(truncation.top_k)(None, warped_BN)
        if truncation.top_p < 1:
            warped_BN = TopPLogitsWarper(truncation.top_p)(None, warped_BN)
        if truncation.min_p > 0:
            warped_BN = MinPLogitsWarper(truncation.min_p)(None, warped_BN)
        kept_BN = truncated(logits_BN.softmax(-1), truncation)
        assert torch.equal(kept_BN > 0, warped_BN > -math.inf)
        assert (kept_BN > 0).any(-1).all()
        torch.testing.assert_close(kept_BN / kept_BN.sum(-1, keepdim=True), warped_BN.softmax(-1))

    def test_of_equal_weights_the_earlier_stay(self):
        equal = torch.full((1, 10), 0.1)
        for truncation in (Truncation(top_k=3), Truncation(top_p=0.3), Truncation(top_p=0.21)):
            assert (truncated(equal, truncation)[0] > 0).tolist() == [True] * 3 + [False] * 7
        assert (truncated(equal, Truncation(min_p=1.0)) > 0).all()

    @pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.5, 0.9])
    def test_what_lies_exactly_on_an_edge(self, share):
        """Of n·20 equal ones n·20·share are the fewest; and a count of exactly that share of the largest stays."""
        for size in range(20, 201, 20):
            weights = candidate_weights(torch.arange(size)[None], 1.0, Truncation(top_p=share))
            assert int((weights > 0).sum()) == round(share * size)
            counts = (size, round(share * size), round(share * size) - 1)
            weights = candidate_weights(classes_of(*counts), 1.0, Truncation(min_p=share))
            assert int((weights > 0).sum()) == 2


class TestWeights:
    @pytest.mark.parametrize(
        "temperature, truncation", [(0.5, Truncation(top_k=2)), (1.5, NO_TRUNCATION), (1.0, Truncation(top_p=0.7))]
    )
    def test_the_choice_follows_them(self, temperature, truncation):
        first_1N = classes_of(1, 4, 2, 3, 2, 1, 2)
        weights_1N = candidate_weights(first_1N, temperature, truncation)
        noise_BN = torch.empty(20_000, first_1N.shape[1]).exponential_(generator=seeded())
        chosen = sample_by_weight(first_1N.expand(20_000, -1), noise_BN, temperature, truncation)
        assert not (weights_1N[0, chosen] == 0).any()
        kept = weights_1N[0].nonzero()[:, 0]
        number, law = torch.searchsorted(kept, chosen), weights_1N[0, kept].double()
        assert chi_square_p_value(number, law / law.sum()) > 1e-3

    @pytest.mark.parametrize(
        "counts, f1, f2", [((1, 1, 1, 2, 5), 3, 1), ((1, 1, 1, 1), 4, 0), ((1, 2, 2), 1, 2), ((3, 4), 0, 0)]
    )
    @pytest.mark.parametrize("temperature", [1.25, 2.0])
    def test_of_the_unseen_by_hand(self, counts, f1, f2, temperature):
        """Chao's f1 (f1 − 1) / (2 (f2 + 1)) patches that were not seen, of weight C(0, 1/T), over the f1."""
        s = 1 / temperature
        unseen = f1 * (f1 - 1) / (2 * (f2 + 1)) / (math.gamma(s + 1) * math.gamma(1 - s))
        plain = [math.gamma(c + 1) / (math.gamma(s + 1) * math.gamma(c - s + 1)) for c in counts]
        expected = [w + (unseen / f1 if c == 1 else 0) for w, c in zip(plain, counts, strict=True)]
        found = by_patch(candidate_weights(classes_of(*counts), temperature), counts)
        assert found == pytest.approx([w / sum(expected) for w in expected], rel=1e-5)

    def test_algorithm_1_only_sharpens(self):
        with pytest.raises(ValueError, match="Algorithm 1 sharpens; above 1 patches are chosen by weight"):
            exact_temperature_sample(StubPool(zipf(5)[None], seeded()), 1.5, 10)


@pytest.mark.parametrize(
    "backend, temperature, truncation",
    [
        ("aot_eager", 0.5, NO_TRUNCATION),
        ("aot_eager", 1.5, Truncation(5, 0.9, 0.05)),
        pytest.param("inductor", 1.5, Truncation(5, 0.9, 0.05), marks=pytest.mark.slow),
    ],
)
def test_the_compiled_choice_equals_the_eager_one(backend, temperature, truncation):
    first_BN = first_occurrences(torch.randint(30, (16, 60, 1), generator=seeded()))
    noise_BN = torch.empty(16, 60).exponential_(generator=seeded(1))
    choose = partial(sample_by_weight, temperature=temperature, truncation=truncation)
    torch._dynamo.reset()  # it counts compilations by code
    compiled = torch.compile(choose, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(specialize_float=True):  # as generation_calm_compiled.py does
        chosen_B = compiled(first_BN, noise_BN)
    assert torch.equal(chosen_B, choose(first_BN, noise_BN))


@functools.cache
def pools(name, num_draws):
    """Of each law and N, made once."""
    return Pools(LAWS[name], 2000, num_draws)


class TestLaws:
    """Total variation of the choice's law to the law meant, below bounds that a wrong rule exceeds."""

    @pytest.mark.parametrize(
        "name, num_draws, temperature, bound",
        [
            ("zipf(20)", 50, 1.5, 0.012),
            ("zipf(20)", 50, 2.0, 0.025),
            ("zipf(100)", 200, 1.25, 0.015),
            ("zipf(1000)", 1000, 2.0, 0.09),
            ("peaked(50)", 200, 2.0, 0.012),
        ],
    )
    def test_flattened(self, name, num_draws, temperature, bound):
        law, meant = pools(name, num_draws), meant_law(LAWS[name], temperature)

        def distance(weigh):
            return total_variation(law.law_of_choice(weigh), meant)

        assert distance(partial(candidate_weights, temperature=temperature)) < bound
        assert distance(partial(plug_in_weights, temperature=temperature)) > bound
        assert distance(partial(candidate_weights, temperature=1.0)) > bound  # not flattened

    @pytest.mark.parametrize(
        "name, num_draws, temperature, truncation, bound",
        [
            ("zipf(100)", 1000, 1.0, Truncation(top_k=5), 0.04),
            ("zipf(1000)", 200, 0.5, Truncation(top_k=5), 0.05),
            ("zipf(100)", 200, 0.5, Truncation(top_p=0.9), 0.035),
            ("zipf(100)", 200, 1.0, Truncation(min_p=0.1), 0.15),
            ("peaked(50)", 200, 1.0, Truncation(min_p=0.1), 0.01),
            ("zipf(100)", 1000, 1.5, Truncation(top_k=5), 0.06),
        ],
    )
    def test_truncated(self, name, num_draws, temperature, truncation, bound):
        law, meant = pools(name, num_draws), meant_law(LAWS[name], temperature, truncation)

        def distance(**settings):
            return total_variation(law.law_of_choice(partial(candidate_weights, **settings)), meant)

        assert distance(temperature=temperature, truncation=truncation) < bound
        assert distance(temperature=temperature) > bound  # not truncated
        other = 1.0 if temperature != 1 else 0.5
        assert distance(temperature=other, truncation=truncation) > bound or name == "peaked(50)"

    def test_drawn_choices_have_it_too(self):
        """From the pool to the draw chosen, with noise, rows of different laws beside one another."""
        laws = torch.stack([zipf(20), zipf(20).flip(0)]).repeat(4000, 1)
        pool = StubPool(laws, seeded())
        truncation = Truncation(top_k=3)
        outcomes = pool.outcomes(batch_temperature_select(pool, 1.0, 200, seeded(1), truncation))
        for first, law in ((0, zipf(20)), (1, zipf(20).flip(0))):
            found = torch.bincount(outcomes[first::2], minlength=20).double() / 4000
            assert total_variation(found, meant_law(law, 1.0, truncation)) < 0.08
            assert total_variation(found, law) > 0.4


class TestReport:
    def test_laws_meant_by_hand(self):
        law = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        torch.testing.assert_close(
            meant_law(law, 1.0, Truncation(top_k=2)), torch.tensor([0.625, 0.375, 0.0]).double()
        )
        torch.testing.assert_close(meant_law(law, 0.5), (law**2 / 0.38))
        torch.testing.assert_close(meant_law(law, 2.0), sharpened(law, 2.0))
        assert by_patch(plug_in_weights(classes_of(4, 1), 2.0), (4, 1)) == pytest.approx([2 / 3, 1 / 3])
        ties = torch.tensor([0.4, 0.2, 0.2, 0.2], dtype=torch.float64)  # one of the three stays, each as often
        torch.testing.assert_close(meant_law(ties, 1.0, Truncation(top_k=2)), torch.tensor([6, 1, 1, 1]).double() / 9)

    def test_law_of_choice_by_loops(self):
        pools, law = Pools(zipf(5), 30, 7), torch.zeros(5, dtype=torch.float64)
        for outcomes in pools.outcomes_BN.tolist():
            weights = candidate_weights(first_occurrences(torch.tensor(outcomes)[None, :, None]), 0.5)[0].tolist()
            for outcome, weight in zip(outcomes, weights, strict=True):
                law[outcome] += weight / 30
        torch.testing.assert_close(pools.law_of_choice(partial(candidate_weights, temperature=0.5)), law)

    def test_command(self, monkeypatch, capsys):
        monkeypatch.setattr(report, "LAWS", {name: LAWS[name] for name in ("zipf(20)", "flat(100)")})
        assert report.main(["--pools", "20"]) == 0
        printed = capsys.readouterr().out
        assert report.main(["--pools", "20"]) == 0 and capsys.readouterr().out == printed
        lines = [line.strip("| ").split(" | ")[2:] for line in printed.splitlines() if line.count("|") > 2]
        numbers = [[float(cell) for cell in line] for line in lines if line[0][0].isdigit()]
        assert [len(line) for line in numbers] == [10] * 6 + [12] * 6
        assert all(0 <= number <= 1 for line in numbers for number in line)
        assert report.main(["--pools", "0"]) == 2
        assert "--pools: 0: must be a whole number of at least 1" in capsys.readouterr().err
