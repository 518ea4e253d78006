"""Temperature sampling of patches from black-box draws: pure functions, free of the model.

Axes: B batch rows, N candidate draws, K tokens per patch, R active rows (a subset of the B).

The target at temperature T is P(x)^s / Z with the exponent s = 1/T >= 1, over whole patches x, when all one can do is
draw patches from P. Three ways to get there, from a pool of N draws of each row or from a `draw` function:

- `batch_temperature_select`   weighs the distinct patches of a pool (paper, Algorithm 2, extended to every T);
- `exact_temperature_sample`   the paper's Algorithm 1, drawing in growing blocks up to a bound, then the batch rule;
- `most_frequent_patch`        the mode of a pool, for `do_sample=False`.

The exact one asks only which draws are equal: where 1/T is whole, only of the pairs that its attempts compare. And it
draws the choice among distinct ones before it asks. So candidates_calm.py need not decode everything.

Rows are independent, and all randomness comes from `generator`. What depends on draws stays on their device; the host
reads from there which rows are done after each block, and how many draws they needed where a plan is kept. Tables of
the counts alone (weights, restarts) are made on the CPU in float64 and copied.
"""

import math
import numbers
from collections import deque
from collections.abc import Callable
from typing import Literal

import torch

# 1/T this close (relatively) to a whole number counts as whole: T = 0.3333333 or float32(1/3) means 1/3.
WHOLE_TOLERANCE = 1e-6
FIRST_BLOCK = 4  # draws of the exact sampler's first block; the pool then doubles until a row is done
BLOCK_COST = 15  # what a block costs beside its draws, in draws: the weights of head and vocabulary are read anew
FIRST_GUESS = 64  # draws that a row is thought to need before any is known
STEPS_REMEMBERED = 32


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless 0 < temperature <= 1."""
    is_number = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
    if not (is_number and 0 < temperature <= 1):
        raise ValueError(
            f"temperature={temperature}: sampling needs a temperature in (0, 1], because draws of patches can be made "
            "sharper but not flatter; for the most frequent patch use do_sample=False."
        )


def check_num_candidates(num_candidates: int, temperature: float) -> None:
    """Raise ValueError unless `num_candidates` is a whole number of at least 1/temperature."""
    check_temperature(temperature)
    if not isinstance(num_candidates, numbers.Integral) or isinstance(num_candidates, bool) or num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates}: it must be a positive whole number.")
    if num_candidates < inverse_temperature(temperature):
        least = math.ceil(inverse_temperature(temperature))
        raise ValueError(
            f"num_candidates={num_candidates} is too few for temperature={temperature}: "
            f"a patch must be drawn 1/temperature times to count, so use at least {least}."
        )


def inverse_temperature(temperature: float) -> float:
    """The exponent s = 1/T, exactly whole where T is 1/n up to rounding."""
    exponent = 1.0 / float(temperature)
    return float(round(exponent)) if abs(exponent - round(exponent)) <= WHOLE_TOLERANCE * exponent else exponent


def group_patches(patches_BNK: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Find equal patches within each row, exactly, whatever K and the vocabulary.

    Returns `group_BN`, the index of the first candidate of the row with the same patch, and `counts_BN`, how many
    candidates of the row have the same patch. Token ids must lie in [0, 2^32).
    """
    rank_BN = torch.zeros_like(patches_BNK[..., 0], dtype=torch.long)
    for ids_BN in patches_BNK.unbind(-1):  # rank the prefixes, one token longer each time: no overflow at any K
        key_BN, order_BN = torch.sort((rank_BN << 32) | ids_BN, dim=-1, stable=True)
        is_new_BN = torch.zeros_like(key_BN)
        is_new_BN[:, 1:] = key_BN[:, 1:] != key_BN[:, :-1]
        rank_BN = torch.empty_like(rank_BN).scatter_(-1, order_BN, is_new_BN.cumsum(-1))

    index_BN = torch.arange(rank_BN.shape[-1], device=rank_BN.device).expand_as(rank_BN)
    first_of_rank_BN = torch.zeros_like(rank_BN).scatter_reduce_(-1, rank_BN, index_BN, "amin", include_self=False)
    count_of_rank_BN = torch.zeros_like(rank_BN).scatter_add_(-1, rank_BN, torch.ones_like(rank_BN))
    return first_of_rank_BN.gather(-1, rank_BN), count_of_rank_BN.gather(-1, rank_BN)


