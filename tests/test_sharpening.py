"""Temperature on a known truth: the law is the language's, and each cause of distance from it shows in its column."""

import json

import numpy as np
import pytest
import torch
from commands import refusal
from enumerable_distributions import chi_square_p_value
from language_oracle import LANGUAGE, Oracle, V, continuations
from tiny import tiny_model

from calm_transformers.experiments import sharpening
from calm_transformers.experiments.language import HiddenMarkovLanguage, write
from calm_transformers.experiments.sharpening import COLUMNS, SETTINGS, PatchLaw, RecordedPool, main, measure_model
from calm_transformers.model.generation_calm_samplers import PatchSampling

VOCAB_SIZE = V + 4  # with the special tokens
CONTEXT = torch.from_numpy(LANGUAGE.ids(np.array([2, 3, 2, 2])))
TEMPERATURES = (1.0, 0.7, 0.5, 1 / 3)


@pytest.fixture(scope="module", autouse=True)
def shorter_record():
    """Few patches are chosen here, so few recorded draws are as good as the command's million, and quicker."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharpening, "TRUE_RECORD", 2**17)
        yield


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def law() -> PatchLaw:
    return sharpening.next_patch_law(LANGUAGE, CONTEXT, 3, VOCAB_SIZE)


# the law


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1 / 3])
def test_the_law_is_the_languages_sharpened(law, temperature):
    belief = LANGUAGE.beliefs(LANGUAGE.symbols(CONTEXT.numpy())[None])[0, -1]
    powers = [p ** (1 / temperature) for p in continuations(LANGUAGE, belief, 3).flatten()]
    expected = torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)
    first, second, third = torch.cartesian_prod(*[torch.arange(4, VOCAB_SIZE)] * 3).T
    sharpened = law.sharpened(temperature)
    found = sharpened.probability((first * VOCAB_SIZE + second) * VOCAB_SIZE + third)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert sharpened.entropy == pytest.approx(-(expected * expected.log()).sum().item(), abs=1e-5)


def test_compare_by_hand():
    """Three draws of a patch of probability 1/2, one of a patch that the law doesn't name: 1 − min(3/4, 1/2)."""
    law = PatchLaw(torch.tensor([3, 5]), torch.tensor([0.5, 0.5], dtype=torch.float64))
    variation, difference = law.compare(torch.tensor([3, 3, 7, 3]))
    assert variation == pytest.approx(0.5)
    assert difference == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25) - np.log(2))
    assert law.compare(torch.tensor([5, 3])) == (pytest.approx(0), pytest.approx(0))


def test_draws_are_of_the_law(law):
    index = torch.searchsorted(law.patches_X, law.draw(20_000, seeded()))
    assert chi_square_p_value(index, law.probability_X) > 1e-3
    assert chi_square_p_value(index, torch.full_like(law.probability_X, 1 / len(law.patches_X))) < 1e-9


# the record


def test_no_row_reads_a_draw_twice_and_each_has_an_order_of_its_own():
    pool = RecordedPool(torch.arange(64), 20, seeded())
    pool.extend(pool.rows_B, 5)
    first = pool.read(pool.rows_B, torch.arange(5))
    pool.extend(pool.rows_B[3:], 59)
    whole = pool.read(pool.rows_B, torch.arange(64))
    assert torch.equal(whole[:, :5], first)
    assert (whole.sort(-1).values == torch.arange(64)).all() and len(whole.unique(dim=0)) == 20
    with pytest.raises(ValueError, match="65 draws of a record of 64"):
        pool.extend(pool.rows_B, 1)


# the samplers


@pytest.mark.parametrize(
    ("temperature", "sampling", "least", "most"),
    [
        *((T, (T, "exact", 200), 0, 1.3) for T in (0.7, 1 / 2, 1 / 3)),
        *((T, (other, "exact", 200), 1.6, 99) for T, other in ((0.7, 0.6), (1 / 3, 1 / 2))),  # told apart
        (1 / 3, (1 / 3, "batch", 10), 4, 99),  # too few candidates
    ],
)
def test_the_exact_method_reaches_what_exact_draws_leave(law, temperature, sampling, least, most):
    """Distance from the law at a temperature of what a method chooses from draws of P, in that of exact draws."""
    T, method, num_candidates = sampling
    sampling = PatchSampling(temperature=T, sampling_method=method, num_candidates=num_candidates)
    target, generator, pairs = law.sharpened(temperature), seeded(), []
    for _ in range(20):
        chosen = sharpening.choose(law.draw(2**16, generator), sampling, 1000, generator)
        pairs.append([target.compare(drawn)[0] for drawn in (chosen, target.draw(1000, generator))])
    variation, floor = np.mean(pairs, axis=0)
    assert least * floor < variation < most * floor


