"""Measures the error of choosing among N samples, at T > 1 and with top-k, top-p and min-p.

    python -m calm_transformers.benchmarks.truncation

P is a known distribution over V patches. From each set of N samples one patch is chosen by
`generation_calm_algorithms.candidate_weights`. The table has total variation distances between the distribution of the
choice, averaged over many sets, and the target: P^(1/T)/Z, truncated. If equal probabilities meet at the edge of a
truncation, each of them is equally likely in the target.

- "untouched": the distance of P itself at T > 1, and of P^(1/T)/Z without the truncation.
- "plug-in": the weight of a patch is count^(1/T), which ignores unseen patches.
- "noise": the distance of the samples themselves from P, which a perfect method would have for this many sets.
"""

# B sets of samples, N samples, V outcomes (patches)

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from calm_transformers.command_line import Parser, command, positive
from calm_transformers.evaluation.report import markdown
from calm_transformers.model.generation_calm_algorithms import (
    NO_TRUNCATION,
    Truncation,
    candidate_weights,
    first_occurrences,
    occurrence_counts,
    truncated,
)
from calm_transformers.progress import progress_bar

NUM_SAMPLES = (50, 200, 1000)
TEMPERATURES = (1.25, 1.5, 2.0)
TRUNCATIONS = {
    "top_k = 5": Truncation(top_k=5),
    "top_p = 0.9": Truncation(top_p=0.9),
    "min_p = 0.1": Truncation(min_p=0.1),
}
TRUNCATED_TEMPERATURES = (1.0, 0.5)


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


def total_variation(probs_V: Tensor, other_V: Tensor) -> float:
    return 0.5 * float((probs_V - other_V).abs().sum())


def flattened_row(probs_V: Tensor, samples: SampleSets) -> list[float]:
    """Returns the noise, then for each T the distances of `candidate_weights`, of the plug-in, and of P itself."""
    sampled_V = samples.choice_distribution(lambda first_BN: torch.full(first_BN.shape, 1 / first_BN.shape[1]))
    row = [total_variation(sampled_V, probs_V)]
    for temperature in TEMPERATURES:
        target_V = target_distribution(probs_V, temperature)
        for weight_fn in (candidate_weights, plug_in_weights):
            choice_V = samples.choice_distribution(partial(weight_fn, temperature=temperature))
            row.append(total_variation(choice_V, target_V))
        row.append(total_variation(probs_V, target_V))
    return row


def truncated_row(probs_V: Tensor, samples: SampleSets) -> list[float]:
    """Returns for each T and truncation the distances of `candidate_weights`, and of P^(1/T)/Z without truncation."""
    row = []
    for temperature in TRUNCATED_TEMPERATURES:
        for truncation in TRUNCATIONS.values():
            target_V = target_distribution(probs_V, temperature, truncation)
            weight_fn = partial(candidate_weights, temperature=temperature, truncation=truncation)
            row.append(total_variation(samples.choice_distribution(weight_fn), target_V))
            row.append(total_variation(target_distribution(probs_V, temperature), target_V))
    return row


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm_transformers.benchmarks.truncation", __doc__)
    parser.add_argument("--pools", type=positive, default=2000, help="sets per distribution and N (default: 2,000)")
    args = parser.parse_args(argv)
    flattened = [f"{prefix}T = {t:g}" for t in TEMPERATURES for prefix in ("", "plug-in, ", "untouched, ")]
    cases = [f"{name}, T = {t:g}" for t in TRUNCATED_TEMPERATURES for name in TRUNCATIONS]
    tables = [
        (["noise", *flattened], flattened_row),
        ([f"{case}{suffix}" for case in cases for suffix in ("", ", untouched")], truncated_row),
    ]
    cells = list(product(DISTRIBUTIONS.items(), NUM_SAMPLES))
    for header, compute_row in tables:
        rows = []
        for (name, probs_V), num_samples in progress_bar(cells, "Choosing", "row"):
            distances = compute_row(probs_V, SampleSets(probs_V, args.pools, num_samples))
            rows.append([name, f"{num_samples:,}", *(f"{distance:.3f}" for distance in distances)])
        print(markdown(["distribution", "N", *header], rows), end="\n\n")


if __name__ == "__main__":
    sys.exit(main())