def repetition_log_weights(num_draws: int, exponent: float) -> torch.Tensor:
    """log C(c, s) for c = 0 .. num_draws repetitions at the exponent s = 1/T; shape (num_draws + 1,), float64, CPU.

    C(c, s) = Gamma(c+1) / (Gamma(s+1) Gamma(c-s+1)), and zero (log: -inf) for c <= s - 1. For a whole s = n these are
    the binomials of the paper's Algorithm 2. Between whole numbers they are what Algorithm 1 says about a pool: from c
    hits in N draws, C(c, s) / C(N, s) is the unbiased estimate of the series p^s = p^n sum_k a_k (1-p)^k that
    Algorithm 1 sums by its restarts, cut off at k = N - n. The weights are continuous in s.
    """
    count = torch.arange(num_draws + 1, dtype=torch.float64)
    log_weights = torch.lgamma(count + 1) - math.lgamma(exponent + 1) - torch.lgamma(count - exponent + 1)
    return log_weights.masked_fill(count <= exponent - 1, -math.inf)


def candidate_log_weights(patches_BNK: torch.LongTensor, temperature: float) -> torch.Tensor:
    """Unnormalised log probability of choosing each candidate by the batch rule; shape (B, N), float32.

    A patch seen c times weighs C(c, 1/T), all of it on its first occurrence. A row in which that leaves nothing falls
    back to smaller exponents n-1, n-2, ..., which ends at equal weights for the patches seen most often.
    """
    group_BN, counts_BN = group_patches(patches_BNK)
    num_draws = patches_BNK.shape[1]
    log_weights = repetition_log_weights(num_draws, inverse_temperature(temperature))
    log_weights_BN = log_weights.to(patches_BNK.device, torch.float32)[counts_BN]

    most_B1 = counts_BN.amax(-1, keepdim=True)
    none_counts_B1 = log_weights_BN.amax(-1, keepdim=True) == -math.inf
    log_weights_BN = log_weights_BN.masked_fill(none_counts_B1 & (counts_BN == most_B1), 0.0)
    is_first_BN = group_BN == torch.arange(num_draws, device=group_BN.device)
    return log_weights_BN.masked_fill(~is_first_BN, -math.inf)


def batch_temperature_select(
    patches_BNK: torch.LongTensor,
    temperature: float,
    generator: torch.Generator | None = None,
    race_BN: torch.Tensor | None = None,
) -> torch.LongTensor:
    """Choose one patch of each row's pool of N draws, approximately by P^(1/T)/Z (paper, Algorithm 2); shape (B, K).

    The published rule takes T = 1/n: a patch seen c >= n times weighs C(c, n); where there is none, n-1, and so on.
    `repetition_log_weights` extends it to every T in (0, 1]. Raises ValueError for T outside it and for N < 1/T.

    The choice is a race: each candidate takes an exponential time ÷ its weight, and the first to arrive is chosen.
    `race_BN` are the times, where they were drawn before the patches are known (`exponential_times`).
    """
    check_num_candidates(patches_BNK.shape[1], temperature)
    weights_BN = candidate_log_weights(patches_BNK, temperature).softmax(-1)
    race_BN = exponential_times(weights_BN, generator) if race_BN is None else race_BN
    return _take_patch(patches_BNK, (weights_BN / race_BN).argmax(-1))


