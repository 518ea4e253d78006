"""Per-row generators: numbers don't depend on block sizes or on other rows, and follow their distributions."""

import pytest
import torch
from enumerable_distributions import StubBatch, zipf
from scipy.stats import kstest
from tiny import BOS, EOS, HEAD_TYPES, METHODS, PAD, exact_model, padded, seeded, tiny_model

from calm_transformers.model import generation_calm_samplers
from calm_transformers.model.generation_calm_samplers import FIRST_CHUNK, RepetitionAttempts, RowRandomness


def rows_of(*numbers):
    return torch.tensor(numbers)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_a_head_s_samples_do_not_depend_on_blocks_or_other_rows(head_type):
    model, context = tiny_model(head_type).double(), torch.randn(3, 48, generator=seeded(), dtype=torch.float64)

    def sample(randomness, rows, num_samples):
        noise = randomness.noise_arguments(model.head, context, rows, num_samples)
        return model.head.sample(context[[1] * len(rows)], num_samples=num_samples, **noise)

    alone = sample(RowRandomness([seeded(7)]), rows_of(0), 2 * FIRST_CHUNK + 5)
    many = RowRandomness([seeded(3), seeded(7)])
    blocks = [sample(many, rows_of(0, 1), size)[:, 1:] for size in (1, FIRST_CHUNK, 2)]
    blocks += [sample(many, rows_of(1), FIRST_CHUNK + 2)]
    torch.testing.assert_close(torch.cat(blocks), alone)


@pytest.mark.parametrize("kind, distribution", [("uniform", "uniform"), ("exponential", "expon")])
def test_numbers_follow_their_distribution_along_a_row_and_across_rows_and_steps(kind, distribution):
    along = RowRandomness([seeded(0)]).numbers(kind, rows_of(0), 20_000)[0]
    assert kstest(along.numpy(), distribution).pvalue > 1e-3
    generators = [seeded(seed) for seed in range(500)]
    steps = [RowRandomness(generators).numbers(kind, torch.arange(500), 1)[:, 0] for _ in range(20)]
    assert kstest(torch.stack(steps).flatten().numpy(), distribution).pvalue > 1e-3
    assert len(torch.stack(steps).unique()) > 9_900  # no two rows, and no two steps, have the same


@pytest.mark.parametrize("temperature", [0.5, 0.4, 1 / 3])
def test_the_choice_does_not_depend_on_the_size_of_blocks(temperature):
    stream_BN = torch.multinomial(zipf(40), 50 * 64, True, generator=seeded(5)).view(50, 64)

    def choose(size):
        rng, attempts = RowRandomness([seeded(row) for row in range(50)]), RepetitionAttempts(temperature)
        attempts.first_block = size
        candidates = StubBatch(stream_BN=stream_BN)
        return generation_calm_samplers.exact_temperature_sample(candidates, attempts, 64, rng)[0]

    first, *others = (choose(size) for size in (4, 7, 32, 64))
    assert all(torch.equal(first, other) for other in others)


# In `generate`

PROMPTS = [[BOS, 10, 11], [BOS, 20, 21, 22, 23, 24], [BOS, 30, 31, 32, 33]]
SETTINGS = [*METHODS.values(), {"temperature": 0.7, "sampling_method": "exact"}]


@pytest.mark.parametrize(
    "head_type, settings",
    [("energy", settings) for settings in SETTINGS]
    + [(head_type, SETTINGS[-1]) for head_type in HEAD_TYPES if head_type != "energy"]
    + [("token_chain", {"temperature": 0.4})],  # by rejection
    ids=str,
)
def test_with_per_row_generators_a_sequence_is_the_same_alone_and_in_a_batch(head_type, settings):
    model, settings = exact_model(head_type), {"max_new_tokens": 22, "eos_token_id": EOS, **settings}
    together = model.generate(**padded(PROMPTS), generator=[seeded(row) for row in range(3)], **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), generator=[seeded(row)], **settings)[0, len(prompt) :]
        assert torch.equal(together[row, 6:][: len(alone)], alone) and (together[row, 6 + len(alone) :] == PAD).all()


def test_a_wrong_number_of_generators_raises_before_any_work():
    model, same = tiny_model(), [seeded(0), seeded(0)]
    with pytest.raises(ValueError, match="generator is a list of 2, but 3 rows are generated"):
        model.generate(**padded(PROMPTS), generator=same, do_sample=True)
    with pytest.raises(ValueError, match="or a list of them, one per row"):
        model.generate(**padded(PROMPTS), generator=[0, 1, 2], do_sample=True)
    settings = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 8}
    output = model.generate(torch.tensor(PROMPTS[1:2]), generator=same, **settings)
    assert torch.equal(output[0], output[1])
