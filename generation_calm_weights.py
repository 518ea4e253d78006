"""What the draws of a step weigh: which are the same patch, how often each was seen, what that makes of it at T.

Functions of class ids (a draw's is the index of the first one of its row that equals it), free of any model. At
temperature T a patch x should be chosen with P(x)^s / Z, s = 1/T; from N draws that is an estimate, which Algorithm 2
of the paper gives for whole s and `repetition_log_weights` for all. top-k, top-p and min-p cut it off.

Axes: B rows of a pool, N draws of a row, K tokens per patch.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels_calm import arange, cached_per_device, float64_device

# 1/T this close (relatively) to a whole number counts as whole: T = 0.3333333 or float32(1/3) means 1/3.
WHOLE_TOLERANCE = 1e-6
# Comparisons of pairs of draws, B·N²·K, up to which all are made at once: few operations, where these are what costs.
MAX_COMPARISONS = {"cpu": 2**18, "other": 2**26}
NO_WEIGHT = 1000.0  # nats: e^-1000 is 0 in float32
ROUNDING = 1e-5  # of shares: counts are whole, so that many of them lie exactly on the edge of a truncation
MAX_TEMPERATURE = 2.0  # above, most of the law is patches that no pool has seen


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
        return self == NO_TRUNCATION

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        if not isinstance(self.top_k, numbers.Integral) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r}: must be a whole number of patches to keep, or 0 for all.")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name}={value!r}: must be a share, in [0, 1].")


NO_TRUNCATION = Truncation()


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless 0 < temperature <= 2."""
    if not (_is_number(temperature) and 0 < temperature <= MAX_TEMPERATURE):
        raise ValueError(
            f"temperature={temperature!r}: sampling needs a temperature in (0, {MAX_TEMPERATURE:g}]; for the most "
            "frequent patch use do_sample=False."
        )


def check_num_candidates(num_candidates: int, temperature: float) -> None:
    """Raise ValueError unless `num_candidates` is a whole number of at least 1/temperature."""
    check_temperature(temperature)
    if not isinstance(num_candidates, numbers.Integral) or isinstance(num_candidates, bool) or num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates!r}: it must be a positive whole number.")
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


def first_occurrences(patches_BNK: Tensor) -> Tensor:
    """For each patch the index of the first one of its row that equals it, (B, N); exact for any K and vocabulary.

    Token ids must lie in [0, 2^32).
    """
    if 0 < patches_BNK.numel() * patches_BNK.shape[1] <= _comparisons_at_once(patches_BNK.device):
        return _classes_by_pairs(patches_BNK)
    return _classes_by_sorting(patches_BNK)


def _comparisons_at_once(device: torch.device) -> int:
    return MAX_COMPARISONS["cpu" if device.type == "cpu" else "other"]


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

    index_BN = arange(rank_BN.shape[-1], rank_BN.device).expand_as(rank_BN)
    first_of_rank_BN = torch.zeros_like(rank_BN).scatter_reduce_(-1, rank_BN, index_BN, "amin", include_self=False)
    return first_of_rank_BN.gather(-1, rank_BN)


def occurrence_counts(first_BN: Tensor) -> Tensor:
    """How many draws of the row have the same class id, (B, N)."""
    if first_BN.numel() * first_BN.shape[1] <= _comparisons_at_once(first_BN.device):
        return (first_BN[..., None] == first_BN[..., None, :]).sum(-1)
    return torch.zeros_like(first_BN).scatter_add_(-1, first_BN, torch.ones_like(first_BN)).gather(-1, first_BN)


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


def candidate_log_weights(first_BN: Tensor, temperature: float) -> Tensor:
    """Unnormalised log probability of choosing each draw by the batch rule; shape (B, N), float32.

    A patch seen c times weighs C(c, 1/T), all of it on its first occurrence. A row in which that leaves nothing falls
    back to smaller exponents n-1, n-2, ..., which ends at equal weights for the patches seen most often. At T > 1 the
    patches seen once also have the weight of those that were not seen, see `unseen_log_weight`.
    """
    num_draws = first_BN.shape[1]
    sizes_BN = occurrence_counts(first_BN)
    log_weights_BN = _log_weight_table(num_draws, temperature, first_BN.device)[sizes_BN]
    if temperature > 1:
        unseen_B1 = unseen_log_weight(sizes_BN, temperature)
        log_weights_BN = torch.where(sizes_BN == 1, log_weights_BN.logaddexp(unseen_B1), log_weights_BN)
    is_later_BN = first_BN != arange(num_draws, first_BN.device)
    return log_weights_BN.masked_fill(is_later_BN, -math.inf)


