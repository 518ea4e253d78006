"""The sequences of one call of `generate`: how they grow and end, and logits processors on their candidate patches.

Stopping criteria that look at ids alone are evaluated on a whole patch at once, so that the host waits for the device
once per step; others, as the user's own or of time, after each token, as upstream does.

Upstream's logits processors act on the model's logits of the next token. CALM samples a latent vector, so processors
get the decoder's logits of its tokens, position by position, with the ids before. The most probable token that they
leave is taken, and the candidate's weight is multiplied by e^(that token's logit − the largest logit before
processing). So a candidate that satisfies the processors keeps its weight, one with a penalised token weighs less, and
one that was forced against the decoder's certainty next to nothing, unless a step has no others.

Axes: B batch, R rows that aren't finished, L tokens so far, K tokens per patch, k positions, C candidates of one row,
M of them whose sequence has not ended, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from .kernels_calm import arange, as_tensor

if TYPE_CHECKING:
    from .generation_calm_upstream import GenerateCall

TOKEN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)  # they look at ids alone
UPSTREAM, CALLS_BACK = "transformers.generation.logits_process", "_prefix_allowed_tokens_fn"
Processors = Callable[..., Tensor]  # ids (M, L), logits (M, V) float32 → logits (M, V)


class GenerationState:
    """Holds prompts and the tokens generated so far, and appends patches under the call's stopping criteria.

    Attributes:
        ids_BL: prompts and what was appended, with padding after a row's end.
        active_rows: numbers of the rows to be sampled: the unfinished ones. Once all are finished, all rows, as
            dummies for steps that other processes still take (`synced_gpus`).
    """

    def __init__(self, prompts_BL: Tensor, call: GenerateCall):
        self.ids_BL, self.call = prompts_BL, call
        self.is_finished, self.active_rows = False, list(range(len(prompts_BL)))
        self.criteria = call.stopping_criteria
        self.criteria_need_only_ids = set(map(type, self.criteria)) <= set(TOKEN_CRITERIA)

    def select(self, values_B: Tensor) -> Tensor:
        """Returns the active rows' values, (R, …)."""
        if len(self.active_rows) == len(values_B):
            return values_B
        return values_B[as_tensor(self.active_rows, values_B.device)]

    def append(self, patches_RK: Tensor) -> Tensor:
        """Appends a patch to each unfinished row, up to its end, and padding to the others.

        Takes patches of the active rows, or of all (B, K), and returns those of all, which the model reads next: zeros
        for rows that were not sampled.
        """
        patches_BK = patches_RK.to(self.ids_BL.device)
        if len(patches_BK) < len(self.ids_BL):
            index_R = as_tensor(self.active_rows, patches_BK.device)
            patches_BK = patches_BK.new_zeros(len(self.ids_BL), patches_BK.shape[1]).index_copy(0, index_R, patches_BK)
        if not self.is_finished:
            (self._append_patch if self.criteria_need_only_ids else self._append_token_by_token)(patches_BK)
        return patches_BK

    def _append_patch(self, patches_BK: Tensor) -> None:
        lengths, is_finished = self._lengths(patches_BK)
        num_tokens = max(lengths)  # upstream stops with the last row
        tokens_BK = patches_BK[:, :num_tokens]
        if self.call.pad_token is not None and min(lengths) < num_tokens:
            is_padding_BK = arange(num_tokens, tokens_BK.device) >= as_tensor(lengths, tokens_BK.device)[:, None]
            tokens_BK = torch.where(is_padding_BK, self.call.pad_token, tokens_BK)
        self.ids_BL = torch.cat([self.ids_BL, tokens_BK], dim=1)
        # Upstream's MaxLengthCriteria warns once of sequences longer than the model supports.
        for criterion in self.criteria:
            longest = getattr(criterion, "max_position_embeddings", None)
            if longest is not None and self.ids_BL.shape[1] > longest:
                criterion(self.ids_BL, None)
        if self.call.streamer is not None:
            for tokens_B in tokens_BK.cpu().unbind(1):
                self.call.streamer.put(tokens_B)
        self._finish_rows(is_finished)

    def _lengths(self, patches_BK: Tensor) -> tuple[list[int], list[bool]]:
        """Returns how many of the patch's tokens each row takes, and whether it ends with the last of them."""
        patch_size, max_tokens, is_end_BK = patches_BK.shape[1], math.inf, None
        for criterion in self.criteria:
            if isinstance(criterion, MaxLengthCriteria):  # upstream writes one token at least
                max_tokens = min(max_tokens, max(criterion.max_length - self.ids_BL.shape[1], 1))
                continue
            ends_BK = self._ends(criterion, patches_BK)
            is_end_BK = ends_BK if is_end_BK is None else is_end_BK | ends_BK
        lengths, is_finished = [0] * len(patches_BK), [True] * len(patches_BK)
        ends = [[]] * len(patches_BK) if is_end_BK is None else is_end_BK.tolist()
        for row in self.active_rows:
            end = min(ends[row].index(True) + 1 if True in ends[row] else math.inf, max_tokens)
            lengths[row], is_finished[row] = int(min(end, patch_size)), end <= patch_size
        return lengths, is_finished

    def _ends(self, criterion: Any, patches_BK: Tensor) -> Tensor:
        """Returns whether the sequence would end with each of a patch's tokens, (B, K)."""
        if isinstance(criterion, EosTokenCriteria):  # looks at the last token of its rows
            return criterion(patches_BK.reshape(-1, 1), None).view(patches_BK.shape)  # pyright: ignore (LongTensor)
        ids, length = torch.cat([self.ids_BL, patches_BK], dim=1), self.ids_BL.shape[1]
        ends = [criterion(ids[:, : length + k + 1], None).to(ids.device) for k in range(patches_BK.shape[1])]
        return torch.stack(ends, dim=1)

    def _append_token_by_token(self, patches_BK: Tensor) -> None:
        for tokens_B in patches_BK.unbind(1):
            if self.call.pad_token is not None and len(self.active_rows) < len(self.ids_BL):
                index_R = as_tensor(self.active_rows, tokens_B.device)
                tokens_B = self.call.pad_token.expand_as(tokens_B).index_copy(0, index_R, tokens_B[index_R])
            self.ids_BL = torch.cat([self.ids_BL, tokens_B[:, None]], dim=1)
            if self.call.streamer is not None:
                self.call.streamer.put(tokens_B.cpu())
            self._finish_rows(self.criteria(self.ids_BL, None).tolist())
            if self.is_finished:
                break

    def _finish_rows(self, is_finished: list[bool]) -> None:
        """Keeps the other rows active, or all rows once all are finished."""
        active_rows = [row for row in self.active_rows if not is_finished[row]]
        self.is_finished = not active_rows
        self.active_rows = active_rows or list(range(len(self.ids_BL)))


