"""A generator for each row: its numbers don't depend on blocks or on the rows beside it, and have the right laws."""

import pytest
import torch
from enumerable_distributions import FixedPlan, StubPool, chi_square_p_value, flat, peaked, seeded, sharpened, zipf
from scipy.stats import kstest
from tiny import BOS, EOS, HEAD_TYPES, PAD, tiny_model

from calm_transformers.model.generation_calm_samplers import FIRST_CHUNK, RowRandomness, exact_temperature_sample


def rows_of(*numbers):
    return torch.tensor(numbers)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_so_are_the_draws_of_a_head(head_type):
    model, context = tiny_model(head_type).double(), torch.randn(3, 48, generator=seeded(), dtype=torch.float64)

    def draws(randomness, rows, num_draws):
        noise = randomness.head_noise(model.head, context, rows, num_draws)
        return model.head.sample(context[[1] * len(rows)], num_samples=num_draws, **noise)

    alone = draws(RowRandomness([seeded(7)]), rows_of(0), 2 * FIRST_CHUNK + 5)
    many = RowRandomness([seeded(3), seeded(7)])
    blocks = [draws(many, rows_of(0, 1), size)[:, 1:] for size in (1, FIRST_CHUNK, 2)]
    blocks += [draws(many, rows_of(1), FIRST_CHUNK + 2)]
    torch.testing.assert_close(torch.cat(blocks), alone)


@pytest.mark.parametrize("kind, law", [("uniform", "uniform"), ("exponential", "expon")])
def test_the_numbers_have_their_law_along_a_row_and_across_rows_and_steps(kind, law):
    along = RowRandomness([seeded(0)]).numbers(kind, rows_of(0), 20_000)[0]
    assert kstest(along.numpy(), law).pvalue > 1e-3
    generators = [seeded(seed) for seed in range(500)]
    steps = [RowRandomness(generators).numbers(kind, torch.arange(500), 1)[:, 0] for _ in range(20)]
    assert kstest(torch.stack(steps).flatten().numpy(), law).pvalue > 1e-3
    assert len(torch.stack(steps).unique()) > 9_900  # no two rows, and no two steps, have the same


@pytest.mark.parametrize("law_V, temperature", [(peaked(6), 0.5), (flat(5), 0.4), (zipf(30), 0.4)], ids=str)
def test_the_exact_sampler_keeps_its_law_with_a_generator_a_row(law_V, temperature):
    pool = StubPool(law_V.expand(6000, -1), seeded())
    randomness = RowRandomness([seeded(row) for row in range(6000)])
    index_B, is_exact_B = exact_temperature_sample(pool, temperature, 4000, randomness)
    outcomes = pool.outcomes(index_B)
    assert is_exact_B.all() and chi_square_p_value(outcomes, sharpened(law_V, temperature)) > 1e-3
    assert chi_square_p_value(outcomes, sharpened(law_V, 0.9 * temperature)) < 1e-3 or len(law_V) == 5


@pytest.mark.parametrize("temperature", [0.5, 0.4, 1 / 3])
def test_the_choice_does_not_depend_on_the_size_of_blocks(temperature):
    stream_BN = torch.multinomial(zipf(40), 50 * 64, True, generator=seeded(5)).view(50, 64)

    def choose(size):
        randomness = RowRandomness([seeded(row) for row in range(50)])
        return exact_temperature_sample(StubPool(stream_BN=stream_BN), temperature, 64, randomness, FixedPlan(size))[0]

    first, *others = (choose(size) for size in (4, 7, 32, 64))
    assert all(torch.equal(first, other) for other in others)


# In `generate`

PROMPTS = torch.tensor([[PAD, PAD, PAD, BOS, 10, 11], [BOS, 20, 21, 22, 23, 24], [PAD, BOS, 30, 31, 32, 33]])
SETTINGS = [{"temperature": 1.0}, {"do_sample": False}, {"temperature": 0.5, "sampling_method": "batch"}]
SETTINGS += [{"temperature": 0.7, "sampling_method": method} for method in ("adaptive", "exact")]


@pytest.mark.parametrize(
    "head_type, settings",
    [("energy", settings) for settings in SETTINGS]
    + [(head_type, SETTINGS[-1]) for head_type in HEAD_TYPES if head_type != "energy"],
    ids=str,
)
def test_with_a_generator_a_row_a_text_is_the_same_alone_and_in_a_batch(head_type, settings):
    model = tiny_model(head_type).double()
    settings = {"do_sample": True, "num_candidates": 20, "max_new_tokens": 22, "eos_token_id": EOS, **settings}
    together = model.generate(
        PROMPTS, attention_mask=(PROMPTS != PAD).long(), generator=[seeded(r) for r in range(3)], **settings
    )
    for row, prompt in enumerate(PROMPTS):
        own = prompt[prompt != PAD][None]
        alone = model.generate(own, generator=[seeded(row)], **settings)[0, own.shape[1] :]
        assert torch.equal(together[row, PROMPTS.shape[1] :][: len(alone)], alone)
        assert (together[row, PROMPTS.shape[1] + len(alone) :] == PAD).all()


def test_generators_of_rows_are_counted_before_any_work():
    model = tiny_model()
    with pytest.raises(ValueError, match="generator is a list of 2, but 3 rows are generated"):
        model.generate(PROMPTS, generator=[seeded(0), seeded(1)], do_sample=True)
    with pytest.raises(ValueError, match="or a list of them, one per row"):
        model.generate(PROMPTS, generator=[0, 1, 2], do_sample=True)
    texts = model.generate(
        PROMPTS[1:2], generator=[seeded(0), seeded(0)], num_return_sequences=2, do_sample=True, max_new_tokens=8
    )
    assert torch.equal(texts[0], texts[1])
