"""A sequence of the batcher: its settings, logits processors and progress, and its text, decoded step by step.

Axes: P patches of the prompt, L tokens of it, K tokens per patch, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from calm_transformers.model.generation_calm_samplers import OptionError, PatchSampling
from calm_transformers.model.generation_calm_sequences import Processors

FinishReason = Literal["stop", "length"]
REPLACEMENT_CHARACTER = "\ufffd"
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_STRINGS = 256
PROMPT_CONTEXT_TOKENS = 256  # last tokens of the prompt, enough to decode what follows it


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability in nats at T = 1, given those before it, and those of the most probable ones there."""

    token: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class GenerationResult:
    """A finished sequence.

    Args:
        tokens: the new ids, including the EOS that ended the sequence.
        text: `tokens` without special tokens, cut before the stop string; `None` without a tokenizer.
        finish_reason: "stop" after an EOS or a stop string, "length" after `max_new_tokens`.
        num_prompt_tokens: tokens of the prompt.
        seed: seed that reproduces the sequence; `None` where a generator was given.
        logprobs: of each token, if the request wants them; else empty.
    """

    tokens: list[int]
    text: str | None
    finish_reason: FinishReason
    num_prompt_tokens: int
    seed: int | None
    logprobs: list[TokenLogprobs]


@dataclass(frozen=True)
class TextDelta:
    """The tokens that one step adds to a sequence, and the text that they complete (`None` without a tokenizer)."""

    tokens: list[int]
    text: str | None
    logprobs: list[TokenLogprobs]


@lru_cache(4)
def _prefixes(strings: tuple[str, ...]) -> frozenset[str]:
    """Returns the proper prefixes of stop strings, once for all texts of a request."""
    return frozenset(string[:length] for string in strings for length in range(1, len(string)))


class TextAssembler:
    """Decodes tokens one by one to text of whole characters, and stops before a stop string.

    Tokens are decoded together with those before them, because tokenizers of SentencePiece's kind drop the space
    before a text's first word. Text that may be the beginning of a stop string is held back until it is decided.

    Args:
        tokenizer: a fast tokenizer.
        stop: strings that end the text.
        prompt: ids of the prompt.

    Raises:
        ValueError: an empty stop string, too many or too long ones, or a slow tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        if not all(stop):
            raise OptionError("stop: holds an empty string; every stop string needs at least one character.", "stop")
        if len(stop) > MAX_STOP_STRINGS or max(map(len, stop), default=0) > MAX_STOP_LENGTH:
            limits = f"{MAX_STOP_STRINGS} strings of {MAX_STOP_LENGTH} characters"
            raise OptionError(f"stop: must be at most {limits}.", "stop")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer, which decoding step by step needs.")
        self.stop = tuple(stop)
        self._backend: Tokenizer = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self._stop_prefixes = _prefixes(self.stop)
        self._max_prefix_length = max(map(len, self._stop_prefixes), default=0)
        self._context = list(prompt[-PROMPT_CONTEXT_TOKENS:])  # the ids decoded last, and their text
        self._context_text = self._decode(self._context)
        self._undecoded: list[int] = []  # ids that don't form a whole character yet
        self.text = ""  # all that is decoded, up to a stop string
        self.num_taken = 0  # characters returned by `take`
        self.has_stopped = False

    def push(self, token: int) -> bool:
        """Adds the next token, and returns whether the text now contains a stop string; push nothing after that."""
        self._undecoded.append(token)
        new_text = self._decode_new_text()
        if new_text and not new_text.endswith(REPLACEMENT_CHARACTER):
            self._context, self._undecoded = self._undecoded, []
            self._context_text = self._decode(self._context)
            self._append(new_text)
        return self.has_stopped

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def _decode_new_text(self) -> str:
        """Returns the text that the undecoded ids add to that of the context."""
        text = self._decode(self._context + self._undecoded)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(self._undecoded)  # invalid bytes can change how the character before them is decoded

    def _append(self, new_text: str) -> None:
        """Appends text, and cuts it before the first stop string."""
        old_length = len(self.text)
        self.text += new_text
        starts = [self.text.find(stop, max(0, old_length - len(stop) + 1)) for stop in self.stop]
        starts = [start for start in starts if start >= 0]
        if starts:
            self.text, self.has_stopped = self.text[: min(starts)], True

    def take(self, is_last: bool = False) -> str:
        """Returns the text that is new since the last call and can't be part of a stop string; all, if `is_last`."""
        if is_last and not self.has_stopped:
            self.text += self._decode_new_text()  # the bytes of an incomplete character
        end = len(self.text) if is_last or self.has_stopped else len(self.text) - self._num_held_back()
        new_text, self.num_taken = self.text[self.num_taken : end], max(end, self.num_taken)
        return new_text

    def _num_held_back(self) -> int:
        """Returns the number of characters at the text's end that may begin a stop string."""
        lengths = range(min(self._max_prefix_length, len(self.text)), 0, -1)
        return next((length for length in lengths if self.text[-length:] in self._stop_prefixes), 0)


