"""Temperature sampling of patches from black-box draws: functions of a pool, free of the model.

Axes: B rows of a pool, R rows that still draw, N draws of a row, K tokens per patch.

The target at temperature T is P(x)^s / Z with the exponent s = 1/T, over whole patches x, when all one can do is draw
patches from P. A `Candidates` draws, and knows which of its draws are the same patch. Each method makes it draw, and returns
which draw of each row it chose; none knows a token:

- `single_sample`                T = 1;
- `batch_temperature_select`   weighs the distinct patches among N draws (paper, Algorithm 2, extended to every T), and
                               truncates what it weighed (top-k, top-p, min-p);
- `exact_temperature_sample`   the paper's Algorithm 1, drawing in growing blocks up to a bound, then the batch rule;
- `most_frequent_patch`        the mode of N draws, for `do_sample=False`.

The exact one asks only which draws are equal: where 1/T is whole, only of the pairs that its attempts compare. And it
draws the choice among distinct ones before it asks. So a pool need not decode everything.

Rows are independent, and all randomness but the pool's comes from `generator` (or from one a row, see
generation_calm_randomness.py). What depends on draws stays on their device, but that after each block of the exact one
the host reads, once, which rows are done. Tables that depend on no draw (weights, restarts) are made once, in float64.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig

from .generation_calm_randomness import Randomness, StepRandomness
from .generation_calm_weights import (
    NO_TRUNCATION,
    Truncation,
    candidate_weights,
    check_num_candidates,
    check_temperature,
    inverse_temperature,
    occurrence_counts,
    sample_by_weight,
)
from .kernels_calm import arange, as_tensor, cached_per_device, float64_device

MIN_BLOCK_SIZE = 4  # draws of the exact sampler's first block, at least; the pool then doubles until a row is done
BLOCK_COST = 15  # what a block costs beside its draws, in draws: the weights of head and vocabulary are read anew
FIRST_GUESS = 64  # draws that a row is thought to need before any is known
STEPS_REMEMBERED = 32
MAX_SAMPLES_PER_STEP = 2**22  # of a step: what is kept of them, about a kilobyte each, takes 4 GB
SamplingMethod = Literal["batch", "adaptive", "exact"]
SAMPLING_METHODS = get_args(SamplingMethod)
EXACT_DRAWS_PER_CANDIDATE = 10  # bound of the exact algorithm, in units of num_candidates

Pairs = Literal["all", "adjacent", "disjoint"]


class Candidates(Protocol):
    """Independent draws of patches, a sequence for each of B rows, that grows as it is asked to.

    Args:
        rows_B: the numbers of its rows, 0 … B − 1, on the device on which it answers.
        has_processors: whether draws weigh differently, by what they are: then all must be weighed.
        processor_log_weights_BN: then, by what each draw's probability is to be multiplied, the natural logarithm; equal draws
            have equal ones.
    """

    rows_B: Tensor
    has_processors: bool
    processor_log_weights_BN: Tensor | None

    def extend(self, rows_R: Tensor, num_draws: int) -> None:
        """Draws so many more for each of these rows, which must have drawn in every call before."""
        ...

    def first_occurrences(self, rows_R: Tensor, pairs: Pairs = "all", noise_RN: Tensor | None = None) -> Tensor:
        """Class ids of all draws of these rows so far, (R, N): a draw's is the index of the first one equal to it.

        Args:
            rows_R: numbers of the rows.
            pairs: of which pairs the ids must be equal exactly where the patches are: draws 2i and 2i + 1
                ("disjoint"), i and i + 1 ("adjacent"), or all. Other equal draws may have two ids.
            noise_RN: the draw with the least will be chosen if all are distinct: its tokens may be read on this
                occasion.
        """
        ...

    def tokens(self, rows_R: Tensor, index_R: Tensor) -> Tensor:
        """The patches of one draw of each of these rows, (R, K)."""
        ...


# The methods


def single_sample(pool: Candidates) -> Tensor:
    """The law of the draws themselves, T = 1: draws once; index (B,)."""
    pool.extend(pool.rows_B, 1)
    return torch.zeros_like(pool.rows_B)


def most_frequent_patch(pool: Candidates, num_draws: int) -> Tensor:
    """The patch seen most often in each row's draws, of equals the one seen first; index (B,)."""
    pool.extend(pool.rows_B, num_draws)
    first_BN = pool.first_occurrences(pool.rows_B)
    if pool.processor_log_weights_BN is not None:
        return candidate_weights(first_BN, 1.0, processor_log_weights_BN=pool.processor_log_weights_BN).argmax(-1)
    sizes_BN = occurrence_counts(first_BN)
    earliness_N = torch.arange(num_draws - 1, -1, -1, device=sizes_BN.device)
    return (sizes_BN * num_draws + earliness_N).argmax(-1)