@dataclass
class CandidateProcessors:
    """Applies logits processors to the decoder's logits of candidates, for rows that are sampled together.

    A processor must be a function of the ids and logits that it is given: it is called on many candidates at once, and
    on the same ids more than once.

    Args:
        processors_R: of each row, upstream's `LogitsProcessorList` or any such function.
        ids_R: of each row the ids (L,) so far, without padding.
        eos_tokens (`(E,)`, *optional*): after one of these a candidate has ended, and no processor is called.
        num_left (*optional*): the number of tokens after which all sequences end.
    """

    processors_R: list[Processors]
    ids_R: list[Tensor]
    eos_tokens: Tensor | None = None
    num_left: int | None = None

    def decode(self, row: int, logits_CKV: Tensor) -> tuple[Tensor, Tensor]:
        """Decodes candidates of the row-th row, from float32 logits, under its processors.

        Returns the patches (C, K) and the log of the factor on each one's weight (C,), 0 where no processor acts and
        NaN where the processors leave no token.
        """
        ids_L, device = self.ids_R[row].to(logits_CKV.device), logits_CKV.device
        eos_E = ids_L[:0] if self.eos_tokens is None else self.eos_tokens.to(device)
        patches_Ck, log_weights_C = ids_L.new_empty(len(logits_CKV), 0), torch.zeros(len(logits_CKV), device=device)
        for logits_CV in logits_CKV[:, : self.num_left].unbind(1):
            tokens_C = logits_CV.argmax(-1)  # the first of equal ones, as without processors
            before_C = logits_CV.gather(1, tokens_C[:, None])[:, 0]
            is_open_C = ~(torch.isin(patches_Ck, eos_E).any(-1) | log_weights_C.isnan())
            index_M = is_open_C.nonzero()[:, 0] if self.selects(row, device) else arange(len(tokens_C), device)
            if len(index_M):
                ids_ML = torch.cat([ids_L.expand(len(index_M), -1), patches_Ck[index_M]], dim=-1)
                after_MV, logits_MV = self.processors_R[row](ids_ML, logits_CV[index_M]), logits_CV[index_M]
                after_MV = torch.where(is_open_C[index_M, None], after_MV, logits_MV)
                after_MV = after_MV.masked_fill(logits_MV == -torch.inf, -torch.inf)  # some make NaN of it
                tokens_M1 = after_MV.argmax(-1, keepdim=True)
                after_M, tokens_C[index_M] = after_MV.gather(1, tokens_M1)[:, 0], tokens_M1[:, 0]
                # A forced token may have any logit.
                is_forced_M = (after_MV > -torch.inf).sum(-1) == 1
                own_M = logits_MV.gather(1, tokens_M1)[:, 0]
                change_M = torch.where(is_forced_M, own_M, after_M) - before_C[index_M]
                log_weights_C[index_M] += change_M.nan_to_num().masked_fill(after_M == -torch.inf, torch.nan)
            patches_Ck = torch.cat([patches_Ck, tokens_C[:, None]], dim=1)
        return torch.cat([patches_Ck, logits_CKV[:, patches_Ck.shape[1] :].argmax(-1)], dim=1), log_weights_C

    def selects(self, row: int, device: torch.device) -> bool:
        """Whether the host waits to leave out candidates that are alike or have ended: on a GPU not for upstream's."""
        given: Any = self.processors_R[row]
        given = given if isinstance(given, list) else [None]
        is_own = [type(each).__module__ == UPSTREAM and not hasattr(each, CALLS_BACK) for each in given]
        return device.type == "cpu" or not all(is_own)


