"""The published rules in plain Python, one draw at a time: slow twins of the vectorised samplers."""

# B rows of a pool, N draws, V outcomes (patches) of an enumerable distribution

import math
from collections import Counter

import torch


def published_choice_by_loops(candidates: list, n: int) -> dict:
    """The published batch rule for T = 1/n: weights C(count, n), or C(count, n-1) where all are zero, and so on."""
    counts = Counter(candidates)
    for exponent in range(n, 0, -1):
        weights = {patch: math.comb(count, exponent) for patch, count in counts.items() if count >= exponent}
        if weights:
            total = sum(weights.values())
            return {patch: weight / total for patch, weight in weights.items()}
    raise AssertionError("unreachable: every candidate counts once")


def published_laws_by_loops(outcomes_BN: torch.Tensor, n: int, num_outcomes: int) -> torch.Tensor:
    """The published rule's choice probabilities, one row a pool; shape (B, V)."""
    laws_BV = torch.zeros(len(outcomes_BN), num_outcomes, dtype=torch.float64)
    for row, outcomes in enumerate(outcomes_BN.tolist()):
        for outcome, probability in published_choice_by_loops(outcomes, n).items():
            laws_BV[row, outcome] = probability
    return laws_BV


def table_of_pairs(pairs: str, num_draws: int) -> torch.Tensor:
    """The pairs of draws that `compared_pairs` names, each draw with itself included; shape (N, N)."""
    rule = {
        "disjoint": lambda i, j: i // 2 == j // 2,
        "adjacent": lambda i, j: abs(i - j) <= 1,
        "all": lambda i, j: True,
    }
    return torch.tensor([[rule[pairs](i, j) for j in range(num_draws)] for i in range(num_draws)])


def first_attempt_by_loops(draws: list, uniforms: list, exponent: float, circular: bool) -> int | None:
    """Where Algorithm 1, draw by draw, starts the attempt that it accepts.

    The attempt from draw t restarts once the probability that it would have by now exceeds uniforms[t]. `circular`:
    while it waits for its patch it reads the draws in a circle, and accepts when it is back at t.
    """
    whole, position = math.floor(exponent), 0
    fraction = exponent - whole
    while position < len(draws):
        start, restarted = position, False
        while position < start + whole and not restarted:
            if position == len(draws):
                return None
            restarted = draws[position] != draws[start]
            position += 1
        further, no_restart_yet = 0, 1.0
        while not restarted:
            if fraction == 0:
                return start
            if position == len(draws) and not circular:
                return None
            if position == start + len(draws):
                return start
            if draws[position % len(draws)] == draws[start]:
                return start
            position, further = position + 1, further + 1
            no_restart_yet *= 1 - fraction / further
            restarted = uniforms[start] < 1 - no_restart_yet
    return None
