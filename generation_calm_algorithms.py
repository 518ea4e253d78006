"""The paper's two algorithms of temperature sampling, as functions of which samples are the same patch.

The target at temperature T is P(x)^s / Z over whole patches x, with the exponent s = 1/T, given only samples of P. All
functions take `first_BN`: for each of a row's N samples the index of the first one that equals it. Algorithm 2 gives
each distinct patch a weight by how often it was seen, for whole s in the paper, for every s here. Algorithm 1 reads
the samples in order and is exact. The host reads nothing. Axes: B rows, N samples of a row, K tokens per patch, H
pairs of neighbours.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels_calm import arange, cached_per_device, float64_device

WHOLE_TOLERANCE = 1e-6  # 1/T this close (relatively) to a whole number counts as whole: T = 0.3333333 means 1/3
MAX_COMPARISONS = {"cpu": 2**18, "other": 2**26}  # B·N²·K up to which all pairs of samples are compared at once
NO_WEIGHT = 1000.0  # nats: e^-1000 is 0 in float32
ROUNDING = 1e-5  # of fractions: counts are whole, so that many lie exactly on the edge of a truncation

Pairs = Literal["all", "adjacent", "disjoint"]


class Truncation(NamedTuple):
    """Limits a row's choice to some of its distinct patches, by their weights; all three limits apply."""

    top_k: int = 0  # keeps this many patches of the largest weight; 0 keeps all
    top_p: float = 1.0  # keeps the fewest patches, by descending weight, that hold this fraction of it; 1 keeps all
    min_p: float = 0.0  # keeps patches with at least this fraction of the largest weight; 0 keeps all


NO_TRUNCATION = Truncation()


def inverse_temperature(temperature: float) -> float:
    """Returns the exponent s = 1/T, exactly whole where T is 1/n up to rounding."""
    exponent = 1.0 / float(temperature)
    if math.isinf(exponent) or abs(exponent - round(exponent)) > WHOLE_TOLERANCE * exponent:
        return exponent
    return float(round(exponent))


def first_occurrences(patches_BNK: Tensor) -> Tensor:
    """Returns for each patch the index of the first one of its row that equals it, (B, N); ids in [0, 2^32)."""
    if 0 < patches_BNK.numel() * patches_BNK.shape[1] <= MAX_COMPARISONS["cpu" if patches_BNK.is_cpu else "other"]:
        patches_KBN = patches_BNK.movedim(-1, 0)
        equal_BNN = (patches_KBN[..., None] == patches_KBN[..., None, :]).all(0)
        return equal_BNN.view(torch.uint8).argmax(-1)
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
    """Returns for each sample how many of its row are the same patch, (B, N)."""
    if first_BN.numel() * first_BN.shape[1] <= MAX_COMPARISONS["cpu" if first_BN.is_cpu else "other"]:
        return (first_BN[..., None] == first_BN[..., None, :]).sum(-1)
    return torch.zeros_like(first_BN).scatter_add_(-1, first_BN, torch.ones_like(first_BN)).gather(-1, first_BN)


# Algorithm 2: candidate weights


def repetition_log_weights(num_samples: int, exponent: float, device: torch.device | None = None) -> Tensor:
    """Returns log C(c, s) for c = 0 … N repetitions at the exponent s = 1/T, (N + 1,), float64.

    C(c, s) = Gamma(c+1) / (Gamma(s+1) Gamma(c-s+1)), and zero (log: -inf) for c <= s - 1. For a whole s = n these are
    the binomials of the paper's Algorithm 2. Otherwise C(c, s) / C(N, s) of a patch seen c times is the unbiased
    estimate of p^s = p^n sum_k a_k (1-p)^k, which Algorithm 1 sums by its restarts, cut off at k = N - n.
    """
    count = torch.arange(num_samples + 1, dtype=torch.float64, device=device)
    log_weights = torch.lgamma(count + 1) - math.lgamma(exponent + 1) - torch.lgamma(count - exponent + 1)
    return log_weights.masked_fill(count <= exponent - 1, -math.inf)


def candidate_log_weights(first_BN: Tensor, temperature: float) -> Tensor:
    """Returns the unnormalised log probability of choosing each sample by the batch rule, (B, N), float32.

    A patch seen c times weighs C(c, 1/T), all of it on its first occurrence. Where that leaves nothing of a row, the
    patches seen most often weigh the same. At T > 1 patches seen once also carry `unseen_log_weight`.
    """
    num_samples = first_BN.shape[1]
    counts_BN = occurrence_counts(first_BN)
    log_weights_BN = _log_weight_table(num_samples, temperature, first_BN.device)[counts_BN]
    if temperature > 1:
        unseen_B1 = unseen_log_weight(counts_BN, temperature)
        log_weights_BN = torch.where(counts_BN == 1, log_weights_BN.logaddexp(unseen_B1), log_weights_BN)
    return log_weights_BN.masked_fill(first_BN != arange(num_samples, first_BN.device), -math.inf)


