"""The BrierLM metric: hand-computed values, its definition, and recorded results of the published code."""

import pytest
import torch

from calm_transformers.benchmarks.golden import HEAD_TYPES, recorded_model, recorded_tensors
from calm_transformers.evaluation.brier import BrierCounts, brierlm


def test_estimates_by_hand():
    """x1 = y for one token, x2 = y for three, x1 = x2 for one: 1+1-1, 0+1-0, 0+1-0, 0. A fifth token doesn't count."""
    samples = (torch.tensor([[ids]]) for ids in ([1, 9, 3, 4, 0], [1, 2, 3, 0, 0], [1, 2, 3, 4, 5]))
    counts = BrierCounts.from_samples(*samples)
    assert counts.accuracy_B4.tolist() == [[2, 1, 1, 0]]
    assert counts.collision_B4.tolist() == [[1, 0, 0, 0]]
    assert counts.score().brier == [1, 1, 1, 0]
    target = torch.arange(24).view(1, 6, 4)
    assert BrierCounts.from_samples(target, target, target).score().brierlm.value == pytest.approx(100)
    constant = torch.full_like(target, 99)
    score = BrierCounts.from_samples(constant, constant, target).score()
    assert (score.brier, score.brierlm.value) == ([-1, -1, -1, -1], 0)


def test_a_negative_brier_score_counts_as_zero():
    assert brierlm(torch.tensor([0.2, 0.1, -0.05, -0.01])) == 0
    assert brierlm(torch.tensor([0.2, 0.1, -0.05, 0.01])) == 0
    assert brierlm(torch.tensor([0.16, 0.08, 0.04, 0.02])).item() == pytest.approx(100 * 0.00001024**0.25)


def random_counts(blocks, positions=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, second, target = torch.randint(0, 2, (3, blocks, positions, 4), generator=generator)
    return BrierCounts.from_samples(first, second, target)


def test_counts_add_up():
    """Batches are weighted by their number of positions."""
    parts = [random_counts(3, 7), random_counts(5, 2, seed=1)]
    total = sum(parts, BrierCounts.empty()).score()
    assert (total.positions, total.blocks) == (31, 8)
    weighted = [(21 * a + 10 * b) / 31 for a, b in zip(*(part.score().brier for part in parts), strict=True)]
    assert total.brier == pytest.approx(weighted)


def test_interval_covers_and_shrinks():
    few, many = (random_counts(blocks).score().brierlm for blocks in (20, 2000))
    assert few.low < few.value < few.high and many.low < many.value < many.high
    assert (many.high - many.low) < (few.high - few.low) / 5
    for score in (random_counts(20).score(), random_counts(2000).score()):
        assert all(low < b < high for b, (low, high) in zip(score.brier, score.brier_intervals, strict=True))
    assert random_counts(1).score().brier_intervals is None
    assert random_counts(20).score(seed=3) == random_counts(20).score(seed=3)
    assert random_counts(1).score().brierlm.low is None


def test_errors():
    with pytest.raises(ValueError, match="no positions"):
        BrierCounts.empty().score()
    with pytest.raises(ValueError, match="continuation of 3 tokens"):
        BrierCounts.from_samples(*torch.zeros(3, 1, 1, 3))


@pytest.mark.parametrize("head", HEAD_TYPES)
def test_published_numbers(head):
    """Two decoded samples of each of 16 x 12 patches give the Brier-1..4 recorded from the published code."""
    golden = recorded_tensors(head)
    with torch.no_grad():
        logits = recorded_model(head).autoencoder.decoder(golden["brier.latents"])
    targets = golden["brier.targets"].unflatten(1, (12, 4))
    score = BrierCounts.from_samples(*logits.argmax(-1), targets).score()
    assert score.positions == 16 * 12
    assert score.brier == pytest.approx([golden[f"brier.brier{n}"].item() for n in range(1, 5)], abs=1e-6)
