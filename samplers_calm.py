"""Temperature sampling of patches from black-box draws: functions of a pool, free of the model.

Axes: B rows of a pool, R rows that still draw, N draws of a row, K tokens per patch.

The target at temperature T is P(x)^s / Z with the exponent s = 1/T, over whole patches x, when all one can do is draw
patches from P. A `Pool` draws, and knows which of its draws are the same patch. Each method makes it draw, and returns
which draw of each row it chose; none knows a token:

- `single_draw`                T = 1;
- `batch_temperature_select`   weighs the distinct patches among N draws (paper, Algorithm 2, extended to every T), and
                               truncates what it weighed (top-k, top-p, min-p);
- `exact_temperature_sample`   the paper's Algorithm 1, drawing in growing blocks up to a bound, then the batch rule;
- `most_frequent_patch`        the mode of N draws, for `do_sample=False`.

The exact one asks only which draws are equal: where 1/T is whole, only of the pairs that its attempts compare. And it
draws the choice among distinct ones before it asks. So a pool need not decode everything.

Rows are independent, and all randomness but the pool's comes from `generator` (or from one a row, see
randomness_calm.py). What depends on draws stays on their device, but that after each block of the exact one the host
reads, once, which rows are done. Tables that depend on no draw (weights, restarts) are made once, in float64.
"""

from __future__ import annotations

import math
import numbers
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .randomness_calm import Randomness, StepRandomness
from .tables_calm import made_once, numbers_up_to, to_device, where_float64_is

# 1/T this close (relatively) to a whole number counts as whole: T = 0.3333333 or float32(1/3) means 1/3.
WHOLE_TOLERANCE = 1e-6
LEAST_BLOCK = 4  # draws of the exact sampler's first block, at least; the pool then doubles until a row is done
BLOCK_COST = 15  # what a block costs beside its draws, in draws: the weights of head and vocabulary are read anew
FIRST_GUESS = 64  # draws that a row is thought to need before any is known
STEPS_REMEMBERED = 32
# Comparisons of pairs of draws, B·N²·K, up to which all are made at once: few operations, where these are what costs.
COMPARISONS_AT_ONCE = {"cpu": 2**18, "other": 2**26}
NO_WEIGHT = 1000.0  # nats: e^-1000 is 0 in float32
ROUNDING = 1e-5  # of shares: counts are whole, so that many of them lie exactly on the edge of a truncation
HIGHEST_TEMPERATURE = 2.0  # above, most of the law is patches that no pool has seen

Pairs = Literal["all", "adjacent", "disjoint"]
OneBlock = Literal["one block"]


class Pool(Protocol):
    """Independent draws of patches, a sequence for each of B rows, that grows as it is asked to.

    Args:
        rows_B: the numbers of its rows, 0 … B − 1, on the device on which it answers.
        has_factors: whether draws weigh differently, by what they are: then all must be weighed.
        log_factors_BN: then, by what each draw's probability is to be multiplied, the natural logarithm; equal draws
            have equal ones.
    """

    rows_B: Tensor
    has_factors: bool
    log_factors_BN: Tensor | None

    def extend(self, rows_R: Tensor, num_draws: int) -> None:
        """Draws so many more for each of these rows, which must have drawn in every call before."""
        ...

    def classes(self, rows_R: Tensor, pairs: Pairs = "all", noise_RN: Tensor | None = None) -> Tensor:
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


class ExactSample(NamedTuple):
    """What `exact_temperature_sample` chose.

    Args:
        index_B: the draw chosen, on the pool's device.
        is_exact_B: whether an attempt was accepted, so that its law is exact; on the CPU.
        num_draws_B: how many draws were made; on the CPU.
    """

    index_B: Tensor
    is_exact_B: Tensor
    num_draws_B: Tensor