def unseen_log_weight(counts_BN: Tensor, temperature: float) -> Tensor:
    """Returns, at T > 1, the log weight of all unseen patches together per patch seen once, (B, 1), float32.

    From f1 patches seen once and f2 seen twice, f1 (f1 - 1) / (2 (f2 + 1)) is Chao's estimate (1984) of the number of
    unseen patches, each of which weighs C(0, 1/T). Patches seen once, as the most like them, stand for them.
    """
    once_B1 = (counts_BN == 1).sum(-1, keepdim=True)
    twice_B1 = (counts_BN == 2).sum(-1, keepdim=True) / 2
    num_unseen_B1 = (once_B1 - 1).clamp(min=0) / (2 * (twice_B1 + 1))
    return num_unseen_B1.log() + _log_weight_table(1, temperature, counts_BN.device)[0]


@cached_per_device
def _log_weight_table(num_samples: int, temperature: float, device: torch.device) -> Tensor:
    """Returns log C(c, 1/T) for c = 0 … N, float32; in place of log 0, values that increase steeply with c."""
    log_weights = repetition_log_weights(num_samples, inverse_temperature(temperature), float64_device(device))
    steps_down = torch.arange(-num_samples - 1, 0, dtype=torch.float64, device=log_weights.device) * NO_WEIGHT
    return torch.where(log_weights == -math.inf, steps_down, log_weights).to(device, torch.float32)


def truncated(weights_BN: Tensor, truncation: Truncation) -> Tensor:
    """Returns the weights (..., N), of sum 1 before, with 0 in place of those that `truncation` removes.

    As upstream: top-k, then top-p of the rest, then min-p. Of equal weights the earlier stays; at least one stays.
    """
    top_k, top_p, min_p = truncation
    sorted_BN, order_BN = weights_BN.sort(dim=-1, descending=True, stable=True)
    rank_N = arange(weights_BN.shape[-1], weights_BN.device)
    if top_k > 0:
        sorted_BN = sorted_BN.masked_fill(rank_N >= top_k, 0)
    if top_p < 1:
        before_BN = sorted_BN.cumsum(-1) - sorted_BN
        is_removed_BN = before_BN >= (top_p - ROUNDING) * sorted_BN.sum(-1, keepdim=True)
        sorted_BN = sorted_BN.masked_fill(is_removed_BN & (rank_N > 0), 0)
    if min_p > 0:
        sorted_BN = sorted_BN.masked_fill(sorted_BN < (1 - ROUNDING) * min_p * sorted_BN[..., :1], 0)
    return torch.empty_like(weights_BN).scatter_(-1, order_BN, sorted_BN)


def candidate_weights(
    first_BN: Tensor, temperature: float, truncation: Truncation = NO_TRUNCATION, log_factors_BN: Tensor | None = None
) -> Tensor:
    """Returns the probability of choosing each sample by the batch rule, on first occurrences, (B, N), float32.

    With `log_factors_BN`, log f(x) of each patch x, the target is (P · f)^(1/T) / Z; truncation comes after.
    """
    log_weights_BN = candidate_log_weights(first_BN, temperature)
    if log_factors_BN is not None:
        log_weights_BN = log_weights_BN + log_factors_BN / temperature
    weights_BN = log_weights_BN.softmax(-1)
    if truncation != NO_TRUNCATION:
        weights_BN = truncated(weights_BN, truncation)
        weights_BN = weights_BN / weights_BN.sum(-1, keepdim=True)
    return weights_BN


def sample_by_weight(
    first_BN: Tensor,
    noise_BN: Tensor,
    temperature: float,
    truncation: Truncation = NO_TRUNCATION,
    log_factors_BN: Tensor | None = None,
) -> Tensor:
    """Samples one index of each row by `candidate_weights`, (B,), with exponential noise (an exponential race)."""
    return (candidate_weights(first_BN, temperature, truncation, log_factors_BN) / noise_BN).argmax(-1)


# Algorithm 1: attempts along a row's samples


def compared_pairs(temperature: float) -> Pairs:
    """Returns which pairs of samples the attempts of Algorithm 1 compare: 2i with 2i + 1, i with i + 1, or all.

    Where 1/T is whole, an attempt compares each sample with the one before it; at 1/T = 2 it always reads two samples.
    """
    exponent = inverse_temperature(temperature)
    return "disjoint" if exponent == 2 else "adjacent" if exponent.is_integer() else "all"


