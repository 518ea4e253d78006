"""Temperature-sampling fidelity: the exact distribution, and each source of error in its own column."""

import json

import numpy as np
import pytest
import torch
from commands import refusal
from enumerable_distributions import chi_square_p_value
from language_oracle import LANGUAGE, Oracle, V, continuation_probabilities
from tiny import seeded, tiny_model

from calm_transformers.experiments import temperature_fidelity
from calm_transformers.experiments.language import HiddenMarkovLanguage, write_corpus
from calm_transformers.experiments.temperature_fidelity import COLUMNS, PatchDistribution, main, make_settings
from calm_transformers.model.generation_calm_samplers import PatchSampling

VOCAB_SIZE = V + 4  # with the special tokens
CONTEXT = torch.from_numpy(LANGUAGE.to_ids(np.array([2, 3, 2, 2])))
TEMPERATURES = (1.0, 0.7, 0.5, 1 / 3)
SETTINGS = make_settings()


@pytest.fixture(scope="module", autouse=True)
def fewer_true_samples():
    """Few patches are chosen here, so fewer stored samples suffice."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(temperature_fidelity, "NUM_TRUE_SAMPLES", 2**17)
        yield


@pytest.fixture(scope="module")
def distribution() -> PatchDistribution:
    return temperature_fidelity.next_patch_distribution(LANGUAGE, CONTEXT, 3, VOCAB_SIZE)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1 / 3])
def test_next_patch_distribution_matches_enumeration(distribution, temperature):
    belief = LANGUAGE.beliefs(LANGUAGE.to_symbols(CONTEXT.numpy())[None])[0, -1]
    powers = [p ** (1 / temperature) for p in continuation_probabilities(LANGUAGE, belief, 3).flatten()]
    expected = torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)
    first, second, third = torch.cartesian_prod(*[torch.arange(4, VOCAB_SIZE)] * 3).T
    tempered = distribution.tempered(temperature)
    found = tempered.probability((first * VOCAB_SIZE + second) * VOCAB_SIZE + third)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert tempered.entropy == pytest.approx(-(expected * expected.log()).sum().item(), abs=1e-5)


def test_compare_by_hand():
    """Three samples of a patch with probability 1/2, one of a patch with probability 0: 1 − min(3/4, 1/2)."""
    distribution = PatchDistribution(torch.tensor([3, 5]), torch.tensor([0.5, 0.5], dtype=torch.float64))
    variation, difference = distribution.compare(torch.tensor([3, 3, 7, 3]))
    assert variation == pytest.approx(0.5)
    assert difference == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25) - np.log(2))
    assert distribution.compare(torch.tensor([5, 3])) == (pytest.approx(0), pytest.approx(0))


def test_samples_follow_the_distribution(distribution):
    index = torch.searchsorted(distribution.patches_X, distribution.sample(20_000, seeded()))
    assert chi_square_p_value(index, distribution.probability_X) > 1e-3
    uniform_X = torch.full_like(distribution.probability_X, 1 / len(distribution.patches_X))
    assert chi_square_p_value(index, uniform_X) < 1e-9


def test_no_row_reads_a_sample_twice_and_rows_differ_in_order():
    candidates = temperature_fidelity.StoredCandidates(torch.arange(64), 20, seeded())
    candidates.extend(candidates.rows_B, 5)
    first = candidates.read(candidates.rows_B, torch.arange(5))
    candidates.extend(candidates.rows_B[3:], 59)
    whole = candidates.read(candidates.rows_B, torch.arange(64))
    assert torch.equal(whole[:, :5], first)
    assert (whole.sort(-1).values == torch.arange(64)).all() and len(whole.unique(dim=0)) == 20


@pytest.mark.parametrize(
    ("temperature", "sampling", "min_ratio", "max_ratio"),
    [
        *((T, (T, "exact", 200), 0, 1.3) for T in (0.7, 1 / 2, 1 / 3)),
        *((T, (other, "exact", 200), 1.6, 99) for T, other in ((0.7, 0.6), (1 / 3, 1 / 2))),  # wrong temperatures
        (1 / 3, (1 / 3, "batch", 10), 4, 99),  # too few candidates
    ],
)
def test_the_exact_method_is_as_close_as_exact_samples(distribution, temperature, sampling, min_ratio, max_ratio):
    """Total variation of a method's patches to the tempered distribution, relative to that of exact samples."""
    T, method, num_candidates = sampling
    sampling = PatchSampling(temperature=T, sampling_method=method, num_candidates=num_candidates)
    target, generator, pairs = distribution.tempered(temperature), seeded(), []
    for _ in range(20):
        chosen = temperature_fidelity.choose_patches(distribution.sample(2**16, generator), sampling, 1000, generator)
        pairs.append([target.compare(samples)[0] for samples in (chosen, target.sample(1000, generator))])
    variation, exact = np.mean(pairs, axis=0)
    assert min_ratio * exact < variation < max_ratio * exact


class ContextFreeOracle(Oracle):
    """Ignores context and temperature: samples each patch from the stationary distribution."""

    def draw(self, states, num_samples, generator=None, temperature=1.0):
        return super().draw(torch.from_numpy(LANGUAGE.stationary).expand_as(states), num_samples, generator)


