"""Reference implementations of the published samplers in plain Python, one sample at a time."""

# B sets of samples, N samples each, V outcomes (patches) of an enumerable distribution

import math
from collections import Counter

import torch


def published_choice_by_loops(candidates: list, n: int) -> dict:
    """Returns the published choice at T = 1/n: weights C(count, n), or C(count, n-1) if all are 0, and so on."""
    counts = Counter(candidates)
    for exponent in range(n, 0, -1):
        weights = {patch: math.comb(count, exponent) for patch, count in counts.items() if count >= exponent}
        if weights:
            total = sum(weights.values())
            return {patch: weight / total for patch, weight in weights.items()}
    raise AssertionError("unreachable: every candidate counts once")


def published_probs_by_loops(outcomes_BN: torch.Tensor, n: int, num_outcomes: int) -> torch.Tensor:
    """Returns the published choice probabilities, one row per set of samples; shape (B, V)."""
    probs_BV = torch.zeros(len(outcomes_BN), num_outcomes, dtype=torch.float64)
    for row, outcomes in enumerate(outcomes_BN.tolist()):
        for outcome, probability in published_choice_by_loops(outcomes, n).items():
            probs_BV[row, outcome] = probability
    return probs_BV


def table_of_pairs(pairs: str, num_samples: int) -> torch.Tensor:
    """Returns the pairs of samples that `compared_pairs` names, with the diagonal; shape (N, N)."""
    is_pair = {
        "disjoint": lambda i, j: i // 2 == j // 2,
        "adjacent": lambda i, j: abs(i - j) <= 1,
        "all": lambda i, j: True,
    }
    return torch.tensor([[is_pair[pairs](i, j) for j in range(num_samples)] for i in range(num_samples)])


def first_attempt_by_loops(samples: list, uniforms: list, exponent: float, circular: bool) -> int | None:
    """Returns where Algorithm 1, sample by sample, starts the attempt that it accepts.

    The attempt from sample t restarts once the probability that it would have by now exceeds uniforms[t]. `circular`:
    while it waits for its patch it wraps around the samples, and is accepted when it is back at t.
    """
    whole, position = math.floor(exponent), 0
    fraction = exponent - whole
    while position < len(samples):
        start, restarted = position, False
        while position < start + whole and not restarted:
            if position == len(samples):
                return None
            restarted = samples[position] != samples[start]
            position += 1
        num_extra, no_restart_yet = 0, 1.0
        while not restarted:
            if fraction == 0:
                return start
            if position == len(samples) and not circular:
                return None
            if position == start + len(samples):
                return start
            if samples[position % len(samples)] == samples[start]:
                return start
            position, num_extra = position + 1, num_extra + 1
            no_restart_yet *= 1 - fraction / num_extra
            restarted = uniforms[start] < 1 - no_restart_yet
    return None
