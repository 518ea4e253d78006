"""The texts of one call of `generate`: they grow by a patch a step, until their stopping criteria end them.

A rule that looks at ids alone is asked about a whole patch at once, so that the host waits for the device once a step.
A rule of the user's own, or of time, is asked after each token, as upstream does. Axes: B batch, L tokens so far, K
tokens of a patch, R rows that aren't finished.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from .kernels_calm import arange, as_tensor

if TYPE_CHECKING:
    from .generation_calm_upstream import GenerateCall

TOKEN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)


class GenerationState:
    """Prompts and what was written after them, row by row.

    Args:
        prompts_BL: ids where the texts begin.
        call: whose stopping criteria, padding and streamer are used.

    Attributes:
        ids_BL: prompts and what was appended; after a row's end there is padding.
        drawing: numbers of the rows that are to be drawn, on the host: of those that aren't finished, or of all once
            all are, for then this process only keeps up with others.
    """

    def __init__(self, prompts_BL: Tensor, call: GenerateCall):
        self.ids_BL, self.call = prompts_BL, call
        self.is_finished = False
        self.drawing = list(range(len(prompts_BL)))
        criteria: Any = call.stopping_criteria
        self.is_asked_by_patch = isinstance(criteria, list) and all(type(rule) in TOKEN_CRITERIA for rule in criteria)
        self.rules: list[Any] = list(criteria) if self.is_asked_by_patch else []

    @property
    def length(self) -> int:
        return self.ids_BL.shape[1]

    def rows(self, values_B: Tensor) -> Tensor:
        """Of values by row those of the rows that are drawn."""
        if len(self.drawing) == len(values_B):
            return values_B
        return values_B[as_tensor(self.drawing, values_B.device)]

    def append(self, patches_RK: Tensor) -> Tensor:
        """Appends a patch to each row that isn't finished, up to its end, and to the others padding.

        Args:
            patches_RK: of the rows `drawing`, or of all.

        Returns:
            The patches of all rows (B, K), as the model is to read them: zeros for rows that were not drawn.
        """
        patches_BK = patches_RK.to(self.ids_BL.device)
        if len(patches_BK) < len(self.ids_BL):
            index_R = as_tensor(self.drawing, patches_BK.device)
            patches_BK = patches_BK.new_zeros(len(self.ids_BL), patches_BK.shape[1]).index_copy(0, index_R, patches_BK)
        if not self.is_finished:
            (self._append_at_once if self.is_asked_by_patch else self._append_one_by_one)(patches_BK)
        return patches_BK

    def _append_at_once(self, patches_BK: Tensor) -> None:
        num_rows, patch_size = patches_BK.shape
        is_open = set(self.drawing)
        last = self._last_tokens(patches_BK)
        num_tokens = max(min(last[row] + 1, patch_size) for row in is_open)  # upstream stops with the last row
        tokens_BK = patches_BK[:, :num_tokens]
        lengths = [min(last[row] + 1, num_tokens) if row in is_open else 0 for row in range(num_rows)]
        if self.call.pad_token is not None and min(lengths) < num_tokens:
            lengths_B = as_tensor(lengths, tokens_BK.device)
            is_padding_BK = arange(num_tokens, tokens_BK.device) >= lengths_B[:, None]
            tokens_BK = torch.where(is_padding_BK, self.call.pad_token, tokens_BK)
        self.ids_BL = torch.cat([self.ids_BL, tokens_BK], dim=1)
        self._warn_of_length()
        if self.call.streamer is not None:
            for tokens_B in tokens_BK.cpu().unbind(1):
                self.call.streamer.put(tokens_B)
        self._go_on_with([row for row in self.drawing if last[row] == patch_size])

    def _last_tokens(self, patches_BK: Tensor) -> list[int]:
        """Of each row the place in the patch of its last token, K where it goes on."""
        num_rows, room = patches_BK.shape
        is_end_BK = None
        for rule in self.rules:
            if isinstance(rule, MaxLengthCriteria):
                # Asked by its length alone; at least one token is written, as upstream does.
                room = min(room, max(rule.max_length - self.length - 1, 0))
                continue
            by_rule_BK = self._ends(rule, patches_BK)
            is_end_BK = by_rule_BK if is_end_BK is None else is_end_BK | by_rule_BK
        if is_end_BK is None:
            return [room] * num_rows
        return [ends_K[:room].index(True) if any(ends_K[:room]) else room for ends_K in is_end_BK.tolist()]

    def _warn_of_length(self) -> None:
        """A rule of length warns, once it is asked, of texts longer than the model takes."""
        for rule in self.rules:
            longest = getattr(rule, "max_position_embeddings", None)
            if longest is not None and self.length > longest:
                rule(self.ids_BL, None)

    def _ends(self, rule: Any, patches_BK: Tensor) -> Tensor:
        """Whether the text would end with each of a patch's tokens, (B, K)."""
        if isinstance(rule, EosTokenCriteria):  # looks at the last token of its rows
            last_token = patches_BK.reshape(-1, 1)
            return rule(last_token, None).view(patches_BK.shape)  # pyright: ignore[reportArgumentType] (LongTensor)
        ids = torch.cat([self.ids_BL, patches_BK], dim=1)
        ends = [rule(ids[:, : self.length + k + 1], None).to(ids.device) for k in range(patches_BK.shape[1])]
        return torch.stack(ends, dim=1)

    def _append_one_by_one(self, patches_BK: Tensor) -> None:
        for tokens_B in patches_BK.unbind(1):
            if self.call.pad_token is not None and len(self.drawing) < len(self.ids_BL):
                index_R = as_tensor(self.drawing, tokens_B.device)
                tokens_B = self.call.pad_token.expand_as(tokens_B).index_copy(0, index_R, tokens_B[index_R])
            self.ids_BL = torch.cat([self.ids_BL, tokens_B[:, None]], dim=1)
            if self.call.streamer is not None:
                self.call.streamer.put(tokens_B.cpu())
            ends = self.call.stopping_criteria(self.ids_BL, None).tolist()
            self._go_on_with([row for row in self.drawing if not ends[row]])
            if self.is_finished:
                break

    def _go_on_with(self, open_rows: list[int]) -> None:
        self.is_finished = not open_rows
        self.drawing = open_rows or list(range(len(self.ids_BL)))
