"""BrierLM: a likelihood-free metric of language models, estimated from samples (paper section 4).

For a distribution P over n-token continuations and the true continuation y

    Brier-n = 2 P(y) - sum_x P(x)^2          (higher is better, 1 at best)

and two independent samples x1, x2 give the unbiased estimate 1{x1 = y} + 1{x2 = y} - 1{x1 = x2}. The first two terms
are called accuracy below, the third collision. The estimates are averaged over all positions, and

    BrierLM = 100 * (Brier-1 * Brier-2 * Brier-3 * Brier-4)^(1/4),   0 when one of them is negative.

Definitions inferred from recorded outputs of the published code (tests/fixtures/*_k4/golden.safetensors): the n-token
continuation is the *first n tokens of a patch* and never crosses into the next patch; each Brier-n is a mean over all
predicted patches (the same denominator for n = 1..4); the first patch of a block, which is not predicted, is excluded.
N-grams at every token offset, crossing patches, give other numbers.

One difference: the published code clamps only a negative *product* to 0. With two or four negative Brier-n the product
is positive again: an untrained CALM that repeats one patch (every Brier-n = -1) would score 100. Here it scores 0.
"""

# B blocks of text, M predicted positions of a block, n = 1..4 tokens of a continuation, R bootstrap resamples

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

MAX_N = 4  # Brier-1 to Brier-4; paper section 4


def prefix_matches(left_Mn: torch.Tensor, right_Mn: torch.Tensor) -> torch.Tensor:
    """Returns whether the first n = 1..4 tokens of two continuations (..., at least 4) are equal, bool (..., 4)."""
    shortest = min(left_Mn.shape[-1], right_Mn.shape[-1])
    if shortest < MAX_N:
        raise ValueError(f"a continuation of {shortest} tokens: Brier-{MAX_N} needs at least {MAX_N}")
    return (left_Mn[..., :MAX_N] == right_Mn[..., :MAX_N]).cumprod(-1).bool()


@dataclass
class BrierLM:
    """BrierLM x 100 with its bootstrap interval (None for a single block)."""

    value: float
    low: float | None
    high: float | None


@dataclass
class BrierScore:
    """Brier-1..4 with bootstrap intervals (None for a single block), BrierLM, number of positions and of blocks."""

    brier: list[float]
    brier_intervals: list[list[float]] | None
    brierlm: BrierLM
    positions: int
    blocks: int


@dataclass
class BrierCounts:
    """Per-block sums of the Brier terms; counts of different batches and processes are added with `+`.

    accuracy_B4: per block and n, the sum over positions of 1{x1 = y} + 1{x2 = y}, or of its expectation 2 P(y).
    collision_B4: per block and n, the sum over positions of 1{x1 = x2}, or of its expectation.
    positions_B: number of positions of each block.
    """

    accuracy_B4: torch.Tensor
    collision_B4: torch.Tensor
    positions_B: torch.Tensor

    @classmethod
    def empty(cls) -> BrierCounts:
        sums = torch.zeros(0, MAX_N, dtype=torch.float64)
        return cls(sums, sums.clone(), torch.zeros(0, dtype=torch.long))

    @classmethod
    def from_terms(cls, accuracy_BM4: torch.Tensor, collision_BM4: torch.Tensor) -> BrierCounts:
        """Sums the accuracy and collision terms over the positions of each block."""
        blocks, positions = accuracy_BM4.shape[:2]
        return cls(
            accuracy_BM4.double().sum(1).cpu(),
            collision_BM4.double().sum(1).cpu(),
            torch.full((blocks,), positions, dtype=torch.long),
        )

    @classmethod
    def from_samples(cls, first_BMn: torch.Tensor, second_BMn: torch.Tensor, target_BMn: torch.Tensor) -> BrierCounts:
        """Counts two sampled continuations per position against the true one, each of at least 4 tokens."""
        accuracy_BM4 = prefix_matches(first_BMn, target_BMn).double() + prefix_matches(second_BMn, target_BMn).double()
        return cls.from_terms(accuracy_BM4, prefix_matches(first_BMn, second_BMn))

    def __add__(self, other: BrierCounts) -> BrierCounts:
        return BrierCounts(
            torch.cat([self.accuracy_B4, other.accuracy_B4]),
            torch.cat([self.collision_B4, other.collision_B4]),
            torch.cat([self.positions_B, other.positions_B]),
        )

    def gather(self) -> BrierCounts:
        """Returns the counts of all torch.distributed processes, or `self` without a process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        counts_of_ranks: list[BrierCounts] = [self] * dist.get_world_size()
        dist.all_gather_object(counts_of_ranks, self)
        return sum(counts_of_ranks, BrierCounts.empty())

    def score(self, resamples: int = 1000, seed: int = 0) -> BrierScore:
        """Returns the means over all positions, with 95 % intervals from a bootstrap over blocks."""
        positions = int(self.positions_B.sum())
        if positions == 0:
            raise ValueError("no positions were counted: a score needs at least one position")
        sums_B4 = self.accuracy_B4 - self.collision_B4
        brier_4 = sums_B4.sum(0) / positions
        lm, intervals = BrierLM(brierlm(brier_4).item(), None, None), None
        if len(sums_B4) > 1:
            brier_R4 = bootstrap(sums_B4, self.positions_B, resamples, seed)
            lm.low, lm.high = interval(brierlm(brier_R4))
            intervals = [interval(brier_R) for brier_R in brier_R4.T]
        return BrierScore(brier_4.tolist(), intervals, lm, positions, blocks=len(self.positions_B))


def brierlm(brier_4: torch.Tensor) -> torch.Tensor:
    """Returns BrierLM x 100 (...,) from Brier-1..4 (..., 4); 0 when one of them is negative."""
    return 100 * brier_4.clamp(min=0).prod(-1) ** (1 / MAX_N)


def bootstrap(sums_B4: torch.Tensor, positions_B: torch.Tensor, resamples: int, seed: int = 0) -> torch.Tensor:
    """Returns Brier-1..4 of R resamples of the blocks with replacement, (R, 4)."""
    blocks = len(positions_B)
    generator = torch.Generator().manual_seed(seed)
    chosen_RB = torch.randint(blocks, (resamples, blocks), generator=generator)
    counts_RB = torch.zeros(resamples, blocks, dtype=torch.float64)
    counts_RB.scatter_add_(1, chosen_RB, torch.ones_like(counts_RB))
    return (counts_RB @ sums_B4) / (counts_RB @ positions_B.double()).unsqueeze(-1)


def interval(values_R: torch.Tensor) -> list[float]:
    """Returns the 2.5 % and 97.5 % quantiles."""
    return values_R.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