class Truncation(NamedTuple):
    """Which of the distinct patches of a row's draws may be chosen, by their weights; all three may be asked for.

    Args:
        top_k: the so many with most weight; 0 is all.
        top_p: the fewest, of most weight, that together have this share of it; 1 is all.
        min_p: those with at least this share of the largest weight; 0 is all.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def keeps_all(self) -> bool:
        return self == KEEP_ALL

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        if not isinstance(self.top_k, numbers.Integral) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be a whole number of patches to keep, or 0 for all.")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name}={value}: must be a share, in [0, 1].")


KEEP_ALL = Truncation()


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless 0 < temperature <= 2."""
    if not (_is_number(temperature) and 0 < temperature <= HIGHEST_TEMPERATURE):
        raise ValueError(
            f"temperature={temperature}: sampling needs a temperature in (0, {HIGHEST_TEMPERATURE:g}]; for the most "
            "frequent patch use do_sample=False."
        )


def check_num_candidates(num_candidates: int, temperature: float) -> None:
    """Raise ValueError unless `num_candidates` is a whole number of at least 1/temperature."""
    check_temperature(temperature)
    if not isinstance(num_candidates, numbers.Integral) or isinstance(num_candidates, bool) or num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates}: it must be a positive whole number.")
    exponent = inverse_temperature(temperature)
    if num_candidates < exponent:
        least = math.ceil(exponent) if exponent < 1e9 else f"{exponent:.1g}"
        raise ValueError(
            f"num_candidates={num_candidates} is too few for temperature={temperature}: "
            f"a patch must be drawn 1/temperature times to count, so use at least {least}."
        )


def inverse_temperature(temperature: float) -> float:
    """The exponent s = 1/T, exactly whole where T is 1/n up to rounding."""
    exponent = 1.0 / float(temperature)
    if math.isinf(exponent):
        return exponent
    return float(round(exponent)) if abs(exponent - round(exponent)) <= WHOLE_TOLERANCE * exponent else exponent


# The methods


def single_draw(pool: Pool) -> Tensor:
    """The law of the draws themselves, T = 1: draws once; index (B,)."""
    pool.extend(pool.rows_B, 1)
    return torch.zeros_like(pool.rows_B)


def most_frequent_patch(pool: Pool, num_draws: int) -> Tensor:
    """The patch seen most often in each row's draws, of equals the one seen first; index (B,)."""
    pool.extend(pool.rows_B, num_draws)
    class_BN = pool.classes(pool.rows_B)
    if pool.log_factors_BN is not None:
        return draw_weights(class_BN, 1.0, log_factors_BN=pool.log_factors_BN).argmax(-1)
    sizes_BN = class_sizes(class_BN)
    earliness_N = torch.arange(num_draws - 1, -1, -1, device=sizes_BN.device)
    return (sizes_BN * num_draws + earliness_N).argmax(-1)


def batch_temperature_select(
    pool: Pool,
    temperature: float,
    num_draws: int,
    generator: Randomness = None,
    truncation: Truncation = KEEP_ALL,
) -> Tensor:
    """Chooses one of N draws of each row, approximately by P^(1/T)/Z (paper, Algorithm 2); index (B,).

    The published rule takes T = 1/n: a patch seen c >= n times weighs C(c, n); where there is none, n-1, and so on.
    `repetition_log_weights` extends it to every T. Raises ValueError for T outside (0, 2] and for N < 1/T.
    """
    check_num_candidates(num_draws, temperature)
    pool.extend(pool.rows_B, num_draws)
    noise_BN = StepRandomness.of(generator).exponential(pool.rows_B, num_draws)
    class_BN = pool.classes(pool.rows_B)
    return choose_by_weight(class_BN, noise_BN, temperature, truncation, pool.log_factors_BN)


