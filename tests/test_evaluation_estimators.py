"""Both estimators are unbiased: on a Markov chain with known transitions they agree with the exact Brier-n.

The stub implements the estimators' protocol (evaluation/branching.py) by exact sampling from a chain, so the tests
cover everything that an estimator does around a model: positions, targets, branches, dropped positions, sums.
"""

import pytest
import torch

from calm_transformers.evaluation.ar_estimator import brier_counts_ar
from calm_transformers.evaluation.calm_estimator import brier_counts_calm

V = 4  # states of the chains
BLOCKS, LENGTH = 256, 48


def random_chain(seed, sharpness=2.0):
    """Returns a transition matrix (V, V) with positive entries."""
    return (sharpness * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def walk(chain, starts, steps, generator):
    """Samples `steps` states after each start (...) and returns them, (..., steps)."""
    states = [starts.flatten()]
    for _ in range(steps):
        states.append(chain[states[-1]].multinomial(1, generator=generator).squeeze(-1))
    return torch.stack(states[1:], dim=-1).unflatten(0, starts.shape)


class ChainReader:
    """Stub model whose state is the last token."""

    def __init__(self, chain, patch_size=None):
        self.chain, self.patch_size = chain, patch_size

    def _state(self, units):
        last = units if self.patch_size is None else units[..., -1]
        return self.chain.log()[last] if self.patch_size is None else last

    def read(self, units_BP):
        self.states = self._state(units_BP)
        return self.states

    def start(self, positions_BN):
        self.branches = positions_BN.shape[1]

    def extend(self, parents_BN, units_BN):
        assert 0 <= parents_BN.min() and parents_BN.max() < self.branches
        assert parents_BN.shape == units_BN.shape[:2]
        self.branches = parents_BN.shape[1]
        return self._state(units_BN)

    def draw(self, states, num_samples, generator=None):
        return walk(self.chain, states.expand(num_samples, *states.shape), self.patch_size, generator)


def exact_brier(model, contexts, targets):
    """Returns 2 P(y) - sum_x P(x)^2 (..., 4) by enumeration, given contexts (...) and true continuations (..., 4)."""
    path = torch.cat([contexts.unsqueeze(-1), targets], dim=-1)
    accuracy = model[path[..., :-1], path[..., 1:]].cumprod(-1)
    squares, ones, collision = model**2, torch.ones(V), []
    for _ in range(4):  # sum over paths of the squared path probability = (P∘P)^n 1
        ones = squares @ ones
        collision.append(ones[contexts])
    return 2 * accuracy - torch.stack(collision, dim=-1)


def assert_unbiased(counts, exact_BM4, max_error):
    """Checks that the mean of (estimate - exact) over blocks is within 3 standard errors, below `max_error`, of 0."""
    estimate_B4 = (counts.accuracy_B4 - counts.collision_B4) / counts.positions_B.unsqueeze(1)
    error_B4 = estimate_B4 - exact_BM4.mean(1)
    standard_error_4 = error_B4.std(0) / len(error_B4) ** 0.5
    assert (error_B4.mean(0).abs() <= 3 * standard_error_4 + 1e-6).all(), (error_B4.mean(0), standard_error_4)
    assert standard_error_4.max() < max_error


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(0)
    return walk(random_chain(0), torch.randint(V, (BLOCKS,), generator=generator), LENGTH, generator)


@pytest.mark.parametrize("model_seed", [0, 1], ids=["true_model", "wrong_model"])
@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 8])
def test_calm_estimator_is_unbiased(text, patch_size, model_seed):
    model = random_chain(model_seed)
    counts = brier_counts_calm(
        ChainReader(model, patch_size), text, patch_size, torch.Generator().manual_seed(1), chunk=13
    )
    ends = torch.arange(LENGTH // patch_size - -(-4 // patch_size)) * patch_size + patch_size - 1
    targets = torch.stack([text[:, ends + i] for i in range(1, 5)], dim=-1)
    assert counts.positions_B.tolist() == [len(ends)] * BLOCKS
    assert_unbiased(counts, exact_brier(model, text[:, ends], targets), max_error=0.03)


@pytest.mark.parametrize(("model_seed", "chunk"), [(0, 11), (1, 512)], ids=["true_model", "wrong_model"])
def test_ar_estimator_is_unbiased(text, model_seed, chunk):
    """Brier-1 is even exact."""
    model = random_chain(model_seed)
    counts = brier_counts_ar(ChainReader(model), text, torch.Generator().manual_seed(1), chunk)
    exact = exact_brier(model, text[:, :-4], text[:, 1:].unfold(1, 4, 1))
    assert counts.positions_B.tolist() == [LENGTH - 4] * BLOCKS
    assert_unbiased(counts, exact, max_error=0.005)
    torch.testing.assert_close(torch.tensor(counts.score().brier[0]), exact.mean((0, 1))[0])


@pytest.mark.parametrize(
    ("length", "patch_size", "message"),
    [(9, 4, "not divisible by the patch size 4"), (4, 4, "at least 8"), (4, 1, "at least 5"), (4, None, "at least 5")],
)
def test_unsupported_block_sizes_raise(length, patch_size, message):
    reader, blocks = ChainReader(random_chain(0), patch_size), torch.zeros(1, length, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        brier_counts_ar(reader, blocks) if patch_size is None else brier_counts_calm(reader, blocks, patch_size)
