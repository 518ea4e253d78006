"""The pools of candidate patches of one generation step: drawn as latent vectors, decoded no further than needed.

The samplers ask of a candidate only which others of its row are the same patch. Two patches are the same when all K
tokens are, so a candidate whose token at one position no other has is known to be alone, and its other tokens matter
only if it is chosen. `LazyCandidateBatch` decodes position by position on that ground, and only candidates of the pairs that are
asked for; `CandidateBatch` decodes every token of every candidate as it comes, and is what the lazy one is tested against.

Axes: B rows of the pool, R of these that still draw, N candidates of a row so far, n new ones, K tokens per patch, Z
latent size, d width of the decoder, V vocabulary, C candidates of a chunk, M tokens to
read, U the candidates that they are of, k some of the K, D distinct patches among the candidates, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .generation_calm_rules import CandidateProcessors
from .generation_calm_samplers import Pairs
from .generation_calm_weights import first_occurrences, occurrence_counts
from .kernels_calm import arange
from .modeling_calm_autoencoder import CALMAutoencoder, logits_chunk_size

FEW_TOKENS = 96  # so many are read at once: a product with the vocabulary costs as much as 25 more tokens
TOKENS_CHUNK_SIZE = 1000  # decoded at a time at most: what the decoder's layers hold doesn't grow with N
NOTHING = torch.empty(0)  # is known of what is not drawn
LEAST_FACTOR = 10.0  # nats: candidates that rules make so much lighter than a row's heaviest are left out
UNKNOWN = -1  # id of a token that isn't decoded yet
NO_TOKEN = -1
Weigh = Callable[..., Tensor]  # (class ids (1, N), processor_log_weights_BN=...)


class CandidateBatch:
    """A `generation_calm_samplers.Candidates` whose candidates are all decoded in full as they come.

    Args:
        draw: `draw(rows_R, n)` gives so many latent vectors for each of these rows, (n, R, Z).
        rows_B: 0 … B − 1, on the device that the rows and ids are on.
        autoencoder: decodes.
        forbidden_KV (`(K, V)` bool, *optional*): tokens that may not stand at a position.
        rules (*optional*): what else may not, or should less.
    """

    def __init__(
        self,
        draw: Callable[[Tensor, int], Tensor],
        rows_B: Tensor,
        autoencoder: CALMAutoencoder,
        forbidden_KV: Tensor | None = None,
        rules: CandidateProcessors | None = None,
    ):
        self.draw, self.rows_B, self.autoencoder = draw, rows_B, autoencoder
        self.forbidden_KV, self.rules = forbidden_KV, rules
        self.has_processors = rules is not None
        self.processor_log_weights_BN: Tensor | None = None
        self.blocks: list[tuple[Tensor, int]] = []  # which rows drew, and how many each
        self.tokens_BNK: Tensor = NOTHING
        self._classes: tuple[Tensor, Tensor] | None = None  # rows, and the class ids of all their draws

    @property
    def num_drawn(self) -> int:
        return sum(num_draws for _, num_draws in self.blocks)

    def extend(self, rows_R: Tensor, num_draws: int) -> None:
        """Draws so many more for each of these rows, which must have drawn in every call before."""
        self._keep(rows_R, self.draw(rows_R, num_draws))
        self.blocks.append((rows_R, num_draws))
        self._classes = None

    def _keep(self, rows_R: Tensor, latents_nRZ: Tensor) -> None:
        tokens_nRK = self.autoencoder.decode_tokens(latents_nRZ, self.forbidden_KV).to(rows_R.device)
        if self.rules is not None:
            by_row = zip(rows_R.tolist(), latents_nRZ.unbind(1), tokens_nRK.unbind(1), strict=True)
            ruled = [self._by_rules(self.rules, *row) for row in by_row]
            tokens_nRK, factors_nR = (torch.stack(parts, dim=1) for parts in zip(*ruled, strict=True))
            old_BN = NOTHING if self.processor_log_weights_BN is None else self.processor_log_weights_BN
            self.processor_log_weights_BN = self._grown(old_BN, rows_R, factors_nR)
        self.tokens_BNK = self._grown(self.tokens_BNK, rows_R, tokens_nRK)

    def _by_rules(
        self, rules: CandidateProcessors, row: int, latents_nZ: Tensor, tokens_nK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One row's new candidates as its rules leave them: tokens (n, K), and the logarithm of what each weighs (n,).

        Of those that are the same patch without rules the first stands for all.
        """
        first_C, place_n = first_occurrences(tokens_nK[None])[0].unique(return_inverse=True)
        chunks = latents_nZ[first_C.to(latents_nZ.device)].split(self._candidates_at_once(latents_nZ.device))
        decoded = [rules.decode(row, self._logits(latents_cZ)) for latents_cZ in chunks]
        patches_CK, factors_C = (torch.cat(parts).to(tokens_nK.device) for parts in zip(*decoded, strict=True))
        patches_nK, factors_n = patches_CK[place_n], factors_C[place_n]
        # Draws that are the same patch now weigh what they weigh on average.
        first_n = first_occurrences(patches_nK[None])[0]
        largest = factors_n.amax()
        sums_n = torch.zeros_like(factors_n).scatter_add(0, first_n, (factors_n - largest).exp())
        means_n = (sums_n / first_n.bincount(minlength=len(first_n)).clamp(min=1)).log()[first_n]
        return patches_nK, means_n.masked_fill(means_n < means_n.amax() - LEAST_FACTOR, -torch.inf)

    def _logits(self, latents_CZ: Tensor) -> Tensor:
        """(C, K, V), float32, −inf for forbidden tokens."""
        logits_CKV = self.autoencoder.decode(latents_CZ).float()
        if self.forbidden_KV is None:
            return logits_CKV
        return logits_CKV.masked_fill(self.forbidden_KV.to(logits_CKV.device), -torch.inf)

    def _candidates_at_once(self, device: torch.device) -> int:
        config = self.autoencoder.config
        return max(1, logits_chunk_size(device) // (config.patch_size * config.vocab_size))

    def _grown(self, old_BN: Tensor, rows_R: Tensor, new_nR: Tensor) -> Tensor:
        """What is known of each candidate, and the same of new ones; zero for rows that don't draw."""
        new_Rn = new_nR.transpose(0, 1)
        if rows_R is not self.rows_B:
            drawn_Rn = new_Rn
            new_Rn = drawn_Rn.new_zeros(len(self.rows_B), *drawn_Rn.shape[1:])
            new_Rn[rows_R.to(new_Rn.device)] = drawn_Rn
        return new_Rn if old_BN is NOTHING else torch.cat([old_BN, new_Rn], dim=1)

    def _of(self, rows_R: Tensor, values_B: Tensor) -> Tensor:
        """The values of these rows, of values by row."""
        return values_B if rows_R is self.rows_B else values_B[rows_R.to(values_B.device)]

    def first_occurrences(self, rows_R: Tensor, pairs: Pairs = "all", noise_RN: Tensor | None = None) -> Tensor:
        """Class ids of all candidates of these rows so far, (R, N); those of every pair, for all tokens are known."""
        if self._classes is None or self._classes[0] is not rows_R:
            self._classes = rows_R, first_occurrences(self._of(rows_R, self.tokens_BNK))
        return self._classes[1]

    def tokens(self, rows_R: Tensor, index_R: Tensor) -> Tensor:
        """The patches of one candidate of each of these rows, (R, K)."""
        if self.num_drawn == 1:  # T = 1: there is nothing to choose
            return self._of(rows_R, self.tokens_BNK)[:, 0]
        return self.tokens_BNK[rows_R, index_R]


class LazyCandidateBatch(CandidateBatch):
    """Decodes only the tokens that decide which candidates of a row are the same patch. Same results, less work.

    Args: as in `CandidateBatch`, but no rules.
    """

    latents_BNZ: Tensor = NOTHING

    def _keep(self, rows_R: Tensor, latents_nRZ: Tensor) -> None:
        patch_size = self.autoencoder.config.patch_size
        unknown_nRK = torch.full((*latents_nRZ.shape[:2], patch_size), UNKNOWN, device=rows_R.device)
        self.latents_BNZ = self._grown(self.latents_BNZ, rows_R, latents_nRZ)
        self.tokens_BNK = self._grown(self.tokens_BNK, rows_R, unknown_nRK)

    def first_occurrences(self, rows_R: Tensor, pairs: Pairs = "all", noise_RN: Tensor | None = None) -> Tensor:
        """Class ids of the candidates of these rows so far, (R, N): see `generation_calm_samplers.Candidates`.

        The likely ones are decoded in full, in the same product with the vocabulary as the first tokens of the others.
        """
        index_N = arange(self.num_drawn, rows_R.device)
        # Candidates with one id may be the same patch, as far as is known.
        first_RN = (index_N - index_N % 2 if pairs == "disjoint" else index_N * 0).expand(len(rows_R), -1)
        wanted_RNK = self._whole_patches(rows_R, None if noise_RN is None else noise_RN.argmin(-1))
        positions = list(range(self.tokens_BNK.shape[-1]))
        while positions:
            is_open_RN1 = (occurrence_counts(first_RN) > 1)[..., None]
            # The last token is the one that most often tells patches apart: the context says least about it.
            at_once = positions if is_open_RN1.sum() * len(positions) <= FEW_TOKENS else positions[-1:]
            positions = positions[: -len(at_once)]
            wanted_RNK[..., at_once] |= is_open_RN1
            self._decode(rows_R, wanted_RNK)
            # Tokens that are unknown are of candidates whose id no other has.
            tokens_RNk = self._of(rows_R, self.tokens_BNK)[..., at_once].clamp(min=0)
            keys_RNk = torch.cat([first_RN[..., None], tokens_RNk], dim=-1)
            first_RN = first_occurrences(keys_RNk) if pairs == "all" else _runs(keys_RNk)
        return first_RN

    def tokens(self, rows_R: Tensor, index_R: Tensor) -> Tensor:
        """The patches of one candidate of each of these rows, (R, K), decoded where they aren't yet."""
        self._decode(rows_R, self._whole_patches(rows_R, index_R))
        return super().tokens(rows_R, index_R)

    def _whole_patches(self, rows_R: Tensor, index_R: Tensor | None) -> Tensor:
        """Marks all tokens of one candidate of each row, or none, (R, N, K)."""
        marked_RNK = torch.zeros(len(rows_R), *self.tokens_BNK.shape[1:], dtype=torch.bool, device=rows_R.device)
        if index_R is not None:
            marked_RNK[arange(len(rows_R), rows_R.device), index_R] = True
        return marked_RNK

    def _decode(self, rows_R: Tensor, wanted_RNK: Tensor) -> None:
        """Makes these tokens known."""
        is_unknown_RNK = self._of(rows_R, self.tokens_BNK) == UNKNOWN
        row, candidate, position = (wanted_RNK & is_unknown_RNK).nonzero().unbind(-1)
        row = row if rows_R is self.rows_B else rows_R[row]
        for index in zip(*(index.split(TOKENS_CHUNK_SIZE) for index in (row, candidate, position)), strict=True):
            if len(index[0]):
                self.tokens_BNK[index] = self.read(*index)

    def read(self, rows_M: Tensor, draws_M: Tensor, positions_M: Tensor) -> Tensor:
        """The ids (M,) of tokens, each given by its row, the index of its candidate and its position."""
        device = self.latents_BNZ.device
        candidate_U, place_M = (rows_M * self.num_drawn + draws_M).unique(return_inverse=True)
        states_UKd = self.autoencoder.decode_states(self.latents_BNZ.flatten(0, 1)[candidate_U.to(device)])
        states_Md = states_UKd[place_M.to(states_UKd.device), positions_M.to(states_UKd.device)]
        return self.autoencoder.read_tokens(states_Md, positions_M, self.forbidden_KV).to(rows_M.device)


def _runs(keys_RNk: Tensor) -> Tensor:
    """For each candidate the first of the run of equal ones that it is in, (R, N)."""
    is_same_RN = F.pad((keys_RNk[:, 1:] == keys_RNk[:, :-1]).all(-1), (1, 0))
    return arange(is_same_RN.shape[1], is_same_RN.device).masked_fill(is_same_RN, 0).cummax(-1).values


# What a step chose from


class CandidateScores(NamedTuple):
    """The candidates of one step, of each row the one with most weight first; rows are filled up to the largest D.

    Args:
        patches (`(B, D, K)`): ids of the distinct patches among the draws; −1 where a row has no more.
        counts (`(B, D)`): how often each was drawn; their sum is the number of draws, 0 in a row that has ended. The
            exact algorithm draws in blocks, whose sizes are the batch's and change no text.
        weights (`(B, D)`): the batch rule's estimate of P(patch)^(1/T)/Z after truncation, by which the method
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


def candidate_scores(
    pool: CandidateBatch, index_B: Tensor, weigh: Weigh, is_exact_B: Tensor | None = None
) -> CandidateScores:
    """
    Args:
        pool: one that decodes its candidates in full, so no `LazyCandidateBatch`.
        index_B: the draw that was chosen.
        weigh: class ids and log factors (1, N) → the weight of each draw, all of it on the first of equal ones.
        is_exact_B: see `CandidateScores`; by default nowhere.
    """
    num_draws_B = torch.zeros_like(pool.rows_B)
    for rows_R, num_draws in pool.blocks:
        num_draws_B[rows_R] += num_draws
    drawn = zip(index_B.tolist(), num_draws_B.tolist(), strict=True)
    by_row = [_of_row(pool, row, index, num_draws, weigh) for row, (index, num_draws) in enumerate(drawn)]
    patches, counts, weights, chosen = (list(values) for values in zip(*by_row, strict=True))
    return CandidateScores(
        pad_sequence(patches, batch_first=True, padding_value=NO_TOKEN),
        pad_sequence(counts, batch_first=True),
        pad_sequence(weights, batch_first=True),
        torch.stack(chosen),
        torch.zeros_like(index_B, dtype=torch.bool) if is_exact_B is None else is_exact_B.to(index_B.device),
    )


def _of_row(pool: CandidateBatch, row: int, index: int, num_draws: int, weigh: Weigh) -> tuple[Tensor, ...]:
    tokens_NK = pool.tokens_BNK[row, :num_draws]
    first_1N = first_occurrences(tokens_NK[None])
    factors_BN = pool.processor_log_weights_BN
    factors_1N = None if factors_BN is None else factors_BN[row, None, :num_draws]
    weights_N = weigh(first_1N, processor_log_weights_BN=factors_1N)[0]
    first_D = (first_1N[0] == arange(num_draws, first_1N.device)).nonzero()[:, 0]
    first_D = first_D[weights_N[first_D].sort(descending=True, stable=True).indices]
    chosen = (first_D == first_1N[0, index]).nonzero()[0, 0]
    return tokens_NK[first_D], occurrence_counts(first_1N)[0, first_D], weights_N[first_D], chosen


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