# the whole


class Blind(Oracle):
    """Knows the language, but not what stands before: each patch is of the stationary law."""

    def draw(self, states, num_samples, generator=None):
        return super().draw(torch.from_numpy(LANGUAGE.stationary).expand_as(states), num_samples, generator)


def measured(oracle):
    contexts = torch.from_numpy(LANGUAGE.ids(LANGUAGE.sample(3, 12, seed=7)))
    return measure_model(oracle, LANGUAGE, contexts, patch_size=4, num_patches=400, num_recorded=2**14)


def variations(result, **settings):
    """By column, means over the rows that have these settings."""
    rows = [row for row in result["settings"] if all(row[name] == value for name, value in settings.items())]
    return [np.mean([row["total_variation"][column][0] for row in rows]) for column in COLUMNS]


def test_a_model_that_knows_the_language_has_the_true_laws_figures():
    result = measured(Oracle(LANGUAGE, 4))
    for temperature in TEMPERATURES:
        exact, sampler, recorded, model = variations(result, temperature=temperature)
        # Of 400 patches after each of 3 contexts the columns are 0.27 apart at most, in 8 seeds.
        assert model == pytest.approx(recorded, rel=0.3)
        assert recorded == pytest.approx(sampler, rel=0.3)
        assert exact < 1.2 * sampler
    own = result["own_law"]["total_variation"]
    assert own["model"][0] == pytest.approx(own["exact draws"][0], rel=0.15)
    assert [row["temperature"] for row in result["settings"]] == [sampling.temperature for sampling in SETTINGS]
    assert [row["num_candidates"] for row in result["settings"]] == [None, *[50, 200, 1000] * 9]


@pytest.mark.slow
def test_a_models_error_shows_in_its_column_alone():
    blind = measured(Blind(LANGUAGE, 4))
    for temperature in TEMPERATURES:
        best = {"method": "exact", "num_candidates": 1000} if temperature < 1 else {}
        *others, model = variations(blind, temperature=temperature, **best)
        assert model > 1.25 * max(others)
    own = blind["own_law"]["total_variation"]
    assert own["model"][0] > 3 * own["exact draws"][0]


def test_means_have_standard_errors():
    figures = np.arange(2.0 * len(SETTINGS) * 4 * 2).reshape(2, len(SETTINGS), 4, 2)
    result = sharpening.results(figures, np.ones((2, len(SETTINGS))), np.zeros((2, 2, 2)))
    half = len(SETTINGS) * 4  # half the distance of two contexts' figures is their standard error
    assert result["settings"][1]["entropy_difference"]["true law"] == pytest.approx((8 + 3 + half, half))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command for an untrained CALM of 96 tokens, and a language of as many; what doesn't fit them."""
    folder = tmp_path_factory.mktemp("sharpening")
    tiny_model().save_pretrained(folder / "model")
    tiny_model(patch_size=8).save_pretrained(folder / "long")
    write(HiddenMarkovLanguage(vocab_size=92), folder / "language", {"validation": (3, 80)})
    write(HiddenMarkovLanguage(vocab_size=64), folder / "other", {"validation": (1, 9)})
    return ["--language", str(folder / "language"), "--model", str(folder / "model")]


def test_the_command_writes_a_table_and_figures(words, tmp_path, capsys, monkeypatch):
    few = SETTINGS[:5]
    monkeypatch.setattr(sharpening, "SETTINGS", few)
    options = ["--contexts", "2", "--draws", "10", "--recorded", str(2**14), "--json", str(tmp_path / "figures.json")]
    assert main([*words, *options]) == 0
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert printed.count("\n| ") == 2 * (2 + len(few)) + 4  # heads and rules; the laws themselves
    assert figures["draws"] == 10 and figures["recorded"] == 2**14 and figures["context_length"] == 64
    variation = figures["settings"][0]["total_variation"]["model"][0]
    assert f"{variation:.3f}" in printed and variation > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--contexts 1", "needs two"),
        ("--contexts 4", "has not 4 texts of 64 tokens"),
        ("--recorded 8192", "at least 10000"),
        ("--recorded 20000", "power of 2"),
        ("--language {}/other", "has 96 tokens, and the language 68"),
        ("--model {}/long", "too many patches of 8 tokens"),
    ],
)
def test_the_command_refuses(words, capsys, options, message):
    options = options.format(words[1].rpartition("/")[0]).split()
    assert message in refusal(capsys, main, *words, *options)