def exact_temperature_sample(
    pool: Pool,
    temperature: float,
    max_draws: int,
    generator: Randomness = None,
    plan: BlockPlan | None = None,
) -> ExactSample:
    """Samples P^(1/T)/Z exactly (paper, Algorithm 1), with at most `max_draws` draws a row.

    Each block of draws doubles the pool; a row whose draws hold an accepted attempt stops, and only the others draw
    on. A row that reaches `max_draws` without one chooses from what it has, see `choose_from_full_pool`. A `plan` that
    is handed from step to step fits the first block to what the steps before needed.

    The total-variation distance to the target is at most the share of rows not exact. `max_draws=num_candidates` makes
    it a substitute for `batch_temperature_select` with fewer draws: at T = 1/n the distance was no larger in every
    case enumerated, at other T no larger within the noise of a simulation (tests/test_samplers.py, TestFallback).
    Raises ValueError for T outside (0, 1] and for max_draws < 1/T.
    """
    check_num_candidates(max_draws, temperature)
    if temperature > 1:
        raise ValueError(f"temperature={temperature}: Algorithm 1 sharpens; above 1 patches are chosen by weight.")
    exponent, pairs = inverse_temperature(temperature), compared_pairs(temperature)
    attempt_length, num_rows = math.ceil(exponent), len(pool.rows_B)
    plan, randomness = BlockPlan() if plan is None else plan, StepRandomness.of(generator)
    first_block = plan.first_block(min(max(LEAST_BLOCK, attempt_length), max_draws), num_rows, max_draws)
    chosen, num_draws = [0] * num_rows, [max_draws] * num_rows
    left, rows_R = list(range(num_rows)), pool.rows_B  # rows that draw, on the host and on the pool's device
    uniform_RN = noise_RN = None
    for num_drawn, size in block_sizes(first_block, max_draws):
        pool.extend(rows_R, size)
        if not exponent.is_integer():
            new_RN = randomness.uniform(rows_R, size)
            uniform_RN = new_RN if uniform_RN is None else torch.cat([uniform_RN, new_RN], dim=1)
        if num_drawn == max_draws:
            noise_RN = randomness.exponential(rows_R, max_draws)
        class_RN = pool.classes(rows_R, pairs, None if pairs == "all" else noise_RN)
        starts = first_accepted_attempt(class_RN, uniform_RN, temperature).tolist()
        kept = [i for i, start in enumerate(starts) if start == num_drawn]
        for row, start in zip(left, starts, strict=True):
            if start < num_drawn:
                chosen[row], num_draws[row] = start, num_drawn
        plan.note(start + attempt_length for start in starts if start < num_drawn)
        if len(kept) < len(left):
            left, kept_R = [left[i] for i in kept], to_device(kept, rows_R.device)
            if not left:
                break
            rows_R = rows_R[kept_R]
            uniform_RN, noise_RN = (x if x is None else x[kept_R] for x in (uniform_RN, noise_RN))

    plan.note([max_draws] * len(left))
    index_B = to_device(chosen, rows_R.device)
    if left and noise_RN is not None:
        index_R = choose_from_full_pool(pool.classes(rows_R), uniform_RN, noise_RN, temperature)
        index_B = index_R if len(left) == num_rows else index_B.index_copy(0, rows_R, index_R)
    fell_back = set(left)
    is_exact = [row not in fell_back for row in range(num_rows)]
    return ExactSample(index_B, torch.tensor(is_exact), torch.tensor(num_draws))


def one_block_temperature_sample(
    pool: Pool, temperature: float, num_draws: int, generator: Randomness = None
) -> Tensor:
    """`exact_temperature_sample` with all draws in one block, and nothing for the host to read; index (B,).

    More draws, fewer waits; a step's law depends on no block size, so it is the same.
    """
    check_num_candidates(num_draws, temperature)
    randomness, uniform_BN = StepRandomness.of(generator), None
    pool.extend(pool.rows_B, num_draws)
    if not inverse_temperature(temperature).is_integer():
        uniform_BN = randomness.uniform(pool.rows_B, num_draws)
    noise_BN = randomness.exponential(pool.rows_B, num_draws)
    class_BN = pool.classes(pool.rows_B)
    start_B = first_accepted_attempt(class_BN, uniform_BN, temperature)
    fallback_B = choose_from_full_pool(class_BN, uniform_BN, noise_BN, temperature)
    return torch.where(start_B < num_draws, start_B, fallback_B)