class SequenceProcessors:
    """Makes the logits processors of each row of a call, for its own prompt without padding.

    They never see padding and count lengths from the row's own prompt: what a row may generate doesn't depend on the
    rows beside it.

    Args:
        call: makes the processors; an empty prompt begins with its `bos_token`.
        prompts_BL, mask_BL: prompts, padded anywhere, and where a token is the prompt's own.
    """

    def __init__(self, call: GenerateCall, prompts_BL: Tensor, mask_BL: Tensor | None):
        make_processors, bos_token = call.processors, call.bos_token
        assert make_processors is not None
        mask_BL = torch.ones_like(prompts_BL) if mask_BL is None else mask_BL
        own_B = [ids_L[mask_L.bool()] for ids_L, mask_L in zip(prompts_BL, mask_BL, strict=True)]
        self.prompts_B = [ids_L if len(ids_L) or bos_token is None else bos_token.reshape(1) for ids_L in own_B]
        self.processors_B = [make_processors(row, len(ids_L)) for row, ids_L in enumerate(self.prompts_B)]
        self.prompt_length, self.eos_tokens = prompts_BL.shape[1], call.eos_tokens

    def for_rows(self, rows: Sequence[int], ids_BL: Tensor, num_left: int) -> CandidateProcessors:
        """Returns the processors of these rows, given the ids of all rows so far and how many tokens may follow."""
        ids_R = [torch.cat([self.prompts_B[row], ids_BL[row, self.prompt_length :]]) for row in rows]
        return CandidateProcessors([self.processors_B[row] for row in rows], ids_R, self.eos_tokens, num_left)
