"""Known distributions over patches, their targets, and the distribution of a choice among N samples.

P is a distribution over V patches. From each of many sets of N samples one patch is chosen by a weight; the choice's
distribution, averaged over the sets, is compared with P^(1/T)/Z, truncated. If equal probabilities meet at the edge of
a truncation, each of them is equally likely in the target.
"""

# B sets of samples, N samples, V outcomes (patches)

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calm_transformers.model.generation_calm_algorithms import (
    NO_TRUNCATION,
    Truncation,
    first_occurrences,
    occurrence_counts,
    truncated,
)


def normalise(*weights: float) -> Tensor:
    weights_V = torch.tensor(weights, dtype=torch.float64)
    return weights_V / weights_V.sum()


DISTRIBUTIONS = {  # zipf: P(i) ∝ 1/i; peaked: one outcome has 0.6, the others are equal
    **{f"zipf({size})": normalise(*(1 / i for i in range(1, size + 1))) for size in (20, 100, 1000)},
    "peaked(50)": normalise(0.6, *[0.4 / 49] * 49),
    "flat(100)": normalise(*[1.0] * 100),
}


def target_distribution(probs_V: Tensor, temperature: float, truncation: Truncation = NO_TRUNCATION) -> Tensor:
    """Returns P^(1/T)/Z, truncated, with the truncated mass of ties shared equally among them."""
    tempered_V = probs_V ** (1 / temperature)
    tempered_V = tempered_V / tempered_V.sum()
    target_V = truncated(tempered_V[None], truncation)[0]
    _, tie_V = probs_V.unique(return_inverse=True)  # equal probabilities have the same index
    sums = torch.zeros_like(probs_V).index_add(0, tie_V, target_V)
    target_V = (sums / tie_V.bincount(minlength=len(probs_V)))[tie_V]
    return target_V / target_V.sum()


def plug_in_weights(first_BN: Tensor, temperature: float) -> Tensor:
    """Returns weights count^(1/T) on the first of equal samples, normalised per row."""
    is_first_BN = first_BN == torch.arange(first_BN.shape[1])
    weights_BN = occurrence_counts(first_BN).double().pow(1 / temperature) * is_first_BN
    return weights_BN / weights_BN.sum(-1, keepdim=True)


class SampleSets:
    """`num_sets` sets of `num_samples` samples from a distribution (V,)."""

    def __init__(self, probs_V: Tensor, num_sets: int, num_samples: int):
        generator = torch.Generator().manual_seed(0)
        outcomes = torch.multinomial(probs_V, num_sets * num_samples, replacement=True, generator=generator)
        self.num_outcomes, self.outcomes_BN = len(probs_V), outcomes.view(num_sets, num_samples)
        self.first_BN = first_occurrences(self.outcomes_BN[..., None])

    def choice_distribution(self, weight_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the distribution (V,) of a choice weighted by `weight_fn(first_BN)`, averaged over the sets."""
        weights_BN, probs_V = weight_fn(self.first_BN).double(), torch.zeros(self.num_outcomes, dtype=torch.float64)
        return probs_V.index_add(0, self.outcomes_BN.flatten(), weights_BN.flatten()) / len(weights_BN)
