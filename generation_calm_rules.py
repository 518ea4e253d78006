"""Logits processors on the decoder's logits: what may stand at a position, given the text and the patch before it.

Upstream asks its processors once a token, with the text so far and the model's logits, and the law of the next token
is what they make of these. Here a latent vector is drawn, and the decoder's logits say which tokens it might be,
position after position. So processors see these, with the text and the patch before; the most probable token that
they leave stands there; and the vector weighs as much more or less as that token is more or less probable than the
one that stood there before them (e^(difference of the two logits)). A candidate that obeys the rules as it is keeps
its weight, one whose tokens a penalty touches weighs less, and one that had to be bent against the decoder's certainty
next to nothing, unless a step has no others.

Axes: R rows, L tokens of a row's text, C candidates of one row, k positions, K tokens per patch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Processors = Callable[..., Tensor]  # ids (M, L), logits (M, V) float32 → logits (M, V)


class CandidateProcessors:
    """The processors of rows that are written together, each with the text of its row.

    A processor must be a function of the ids and logits that it is given: it is asked about many candidates, which
    are its rows, and about the same text more than once.

    Args:
        processors_R: of each row, upstream's `LogitsProcessorList` or any such function.
        texts_R: of each row the ids (L,) so far, without padding.
        eos_tokens (`(E,)`, *optional*): after one of these a candidate's text has ended, and no rule is asked.
        num_left (*optional*): tokens after which all texts end.
    """

    def __init__(
        self,
        processors_R: list[Processors],
        texts_R: list[Tensor],
        eos_tokens: Tensor | None = None,
        num_left: int | None = None,
    ):
        self.processors_R, self.texts_R = processors_R, texts_R
        self.eos_tokens, self.num_left = eos_tokens, num_left

    def decode(self, row: int, logits_CKV: Tensor) -> tuple[Tensor, Tensor]:
        """The patches (C, K) of candidates of one row, and the logarithm of what each weighs (C,), 0 where it obeys.

        Args:
            row: its number among these rows.
            logits_CKV: of the decoder, float32.

        Raises:
            ValueError: the processors leave no token.
        """
        patches_Ck = torch.empty(len(logits_CKV), 0, dtype=torch.long, device=logits_CKV.device)
        factors_C = torch.zeros(len(logits_CKV), device=logits_CKV.device)
        for logits_CV in logits_CKV.unbind(1):
            tokens_C = logits_CV.argmax(-1)  # the first of equal ones, as without rules
            before_C = logits_CV.gather(1, tokens_C[:, None])[:, 0]
            index_M = self._going_on(patches_Ck).nonzero()[:, 0]
            if len(index_M):
                after_MV = self._ask(row, logits_CV[index_M], patches_Ck[index_M])
                tokens_M1 = after_MV.argmax(-1, keepdim=True)
                after_M, tokens_C[index_M] = after_MV.gather(1, tokens_M1)[:, 0], tokens_M1[:, 0]
                if bool((after_M == -torch.inf).any()):
                    raise ValueError(
                        "The logits processors leave no token to write after a text of "
                        f"{len(self.texts_R[row]) + patches_Ck.shape[1]} tokens: loosen one of bad_words_ids, "
                        "suppress_tokens, prefix_allowed_tokens_fn or your own."
                    )
                # A token that is forced may have been given any number.
                is_forced_M = (after_MV > -torch.inf).sum(-1) == 1
                own_M = logits_CV[index_M].gather(1, tokens_M1)[:, 0]
                change_M = torch.where(is_forced_M, own_M, after_M) - before_C[index_M]
                factors_C[index_M] += change_M.nan_to_num()
            patches_Ck = torch.cat([patches_Ck, tokens_C[:, None]], dim=1)
        return patches_Ck, factors_C

    def _going_on(self, before_Ck: Tensor) -> Tensor:
        """Which candidates' texts have not ended before a position, (C,) bool."""
        if self.num_left is not None and before_Ck.shape[1] >= self.num_left:
            return torch.zeros(len(before_Ck), dtype=torch.bool, device=before_Ck.device)
        if self.eos_tokens is None:
            return torch.ones(len(before_Ck), dtype=torch.bool, device=before_Ck.device)
        return ~torch.isin(before_Ck, self.eos_tokens.to(before_Ck.device)).any(-1)

    def _ask(self, row: int, logits_MV: Tensor, before_Mk: Tensor) -> Tensor:
        """What the row's processors make of logits (M, V) after these tokens of candidates."""
        text_L = self.texts_R[row].to(logits_MV.device)
        ids_ML = torch.cat([text_L.expand(len(before_Mk), -1), before_Mk.to(text_L.device)], dim=-1)
        after_MV = self.processors_R[row](ids_ML, logits_MV.clone())
        return after_MV.masked_fill(logits_MV == -torch.inf, -torch.inf)  # some make NaN of it


class SequenceProcessors:
    """The rules of the texts of one call of `generate`: each row has processors of its own, made for its own text.

    So a row's padding is no text to them, and lengths that they count from are the row's own: what a row may write
    doesn't depend on the rows beside it.

    Args:
        make_processors: the number of a row and the length of its prompt → its processors.
        prompts_BL, mask_BL: prompts, padded anywhere, and where a token is the prompt's own.
        bos_token, eos_tokens: ids; an empty prompt begins with the first.
    """

    def __init__(
        self,
        make_processors: Callable[[int, int], Processors],
        prompts_BL: Tensor,
        mask_BL: Tensor | None,
        bos_token: Tensor | None,
        eos_tokens: Tensor | None,
    ):
        mask_BL = torch.ones_like(prompts_BL) if mask_BL is None else mask_BL
        own_B = [ids_L[mask_L.bool()] for ids_L, mask_L in zip(prompts_BL, mask_BL, strict=True)]
        self.prompts_B = [ids_L if len(ids_L) or bos_token is None else bos_token.reshape(1) for ids_L in own_B]
        self.processors_B = [make_processors(row, len(ids_L)) for row, ids_L in enumerate(self.prompts_B)]
        self.prompt_length, self.eos_tokens = prompts_BL.shape[1], eos_tokens

    def of_rows(self, rows: Sequence[int], ids_BL: Tensor, num_left: int) -> CandidateProcessors:
        """Those of rows that go on, whose prompts and texts so far are `ids_BL`, with so many tokens left to write."""
        texts = [torch.cat([self.prompts_B[row], ids_BL[row, self.prompt_length :]]) for row in rows]
        return CandidateProcessors([self.processors_B[row] for row in rows], texts, self.eos_tokens, num_left)
