"""One text that is asked for: what it is to be, how far it is, and its tokens as text that can be shown.

Axes: P patches of the prompt, L tokens of it, K tokens per patch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calm_transformers.model.generation_calm_rules import Processors
from calm_transformers.model.generation_calm_samplers import PatchSampling

FinishReason = Literal["stop", "length"]
REPLACEMENT = "\ufffd"
LONGEST_STOP = 256  # characters
MOST_STOPS = 256
PROMPT_TOKENS = 256  # of a prompt's end, which is enough to decode what follows it


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


class TextAssembler:
    """Turns a row's tokens into whole characters, and nothing of a stop string.

    A completion's text is that of prompt and completion without the prompt's: a tokenizer that writes a space before
    every word, as SentencePiece does, leaves it out where a text begins, so tokens are decoded behind those before
    them. A stop string may begin in one token and end in another, so text that may be its beginning is held back until
    that is decided. The string itself is not part of the text.

    Args:
        tokenizer: a fast one, with the tokenizers library behind it.
        stop: strings that end the text.
        prompt: the ids before it.

    Raises:
        ValueError: an empty stop string, or a tokenizer without that library.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        if not all(stop):
            raise ValueError("stop: holds an empty string; every stop string needs a character at least.")
        if len(stop) > MOST_STOPS or max(map(len, stop), default=0) > LONGEST_STOP:
            raise ValueError(f"stop: may hold {MOST_STOPS} strings of {LONGEST_STOP} characters each, at most.")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: text is assembled by its library.")
        self.stop = tuple(stop)
        self._backend: Tokenizer = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self._beginnings = {string[:length] for string in stop for length in range(1, len(string))}
        self._longest_beginning = max(map(len, self._beginnings), default=0)
        self._known = list(prompt[-PROMPT_TOKENS:])  # the ids last decoded, and their text
        self._known_text = self._decode(self._known)
        self._new: list[int] = []  # ids that are no whole character yet
        self.text = ""  # all that is decoded, up to a stop string
        self.num_taken = 0  # characters handed out
        self.has_stopped = False

    def push(self, token: int) -> bool:
        """Takes the next token; returns whether a stop string is complete, after which there is no more to take."""
        self._new.append(token)
        piece = self._new_text()
        if piece and not piece.endswith(REPLACEMENT):
            self._known, self._new = self._new, []
            self._known_text = self._decode(self._known)
            self._append(piece)
        return self.has_stopped

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def _new_text(self) -> str:
        both = self._decode(self._known + self._new)
        if both.startswith(self._known_text):
            return both[len(self._known_text) :]
        return self._decode(self._new)  # bytes that are no character's spoil one whose bytes they follow

    def _append(self, piece: str) -> None:
        searched_from = len(self.text)
        self.text += piece
        found = [self.text.find(stop, max(0, searched_from - len(stop) + 1)) for stop in self.stop]
        begins = [begin for begin in found if begin >= 0]
        if begins:
            self.text, self.has_stopped = self.text[: min(begins)], True

    def take(self, is_last: bool = False) -> str:
        """The text that was not handed out yet and can no longer be part of a stop string; all of it, when last."""
        if is_last and not self.has_stopped:
            self.text += self._new_text()  # the bytes of an incomplete character
        end = len(self.text) if is_last or self.has_stopped else len(self.text) - self._num_undecided()
        piece, self.num_taken = self.text[self.num_taken : end], max(end, self.num_taken)
        return piece

    def _num_undecided(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        for length in range(min(self._longest_beginning, len(self.text)), 0, -1):
            if self.text[-length:] in self._beginnings:
                return length
        return 0


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