def unseen_log_weight(sizes_BN: Tensor, temperature: float) -> Tensor:
    """At T > 1, the log weight of all patches that were not seen, per patch seen once; (B, 1), float32.

    From f1 patches seen once and f2 seen twice, f1 (f1 - 1) / (2 (f2 + 1)) is Chao's estimate (1984) of how many were
    not seen, each of which weighs C(0, 1/T). Those seen once are most like them, and stand for them: where a patch is
    as rare as that, which one it is is the least part of the error.
    """
    once_B1 = (sizes_BN == 1).sum(-1, keepdim=True)
    twice_B1 = (sizes_BN == 2).sum(-1, keepdim=True) / 2
    unseen_B1 = (once_B1 - 1).clamp(min=0) / (2 * (twice_B1 + 1))
    return unseen_B1.log() + _log_weight_table(1, temperature, sizes_BN.device)[0]


@cached_per_device
def _log_weight_table(num_draws: int, temperature: float, device: torch.device) -> Tensor:
    """Log weights of 0 … N repetitions, float32. Where C(c, 1/T) is 0 they are so low, and the lower the smaller c is,
    that beside any larger count the weight is 0 in float32: alone, the largest counts weigh 1."""
    log_weights = repetition_log_weights(num_draws, inverse_temperature(temperature), float64_device(device))
    steps_down = torch.arange(-num_draws - 1, 0, dtype=torch.float64, device=log_weights.device) * NO_WEIGHT
    return torch.where(log_weights == -math.inf, steps_down, log_weights).to(device, torch.float32)


def truncated(weights_BN: Tensor, truncation: Truncation) -> Tensor:
    """Weights, of each row's sum 1, with those that `truncation` leaves out at 0; of equal weights the earlier stays.

    In upstream's order: top-k, then top-p of what is left, then min-p; at least one is left.
    """
    top_k, top_p, min_p = truncation
    sorted_BN, order_BN = weights_BN.sort(dim=-1, descending=True, stable=True)
    rank_N = arange(weights_BN.shape[-1], weights_BN.device)
    if top_k > 0:
        sorted_BN = sorted_BN.masked_fill(rank_N >= top_k, 0)
    if top_p < 1:
        before_BN = sorted_BN.cumsum(-1) - sorted_BN
        is_left_out_BN = before_BN >= (top_p - ROUNDING) * sorted_BN.sum(-1, keepdim=True)
        sorted_BN = sorted_BN.masked_fill(is_left_out_BN & (rank_N > 0), 0)
    if min_p > 0:
        sorted_BN = sorted_BN.masked_fill(sorted_BN < (1 - ROUNDING) * min_p * sorted_BN[:, :1], 0)
    return torch.empty_like(weights_BN).scatter_(-1, order_BN, sorted_BN)


def candidate_weights(
    first_BN: Tensor,
    temperature: float,
    truncation: Truncation = NO_TRUNCATION,
    processor_log_weights_BN: Tensor | None = None,
) -> Tensor:
    """The probability of choosing each draw by the batch rule, on the first of equal ones; (B, N), float32.

    With factors the law is (P · factor)^(1/T) / Z; `truncation` then sees what they leave.
    """
    log_weights_BN = candidate_log_weights(first_BN, temperature)
    if processor_log_weights_BN is not None:
        log_weights_BN = log_weights_BN + processor_log_weights_BN / temperature
    weights_BN = log_weights_BN.softmax(-1)
    if truncation.keeps_all:
        return weights_BN
    weights_BN = truncated(weights_BN, truncation)
    return weights_BN / weights_BN.sum(-1, keepdim=True)


def sample_by_weight(
    first_BN: Tensor,
    noise_BN: Tensor,
    temperature: float,
    truncation: Truncation = NO_TRUNCATION,
    processor_log_weights_BN: Tensor | None = None,
) -> Tensor:
    """The batch rule's choice; index (B,).

    Each draw's exponential noise ÷ its weight is an exponential variate too, with the weight for its rate; the draw
    with the smallest is chosen, which is each in proportion to its weight.
    """
    return (candidate_weights(first_BN, temperature, truncation, processor_log_weights_BN) / noise_BN).argmax(-1)