def choose_from_full_pool(class_RN: Tensor, uniform_RN: Tensor | None, noise_RN: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 when no more draws may be made, in rows where none was accepted; index (R,).

    An attempt that was waiting for its patch to come again reads the pool's earlier draws as if they came next, and
    accepts when it has read them all without a restart. Averaged over the orders of a pool, this accepts a patch in
    proportion to its batch weight C(c, 1/T). Dropping such attempts instead would discriminate against rare patches
    (zipf with 1000 outcomes, N = 200, T = 0.9: total variation 0.14 instead of 0.04). Other rows take the batch rule,
    at 1/T a whole number all of them: nothing waits there.

    Args:
        class_RN: class ids of all pairs.
        uniform_RN: as in `first_accepted_attempt`.
        noise_RN: as in `choose_by_weight`.
        temperature: T.
    """
    by_weight_R = choose_by_weight(class_RN, noise_RN, temperature)
    if uniform_RN is None:
        return by_weight_R
    start_R = first_accepted_attempt(class_RN, uniform_RN, temperature, circular=True)
    return torch.where(start_R < class_RN.shape[1], start_R, by_weight_R)


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


ONE_BLOCK: OneBlock = "one block"


class BlockPlan:
    """How large the first block of `exact_temperature_sample` should be, judged by what the steps before needed.

    Small blocks waste no draws, large ones read the weights less often. What is drawn has the same law either way.
    """

    def __init__(self):
        self.needed = deque(maxlen=STEPS_REMEMBERED)

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


# What follows from which draws are equal


def patch_classes(patches_BNK: Tensor) -> Tensor:
    """For each patch the index of the first one of its row that equals it, (B, N); exact for any K and vocabulary.

    Token ids must lie in [0, 2^32).
    """
    if 0 < patches_BNK.numel() * patches_BNK.shape[1] <= _comparisons_at_once(patches_BNK.device):
        return _classes_by_pairs(patches_BNK)
    return _classes_by_sorting(patches_BNK)


def _comparisons_at_once(device: torch.device) -> int:
    return COMPARISONS_AT_ONCE["cpu" if device.type == "cpu" else "other"]


def _classes_by_pairs(patches_BNK: Tensor) -> Tensor:
    patches_KBN = patches_BNK.movedim(-1, 0)
    equal_BNN = (patches_KBN[..., None] == patches_KBN[..., None, :]).all(0)
    return equal_BNN.view(torch.uint8).argmax(-1)


def _classes_by_sorting(patches_BNK: Tensor) -> Tensor:
    rank_BN = torch.zeros_like(patches_BNK[..., 0], dtype=torch.long)
    for ids_BN in patches_BNK.unbind(-1):  # rank the prefixes, one token longer each time: no overflow at any K
        key_BN, order_BN = torch.sort((rank_BN << 32) | ids_BN, dim=-1, stable=True)
        is_new_BN = torch.zeros_like(key_BN)
        is_new_BN[:, 1:] = key_BN[:, 1:] != key_BN[:, :-1]
        rank_BN = torch.empty_like(rank_BN).scatter_(-1, order_BN, is_new_BN.cumsum(-1))

    index_BN = numbers_up_to(rank_BN.shape[-1], rank_BN.device).expand_as(rank_BN)
    first_of_rank_BN = torch.zeros_like(rank_BN).scatter_reduce_(-1, rank_BN, index_BN, "amin", include_self=False)
    return first_of_rank_BN.gather(-1, rank_BN)


def class_sizes(class_BN: Tensor) -> Tensor:
    """How many draws of the row have the same class id, (B, N)."""
    if class_BN.numel() * class_BN.shape[1] <= _comparisons_at_once(class_BN.device):
        return (class_BN[..., None] == class_BN[..., None, :]).sum(-1)
    return torch.zeros_like(class_BN).scatter_add_(-1, class_BN, torch.ones_like(class_BN)).gather(-1, class_BN)


def repetition_log_weights(num_draws: int, exponent: float, device: torch.device | None = None) -> Tensor:
    """log C(c, s) for c = 0 .. num_draws repetitions at the exponent s = 1/T; shape (num_draws + 1,), float64.

    C(c, s) = Gamma(c+1) / (Gamma(s+1) Gamma(c-s+1)), and zero (log: -inf) for c <= s - 1. For a whole s = n these are
    the binomials of the paper's Algorithm 2. Between whole numbers they are what Algorithm 1 says about a pool: from c
    hits in N draws, C(c, s) / C(N, s) is the unbiased estimate of the series p^s = p^n sum_k a_k (1-p)^k that
    Algorithm 1 sums by its restarts, cut off at k = N - n. The weights are continuous in s. Below s = 1 a patch that
    was never seen has a weight, too.
    """
    count = torch.arange(num_draws + 1, dtype=torch.float64, device=device)
    log_weights = torch.lgamma(count + 1) - math.lgamma(exponent + 1) - torch.lgamma(count - exponent + 1)
    return log_weights.masked_fill(count <= exponent - 1, -math.inf)


def draw_log_weights(class_BN: Tensor, temperature: float) -> Tensor:
    """Unnormalised log probability of choosing each draw by the batch rule; shape (B, N), float32.

    A patch seen c times weighs C(c, 1/T), all of it on its first occurrence. A row in which that leaves nothing falls
    back to smaller exponents n-1, n-2, ..., which ends at equal weights for the patches seen most often. At T > 1 the
    patches seen once also have the weight of those that were not seen, see `log_weight_of_unseen`.
    """
    num_draws = class_BN.shape[1]
    sizes_BN = class_sizes(class_BN)
    log_weights_BN = _log_weight_table(num_draws, temperature, class_BN.device)[sizes_BN]
    if temperature > 1:
        unseen_B1 = log_weight_of_unseen(sizes_BN, temperature)
        log_weights_BN = torch.where(sizes_BN == 1, log_weights_BN.logaddexp(unseen_B1), log_weights_BN)
    is_later_BN = class_BN != numbers_up_to(num_draws, class_BN.device)
    return log_weights_BN.masked_fill(is_later_BN, -math.inf)


def log_weight_of_unseen(sizes_BN: Tensor, temperature: float) -> Tensor:
    """At T > 1, the log weight of all patches that were not seen, per patch seen once; (B, 1), float32.

    From f1 patches seen once and f2 seen twice, f1 (f1 - 1) / (2 (f2 + 1)) is Chao's estimate (1984) of how many were
    not seen, each of which weighs C(0, 1/T). Those seen once are most like them, and stand for them: where a patch is
    as rare as that, which one it is is the least part of the error.
    """
    once_B1 = (sizes_BN == 1).sum(-1, keepdim=True)
    twice_B1 = (sizes_BN == 2).sum(-1, keepdim=True) / 2
    unseen_B1 = (once_B1 - 1).clamp(min=0) / (2 * (twice_B1 + 1))
    return unseen_B1.log() + _log_weight_table(1, temperature, sizes_BN.device)[0]


@made_once
def _log_weight_table(num_draws: int, temperature: float, device: torch.device) -> Tensor:
    """Log weights of 0 … N repetitions, float32. Where C(c, 1/T) is 0 they are so low, and the lower the smaller c is,
    that beside any larger count the weight is 0 in float32: alone, the largest counts weigh 1."""
    log_weights = repetition_log_weights(num_draws, inverse_temperature(temperature), where_float64_is(device))
    steps_down = torch.arange(-num_draws - 1, 0, dtype=torch.float64, device=log_weights.device) * NO_WEIGHT
    return torch.where(log_weights == -math.inf, steps_down, log_weights).to(device, torch.float32)


def truncated(weights_BN: Tensor, truncation: Truncation) -> Tensor:
    """Weights, of each row's sum 1, with those that `truncation` leaves out at 0; of equal weights the earlier stays.

    In upstream's order: top-k, then top-p of what is left, then min-p; at least one is left.
    """
    top_k, top_p, min_p = truncation
    sorted_BN, order_BN = weights_BN.sort(dim=-1, descending=True, stable=True)
    rank_N = numbers_up_to(weights_BN.shape[-1], weights_BN.device)
    if top_k > 0:
        sorted_BN = sorted_BN.masked_fill(rank_N >= top_k, 0)
    if top_p < 1:
        before_BN = sorted_BN.cumsum(-1) - sorted_BN
        is_left_out_BN = before_BN >= (top_p - ROUNDING) * sorted_BN.sum(-1, keepdim=True)
        sorted_BN = sorted_BN.masked_fill(is_left_out_BN & (rank_N > 0), 0)
    if min_p > 0:
        sorted_BN = sorted_BN.masked_fill(sorted_BN < (1 - ROUNDING) * min_p * sorted_BN[:, :1], 0)
    return torch.empty_like(weights_BN).scatter_(-1, order_BN, sorted_BN)


def draw_weights(
    class_BN: Tensor,
    temperature: float,
    truncation: Truncation = KEEP_ALL,
    log_factors_BN: Tensor | None = None,
) -> Tensor:
    """The probability of choosing each draw by the batch rule, on the first of equal ones; (B, N), float32.

    With factors the law is (P · factor)^(1/T) / Z; `truncation` then sees what they leave.
    """
    log_weights_BN = draw_log_weights(class_BN, temperature)
    if log_factors_BN is not None:
        log_weights_BN = log_weights_BN + log_factors_BN / temperature
    weights_BN = log_weights_BN.softmax(-1)
    if truncation.keeps_all:
        return weights_BN
    weights_BN = truncated(weights_BN, truncation)
    return weights_BN / weights_BN.sum(-1, keepdim=True)


def choose_by_weight(
    class_BN: Tensor,
    noise_BN: Tensor,
    temperature: float,
    truncation: Truncation = KEEP_ALL,
    log_factors_BN: Tensor | None = None,
) -> Tensor:
    """The batch rule's choice; index (B,).

    Each draw's exponential noise ÷ its weight is an exponential variate too, with the weight for its rate; the draw
    with the smallest is chosen, which is each in proportion to its weight.
    """
    return (draw_weights(class_BN, temperature, truncation, log_factors_BN) / noise_BN).argmax(-1)


def first_accepted_attempt(
    class_BN: Tensor, uniform_BN: Tensor | None, temperature: float, circular: bool = False
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
    num_draws = class_BN.shape[-1]
    start_N = numbers_up_to(num_draws, class_BN.device)
    if exponent == 2 and num_draws > 1:  # each attempt reads two draws, whatever they are
        differs_BP = class_BN[:, :-1:2] != class_BN[:, 1::2]
        return start_N[:-1:2].expand_as(differs_BP).masked_fill(differs_BP, num_draws).amin(-1)

    differs_BN = _next_different(class_BN)
    accepts_BN = differs_BN - start_N >= whole
    next_start_BN = differs_BN + 1
    if fraction > 0:
        assert uniform_BN is not None, "attempts restart by chance where 1/T is not whole"
        last_N = (start_N + whole - 1).clamp(max=num_draws - 1)
        gives_up_BN = last_N + _restart_times(uniform_BN, fraction)
        next_start_BN = torch.where(accepts_BN, gives_up_BN + 1, next_start_BN)
        meets_BN = _next_equal(class_BN, circular)[:, last_N]
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


@made_once
def _restart_table(num_draws: int, fraction: float, device: torch.device) -> Tensor:
    """The probability of a restart by the i-th further draw, i = 1 … N, float32."""
    further_N = torch.arange(1, num_draws + 1, dtype=torch.float64, device=where_float64_is(device))
    return (1 - torch.cumprod(1 - fraction / further_N, dim=0)).to(device, torch.float32)


def _next_different(class_BN: Tensor) -> Tensor:
    """For each draw, the index of the first later draw that differs from it; N where there is none."""
    num_draws = class_BN.shape[-1]
    changed_BN = class_BN[:, 1:] != class_BN[:, :-1]
    next_index_N = numbers_up_to(num_draws, class_BN.device)[1:]
    changes_BN = F.pad(torch.where(changed_BN, next_index_N, num_draws), (0, 1), value=num_draws)
    return changes_BN.flip(-1).cummin(-1).values.flip(-1)


def _next_equal(class_BN: Tensor, circular: bool) -> Tensor:
    """For each draw, the index of the first later draw that equals it; N where there is none.

    `circular`: the draws go on with index N + i equal to draw i, so that at the latest a draw meets itself.
    """
    num_draws = class_BN.shape[-1]
    sorted_BN, order_BN = torch.sort(class_BN, dim=-1, stable=True)
    # A class id is the index of its first draw, which is therefore the next one around the circle.
    follower_BN = num_draws + sorted_BN if circular else torch.full_like(class_BN, num_draws)
    same_BN = sorted_BN[:, 1:] == sorted_BN[:, :-1]
    follower_BN[:, :-1] = torch.where(same_BN, order_BN[:, 1:], follower_BN[:, :-1])
    return torch.empty_like(class_BN).scatter_(-1, order_BN, follower_BN)
