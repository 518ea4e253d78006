"""Logits processors on the decoder's logits: what may stand at a position, given the text and the patch before it.

Upstream asks its processors once a token, with the text so far and the model's logits. Here a candidate patch is
decoded in the same way, position after position, so that a rule about tokens holds within patches too. It acts on what
a latent vector says, after that was drawn: where the most probable token of a position is forbidden, the next one
stands there, and the positions after it are decoded as they would be anyway.

Axes: R rows, L tokens of a row's text, C candidates, M those of one row, k positions decoded so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Processors = Callable[..., Tensor]  # ids (M, L), logits (M, V) float32 → logits (M, V)


class TokenRules:
    """The processors of rows that are written together, each with the text of its row.

    A processor must be a function of the ids and logits that it is given: it is asked about many candidates, which
    are its rows, and about the same text more than once.

    Args:
        processors_R: of each row, upstream's `LogitsProcessorList` or any such function.
        texts_R: of each row the ids (L,) so far, without padding.
        eos_tokens (`(E,)`, *optional*): after one of these a candidate's text has ended, and no rule is asked.
    """

    def __init__(self, processors_R: list[Processors], texts_R: list[Tensor], eos_tokens: Tensor | None = None):
        self.processors_R, self.texts_R, self.eos_tokens = processors_R, texts_R, eos_tokens

    def choose(self, logits_CV: Tensor, rows_C: Tensor, before_Ck: Tensor) -> Tensor:
        """The tokens (C,) that stand next in candidates.

        Args:
            logits_CV: of the decoder.
            rows_C: the row of each candidate.
            before_Ck: its tokens at the positions before.

        Raises:
            ValueError: the processors leave no token.
        """
        ids_C = logits_CV.argmax(-1)
        is_open_C = torch.ones_like(ids_C, dtype=torch.bool)
        if self.eos_tokens is not None:
            is_open_C = ~torch.isin(before_Ck, self.eos_tokens.to(before_Ck.device)).any(-1)
        for row in rows_C.unique().tolist():
            index_M = ((rows_C == row) & is_open_C).nonzero()[:, 0]
            if len(index_M):
                ids_C[index_M] = self._choose_in_row(row, logits_CV[index_M], before_Ck[index_M])
        return ids_C

    def _choose_in_row(self, row: int, logits_MV: Tensor, before_Mk: Tensor) -> Tensor:
        text_L = self.texts_R[row].to(logits_MV.device)
        ids_ML = torch.cat([text_L.expand(len(before_Mk), -1), before_Mk.to(text_L.device)], dim=-1)
        best_M, ids_M = self.processors_R[row](ids_ML, logits_MV.float()).max(-1)
        if bool((best_M == -torch.inf).any()):
            raise ValueError(
                f"The logits processors leave no token to write after {ids_ML.shape[1]} tokens of row {row}: loosen "
                "one of bad_words_ids, suppress_tokens, prefix_allowed_tokens_fn or your own."
            )
        return ids_M


class RulesOfTexts:
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

    def of_rows(self, rows: Sequence[int], ids_BL: Tensor) -> TokenRules:
        """Those of rows that go on, whose prompts and texts so far are `ids_BL`."""
        texts = [torch.cat([self.prompts_B[row], ids_BL[row, self.prompt_length :]]) for row in rows]
        return TokenRules([self.processors_B[row] for row in rows], texts, self.eos_tokens)
