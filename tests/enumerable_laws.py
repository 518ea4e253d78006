"""Distributions small enough to enumerate, draws from them as patches, and what to hold a sample of them against."""

# B batch rows, N candidate draws, V outcomes (patches) of an enumerable distribution

import torch
from scipy.stats import chisquare

TOKENS = 40  # outcome v is the patch (v // TOKENS, v % TOKENS)


def peaked(num_outcomes: int, top: float = 0.6) -> torch.Tensor:
    rest = torch.full((num_outcomes - 1,), (1 - top) / (num_outcomes - 1), dtype=torch.float64)
    return torch.cat((torch.tensor([top], dtype=torch.float64), rest))


def flat(num_outcomes: int) -> torch.Tensor:
    return torch.full((num_outcomes,), 1 / num_outcomes, dtype=torch.float64)


def zipf(num_outcomes: int) -> torch.Tensor:
    weights = 1 / torch.arange(1, num_outcomes + 1, dtype=torch.float64)
    return weights / weights.sum()


def sharpened(law_V: torch.Tensor, temperature: float) -> torch.Tensor:
    power_V = law_V ** (1 / temperature)
    return power_V / power_V.sum()


def as_patches(outcomes: torch.LongTensor) -> torch.LongTensor:
    return torch.stack((outcomes // TOKENS, outcomes % TOKENS), dim=-1)


def as_outcomes(patches: torch.LongTensor) -> torch.LongTensor:
    return patches[..., 0] * TOKENS + patches[..., 1]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws_from(law_BV: torch.Tensor, generator: torch.Generator):
    """The `draw` of a batch whose row b has the law law_BV[b]."""

    def draw(rows: torch.LongTensor, num_draws: int) -> torch.LongTensor:
        return as_patches(torch.multinomial(law_BV[rows], num_draws, replacement=True, generator=generator))

    return draw


def pools_from(law_V: torch.Tensor, num_pools: int, num_draws: int, seed: int = 0) -> torch.LongTensor:
    outcomes = torch.multinomial(law_V, num_pools * num_draws, replacement=True, generator=seeded(seed))
    return as_patches(outcomes.view(num_pools, num_draws))


def chi_square_p_value(outcomes: torch.LongTensor, law_V: torch.Tensor) -> float:
    """p-value of the counts under the law; neighbours share a cell of about 10 where fewer are expected of each."""
    expected_V = law_V * len(outcomes)
    cell_V = ((expected_V.cumsum(0) - expected_V / 2) / 10).long()
    cell_V = torch.unique(cell_V, return_inverse=True)[1]
    expected = torch.zeros(int(cell_V.max()) + 1, dtype=torch.float64).scatter_add_(0, cell_V, expected_V)
    observed = torch.bincount(cell_V[outcomes], minlength=len(expected)).double()
    keep = expected >= 5
    rest = torch.stack((observed[~keep].sum(), expected[~keep].sum()))
    if rest[1] > 0:
        observed, expected = (torch.cat((x[keep], r[None])) for x, r in zip((observed, expected), rest, strict=True))
    assert len(expected) > 1, "one cell cannot be tested"
    return float(chisquare(observed.numpy(), expected.numpy()).pvalue)


def total_variation(law_V: torch.Tensor, other_V: torch.Tensor) -> float:
    return 0.5 * float((law_V - other_V).abs().sum())