def first_accepted_attempt(
    first_BN: Tensor, uniform_BN: Tensor | None, temperature: float, circular: bool = False
) -> Tensor:
    """Runs Algorithm 1 along each row's samples and returns where its first accepted attempt starts, (B,).

    N stands for a row without one. With n = floor(1/T) and alpha = 1/T - n, an attempt reads samples until one
    differs from its first, or until n are equal. Then, if alpha > 0, it reads on: at the i-th next sample it accepts
    if that equals the n equal ones, and otherwise restarts with probability alpha / i. The next attempt starts at the
    first unread sample. `circular`: one that runs out of samples reads on from the row's first one, up to its start.

    `first_BN` need compare only the pairs that `compared_pairs` names. `uniform_BN`, on [0, 1), is for the attempt
    that starts at a sample; None where 1/T is whole.
    """
    exponent, num_samples = inverse_temperature(temperature), first_BN.shape[-1]
    whole, fraction = math.floor(exponent), exponent % 1
    start_N = arange(num_samples, first_BN.device)
    if exponent == 2 and num_samples > 1:  # each attempt reads two samples, whatever they are
        differs_BH = first_BN[:, :-1:2] != first_BN[:, 1::2]
        return start_N[:-1:2].expand_as(differs_BH).masked_fill(differs_BH, num_samples).amin(-1)

    differs_BN = _next_different(first_BN)
    accepts_BN = differs_BN - start_N >= whole
    next_start_BN = differs_BN + 1
    if fraction > 0:
        assert uniform_BN is not None, "attempts restart by chance where 1/T is not whole"
        last_N = (start_N + whole - 1).clamp(max=num_samples - 1)
        restarted_by_N = _restart_table(num_samples, fraction, first_BN.device)
        restart_BN = last_N + (1 + torch.searchsorted(restarted_by_N, uniform_BN.contiguous(), right=True))
        next_start_BN = torch.where(accepts_BN, restart_BN + 1, next_start_BN)
        next_match_BN = _next_equal(first_BN, circular)[:, last_N]
        accepts_BN = accepts_BN & (next_match_BN <= restart_BN) & (circular | (next_match_BN < num_samples))

    # An accepting attempt points at itself, any other at its successor, index N stands for "ran out of samples".
    # Squaring the pointers log2(N) times walks every row to the end of its chain without a loop over samples.
    points_to_BN = torch.where(accepts_BN, start_N, next_start_BN.clamp(max=num_samples))
    points_to_BN = F.pad(points_to_BN, (0, 1), value=num_samples)
    for _ in range(num_samples.bit_length()):
        points_to_BN = points_to_BN.gather(-1, points_to_BN)
    return points_to_BN[:, 0]


def choose_at_limit(first_RN: Tensor, uniform_RN: Tensor | None, noise_RN: Tensor, temperature: float) -> Tensor:
    """Chooses a sample of each row in which Algorithm 1 accepted none and may draw no more, (R,).

    An attempt that was waiting for its patch to come again reads the row's earlier samples as if they came next, and
    accepts when it has read them all without a restart. Averaged over the orders of N samples, this accepts a patch in
    proportion to its batch weight C(c, 1/T); dropping such attempts would be biased against rare patches. Other rows,
    at whole 1/T all of them, take the batch rule. `first_RN` compares all pairs.
    """
    by_weight_R = sample_by_weight(first_RN, noise_RN, temperature)
    if uniform_RN is None:
        return by_weight_R
    start_R = first_accepted_attempt(first_RN, uniform_RN, temperature, circular=True)
    return torch.where(start_R < first_RN.shape[1], start_R, by_weight_R)


@cached_per_device
def _restart_table(num_samples: int, fraction: float, device: torch.device) -> Tensor:
    """Returns the probability of a restart by the i-th further sample, i = 1 … N, float32; alpha / i each time."""
    further_N = torch.arange(1, num_samples + 1, dtype=torch.float64, device=float64_device(device))
    return (1 - torch.cumprod(1 - fraction / further_N, dim=0)).to(device, torch.float32)


def _next_different(first_BN: Tensor) -> Tensor:
    """Returns for each sample the index of the next one that differs from it, N where there is none."""
    num_samples = first_BN.shape[-1]
    next_N = arange(num_samples, first_BN.device)[1:]
    changes_BN = torch.where(first_BN[:, 1:] != first_BN[:, :-1], next_N, num_samples)
    changes_BN = F.pad(changes_BN, (0, 1), value=num_samples)
    return changes_BN.flip(-1).cummin(-1).values.flip(-1)


def _next_equal(first_BN: Tensor, circular: bool) -> Tensor:
    """Returns for each sample the index of the next one that equals it, or N; `circular`: N + i is sample i again."""
    num_samples = first_BN.shape[-1]
    sorted_BN, order_BN = torch.sort(first_BN, dim=-1, stable=True)
    # The first occurrence of a patch is also its next one around the circle.
    follower_BN = num_samples + sorted_BN if circular else torch.full_like(first_BN, num_samples)
    same_BN = sorted_BN[:, 1:] == sorted_BN[:, :-1]
    follower_BN[:, :-1] = torch.where(same_BN, order_BN[:, 1:], follower_BN[:, :-1])
    return torch.empty_like(first_BN).scatter_(-1, order_BN, follower_BN)
