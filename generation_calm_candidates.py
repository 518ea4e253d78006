"""The candidate patches of one generation step: sampled as latent vectors, decoded no further than needed.

The sampling methods ask only which candidates of a row are the same patch. A candidate whose token at one position no
other has is unique, and its other tokens matter only if it is chosen. So `LazyCandidateBatch` decodes position by
position, and only candidates of the pairs that are compared; `CandidateBatch` decodes every token of every candidate
at once, and is what the lazy one is tested against.

Axes: B rows of the step, R of these that still draw, N candidates of a row so far, n new ones, D hidden size or number
of distinct patches, K tokens per patch, k some of these, Z latent size, d width of the decoder, V vocabulary, C
candidates of a chunk, M tokens to read, U candidates that they belong to, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .generation_calm_algorithms import NO_TRUNCATION, Pairs, Truncation, first_occurrences, occurrence_counts
from .generation_calm_samplers import StepRandomness
from .generation_calm_sequences import CandidateProcessors
from .heads_calm import GenerativeHead
from .kernels_calm import arange, cpu_kernels
from .modeling_calm_autoencoder import CALMAutoencoder, logits_chunk_size

FEW_TOKENS = 96  # up to here all positions are decoded at once: a pass over the vocabulary costs as much as 25 tokens
TOKENS_CHUNK_SIZE = 1000  # what the decoder's layers hold doesn't grow with N
MAX_LOG_WEIGHT_GAP = 10.0  # nats: candidates that processors make so much lighter than a row's heaviest are dropped
NO_TOKEN = -1  # id of a token that isn't decoded yet, or isn't there


class CandidateBatch:
    """Samples candidates of each row's next patch, decoded in full (`Candidates` in generation_calm_samplers.py).

    Where a method takes `rows_R`, the object `rows_B` itself stands for all rows, which saves an index.

    Args:
        head: samples latent vectors, or the tokens themselves.
        hidden_BD: the rows' last hidden states.
        randomness: of the step.
        autoencoder: decodes latent vectors.
        forbidden_KV (`(K, V)` bool, *optional*): tokens that are forbidden at a position.
        processors (*optional*): the logits processors of these rows.
        temperature: at which the head samples; 0 is the most probable patch, where the head knows it.
        proposal (*optional*): of a head that samples tokens: which ones it proposes, to be accepted or not.
    """

    def __init__(
        self,
        head: GenerativeHead,
        hidden_BD: Tensor,
        randomness: StepRandomness,
        autoencoder: CALMAutoencoder,
        forbidden_KV: Tensor | None = None,
        processors: CandidateProcessors | None = None,
        temperature: float = 1.0,
        proposal: Truncation | None = None,
    ):
        self.head, self.hidden_BD, self.randomness, self.autoencoder = head, hidden_BD, randomness, autoencoder
        self.forbidden_KV, self.processors, self.proposal = forbidden_KV, processors, proposal
        self.temperature = temperature
        self.rows_B = arange(len(hidden_BD), hidden_BD.device)
        self.has_processors = processors is not None
        self.log_factors_BN: Tensor | None = None
        self.blocks: list[tuple[Tensor, int]] = []  # which rows drew, and how many samples each
        self.num_drawn = 0
        self.tokens_BNK: Any = None  # a tensor from the first `extend` on
        self._compared: tuple[Tensor, Tensor] | None = None  # rows, and the indices of all their samples

    def extend(self, rows_R: Tensor, num_samples: int) -> None:
        noise = self.randomness.noise_arguments(self.head, self.hidden_BD, rows_R, num_samples)
        context_RD = self._select(rows_R, self.hidden_BD)
        samples_tokens, log_factors_nR = self.head.samples_tokens, None  # by few rows: samples share beginnings
        with cpu_kernels(len(context_RD) * (1 if samples_tokens else num_samples), context_RD.shape[-1]):
            if samples_tokens:
                arguments = num_samples, self.temperature, self.proposal or NO_TRUNCATION, self.forbidden_KV
                samples_nR, log_acceptance_nR = self.head.propose(context_RD, *arguments, **noise)
                tokens_nRK, log_factors_nR = samples_nR, None if self.proposal is None else log_acceptance_nR
            else:
                samples_nR = self.head.sample(context_RD, num_samples, temperature=self.temperature, **noise)
                tokens_nRK = self._decode_new(rows_R, samples_nR)
        if self.processors is not None:
            log_acceptance = [None] * len(rows_R) if log_factors_nR is None else log_factors_nR.unbind(1)
            by_row = zip(range(len(rows_R)), samples_nR.unbind(1), tokens_nRK.unbind(1), log_acceptance, strict=True)
            processed = [self._process(*each) for each in by_row]
            tokens_nRK, log_factors_nR = (torch.stack(parts, dim=1) for parts in zip(*processed, strict=True))
            if True in (has_none_left := log_factors_nR.isnan().any(0).tolist()):  # the host waits once for all rows
                length = len(self.processors.ids_R[has_none_left.index(True)])
                raise ValueError(
                    f"The logits processors leave no token to write after a text of {length} tokens: loosen one of "
                    "bad_words_ids, suppress_tokens, prefix_allowed_tokens_fn or your own."
                )
        self.tokens_BNK = self._append(self.tokens_BNK, rows_R, tokens_nRK)
        if log_factors_nR is not None:
            self.log_factors_BN = self._append(self.log_factors_BN, rows_R, log_factors_nR)
        self.blocks.append((rows_R, len(samples_nR)))
        self.num_drawn += len(samples_nR)
        self._compared = None

    def _decode_new(self, rows_R: Tensor, latents_nRZ: Tensor) -> Tensor:
        """Returns the tokens (n, R, K) of new candidates."""
        with cpu_kernels(latents_nRZ[..., 0].numel(), self.autoencoder.config.hidden_size):
            return self.autoencoder.decode_tokens(latents_nRZ, self.forbidden_KV).to(rows_R.device)

    def _process(
        self, row: int, samples_n: Tensor, tokens_nK: Tensor, log_acceptance_n: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Decodes one row's distinct new candidates under its processors: tokens (n, K) and log factors (n,)."""
        config, device, processors = self.autoencoder.config, samples_n.device, self.processors
        assert processors is not None
        all_n, first_n = arange(len(samples_n), tokens_nK.device), first_occurrences(tokens_nK[None])[0]
        selects = processors.selects(row, device)
        first_C, inverse_n = first_n.unique(return_inverse=True) if selects else (all_n, first_n)
        chunk_size = max(1, logits_chunk_size(device) // (config.patch_size * config.vocab_size))
        chunks = samples_n[first_C.to(device)].split(chunk_size)
        decoded = [processors.decode(row, self._logits(samples_c)) for samples_c in chunks]
        patches_CK, log_weights_C = (torch.cat(parts).to(tokens_nK.device) for parts in zip(*decoded, strict=True))
        patches_nK, log_weights_n = patches_CK[inverse_n], log_weights_C[inverse_n]
        if self.temperature != 1:  # the target's factor is f^(1/T), of which this is not yet taken
            log_weights_n = log_weights_n / self.temperature
        if log_acceptance_n is not None:
            log_weights_n = log_weights_n + log_acceptance_n
        # Candidates that are the same patch now weigh what they weigh on average.
        first_n = first_occurrences(patches_nK[None])[0]
        largest = log_weights_n.amax()
        sums_n = torch.zeros_like(log_weights_n).scatter_add(0, first_n, (log_weights_n - largest).exp())
        means_n = (sums_n[first_n] / occurrence_counts(first_n[None])[0]).log()
        return patches_nK, means_n.masked_fill(means_n < means_n.amax() - MAX_LOG_WEIGHT_GAP, -torch.inf)

    def _logits(self, samples_C: Tensor) -> Tensor:
        """Returns the decoder's logits (C, K, V) of latent vectors or tokens, float32, −inf for forbidden tokens."""
        is_tokens = self.head.samples_tokens
        latents_CZ = self.autoencoder.encode(samples_C.reshape(1, -1))[0][0] if is_tokens else samples_C
        logits_CKV = self.autoencoder.decode(latents_CZ).float()
        if self.forbidden_KV is None:
            return logits_CKV
        return logits_CKV.masked_fill(self.forbidden_KV.to(logits_CKV.device), -torch.inf)

    def _append(self, old_BN: Tensor | None, rows_R: Tensor, new_nR: Tensor) -> Tensor:
        """Appends new candidates' values to those of all candidates so far, with zeros in rows that don't draw."""
        new_Rn = new_nR.transpose(0, 1)
        if rows_R is self.rows_B:
            new_Bn = new_Rn
        else:
            new_Bn = new_Rn.new_zeros(len(self.rows_B), *new_Rn.shape[1:])
            new_Bn[rows_R.to(new_Bn.device)] = new_Rn
        return new_Bn if old_BN is None else torch.cat([old_BN, new_Bn], dim=1)

    def _select(self, rows_R: Tensor, values_B: Tensor) -> Tensor:
        return values_B if rows_R is self.rows_B else values_B[rows_R.to(values_B.device)]

    def compare(self, rows_R: Tensor, pairs: Pairs = "all", noise_RN: Tensor | None = None) -> Tensor:
        if self._compared is None or self._compared[0] is not rows_R:
            self._compared = rows_R, first_occurrences(self._select(rows_R, self.tokens_BNK))
        return self._compared[1]

    def decode_chosen(self, rows_R: Tensor, index_R: Tensor) -> Tensor:
        """Returns the patch of one candidate of each of these rows, (R, K), here decoded already."""
        if self.num_drawn == 1:  # T = 1: there is nothing to choose
            return self._select(rows_R, self.tokens_BNK)[:, 0]
        return self.tokens_BNK[rows_R, index_R]


class LazyCandidateBatch(CandidateBatch):
    """Decodes only what `compare` and `decode_chosen` need, and when they need it; takes no processors."""

    latents_BNZ: Any = None  # a tensor from the first `extend` on

    def _decode_new(self, rows_R: Tensor, latents_nRZ: Tensor) -> Tensor:
        patch_size = self.autoencoder.config.patch_size
        self.latents_BNZ = self._append(self.latents_BNZ, rows_R, latents_nRZ)
        return torch.full((*latents_nRZ.shape[:2], patch_size), NO_TOKEN, device=rows_R.device)

    def compare(self, rows_R: Tensor, pairs: Pairs = "all", noise_RN: Tensor | None = None) -> Tensor:
        """Refines groups of candidates that may be equal, token by token: with K = 2 the last tokens of all candidates
        are decoded, then the first tokens of those whose last token another candidate of the group has.
        """
        index_N = arange(self.num_drawn, rows_R.device)
        # A group's candidates share an index: pairs 2i, 2i + 1, or at first all of a row.
        first_RN = (index_N - index_N % 2 if pairs == "disjoint" else index_N * 0).expand(len(rows_R), -1)
        # The candidate of least noise is decoded in the same matmul with the vocabulary as the others' first tokens.
        needed_RNK = self._patch_mask(rows_R, None if noise_RN is None else noise_RN.argmin(-1))
        positions = list(range(needed_RNK.shape[-1]))
        while positions:
            may_have_duplicate_RN1 = (occurrence_counts(first_RN) > 1)[..., None]
            # The last token is the one that most often tells patches apart: the context says least about it.
            is_few = may_have_duplicate_RN1.sum() * len(positions) <= FEW_TOKENS
            decoded = positions if is_few else positions[-1:]
            positions = positions[: -len(decoded)]
            needed_RNK[..., decoded] |= may_have_duplicate_RN1
            self._decode(rows_R, needed_RNK)
            # Unknown tokens belong to candidates that are alone in their group already.
            tokens_RNk = self._select(rows_R, self.tokens_BNK)[..., decoded].clamp(min=0)
            keys_RNk = torch.cat([first_RN[..., None], tokens_RNk], dim=-1)
            first_RN = first_occurrences(keys_RNk) if pairs == "all" else _run_starts(keys_RNk)
        return first_RN

    def decode_chosen(self, rows_R: Tensor, index_R: Tensor) -> Tensor:
        self._decode(rows_R, self._patch_mask(rows_R, index_R))
        return super().decode_chosen(rows_R, index_R)

    def _patch_mask(self, rows_R: Tensor, index_R: Tensor | None) -> Tensor:
        """Returns a mask of all tokens of one candidate of each row, or of none, (R, N, K)."""
        shape = len(rows_R), self.num_drawn, self.autoencoder.config.patch_size
        mask_RNK = torch.zeros(shape, dtype=torch.bool, device=rows_R.device)
        if index_R is not None:
            mask_RNK[arange(len(rows_R), rows_R.device), index_R] = True
        return mask_RNK

    def _decode(self, rows_R: Tensor, needed_RNK: Tensor) -> None:
        """Decodes those of the needed tokens that are unknown."""
        is_unknown_RNK = self._select(rows_R, self.tokens_BNK) == NO_TOKEN
        row, candidate, position = (needed_RNK & is_unknown_RNK).nonzero().unbind(-1)
        row = row if rows_R is self.rows_B else rows_R[row]
        for start in range(0, len(row), TOKENS_CHUNK_SIZE):
            chunk = slice(start, start + TOKENS_CHUNK_SIZE)
            index = row[chunk], candidate[chunk], position[chunk]
            self.tokens_BNK[index] = self.decode_at(*index)

    def decode_at(self, rows_M: Tensor, candidates_M: Tensor, positions_M: Tensor) -> Tensor:
        """Returns the ids (M,) of tokens, each given by its row, the index of its candidate and its position."""
        candidate_U, inverse_M = (rows_M * self.num_drawn + candidates_M).unique(return_inverse=True)
        latents_UZ = self.latents_BNZ.flatten(0, 1)[candidate_U.to(self.latents_BNZ.device)]
        decoder = self.autoencoder.decoder
        # `cpu_kernels` also lets the argmax over the vocabulary compute in int8 first, if that is faster here.
        with cpu_kernels(len(latents_UZ), self.autoencoder.config.hidden_size):
            states_UKd = decoder.expand(latents_UZ)
            states_Md = states_UKd[inverse_M.to(states_UKd.device), positions_M.to(states_UKd.device)]
            return decoder.most_probable_tokens(states_Md, positions_M, self.forbidden_KV).to(rows_M.device)


def _run_starts(keys_RNk: Tensor) -> Tensor:
    """Returns for each candidate the start of the run of equal ones that it is in, (R, N)."""
    is_same_RN = F.pad((keys_RNk[:, 1:] == keys_RNk[:, :-1]).all(-1), (1, 0))
    return arange(is_same_RN.shape[1], is_same_RN.device).masked_fill(is_same_RN, 0).cummax(-1).values


# What a step chose, and from what


class PatchSample(NamedTuple):
    """The patches that one step chose.

    Args:
        patches (`(R, K)`): token ids.
        is_exact: whether they are exact samples of P(patch)^(1/T)/Z; one value for all rows or (R,).
        candidates, index: what they were chosen from, and which; None after a compiled step.
        outputs: the model's, on which the step is based; None after a compiled step.
    """

    patches: Tensor
    is_exact: Tensor | bool
    candidates: CandidateBatch | None = None
    index: Tensor | None = None
    outputs: Any = None


class CandidateScores(NamedTuple):
    """The candidates that one step chose from, each row's by descending weight; rows are padded to the largest D.

    Args:
        patches (`(B, D, K)`): ids of the distinct patches among the samples; −1 where a row has no more.
        counts (`(B, D)`): how often each was drawn; 0 in a row that has ended. Their sum is the number of samples:
            with the exact algorithm it depends on the batch, which changes no text.
        weights (`(B, D)`): the batch rule's estimate of P(patch)^(1/T)/Z after truncation, by which the method
            chooses or, where Algorithm 1 accepted an attempt, would have. Without do_sample: counts ÷ samples.
        chosen (`(B,)`): the index of the patch that was written; −1 in a row that has ended.
        is_exact (`(B,)`): whether it is a sample of P(patch)^(1/T)/Z: Algorithm 1 accepted an attempt, or T = 1
            without truncation and processors. False in a row that has ended.
    """

    patches: Tensor
    counts: Tensor
    weights: Tensor
    chosen: Tensor
    is_exact: Tensor

    def in_rows(self, rows: Sequence[int], num_rows: int) -> CandidateScores:
        """Returns the scores of a batch of `num_rows`, in which these are those of `rows`."""
        if len(rows) == num_rows:
            return self
        empty = CandidateScores(*(values[:1].new_full((num_rows, *values.shape[1:]), NO_TOKEN) for values in self))
        for values in (empty.counts, empty.weights, empty.is_exact):
            values.zero_()
        for whole, values in zip(empty, self, strict=True):
            whole[list(rows)] = values
        return empty


def candidate_scores(
    candidates: CandidateBatch, index_B: Tensor, weights: Callable[..., Tensor], is_exact: Tensor | bool = False
) -> CandidateScores:
    """Returns what a step chose `index_B` from, given candidates that are decoded in full, so no `LazyCandidateBatch`.

    `weights` is a function as `PatchSampling.weights`; `is_exact` is one value for all rows or (B,).
    """
    num_samples_B = torch.zeros_like(candidates.rows_B)
    for rows_R, num_samples in candidates.blocks:
        num_samples_B[rows_R] += num_samples
    drawn = zip(index_B.tolist(), num_samples_B.tolist(), strict=True)
    by_row = [_scores_of_row(candidates, row, *each, weights) for row, each in enumerate(drawn)]
    patches, counts, weights_BD, chosen = (list(values) for values in zip(*by_row, strict=True))
    return CandidateScores(
        pad_sequence(patches, batch_first=True, padding_value=NO_TOKEN),
        pad_sequence(counts, batch_first=True),
        pad_sequence(weights_BD, batch_first=True),
        torch.stack(chosen),
        torch.as_tensor(is_exact, device=index_B.device).expand_as(index_B).clone(),
    )


def _scores_of_row(
    candidates: CandidateBatch, row: int, index: int, num_samples: int, weights: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    tokens_NK, log_factors_BN = candidates.tokens_BNK[row, :num_samples], candidates.log_factors_BN
    first_1N = first_occurrences(tokens_NK[None])
    weights_N = weights(first_1N, None if log_factors_BN is None else log_factors_BN[row, None, :num_samples])[0]
    first_D = (first_1N[0] == arange(num_samples, first_1N.device)).nonzero()[:, 0]
    first_D = first_D[weights_N[first_D].sort(descending=True, stable=True).indices]
    chosen = (first_D == first_1N[0, index]).nonzero()[0, 0]
    return tokens_NK[first_D], occurrence_counts(first_1N)[0, first_D], weights_N[first_D], chosen


def compute_patch_scores(scores: Sequence[CandidateScores]) -> Tensor:
    """Returns the natural logarithm of the chosen patches' weights, (B, S); 0 for rows that have ended, as upstream.

    This takes the place of `compute_transition_scores`, with one value per patch. It is an estimate from the samples:
    without do_sample the log of the patch's fraction of them, and 0 at T = 1, where one patch is drawn and taken.
    Raises ValueError unless `scores` are those of the S >= 1 steps, as `generate` returns them.
    """
    if not isinstance(scores, list | tuple) or not scores or not all(hasattr(step, "chosen") for step in scores):
        raise ValueError(
            "compute_patch_scores() takes outputs.scores of generate(..., return_dict_in_generate=True, "
            "output_scores=True)."
        )
    chosen_BS = torch.stack([step.chosen for step in scores], dim=1)
    weights_BS = torch.stack([step.weights.gather(1, step.chosen.clamp(min=0)[:, None])[:, 0] for step in scores], 1)
    return weights_BS.log().masked_fill(chosen_BS < 0, 0)