def batch_temperature_select(
    pool: Candidates,
    temperature: float,
    num_draws: int,
    generator: Randomness = None,
    truncation: Truncation = NO_TRUNCATION,
) -> Tensor:
    """Chooses one of N draws of each row, approximately by P^(1/T)/Z (paper, Algorithm 2); index (B,).

    The published rule takes T = 1/n: a patch seen c >= n times weighs C(c, n); where there is none, n-1, and so on.
    `repetition_log_weights` extends it to every T. Raises ValueError for T outside (0, 2] and for N < 1/T.
    """
    check_num_candidates(num_draws, temperature)
    pool.extend(pool.rows_B, num_draws)
    noise_BN = StepRandomness.of(generator).exponential(pool.rows_B, num_draws)
    first_BN = pool.first_occurrences(pool.rows_B)
    return sample_by_weight(first_BN, noise_BN, temperature, truncation, pool.processor_log_weights_BN)


def exact_temperature_sample(
    pool: Candidates,
    temperature: float,
    max_draws: int,
    generator: Randomness = None,
    plan: BlockSchedule | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples P^(1/T)/Z exactly (paper, Algorithm 1), with at most `max_draws` draws a row.

    Each block of draws doubles the pool; a row whose draws hold an accepted attempt stops, and only the others draw
    on. A row that reaches `max_draws` without one chooses from what it has, see `choose_at_limit`. A `plan` that
    is handed from step to step fits the first block to what the steps before needed.

    The total-variation distance to the target is at most the share of rows not exact. `max_draws=num_candidates` makes
    it a substitute for `batch_temperature_select` with fewer draws: at T = 1/n the distance was no larger in every
    case enumerated, at other T no larger within the noise of a simulation (tests/test_samplers.py, TestFallback).
    Raises ValueError for T outside (0, 1] and for max_draws < 1/T.

    Returns:
        index of the draw chosen (B,), on the pool's device, and whether an attempt was accepted (B,), on the CPU.
    """
    check_num_candidates(max_draws, temperature)
    if temperature > 1:
        raise ValueError(f"temperature={temperature}: Algorithm 1 sharpens; above 1 patches are chosen by weight.")
    exponent, pairs = inverse_temperature(temperature), compared_pairs(temperature)
    attempt_length, num_rows = math.ceil(exponent), len(pool.rows_B)
    plan, randomness = BlockSchedule() if plan is None else plan, StepRandomness.of(generator)
    first_block = plan.first_block(min(max(MIN_BLOCK_SIZE, attempt_length), max_draws), num_rows, max_draws)
    chosen = [0] * num_rows
    left, rows_R = list(range(num_rows)), pool.rows_B  # rows that draw, on the host and on the pool's device
    uniform_RN = noise_RN = None
    for num_drawn, size in block_sizes(first_block, max_draws):
        pool.extend(rows_R, size)
        if not exponent.is_integer():
            new_RN = randomness.uniform(rows_R, size)
            uniform_RN = new_RN if uniform_RN is None else torch.cat([uniform_RN, new_RN], dim=1)
        if num_drawn == max_draws:
            noise_RN = randomness.exponential(rows_R, max_draws)
        first_RN = pool.first_occurrences(rows_R, pairs, None if pairs == "all" else noise_RN)
        starts = first_accepted_attempt(first_RN, uniform_RN, temperature).tolist()
        kept = [i for i, start in enumerate(starts) if start == num_drawn]
        for row, start in zip(left, starts, strict=True):
            if start < num_drawn:
                chosen[row] = start
        plan.note(start + attempt_length for start in starts if start < num_drawn)
        if len(kept) < len(left):
            left, kept_R = [left[i] for i in kept], as_tensor(kept, rows_R.device)
            if not left:
                break
            rows_R = rows_R[kept_R]
            uniform_RN, noise_RN = (x if x is None else x[kept_R] for x in (uniform_RN, noise_RN))

    plan.note([max_draws] * len(left))
    index_B = as_tensor(chosen, rows_R.device)
    if left and noise_RN is not None:
        index_R = choose_at_limit(pool.first_occurrences(rows_R), uniform_RN, noise_RN, temperature)
        index_B = index_R if len(left) == num_rows else index_B.index_copy(0, rows_R, index_R)
    fell_back = set(left)
    return index_B, torch.tensor([row not in fell_back for row in range(num_rows)])


def one_block_temperature_sample(
    pool: Candidates, temperature: float, num_draws: int, generator: Randomness = None
) -> tuple[Tensor, Tensor]:
    """`exact_temperature_sample` with all draws in one block, and nothing for the host to read.

    More draws, fewer waits; the distribution depends on no block size, so it is the same. All is returned on the
    pool's device.
    """
    check_num_candidates(num_draws, temperature)
    randomness, uniform_BN = StepRandomness.of(generator), None
    pool.extend(pool.rows_B, num_draws)
    if not inverse_temperature(temperature).is_integer():
        uniform_BN = randomness.uniform(pool.rows_B, num_draws)
    noise_BN = randomness.exponential(pool.rows_B, num_draws)
    first_BN = pool.first_occurrences(pool.rows_B)
    start_B = first_accepted_attempt(first_BN, uniform_BN, temperature)
    fallback_B = choose_at_limit(first_BN, uniform_BN, noise_BN, temperature)
    is_exact_B = start_B < num_draws
    return torch.where(is_exact_B, start_B, fallback_B), is_exact_B


def choose_at_limit(first_RN: Tensor, uniform_RN: Tensor | None, noise_RN: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 when no more draws may be made, in rows where none was accepted; index (R,).

    An attempt that was waiting for its patch to come again reads the pool's earlier draws as if they came next, and
    accepts when it has read them all without a restart. Averaged over the orders of a pool, this accepts a patch in
    proportion to its batch weight C(c, 1/T). Dropping such attempts instead would discriminate against rare patches
    (zipf with 1000 outcomes, N = 200, T = 0.9: total variation 0.14 instead of 0.04). Other rows take the batch rule,
    at 1/T a whole number all of them: nothing waits there.

    The arguments are those of `first_accepted_attempt` and `sample_by_weight`, class ids of all pairs.
    """
    by_weight_R = sample_by_weight(first_RN, noise_RN, temperature)
    if uniform_RN is None:
        return by_weight_R
    start_R = first_accepted_attempt(first_RN, uniform_RN, temperature, circular=True)
    return torch.where(start_R < first_RN.shape[1], start_R, by_weight_R)


# The plan of the exact method


def compared_pairs(temperature: float) -> Pairs:
    """Which pairs of draws the attempts of Algorithm 1 compare: 2i with 2i + 1, i with i + 1, or all.

    Where 1/T is a whole n, an attempt goes on as long as each draw equals the one before it. At n = 2 it reads two
    draws whatever they are, so that draws 2i and 2i + 1 are compared and no others.
    """
    exponent = inverse_temperature(temperature)
    if not exponent.is_integer():
        return "all"
    return "disjoint" if exponent == 2 else "adjacent"


def block_sizes(first: int, max_draws: int) -> Iterator[tuple[int, int]]:
    """(Draws after the block, its size): each after the first doubles their number, up to `max_draws`."""
    num_drawn = 0
    while num_drawn < max_draws:
        size = min(num_drawn or first, max_draws - num_drawn)
        num_drawn += size
        yield num_drawn, size


class OneBlock:
    """In the place of a `BlockSchedule`: as much is drawn at once as the method draws at most, and the host reads nothing.

    Attributes:
        is_exact_B: of the last step, whether Algorithm 1 accepted an attempt (B,); `None` where it was not asked.
    """

    is_exact_B: Tensor | None = None


class BlockSchedule:
    """How large the first block of `exact_temperature_sample` should be, judged by what the steps before needed.

    Small blocks waste no draws, large ones read the weights less often. What is drawn has the same law either way.

    Attributes:
        is_exact_B: as in `OneBlock`.
    """

    def __init__(self):
        self.needed = deque(maxlen=STEPS_REMEMBERED)
        self.is_exact_B: Tensor | None = None

    def note(self, num_draws: Iterable[int]) -> None:
        """Remembers after how many draws rows had their patch."""
        self.needed.extend(num_draws)

    def first_block(self, least: int, num_rows: int, max_draws: int) -> int:
        """The size, of `least` times powers of 2 and `max_draws`, that would have cost least in the steps before."""

        def cost(size: int) -> float:
            pool_sizes = [num_drawn for num_drawn, _ in block_sizes(size, max_draws)]
            last_blocks = [bisect_left(pool_sizes, min(needed, max_draws)) for needed in self.needed or [FIRST_GUESS]]
            return sum(pool_sizes[last] + (last + 1) * BLOCK_COST / num_rows for last in last_blocks)

        sizes = [least << i for i in range(max_draws.bit_length()) if least << i < max_draws]
        return min([*sizes, max_draws], key=cost)


# Algorithm 1, along draws of which it is known which are equal


def first_accepted_attempt(
    first_BN: Tensor, uniform_BN: Tensor | None, temperature: float, circular: bool = False
) -> Tensor:
    """Run Algorithm 1 along each row's draws, attempt after attempt, and find the first that accepts.

    With n = floor(1/T) and alpha = 1/T - n, an attempt reads draws until one differs from its first, or until n are
    equal. Then, if alpha > 0, it reads on: at further draw i it accepts if that equals the n, and otherwise restarts
    with probability alpha / i. The next attempt begins at the first unread draw, so every attempt sees fresh draws.

    `uniform_BN` is uniform on [0, 1), one for the attempt that starts at a draw; None where 1/T is whole.
    `circular`: an attempt that runs out of draws reads on from the first draw of the pool, up to its own start.
    Returns where the accepted attempt starts (B,), N where there is none.
    """
    exponent = inverse_temperature(temperature)
    whole = math.floor(exponent)
    fraction = exponent - whole
    num_draws = first_BN.shape[-1]
    start_N = arange(num_draws, first_BN.device)
    if exponent == 2 and num_draws > 1:  # each attempt reads two draws, whatever they are
        differs_BP = first_BN[:, :-1:2] != first_BN[:, 1::2]
        return start_N[:-1:2].expand_as(differs_BP).masked_fill(differs_BP, num_draws).amin(-1)

    differs_BN = _next_different(first_BN)
    accepts_BN = differs_BN - start_N >= whole
    next_start_BN = differs_BN + 1
    if fraction > 0:
        assert uniform_BN is not None, "attempts restart by chance where 1/T is not whole"
        last_N = (start_N + whole - 1).clamp(max=num_draws - 1)
        gives_up_BN = last_N + _restart_times(uniform_BN, fraction)
        next_start_BN = torch.where(accepts_BN, gives_up_BN + 1, next_start_BN)
        meets_BN = _next_equal(first_BN, circular)[:, last_N]
        accepts_BN = accepts_BN & (meets_BN <= gives_up_BN) & (circular | (meets_BN < num_draws))

    # An accepting attempt points at itself, any other at its successor, index N stands for "ran out of draws".
    # Squaring the pointers log2(N) times walks every row to the end of its chain without a loop over draws.
    points_to_BN = torch.where(accepts_BN, start_N, next_start_BN.clamp(max=num_draws))
    points_to_BN = F.pad(points_to_BN, (0, 1), value=num_draws)
    for _ in range(num_draws.bit_length()):
        points_to_BN = points_to_BN.gather(-1, points_to_BN)
    return points_to_BN[:, 0]


def _restart_times(uniform_BN: Tensor, fraction: float) -> Tensor:
    """Turn uniforms into the i >= 1 of the first restart, each with probability alpha / i; N + 1 for later."""
    restarted_by_N = _restart_table(uniform_BN.shape[-1], fraction, uniform_BN.device)
    return 1 + torch.searchsorted(restarted_by_N, uniform_BN.contiguous(), right=True)


@cached_per_device
def _restart_table(num_draws: int, fraction: float, device: torch.device) -> Tensor:
    """The probability of a restart by the i-th further draw, i = 1 … N, float32."""
    further_N = torch.arange(1, num_draws + 1, dtype=torch.float64, device=float64_device(device))
    return (1 - torch.cumprod(1 - fraction / further_N, dim=0)).to(device, torch.float32)


def _next_different(first_BN: Tensor) -> Tensor:
    """For each draw, the index of the first later draw that differs from it; N where there is none."""
    num_draws = first_BN.shape[-1]
    changed_BN = first_BN[:, 1:] != first_BN[:, :-1]
    next_index_N = arange(num_draws, first_BN.device)[1:]
    changes_BN = F.pad(torch.where(changed_BN, next_index_N, num_draws), (0, 1), value=num_draws)
    return changes_BN.flip(-1).cummin(-1).values.flip(-1)


def _next_equal(first_BN: Tensor, circular: bool) -> Tensor:
    """For each draw, the index of the first later draw that equals it; N where there is none.

    `circular`: the draws go on with index N + i equal to draw i, so that at the latest a draw meets itself.
    """
    num_draws = first_BN.shape[-1]
    sorted_BN, order_BN = torch.sort(first_BN, dim=-1, stable=True)
    # A class id is the index of its first draw, which is therefore the next one around the circle.
    follower_BN = num_draws + sorted_BN if circular else torch.full_like(first_BN, num_draws)
    same_BN = sorted_BN[:, 1:] == sorted_BN[:, :-1]
    follower_BN[:, :-1] = torch.where(same_BN, order_BN[:, 1:], follower_BN[:, :-1])
    return torch.empty_like(first_BN).scatter_(-1, order_BN, follower_BN)


@dataclass(frozen=True)
class PatchSampling:
    """How `CALMGenerationMixin.sample_patches` chooses a patch.

    Its fields are the options of `generate` that concern sampling: each may be an argument of the call or a field of
    the generation configuration.

    Args:
        do_sample: False takes the most frequent of the candidates, drawn with a fixed seed.
        temperature: T in (0, 2]; the law is P(patch)^(1/T), normalised.
        num_candidates: N, patches drawn per step unless T = 1 and nothing else is asked for.
        top_k, top_p, min_p: which of the distinct candidates may be chosen, see `Truncation`.
        sampling_method: "batch" draws all N and weighs them (paper, Algorithm 2). "exact" draws in growing blocks
            until Algorithm 1 has a result, and takes the batch result after 10·N draws without one. "adaptive" is
            the same with a bound of N draws: at T = 1/n no further from the law than "batch", and faster where
            patches repeat. At T > 1, or with a truncation, all three are "batch".
        lazy_decoding: True decodes only what the choice of a patch needs, False every candidate in full; the patches
            are the same (see generation_calm_candidates.py). `None` is True on a CPU. With logits processors every
            candidate is drawn, decoded in full and weighed.

    Raises:
        ValueError: a value outside its range, or fewer than 1/T candidates.
    """

    do_sample: bool = True
    temperature: float = 1.0
    num_candidates: int = 200  # published setting of the batch algorithm
    sampling_method: SamplingMethod = "adaptive"
    lazy_decoding: bool | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if self.sampling_method not in SAMPLING_METHODS:
            raise ValueError(f"sampling_method={self.sampling_method!r}: must be one of {SAMPLING_METHODS}.")
        check_temperature(self.temperature)
        check_num_candidates(self.num_candidates, self.temperature)
        self.truncation.check()
        self.check_draws(1)

    def check_draws(self, num_rows: int) -> None:
        """Raises `ValueError` where a step of so many rows may hold more than `MAX_SAMPLES_PER_STEP` draws."""
        num_draws = num_rows * self.samples_in_one_block
        if num_draws > MAX_SAMPLES_PER_STEP:
            raise ValueError(
                f"num_candidates={self.num_candidates} with sampling_method={self.sampling_method!r} and {num_rows} "
                f"sequences may draw {num_draws} patches in a step: at most {MAX_SAMPLES_PER_STEP} fit."
            )

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @classmethod
    def from_generation_config(cls, config: GenerationConfig, **overrides) -> PatchSampling:
        """Reads `generate`'s settings; `overrides` that are not None go before the configuration's fields, those of
        other names are left out."""
        settings = {}
        for name in cls.option_names():
            override = overrides.get(name)
            settings[name] = getattr(config, name, None) if override is None else override
        settings["do_sample"] = bool(settings["do_sample"])  # not set: off, as upstream takes it
        if not settings["do_sample"]:  # these have no meaning then
            settings |= dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
        return cls(**{name: value for name, value in settings.items() if value is not None})

    def choose(
        self, pool: Candidates, generator: Randomness = None, plan: BlockSchedule | OneBlock | None = None
    ) -> Tensor:
        """Makes a pool draw, and returns the index of the draw chosen for each of its rows, (B,).

        A plan is told in which rows Algorithm 1 chose.
        """
        if not self.do_sample:
            return most_frequent_patch(pool, self.num_candidates)
        if self.takes_single_sample and not pool.has_processors:
            return single_sample(pool)
        if self.uses_batch_rule or pool.has_processors:
            return batch_temperature_select(pool, self.temperature, self.num_candidates, generator, self.truncation)
        sampler = (pool, self.temperature, self.max_samples, generator)
        if isinstance(plan, OneBlock):
            index_B, plan.is_exact_B = one_block_temperature_sample(*sampler)
            return index_B
        index_B, is_exact_B = exact_temperature_sample(*sampler, plan)
        if plan is not None:
            plan.is_exact_B = is_exact_B
        return index_B

    def is_exact(self, plan: BlockSchedule | OneBlock, num_rows: int, has_rules: bool) -> Tensor:
        """In which of the rows that `choose` was given last the patch is a sample of P(patch)^(1/T)/Z, (B,) bool."""
        if plan.is_exact_B is not None:
            return plan.is_exact_B
        return torch.full((num_rows,), self.takes_single_sample and not has_rules)

    def weigh(self, first_BN: Tensor, processor_log_weights_BN: Tensor | None = None) -> Tensor:
        """How much each draw weighs in the choice, all of it on the first of equal ones, each row's sum 1; (B, N)."""
        if self.do_sample:
            return candidate_weights(first_BN, self.temperature, self.truncation, processor_log_weights_BN)
        return candidate_weights(first_BN, 1.0, processor_log_weights_BN=processor_log_weights_BN)

    @property
    def samples_in_one_block(self) -> int:
        """The patches that `choose` draws with the plan `OneBlock`."""
        if not self.do_sample:
            return self.num_candidates
        return 1 if self.takes_single_sample else self.max_samples

    @property
    def max_samples(self) -> int:
        """The most patches that are drawn for one row in one step where more than one is."""
        is_exact = self.sampling_method == "exact" and not self.uses_batch_rule
        return self.num_candidates * (EXACT_DRAWS_PER_CANDIDATE if is_exact else 1)

    @property
    def takes_single_sample(self) -> bool:
        """Whether a step draws one patch and takes it."""
        return self.do_sample and self.temperature == 1 and self.truncation.keeps_all

    @property
    def uses_batch_rule(self) -> bool:
        """Whether a step draws all candidates and weighs them, whatever the first of them are."""
        return self.sampling_method == "batch" or self.temperature > 1 or not self.truncation.keeps_all

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.top_k, self.top_p, self.min_p)
