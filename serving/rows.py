"""One text that is asked for: what it is to be, how far it is, and what comes of it.

Axes: P patches of the prompt, L tokens of it, K tokens per patch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from calm.generation_calm import PatchSampling
from calm.serving.text import TextAssembler
from calm.token_rules_calm import Processors

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Written:
    """A finished text.

    Args:
        tokens: the new ones, the EOS that ended it included.
        text: of them, without special tokens and without a stop string and what follows; `None` without a tokenizer.
        finish_reason: "stop" after an EOS or a stop string, "length" after `max_new_tokens`.
        num_prompt_tokens: of the prompt, after which it was written.
        seed: with which the same text comes again; `None` where a generator was given.
    """

    tokens: list[int]
    text: str | None
    finish_reason: FinishReason
    num_prompt_tokens: int
    seed: int | None


@dataclass(frozen=True)
class Piece:
    """What one step adds to a text: its tokens, and the text that they complete (`None` without a tokenizer)."""

    tokens: list[int]
    text: str | None


@dataclass(eq=False)
class Row:
    """A text that waits, or is being written."""

    prompt_PK: Tensor
    prompt_L: Tensor  # the same as ids, without what fills it up; BOS where it is empty
    num_prompt_tokens: int
    sampling: PatchSampling
    max_new_tokens: int
    min_new_tokens: int
    eos_tokens: frozenset[int]
    generator: torch.Generator
    seed: int | None = None
    processors: Processors | None = None
    assembler: TextAssembler | None = None
    on_piece: Callable[[Piece], None] | None = None
    future: Future[Written] = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)
    number: int = 0  # of arrival
    num_read: int = 0  # patches in the cache
    unread: list[int] | None = None  # the patch written last
    hidden_D: Tensor | None = None  # the context of the next patch

    @property
    def is_prompt_read(self) -> bool:
        return self.num_read >= len(self.prompt_PK)

    @property
    def num_eos_free(self) -> int:
        """How many of the next patch's tokens can't be EOS, at most K."""
        return min(max(self.min_new_tokens - len(self.tokens), 0), self.prompt_PK.shape[1])

    def take(self, patch: list[int]) -> FinishReason | None:
        """Adds a patch, up to the token at which the text ends, and tells `on_piece`; returns why it ends, if so."""
        num_before = len(self.tokens)
        reason = self._append(patch)
        text = None if self.assembler is None else self.assembler.take(is_last=reason is not None)
        if self.on_piece is not None:
            self.on_piece(Piece(self.tokens[num_before:], text))
        return reason

    def _append(self, patch: list[int]) -> FinishReason | None:
        for token in patch:
            self.tokens.append(token)
            if token in self.eos_tokens or (self.assembler is not None and self.assembler.push(token)):
                return "stop"
            if len(self.tokens) >= self.max_new_tokens:
                return "length"
        return None

    def written(self, reason: FinishReason) -> Written:
        text = None if self.assembler is None else self.assembler.text
        return Written(self.tokens, text, reason, self.num_prompt_tokens, self.seed)