def evaluate(oracle, settings=SETTINGS, lowest_temperature=1.0):
    contexts = torch.from_numpy(LANGUAGE.to_ids(LANGUAGE.sample(3, 12, seed=7)))
    sizes = {"num_patches": 400, "num_stored": 2**14}
    sizes |= {"settings": settings, "lowest_temperature": lowest_temperature}
    return temperature_fidelity.evaluate_model(oracle, LANGUAGE, contexts, 4, **sizes)


def variations(result, **settings):
    """Returns the mean total variation per column over the rows with these settings."""
    rows = [row for row in result["settings"] if all(row[name] == value for name, value in settings.items())]
    return [np.mean([row["total_variation"][column][0] for row in rows]) for column in COLUMNS]


def test_an_oracle_matches_the_columns_of_the_true_distribution():
    result = evaluate(Oracle(LANGUAGE, 4))
    for temperature in TEMPERATURES:
        exact, sampler, recorded, model = variations(result, temperature=temperature)  # one draw included: at T = 1
        # With 400 patches after each of 3 contexts the columns differ by at most 0.27 over 8 seeds.
        assert model == pytest.approx(recorded, rel=0.3)
        assert recorded == pytest.approx(sampler, rel=0.3)
        assert exact < 1.2 * sampler
    own = result["own_law"]["total_variation"]
    assert own["model"][0] == pytest.approx(own["exact draws"][0], rel=0.15)
    assert [row["temperature"] for row in result["settings"]] == [sampling.temperature for sampling in SETTINGS]
    assert [row["num_candidates"] for row in result["settings"]] == [None, *[None, *[50, 200, 1000] * 3] * 3]


class DistilledOracle(Oracle):
    """Samples at a temperature by enumeration."""

    def draw(self, states, num_samples, generator=None, temperature=1.0):
        powers = torch.from_numpy(continuation_probabilities(self.language, states.numpy(), 4)) ** (1 / temperature)
        index = powers.flatten().multinomial(num_samples, replacement=True, generator=generator)
        return torch.stack(torch.unravel_index(index, powers.shape), dim=-1) + VOCAB_SIZE - V


def test_one_draw_of_a_distilled_head_is_at_its_temperatures():
    result = evaluate(DistilledOracle(LANGUAGE, 4), make_settings(["batch"], [200]), lowest_temperature=0.5)
    for temperature in (0.7, 0.5):
        exact, _, untempered, model = variations(result, temperature=temperature, method="one draw")
        assert model == pytest.approx(exact, rel=0.3) and untempered > 1.5 * exact
    *_, untempered, model = variations(result, temperature=1 / 3, method="one draw")
    assert model == pytest.approx(untempered, rel=0.1)  # below its range: at T = 1


@pytest.mark.slow
def test_a_models_error_shows_only_in_its_column():
    results = evaluate(ContextFreeOracle(LANGUAGE, 4))
    for temperature in TEMPERATURES:
        best = {"method": "exact", "num_candidates": 1000} if temperature < 1 else {}
        *others, model = variations(results, temperature=temperature, **best)
        assert model > 1.25 * max(others)
    own = results["own_law"]["total_variation"]
    assert own["model"][0] > 3 * own["exact draws"][0]


def test_means_have_standard_errors():
    values = np.arange(2.0 * len(SETTINGS) * 4 * 2).reshape(2, len(SETTINGS), 4, 2)
    result = temperature_fidelity.summarise(SETTINGS, values, np.ones((2, len(SETTINGS))), np.zeros((2, 2, 2)))
    half = len(SETTINGS) * 4  # the standard error of two values is half their distance
    assert result["settings"][1]["entropy_difference"]["true law"] == pytest.approx((8 + 3 + half, half))


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """Arguments for an untrained CALM and a language of 96 tokens; also writes a model and a language that differ."""
    folder = tmp_path_factory.mktemp("temperature_fidelity")
    tiny_model().save_pretrained(folder / "model")
    tiny_model(patch_size=8).save_pretrained(folder / "long")
    write_corpus(HiddenMarkovLanguage(vocab_size=92), folder / "language", {"validation": (3, 80)})
    write_corpus(HiddenMarkovLanguage(vocab_size=64), folder / "other", {"validation": (1, 9)})
    return ["--language", str(folder / "language"), "--model", str(folder / "model")]


def test_the_command_writes_tables_and_results(args, tmp_path, capsys):
    few = "--methods batch --candidates 50 --contexts 2 --draws 10 --recorded 16384".split()
    assert main([*args, *few, "--json", str(tmp_path / "results.json")]) == 0
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    assert printed.count("\n| ") == 2 * (2 + 1 + 3 * 2) + 4  # with headers; the last table is at T = 1
    assert results["draws"] == 10 and results["recorded"] == 2**14 and results["context_length"] == 64
    variation = results["settings"][0]["total_variation"]["model"][0]
    assert f"{variation:.3f}" in printed and variation > 0.9


def test_invalid_options(args, capsys):
    folder = args[1].rpartition("/")[0]
    for options, message in (
        ("--contexts 1", "needs at least two"),
        ("--contexts 4", "fewer than 4 documents of 64 tokens"),
        ("--recorded 8192", "at least 10000"),
        ("--recorded 20000", "power of 2"),
        ("--candidates 2", "use at least 3"),
        (f"--language {folder}/other", "has 96 tokens, the language 68"),
        (f"--model {folder}/long", "too many patches of 8 tokens"),
    ):
        assert message in refusal(capsys, main, *args, *options.split())
