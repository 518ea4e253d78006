"""What a step chose from: its distinct candidates with their counts and weights, as `generate` returns on request.

CALM has no token probabilities, so `output_scores=True` gives these in the place of upstream's logits.

Axes: B rows, R of them that draw, N draws, M distinct patches among them, K tokens per patch, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .candidates_calm import PlainPool
from .tables_calm import numbers_up_to
from .weights_calm import class_sizes, patch_classes

NO_TOKEN = -1
Weigh = Callable[..., Tensor]  # (class ids (1, N), log_factors_BN=...)


class CandidateScores(NamedTuple):
    """The candidates of one step, of each row the one with most weight first; rows are filled up to the largest M.

    Args:
        patches (`(B, M, K)`): ids of the distinct patches among the draws; −1 where a row has no more.
        counts (`(B, M)`): how often each was drawn; their sum is the number of draws, 0 in a row that has ended. The
            exact algorithm draws in blocks, whose sizes are the batch's and change no text.
        weights (`(B, M)`): the batch rule's estimate of P(patch)^(1/T)/Z after truncation, by which the method
            chooses or, where Algorithm 1 accepted an attempt, would have. Without do_sample: counts ÷ draws.
        chosen (`(B,)`): the index of the patch that was written; −1 in a row that has ended.
        is_exact (`(B,)`): whether it is a sample of P(patch)^(1/T)/Z: Algorithm 1 accepted an attempt, or T = 1 and
            nothing else was asked for. False where it was chosen by weight or frequency, and in a row that has ended.
    """

    patches: Tensor
    counts: Tensor
    weights: Tensor
    chosen: Tensor
    is_exact: Tensor

    def in_rows(self, rows: Sequence[int], num_rows: int) -> CandidateScores:
        """The same, of these rows among so many."""
        if len(rows) == num_rows:
            return self
        empty = CandidateScores(*(values[:1].new_full((num_rows, *values.shape[1:]), NO_TOKEN) for values in self))
        empty.counts.zero_()
        empty.weights.zero_()
        empty.is_exact.zero_()
        for whole, values in zip(empty, self, strict=True):
            whole[list(rows)] = values
        return empty


class RecordedPool(PlainPool):
    """A `PlainPool` that knows how many draws each row has made, to tell afterwards what was chosen from."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_draws_B = torch.zeros_like(self.rows_B)

    def extend(self, rows_R: Tensor, num_draws: int) -> None:
        super().extend(rows_R, num_draws)
        self.num_draws_B[rows_R] += num_draws

    def scores(self, index_B: Tensor, weigh: Weigh, is_exact_B: Tensor | None = None) -> CandidateScores:
        """
        Args:
            index_B: the draw that was chosen.
            weigh: class ids and log factors (1, N) → the weight of each draw, all of it on the first of equal ones.
            is_exact_B: see `CandidateScores`; by default nowhere.
        """
        by_row = [self._of_row(row, index, weigh) for row, index in enumerate(index_B.tolist())]
        patches, counts, weights, chosen = (list(values) for values in zip(*by_row, strict=True))
        return CandidateScores(
            pad_sequence(patches, batch_first=True, padding_value=NO_TOKEN),
            pad_sequence(counts, batch_first=True),
            pad_sequence(weights, batch_first=True),
            torch.stack(chosen),
            torch.zeros_like(index_B, dtype=torch.bool) if is_exact_B is None else is_exact_B.to(index_B.device),
        )

    def _of_row(self, row: int, index: int, weigh: Weigh) -> tuple[Tensor, ...]:
        num_draws = int(self.num_draws_B[row])
        tokens_NK = self.tokens_BNK[row, :num_draws]
        class_1N = patch_classes(tokens_NK[None])
        factors_BN = self.log_factors_BN
        weights_N = weigh(class_1N, log_factors_BN=None if factors_BN is None else factors_BN[row, None, :num_draws])[
            0
        ]
        first_M = (class_1N[0] == numbers_up_to(num_draws, class_1N.device)).nonzero()[:, 0]
        first_M = first_M[weights_N[first_M].sort(descending=True, stable=True).indices]
        chosen = (first_M == class_1N[0, index]).nonzero()[0, 0]
        return tokens_NK[first_M], class_sizes(class_1N)[0, first_M], weights_N[first_M], chosen


def compute_patch_scores(scores: Sequence[CandidateScores]) -> Tensor:
    """The natural logarithm of the chosen patches' weights, (B, S); 0 for rows that have ended, as upstream has it.

    This is the place of `compute_transition_scores`, with a value a patch. It is an estimate from the draws made:
    without do_sample the log of the patch's share of them, and 0 at T = 1, where one patch is drawn and taken.

    Args:
        scores: of the S steps, as `generate` returns them.

    Raises:
        ValueError: it is something else, as the whole output, or there are none.
    """
    if not isinstance(scores, list | tuple) or not scores or not all(hasattr(step, "chosen") for step in scores):
        raise ValueError(
            "compute_patch_scores() takes outputs.scores of generate(..., return_dict_in_generate=True, "
            "output_scores=True)."
        )
    chosen_BS = torch.stack([step.chosen for step in scores], dim=1)
    weights_BS = torch.stack([step.weights.gather(1, step.chosen.clamp(min=0)[:, None])[:, 0] for step in scores], 1)
    return weights_BS.log().masked_fill(chosen_BS < 0, 0)
