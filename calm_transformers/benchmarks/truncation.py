"""How far the choice among N draws is from the law that it stands for, at T > 1 and with top-k, top-p and min-p.

    python -m calm_transformers.benchmarks.truncation

A law P over V patches is known exactly; of each pool of N draws one patch is chosen by
`generation_calm_weights.candidate_weights`. The figures are total variations between the law of that choice, the mean over
the pools, and the law that is meant: P^(1/T)/Z, truncated. Where equal probabilities meet at the edge of a
truncation, each of them is meant equally often.

- "untouched": of P itself, at T > 1; of P^(1/T)/Z, where it is truncated: what one would have without.
- "plug-in": weighs a patch by its count^(1/T), and knows of no patch that was not drawn.
- "noise" is what so many pools leave of a distance of 0: that of the draws themselves to P.
"""

# B pools, N draws, V outcomes (patches)

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from calm_transformers.command_line import Parser, command, positive
from calm_transformers.evaluation.report import markdown
from calm_transformers.model.generation_calm_weights import (
    NO_TRUNCATION,
    Truncation,
    candidate_weights,
    first_occurrences,
    occurrence_counts,
    truncated,
)
from calm_transformers.progress import progress_bar

NUM_DRAWS = (50, 200, 1000)
TEMPERATURES = (1.25, 1.5, 2.0)
TRUNCATIONS = {
    "top_k = 5": Truncation(top_k=5),
    "top_p = 0.9": Truncation(top_p=0.9),
    "min_p = 0.1": Truncation(min_p=0.1),
}
TRUNCATED_TEMPERATURES = (1.0, 0.5)


def law_of(*weights: float) -> Tensor:
    weights_V = torch.tensor(weights, dtype=torch.float64)
    return weights_V / weights_V.sum()


LAWS = {  # zipf: the i-th has 1/i of the first; peaked: one has 0.6, the others share the rest equally
    **{f"zipf({size})": law_of(*(1 / i for i in range(1, size + 1))) for size in (20, 100, 1000)},
    "peaked(50)": law_of(0.6, *[0.4 / 49] * 49),
    "flat(100)": law_of(*[1.0] * 100),
}


def meant_law(law_V: Tensor, temperature: float, truncation: Truncation = NO_TRUNCATION) -> Tensor:
    """P^(1/T)/Z, truncated as `truncated` does it, equal probabilities alike."""
    power_V = law_V ** (1 / temperature)
    power_V = power_V / power_V.sum()
    kept_V = truncated(power_V[None], truncation)[0]
    _, group_V = law_V.unique(return_inverse=True)
    sums, sizes = (
        torch.zeros(len(law_V), dtype=law_V.dtype).index_add(0, group_V, x) for x in (kept_V, torch.ones_like(law_V))
    )
    kept_V = (sums / sizes)[group_V]
    return kept_V / kept_V.sum()


def plug_in_weights(first_BN: Tensor, temperature: float) -> Tensor:
    """count^(1/T), on the first of equal draws, each row's sum 1."""
    is_first_BN = first_BN == torch.arange(first_BN.shape[1])
    weights_BN = occurrence_counts(first_BN).double().pow(1 / temperature) * is_first_BN
    return weights_BN / weights_BN.sum(-1, keepdim=True)


class Pools:
    """So many pools of so many draws from a law."""

    def __init__(self, law_V: Tensor, num_pools: int, num_draws: int):
        generator = torch.Generator().manual_seed(0)
        draws = torch.multinomial(law_V, num_pools * num_draws, replacement=True, generator=generator)
        self.num_outcomes, self.outcomes_BN = len(law_V), draws.view(num_pools, num_draws)
        self.first_BN = first_occurrences(self.outcomes_BN[..., None])

    def law_of_choice(self, weigh: Callable[[Tensor], Tensor]) -> Tensor:
        """The law (V,) of a choice by weights (B, N) of class ids (B, N)."""
        weights_BN, law_V = weigh(self.first_BN).double(), torch.zeros(self.num_outcomes, dtype=torch.float64)
        return law_V.index_add(0, self.outcomes_BN.flatten(), weights_BN.flatten()) / len(weights_BN)


def total_variation(law_V: Tensor, other_V: Tensor) -> float:
    return 0.5 * float((law_V - other_V).abs().sum())


def flattened_row(law_V: Tensor, pools: Pools) -> list[float]:
    """The noise; then for each T ours, the plug-in's and the untouched law's distance."""
    row = [
        total_variation(pools.law_of_choice(lambda first_BN: torch.full(first_BN.shape, 1 / first_BN.shape[1])), law_V)
    ]
    for temperature in TEMPERATURES:
        meant_V = meant_law(law_V, temperature)
        ways = (partial(way, temperature=temperature) for way in (candidate_weights, plug_in_weights))
        row += [*(total_variation(pools.law_of_choice(way), meant_V) for way in ways), total_variation(law_V, meant_V)]
    return row


def truncated_row(law_V: Tensor, pools: Pools) -> list[float]:
    """For each T and truncation ours, and the untouched law's distance."""
    row = []
    for temperature in TRUNCATED_TEMPERATURES:
        for truncation in TRUNCATIONS.values():
            meant_V = meant_law(law_V, temperature, truncation)
            weigh = partial(candidate_weights, temperature=temperature, truncation=truncation)
            untouched = total_variation(meant_law(law_V, temperature), meant_V)
            row += [total_variation(pools.law_of_choice(weigh), meant_V), untouched]
    return row


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm_transformers.benchmarks.truncation", __doc__)
    parser.add_argument("--pools", type=positive, default=2000, help="of each law and N")
    args = parser.parse_args(argv)
    flattened = [f"{what}T = {t:g}" for t in TEMPERATURES for what in ("", "plug-in, ", "untouched, ")]
    cases = [f"{name}, T = {t:g}" for t in TRUNCATED_TEMPERATURES for name in TRUNCATIONS]
    tables = [
        (["noise", *flattened], flattened_row),
        ([f"{case}{what}" for case in cases for what in ("", ", untouched")], truncated_row),
    ]
    for header, row_of in tables:
        rows = []
        for (name, law_V), num_draws in progress_bar(list(product(LAWS.items(), NUM_DRAWS)), "Choosing", "row"):
            figures = row_of(law_V, Pools(law_V, args.pools, num_draws))
            rows.append([name, f"{num_draws:,}", *(f"{figure:.3f}" for figure in figures)])
        print(markdown(["law", "N", *header], rows), end="\n\n")


if __name__ == "__main__":
    sys.exit(main())