@dataclass(eq=False)
class SequenceState:
    """A waiting or running sequence."""

    prompt_PK: Tensor
    prompt_L: Tensor  # the prompt's ids without the fillers of `prompt_PK`; BOS if the prompt is empty
    num_prompt_tokens: int
    sampling: PatchSampling
    max_new_tokens: int
    min_new_tokens: int
    eos_tokens: frozenset[int]
    generator: torch.Generator
    seed: int | None = None
    logits_processors: Processors | None = None
    assembler: TextAssembler | None = None
    on_piece: Callable[[TextDelta], None] | None = None
    num_logprobs: int | None = None  # most probable tokens to tell of each position
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of whole patches
    future: Future[GenerationResult] = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)
    arrival_index: int = 0
    num_cached: int = 0  # patches in the cache
    uncached_patch: list[int] | None = None  # the patch sampled last
    hidden_D: Tensor | None = None  # hidden state from which the next patch is sampled

    @property
    def is_prefilled(self) -> bool:
        return self.num_cached >= len(self.prompt_PK)

    @property
    def num_tokens_without_eos(self) -> int:
        """How many tokens at the next patch's beginning must not be EOS, at most K."""
        return min(max(self.min_new_tokens - len(self.tokens), 0), self.prompt_PK.shape[1])

    def append_patch(self, patch: list[int]) -> FinishReason | None:
        """Appends the patch as `_append_tokens` does, calls `on_piece`, and returns why the sequence ended, if so."""
        num_before = len(self.tokens)
        reason = self._append_tokens(patch)
        text = None if self.assembler is None else self.assembler.take(is_last=reason is not None)
        if self.on_piece is not None:
            num_tokens = len(self.tokens)
            self.on_piece(TextDelta(self.tokens[num_before:], text, self.logprobs[num_before:num_tokens]))
        return reason

    def _append_tokens(self, patch: list[int]) -> FinishReason | None:
        """Appends tokens up to the one that ends the sequence; returns why it ended, or None if it continues."""
        for token in patch:
            self.tokens.append(token)
            if token in self.eos_tokens or (self.assembler is not None and self.assembler.push(token)):
                return "stop"
            if len(self.tokens) >= self.max_new_tokens:
                return "length"
        return None

    def result(self, reason: FinishReason) -> GenerationResult:
        text = None if self.assembler is None else self.assembler.text
        logprobs = self.logprobs[: len(self.tokens)]
        return GenerationResult(self.tokens, text, reason, self.num_prompt_tokens, self.seed, logprobs)


def make_logits_processors(
    model, prompt_length: int, max_new_tokens: int, logits_processor: Sequence | None = None, **settings
) -> LogitsProcessorList | None:
    """Returns the logits processors that `generate` would use for one sequence, or `None` if there are none.

    Args:
        model: the model that generates.
        prompt_length: tokens of the prompt.
        max_new_tokens: the most new tokens.
        logits_processor: the caller's own processors.
        **settings: those of `PROCESSOR_SETTINGS` that replace the generation configuration's.

    Raises:
        ValueError: a setting is invalid.
    """
    config = copy.copy(model.generation_config)
    for name, value in settings.items():
        setattr(config, name, value)
    config.max_length = prompt_length + max_new_tokens
    # Upstream's `generate` makes this tensor of EOS ids before it calls `_get_logits_processor`, which reads it.
    eos = config.eos_token_id
    config._eos_token_tensor = None if eos is None else torch.tensor([eos] if isinstance(eos, int) else eos)
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=prompt_length,
        logits_processor=logits_processor,
        device=torch.device("cpu") if model.device.type == "meta" else model.device,
    )
    # The model's list is for a batch; this sequence's own processors are those of row 0 in a batch of one.
    return processors.of_row(0, prompt_length) if processors else None