def exponential_times(like_BN: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Standard exponential variates, float32, in the shape and on the device of the given tensor."""
    return torch.empty_like(like_BN, dtype=torch.float32).exponential_(generator=generator)


def most_frequent_patch(patches_BNK: torch.LongTensor) -> torch.LongTensor:
    """The patch seen most often in each row, of equals the one seen first; shape (B, K)."""
    _, counts_BN = group_patches(patches_BNK)
    num_draws = patches_BNK.shape[1]
    earliness_N = torch.arange(num_draws - 1, -1, -1, device=patches_BNK.device)
    return _take_patch(patches_BNK, (counts_BN * num_draws + earliness_N).argmax(-1))


def exact_temperature_sample(
    draw: Callable[[torch.LongTensor, int], torch.LongTensor],
    batch_size: int,
    temperature: float,
    max_draws: int,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    first_block: int = FIRST_BLOCK,
    plan: "BlockPlan | None" = None,
    tell_apart: Callable[..., torch.LongTensor] | None = None,
) -> tuple[torch.LongTensor, torch.BoolTensor, torch.LongTensor]:
    """Sample P^(1/T)/Z exactly from draws of P (paper, Algorithm 1), with at most `max_draws` draws a row.

    `draw(rows_R, n)` returns n fresh independent patches for each of the given rows, shape (R, n, K). Each block of
    draws doubles the pool; a row whose pool holds an accepted attempt stops, and only the others draw on. A row that
    reaches `max_draws` without one chooses from its pool, see `choose_from_full_pool`. `first_block` is the least size
    of the first block; a `plan` that is handed from step to step makes it larger where steps before needed more.

    Where patches are dear to know, `draw` may return any ids instead, and `tell_apart(rows_R, pairs, favourite_R)`
    names all draws of these rows so far, (R, N, K'): of the pairs that it is asked for (see `compared_pairs`), the
    names are equal exactly where the patches are. `favourite_R`, where not None, is the draw chosen if all are
    distinct.

    Returns the patches or names (B, K), whether each is an exact sample (B,) bool, and the draws made (B,). The
    total-variation distance to the target is at most the share of rows not exact. `max_draws=num_candidates` makes it
    a substitute for `batch_temperature_select` with fewer draws: at T = 1/n the distance was no larger in every case
    enumerated, at other T no larger within the noise of a simulation (tests/test_samplers.py, TestFallback).
    Raises ValueError for T outside (0, 1] and for max_draws < 1/T.
    """
    check_num_candidates(max_draws, temperature)
    exponent = inverse_temperature(temperature)
    block = 1 if exponent == 1 else min(max(first_block, math.ceil(exponent)), max_draws)
    if plan is not None and exponent > 1:
        block = plan.first_block(block, batch_size, max_draws)
    pairs, rows_R = compared_pairs(temperature), torch.arange(batch_size, device=device)
    exact_B, num_draws_B = torch.zeros_like(rows_R, dtype=torch.bool), torch.zeros_like(rows_R)
    chosen_BK, pool, num_drawn = None, None, 0
    while True:
        new_RNK = draw(rows_R, min(num_drawn or block, max_draws - num_drawn))
        coin_RN = torch.rand(new_RNK.shape[:2], generator=generator, device=new_RNK.device)
        new = new_RNK, coin_RN, exponential_times(coin_RN, generator)
        pool = new if pool is None else [torch.cat(parts, dim=1) for parts in zip(pool, new, strict=True)]
        names_RNK, coin_RN, race_RN = pool
        num_drawn = names_RNK.shape[1]
        if tell_apart is not None:
            is_last = pairs != "all" and num_drawn == max_draws
            names_RNK = tell_apart(rows_R, pairs, race_RN.argmin(-1) if is_last else None)

        start_R, accepted_R = first_accepted_attempt(group_patches(names_RNK)[0], coin_RN, temperature)
        if chosen_BK is None:
            chosen_BK = names_RNK.new_empty(batch_size, names_RNK.shape[-1])
        chosen_BK[rows_R] = _take_patch(names_RNK, start_R)
        exact_B[rows_R], num_draws_B[rows_R] = accepted_R, num_drawn
        if plan is not None:
            plan.note((start_R + math.ceil(exponent))[accepted_R])
        rows_R, pool = rows_R[~accepted_R], [each[~accepted_R] for each in pool]
        if len(rows_R) == 0 or num_drawn == max_draws:
            break

    if len(rows_R) > 0:
        if plan is not None:
            plan.note(num_draws_B[rows_R])
        names_RNK, coin_RN, race_RN = pool
        names_RNK = names_RNK if tell_apart is None else tell_apart(rows_R)
        chosen_BK[rows_R] = choose_from_full_pool(names_RNK, coin_RN, race_RN, temperature)
    return chosen_BK, exact_B, num_draws_B


def compared_pairs(temperature: float) -> Literal["disjoint", "adjacent", "all"]:
    """Which pairs of draws the attempts of Algorithm 1 compare: 2i with 2i + 1, i with i + 1, or all.

    Where 1/T is a whole n, an attempt goes on as long as each draw equals the one before it. At n = 2 it reads two
    draws whatever they are, so that draws 2i and 2i + 1 are compared and no others.
    """
    exponent = inverse_temperature(temperature)
    if not exponent.is_integer():
        return "all"
    return "disjoint" if exponent == 2 else "adjacent"


class BlockPlan:
    """How large the first block of `exact_temperature_sample` should be, judged by what the steps before needed.

    Small blocks waste no draws, large ones read the weights less often. What is drawn has the same law either way.
    """

    def __init__(self):
        self.needed = deque(maxlen=STEPS_REMEMBERED)

    def note(self, num_draws: torch.LongTensor) -> None:
        """Remembers after how many draws rows had their patch."""
        self.needed.extend(num_draws.tolist())

    def first_block(self, least: int, num_rows: int, max_draws: int) -> int:
        """The size, of `least` times powers of 2 and `max_draws`, that would have cost least in the steps before."""

        def cost(size: int) -> float:
            total = 0.0
            for needed in self.needed or [FIRST_GUESS]:
                pool, blocks = size, 1
                while pool < min(needed, max_draws):
                    pool, blocks = min(2 * pool, max_draws), blocks + 1
                total += pool + blocks * BLOCK_COST / num_rows
            return total

        sizes = [least << i for i in range(max_draws.bit_length()) if least << i < max_draws]
        return min([*sizes, max_draws], key=cost)


def choose_from_full_pool(
    pool_BNK: torch.LongTensor, coin_BN: torch.Tensor, race_BN: torch.Tensor, temperature: float
) -> torch.LongTensor:
    """Algorithm 1 when no more draws may be made; shape (B, K).

    An attempt that was waiting for its patch to come again reads the pool's earlier draws as if they came next, and
    accepts when it has read them all without a restart. Averaged over the orders of a pool, this accepts a patch in
    proportion to its batch weight C(c, 1/T). Dropping such attempts instead would discriminate against rare patches
    (zipf with 1000 outcomes, N = 200, T = 0.9: total variation 0.14 instead of 0.04). Other rows take the batch rule,
    at 1/T a whole number all of them: nothing waits there.
    """
    start_B, accepted_B = first_accepted_attempt(group_patches(pool_BNK)[0], coin_BN, temperature, circular=True)
    by_batch_rule_BK = batch_temperature_select(pool_BNK, temperature, race_BN=race_BN)
    return torch.where(accepted_B[:, None], _take_patch(pool_BNK, start_B), by_batch_rule_BK)


def first_accepted_attempt(
    group_BN: torch.LongTensor, coin_BN: torch.Tensor, temperature: float, circular: bool = False
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """Run Algorithm 1 along each row's draws, attempt after attempt, and find the first that accepts.

    With n = floor(1/T) and alpha = 1/T - n, an attempt reads draws until one differs from its first, or until n are
    equal. Then, if alpha > 0, it reads on: at further draw i it accepts if that equals the n, and otherwise restarts
    with probability alpha / i. The next attempt begins at the first unread draw, so every attempt sees fresh draws.

    `group_BN` comes from `group_patches`; `coin_BN` is uniform on [0, 1), one for the attempt that starts at a draw.
    `circular`: an attempt that runs out of draws reads on from the first draw of the pool, up to its own start.
    Returns where the accepted attempt starts (B,), 0 where there is none, and whether there is one (B,).
    """
    exponent = inverse_temperature(temperature)
    whole = math.floor(exponent)
    fraction = exponent - whole
    num_draws = group_BN.shape[-1]
    start_N = torch.arange(num_draws, device=group_BN.device)

    differs_BN = _next_different(group_BN)
    accepts_BN = differs_BN - start_N >= whole
    next_start_BN = differs_BN + 1
    if fraction > 0:
        last_N = (start_N + whole - 1).clamp(max=num_draws - 1)
        gives_up_BN = last_N + _restart_times(coin_BN, fraction)
        next_start_BN = torch.where(accepts_BN, gives_up_BN + 1, next_start_BN)
        meets_BN = _next_equal(group_BN, circular)[:, last_N]
        accepts_BN = accepts_BN & (meets_BN <= gives_up_BN) & (circular | (meets_BN < num_draws))

    # An accepting attempt points at itself, any other at its successor, index N stands for "ran out of draws".
    # Squaring the pointers log2(N) times walks every row to the end of its chain without a loop over draws.
    points_to_BN = torch.where(accepts_BN, start_N, next_start_BN.clamp(max=num_draws))
    points_to_BN = torch.nn.functional.pad(points_to_BN, (0, 1), value=num_draws)
    for _ in range(num_draws.bit_length()):
        points_to_BN = points_to_BN.gather(-1, points_to_BN)
    end_B = points_to_BN[:, 0]
    accepted_B = end_B < num_draws
    return end_B * accepted_B, accepted_B


def _restart_times(coin_BN: torch.Tensor, fraction: float) -> torch.LongTensor:
    """Turn uniforms into the i >= 1 at which coins of probability alpha / i first say restart; N + 1 for later."""
    num_draws = coin_BN.shape[-1]
    further_N = torch.arange(1, num_draws + 1, dtype=torch.float64)
    restarted_by_N = 1 - torch.cumprod(1 - fraction / further_N, dim=0)
    return 1 + torch.searchsorted(restarted_by_N.to(coin_BN), coin_BN.contiguous(), right=True)


def _next_different(group_BN: torch.LongTensor) -> torch.LongTensor:
    """For each draw, the index of the first later draw that differs from it; N where there is none."""
    num_draws = group_BN.shape[-1]
    index_N = torch.arange(num_draws, device=group_BN.device)
    changes_BN = torch.full_like(group_BN, num_draws)
    changes_BN[:, :-1] = torch.where(group_BN[:, 1:] != group_BN[:, :-1], index_N[1:], num_draws)
    return changes_BN.flip(-1).cummin(-1).values.flip(-1)


def _next_equal(group_BN: torch.LongTensor, circular: bool) -> torch.LongTensor:
    """For each draw, the index of the first later draw that equals it; N where there is none.

    `circular`: the draws go on with index N + i equal to draw i, so that at the latest a draw meets itself.
    """
    num_draws = group_BN.shape[-1]
    sorted_BN, order_BN = torch.sort(group_BN, dim=-1, stable=True)
    # A group is named by its first member, which is therefore the next one around the circle.
    follower_BN = num_draws + sorted_BN if circular else torch.full_like(group_BN, num_draws)
    same_BN = sorted_BN[:, 1:] == sorted_BN[:, :-1]
    follower_BN[:, :-1] = torch.where(same_BN, order_BN[:, 1:], follower_BN[:, :-1])
    return torch.empty_like(group_BN).scatter_(-1, order_BN, follower_BN)


def _take_patch(patches_BNK: torch.LongTensor, index_B: torch.LongTensor) -> torch.LongTensor:
    return patches_BNK[torch.arange(len(index_B), device=index_B.device), index_B]
