"""Enumerable distributions of patches, stub candidates that sample from them, and goodness-of-fit statistics."""

# B rows of candidates, R of these that draw, N samples, V outcomes (patches) of an enumerable distribution

import torch
from scipy.stats import chisquare
from tiny import seeded
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from calm_transformers.model.generation_calm_algorithms import first_occurrences

TOKENS = 40  # outcome v is the patch (v // TOKENS, v % TOKENS)


def peaked(num_outcomes: int, top: float = 0.6) -> torch.Tensor:
    rest = torch.full((num_outcomes - 1,), (1 - top) / (num_outcomes - 1), dtype=torch.float64)
    return torch.cat((torch.tensor([top], dtype=torch.float64), rest))


def flat(num_outcomes: int) -> torch.Tensor:
    return torch.full((num_outcomes,), 1 / num_outcomes, dtype=torch.float64)


def zipf(num_outcomes: int) -> torch.Tensor:
    weights = 1 / torch.arange(1, num_outcomes + 1, dtype=torch.float64)
    return weights / weights.sum()


def tempered(probs_V: torch.Tensor, temperature: float) -> torch.Tensor:
    power_V = probs_V ** (1 / temperature)
    return power_V / power_V.sum()


def as_patches(outcomes: torch.Tensor) -> torch.Tensor:
    return torch.stack((outcomes // TOKENS, outcomes % TOKENS), dim=-1)


class StubBatch:
    """Candidates that are outcomes: row b samples from probs_BV[b], or takes the samples of `stream_BN` in order.

    Calls are recorded: (rows, number of samples) of each `extend`, (pairs, noise) of each `compare`.
    """

    has_processors, log_factors_BN = False, None

    def __init__(self, probs_BV=None, generator=None, stream_BN=None):
        self.probs_BV, self.generator, self.stream_BN = probs_BV, generator, stream_BN
        self.rows_B = torch.arange(len(probs_BV if stream_BN is None else stream_BN))
        self.outcomes_BN = torch.empty(len(self.rows_B), 0, dtype=torch.long)
        self.extended, self.compared = [], []

    def extend(self, rows_R, num_samples):
        start, self.extended = self.outcomes_BN.shape[1], [*self.extended, (rows_R.tolist(), num_samples)]
        new_BN = torch.full((len(self.rows_B), num_samples), -1)
        if self.stream_BN is None:
            new_BN[rows_R] = torch.multinomial(self.probs_BV[rows_R], num_samples, True, generator=self.generator)
        else:
            new_BN[rows_R] = self.stream_BN[rows_R, start : start + num_samples]
        self.outcomes_BN = torch.cat((self.outcomes_BN, new_BN), dim=1)

    def compare(self, rows_R, pairs="all", noise_RN=None):
        self.compared.append((pairs, noise_RN))
        assert (self.outcomes_BN[rows_R] >= 0).all(), "a row that had stopped was sampled again"
        return first_occurrences(self.outcomes_BN[rows_R, :, None])

    def tokens(self, rows_R, index_R):
        return as_patches(self.outcomes_BN[rows_R, index_R])

    @property
    def num_samples_B(self):
        return (self.outcomes_BN >= 0).sum(-1)

    def outcomes(self, index_B):
        return self.outcomes_BN[self.rows_B, index_B]


def warpers_of(truncation) -> LogitsProcessorList:
    """Returns upstream's warpers for a truncation."""
    warpers = LogitsProcessorList()
    if truncation.top_k:
        warpers.append(TopKLogitsWarper(truncation.top_k))
    if truncation.top_p < 1:
        warpers.append(TopPLogitsWarper(truncation.top_p))
    if truncation.min_p > 0:
        warpers.append(MinPLogitsWarper(truncation.min_p))
    return warpers


def outcomes_from(probs_V: torch.Tensor, num_sets: int, num_samples: int, seed: int = 0) -> torch.Tensor:
    outcomes = torch.multinomial(probs_V, num_sets * num_samples, replacement=True, generator=seeded(seed))
    return outcomes.view(num_sets, num_samples)


def chi_square_p_value(outcomes: torch.Tensor, probs_V: torch.Tensor) -> float:
    """Returns the p-value of the counts; neighbours share a cell of about 10 where fewer are expected of each."""
    expected_V = probs_V * len(outcomes)
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


def total_variation(probs_V: torch.Tensor, other_probs_V: torch.Tensor) -> float:
    return 0.5 * float((probs_V - other_probs_V).abs().sum())
