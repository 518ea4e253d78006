"""BrierLM: the quality of a language model measured from samples alone (paper section 4).

For a distribution P over n-token continuations and the true continuation y

    Brier-n = 2 P(y) - sum_x P(x)^2          (higher is better, 1 at best)

and two independent samples x1, x2 give the unbiased estimate 1{x1 = y} + 1{x2 = y} - 1{x1 = x2}. The first two terms
are called accuracy below, the third collision. Over all positions the estimates are averaged, and

    BrierLM = 100 * (Brier-1 * Brier-2 * Brier-3 * Brier-4)^(1/4),   0 when one of them is negative.

Definitions recovered from the recorded outputs of the published code (tests/fixtures/*_k4/golden.safetensors):
the n-token continuation is the *first n tokens of a patch* and never crosses into the next patch; each Brier-n is a
mean over all predicted patches (the same denominator for n = 1..4); the first patch of a block, which nothing
predicts, does not count. An n-gram at every token offset, crossing patches, gives other numbers.

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
    """Bool (..., 4): entry n-1 says whether the first n tokens of two (..., >= 4) continuations agree."""
    shortest = min(left_Mn.shape[-1], right_Mn.shape[-1])
    if shortest < MAX_N:
        raise ValueError(f"a continuation of {shortest} tokens: Brier-{MAX_N} needs at least {MAX_N}")
    return (left_Mn[..., :MAX_N] == right_Mn[..., :MAX_N]).cumprod(-1).bool()


@dataclass
class BrierLM:
    """100 x the geometric mean of Brier-1..4 with its bootstrap interval (None from a single block)."""

    value: float
    low: float | None
    high: float | None


@dataclass
class BrierScore:
    """Brier-1..4 (fractions) with their bootstrap intervals (None from a single block), BrierLM (x 100), and how many
    positions and blocks they were measured on."""

    brier: list[float]
    brier_intervals: list[list[float]] | None
    brierlm: BrierLM
    positions: int
    blocks: int


@dataclass
class BrierCounts:
    """Sums over the positions of each block; counts of different batches and processes add up.

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
        """Counts from the two terms of every position."""
        blocks, positions = accuracy_BM4.shape[:2]
        return cls(
            accuracy_BM4.double().sum(1).cpu(),
            collision_BM4.double().sum(1).cpu(),
            torch.full((blocks,), positions, dtype=torch.long),
        )

    @classmethod
    def from_draws(cls, first_BMn: torch.Tensor, second_BMn: torch.Tensor, target_BMn: torch.Tensor) -> BrierCounts:
        """Counts from two sampled continuations of every position and the true one, each of at least 4 token ids."""
        accuracy_BM4 = prefix_matches(first_BMn, target_BMn).double() + prefix_matches(second_BMn, target_BMn).double()
        return cls.from_terms(accuracy_BM4, prefix_matches(first_BMn, second_BMn))

    def __add__(self, other: BrierCounts) -> BrierCounts:
        return BrierCounts(
            torch.cat([self.accuracy_B4, other.accuracy_B4]),
            torch.cat([self.collision_B4, other.collision_B4]),
            torch.cat([self.positions_B, other.positions_B]),
        )

    def gather(self) -> BrierCounts:
        """The sum over all processes of torch.distributed; the counts themselves when there is one process."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        counts_of_ranks: list[BrierCounts] = [self] * dist.get_world_size()
        dist.all_gather_object(counts_of_ranks, self)
        return sum(counts_of_ranks, BrierCounts.empty())

    def score(self, resamples: int = 1000, seed: int = 0) -> BrierScore:
        """Means over all positions; the 95 % interval resamples whole blocks, for the text of a block hangs together.

        Raises ValueError when nothing was counted.
        """
        positions = int(self.positions_B.sum())
        if positions == 0:
            raise ValueError("no positions were counted: a score needs at least one")
        sums_B4 = self.accuracy_B4 - self.collision_B4
        brier_4 = sums_B4.sum(0) / positions
        lm, intervals = BrierLM(brierlm(brier_4).item(), None, None), None
        if len(sums_B4) > 1:
            brier_R4 = _resampled(sums_B4, self.positions_B, resamples, seed)
            lm.low, lm.high = _interval(brierlm(brier_R4))
            intervals = [_interval(brier_R) for brier_R in brier_R4.T]
        return BrierScore(brier_4.tolist(), intervals, lm, positions, blocks=len(self.positions_B))


def brierlm(brier_4: torch.Tensor) -> torch.Tensor:
    """BrierLM x 100 of (..., 4) Brier-1..4; 0 when one of them is negative."""
    return 100 * brier_4.clamp(min=0).prod(-1) ** (1 / MAX_N)


def _resampled(sums_B4, positions_B, resamples, seed) -> torch.Tensor:
    """(R, 4): Brier-1..4 of as many blocks drawn with replacement, R times."""
    blocks = len(positions_B)
    generator = torch.Generator().manual_seed(seed)
    chosen_RB = torch.randint(blocks, (resamples, blocks), generator=generator)
    times_RB = torch.zeros(resamples, blocks, dtype=torch.float64)
    times_RB.scatter_add_(1, chosen_RB, torch.ones_like(times_RB))
    return (times_RB @ sums_B4) / (times_RB @ positions_B.double()).unsqueeze(-1)


def _interval(values_R: torch.Tensor) -> list[float]:
    """2.5 % and 97.5 % quantiles."""
    return values_R.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
