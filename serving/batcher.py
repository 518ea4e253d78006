"""CALM's continuous batching: texts that are asked for at different times are written together, a patch a step.

    with Batcher(model, tokenizer) as batcher:
        future = batcher.submit("Once upon a time", max_new_tokens=60, temperature=0.5, seed=0)
        print(future.result().text)

One thread owns the model. At each step it lets the rows whose client has left go, takes in rows that wait, reads a
piece of the prompts not yet read, lets every other row read the patch it wrote last, and draws each row's next one. A
row has its own length, law of sampling, seed and stop rules, and its text is the one that it would have alone:
`model.generate(ids, generator=[torch.Generator().manual_seed(seed)], …)` writes the same, up to rounding, which differs
between batch shapes.

Axes: R rows, L tokens of a prompt, P patches, K tokens per patch, D hidden size.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.candidates_calm import trusted_radius
from calm.generation_calm import PatchSampling
from calm.samplers_calm import BlockPlan
from calm.serving.slots import SlotCache
from calm.serving.text import TextAssembler

FinishReason = Literal["stop", "length"]
SEED_BITS = 63
PLANS_KEPT = 64  # block plans of laws that were sampled lately
MASKED_ATTENTION = ("sdpa", "eager")  # implementations that take the mask of a `SlotCache`
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # the others depend on the longest row of a pass

logger = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """As many texts wait as may wait."""


class BatcherClosed(RuntimeError):
    """No more texts are taken."""


@dataclass(frozen=True)
class Written:
    """A finished text.

    Args:
        tokens: the new ones, the EOS that ended it included.
        text: of them, without special tokens and from a stop string on; `None` without a tokenizer.
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


@dataclass(frozen=True)
class Stats:
    """What a batcher has done and is doing."""

    running: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    steps: int = 0
    patches: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    busy_seconds: float = 0.0


@dataclass(eq=False)
class Row:
    """A text that waits, or is being written."""

    prompt_PK: Tensor
    num_prompt_tokens: int
    sampling: PatchSampling
    max_new_tokens: int
    min_new_tokens: int
    eos_tokens: frozenset[int]
    generator: torch.Generator
    seed: int | None
    assembler: TextAssembler | None
    on_piece: Callable[[Piece], None] | None
    future: Future[Written] = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)
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
        """Adds a patch, up to the token at which the text ends; returns why it does."""
        num_before = len(self.tokens)
        reason = self._append(patch)
        if self.on_piece is not None:
            text = None if self.assembler is None else self.assembler.take(is_last=reason is not None)
            self.on_piece(Piece(self.tokens[num_before:], text))
        elif self.assembler is not None and reason is not None:
            self.assembler.take(is_last=True)
        return reason

    def _append(self, patch: list[int]) -> FinishReason | None:
        for token in patch:
            self.tokens.append(token)
            if token in self.eos_tokens:
                return "stop"
            if self.assembler is not None and self.assembler.push(token):
                return "stop"
            if len(self.tokens) >= self.max_new_tokens:
                return "length"
        return None

    def written(self, reason: FinishReason) -> Written:
        text = None if self.assembler is None else self.assembler.text
        return Written(self.tokens, text, reason, self.num_prompt_tokens, self.seed)


class Batcher:
    """Writes texts together. Ends with its `with` block, or with `close`.

    Its model must not be changed or used for training while it is open; `model.generate` in other threads is harmless.

    Args:
        model: a `CALMForCausalLM`, on any devices; a PEFT model around one, too.
        tokenizer (*optional*): needed for prompts as text, stop strings and `Written.text`; a fast one.
        max_rows: texts written at a time; others wait. Memory for their keys and values grows with them.
        max_waiting: texts that may wait; a further one is refused.
        max_length: tokens of prompt and text together, at most; by default what the model's positions allow.
        prefill_chunk_size: prompt tokens read in one step, so that a long prompt doesn't keep other rows waiting.

    Raises:
        ValueError: a model that can't be batched so; the sentence says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_rows: int = 16,
        max_waiting: int = 64,
        max_length: int | None = None,
        prefill_chunk_size: int = 512,
    ):
        model = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
        check_model(model)
        for name, value, least in (("max_rows", max_rows, 1), ("max_waiting", max_waiting, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}.")
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, model.config
        self.max_rows, self.max_waiting = max_rows, max_waiting
        longest = self.config.max_position_embeddings * self.config.patch_size
        self.max_length = min(max_length or longest, longest)
        self.prefill_patches = max(1, prefill_chunk_size // self.config.patch_size)
        self.device = model.get_input_embeddings().weight.device
        self.radius = trusted_radius(model)
        self._cache = SlotCache()
        self._plans: dict[PatchSampling, BlockPlan] = {}
        self._rows: list[Row] = []  # of slot 0, 1, …; the thread's alone
        self._waiting: deque[Row] = deque()
        self._tokenizing = threading.Lock()
        self._changed = threading.Condition()  # guards what waits, the state below, and the stats
        self._closing = False
        self._stats = Stats()
        self._thread = threading.Thread(target=self._run, name="calm-batcher", daemon=True)
        self._thread.start()

    # what callers use

    def submit(
        self,
        prompt: str | Sequence[int] | Tensor,
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        on_piece: Callable[[Piece], None] | None = None,
        **sampling,
    ) -> Future[Written]:
        """Asks for a text. `cancel()` of what is returned lets its row go within a patch, at any time.

        Args:
            prompt: text, or ids (L,) of any length.
            max_new_tokens: by default the generation configuration's, or else what `max_length` leaves.
            min_new_tokens: so many tokens can't be EOS.
            stop: strings that end the text.
            ignore_eos: go on after an EOS.
            seed: fixes the text; a random one by default.
            generator: in place of a seed, on any device.
            on_piece: called in the batcher's thread after each patch; it must be quick. What it raises ends its text.
            **sampling: the fields of `PatchSampling`; by default the generation configuration's.

        Raises:
            ValueError: something makes no sense, or the prompt is too long.
            QueueFull: as many texts wait as may.
            BatcherClosed: it is closed.
        """
        row = self._new_row(
            prompt, max_new_tokens, min_new_tokens, stop, ignore_eos, seed, generator, on_piece, sampling
        )
        with self._changed:
            if self._closing:
                raise BatcherClosed("The batcher is closed: no more texts are taken.")
            if self._num_open() >= self.max_rows + self.max_waiting:
                raise QueueFull(
                    f"{self.max_rows} texts are being written and {self.max_waiting} wait: try again later."
                )
            self._waiting.append(row)
            self._changed.notify_all()
        return row.future

    def stream(self, prompt: str | Sequence[int] | Tensor, **options) -> Iterator[Piece]:
        """The pieces of a text as they are written; leaving the loop cancels it. Options as in `submit`."""
        pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        future = self.submit(prompt, on_piece=pieces.put, **options)
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            future.result()
        finally:
            future.cancel()

    def encode(self, prompt: str | Sequence[int] | Tensor) -> list[int]:
        """The ids of a prompt, as `submit` takes them.

        Raises:
            ValueError: text without a tokenizer, or ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("A prompt as text needs a tokenizer: Batcher(model, tokenizer).")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"The prompt is no text at character {error.start}: half of a surrogate pair."
                ) from None
            with self._tokenizing:  # a fast tokenizer is changed by calls with other settings
                ids = self.tokenizer(prompt)["input_ids"]
        else:
            ids = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        assert isinstance(ids, list)
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"The prompt holds {token!r}: ids are whole numbers in 0 … {self.config.vocab_size - 1}."
                )
        return ids

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of a conversation, ready for the assistant's answer, by the tokenizer's chat template.

        Raises:
            ValueError: there is no template; or whatever the template raises.
        """
        if self.tokenizer is None:
            raise ValueError("A conversation needs a tokenizer: Batcher(model, tokenizer).")
        with self._tokenizing:
            encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return self.encode(encoded["input_ids"])  # pyright: ignore[reportArgumentType, reportIndexIssue]

    def stats(self) -> Stats:
        with self._changed:
            return replace(self._stats, running=len(self._rows), waiting=len(self._waiting))

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def close(self, cancel: bool = False) -> None:
        """Takes no more texts, and returns when those that were taken are written, or have been cancelled."""
        with self._changed:
            self._closing = True
            if cancel:
                for row in [*self._waiting, *self._rows]:
                    row.future.cancel()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, error_type, *_) -> None:
        self.close(cancel=error_type is not None)

    # taking in

    def _num_open(self) -> int:
        return len(self._rows) + len(self._waiting)

    def _new_row(
        self,
        prompt: str | Sequence[int] | Tensor,
        max_new_tokens: int | None,
        min_new_tokens: int,
        stop: str | Sequence[str],
        ignore_eos: bool,
        seed: int | None,
        generator: torch.Generator | None,
        on_piece: Callable[[Piece], None] | None,
        options: dict[str, Any],
    ) -> Row:
        unknown = set(options) - set(PatchSampling.option_names())
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: no option of a text; see Batcher.submit.")
        stated = self.model.generation_config
        assert stated is not None, "a model that generates has one"
        sampling = PatchSampling.from_generation_config(stated, **options)
        ids = self.encode(prompt)
        room = self.max_length - len(ids)
        if max_new_tokens is None:
            max_new_tokens = getattr(stated, "max_new_tokens", None) or max(room, 1)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1.")
        if max_new_tokens > room:
            raise ValueError(
                f"The prompt has {len(ids)} tokens, and max_new_tokens is {max_new_tokens}: together they may be "
                f"{self.max_length}."
            )
        if generator is not None and seed is not None:
            raise ValueError("A text has a seed or a generator, not both.")
        if generator is None:
            seed = secrets.randbits(SEED_BITS) if seed is None else seed
            if not -(2**SEED_BITS) <= seed < 2**SEED_BITS:
                raise ValueError(f"seed={seed}: must be a whole number of 64 bits.")
            generator = torch.Generator().manual_seed(seed)
        stop = [stop] if isinstance(stop, str) else list(stop)
        if stop and self.tokenizer is None:
            raise ValueError("Stop strings need a tokenizer: Batcher(model, tokenizer).")
        packed = self.model.pack_for_generation(
            torch.tensor([ids], dtype=torch.long), pad_token=stated.pad_token_id, bos_token=stated.bos_token_id
        )
        return Row(
            prompt_PK=packed["input_ids"].view(-1, self.config.patch_size),
            num_prompt_tokens=len(ids),
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            eos_tokens=frozenset() if ignore_eos else frozenset(self._eos_tokens().tolist()),
            generator=generator,
            seed=seed,
            assembler=None if self.tokenizer is None else TextAssembler(self.tokenizer, stop),
            on_piece=on_piece,
        )

    def _eos_tokens(self) -> Tensor:
        stated = self.model.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
        return torch.tensor([] if stated is None else stated, dtype=torch.long).flatten()

    # the thread

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait_for_work():
                started = time.perf_counter()
                try:
                    self._step()
                except Exception as error:  # of the model: whatever it was, the next texts may fare better
                    logger.exception("A step failed; its %d texts end with this error.", len(self._rows))
                    self._fail_all(error)
                self._count(steps=1, busy_seconds=time.perf_counter() - started)

    def _wait_for_work(self) -> bool:
        """Blocks until there is a row to write; False when there never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_open() or self._closing)
            return bool(self._num_open())

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._read_patches()
        self._read_prompts()
        self._write_patches()

    def _drop_cancelled(self) -> None:
        for row in [row for row in self._rows if row.future.cancelled()]:
            self._leave(row)
            self._count(cancelled=1)
        with self._changed:
            kept = deque(row for row in self._waiting if not row.future.cancelled())
            num_cancelled, self._waiting = len(self._waiting) - len(kept), kept
        self._count(cancelled=num_cancelled)

    def _admit(self) -> None:
        with self._changed:
            while self._waiting and len(self._rows) < self.max_rows:
                self._rows.append(self._waiting.popleft())

    def _leave(self, row: Row) -> None:
        """Frees a row's slot; the last row moves there."""
        slot, last = self._rows.index(row), self._rows[-1]
        with self._changed:
            if last is not row:
                self._cache.move(len(self._rows) - 1, slot, last.num_read)
                self._rows[slot] = last
            self._rows.pop()

    def _fail_all(self, error: Exception) -> None:
        for row in list(self._rows):
            self._fail(row, error)

    def _fail(self, row: Row, error: Exception) -> None:
        self._leave(row)
        self._count(failed=1)
        with contextlib.suppress(Exception):  # cancelled meanwhile
            row.future.set_exception(error)

    def _count(self, **more: float) -> None:
        with self._changed:
            self._stats = replace(
                self._stats, **{name: getattr(self._stats, name) + value for name, value in more.items()}
            )

    # reading

    def _forward(self, slots: list[int], patches_RPK: Tensor, starts: list[int]) -> Tensor:
        """Lets the rows of these slots read patches from their places `starts` on: hidden states (R, P, D)."""
        patches_RPK = patches_RPK.to(self.device)
        places_RP = self._cache.aim(slots, starts, patches_RPK.shape[1], self.device)
        return self.model(
            input_ids=patches_RPK.flatten(1),
            attention_mask=self._cache.mask(self.model.dtype),
            position_ids=places_RP,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state

    def _read_patches(self) -> None:
        """Every row reads the patch that it wrote last.

        Rows whose prompt is not read yet take part, so that slots need no copying: what they read is overwritten.
        """
        if all(row.unread is None for row in self._rows):
            return
        nothing = [0] * self.config.patch_size
        patches_R1K = torch.tensor([[row.unread or nothing] for row in self._rows])
        hidden_R1D = self._forward(list(range(len(self._rows))), patches_R1K, [row.num_read for row in self._rows])
        for row, hidden_1D in zip(self._rows, hidden_R1D, strict=True):
            if row.unread is not None:
                row.hidden_D, row.unread, row.num_read = hidden_1D[0], None, row.num_read + 1

    def _read_prompts(self) -> None:
        """Rows that have begun first read on in their prompts, as many patches together as one step may read."""
        reading, longest = [], 0
        for slot, row in enumerate(self._rows):
            if row.is_prompt_read:
                continue
            length = min(len(row.prompt_PK) - row.num_read, self.prefill_patches)
            if reading and (len(reading) + 1) * max(length, longest) > self.prefill_patches:
                break
            reading.append((slot, row, length))
            longest = max(length, longest)
        if not reading:
            return
        patches_RPK = torch.zeros(len(reading), longest, self.config.patch_size, dtype=torch.long)
        for patches_PK, (_, row, length) in zip(patches_RPK, reading, strict=True):
            patches_PK[:length] = row.prompt_PK[row.num_read : row.num_read + length]
        slots, starts = [slot for slot, _, _ in reading], [row.num_read for _, row, _ in reading]
        hidden_RPD = self._forward(slots, patches_RPK, starts)
        for hidden_PD, (_, row, length) in zip(hidden_RPD, reading, strict=True):
            row.num_read += length
            if row.is_prompt_read:
                row.hidden_D = hidden_PD[length - 1]
                self._count(prompt_tokens=row.num_prompt_tokens)

    # writing

    def _write_patches(self) -> None:
        """Draws the next patch of each row that has a context: rows of one law together."""
        ready = [row for row in self._rows if row.hidden_D is not None]
        laws = list(dict.fromkeys((row.sampling, row.num_eos_free) for row in ready))
        for sampling, num_eos_free in laws:
            rows = [row for row in ready if (row.sampling, row.num_eos_free) == (sampling, num_eos_free)]
            for row, patch in zip(rows, self._draw(rows, sampling, num_eos_free), strict=True):
                self._take(row, patch)

    def _draw(self, rows: list[Row], sampling: PatchSampling, num_eos_free: int) -> list[list[int]]:
        hidden_RD = torch.stack([row.hidden_D for row in rows if row.hidden_D is not None])
        if len(self._plans) > PLANS_KEPT:
            self._plans.clear()
        return self.model.next_patches(
            hidden_RD,
            sampling,
            [row.generator for row in rows],
            self.model.forbidden_tokens(num_eos_free, self._eos_tokens(), hidden_RD.device),
            self._plans.setdefault(sampling, BlockPlan()),
            self.radius if self.model.compares_lazily(sampling) else None,
        ).tolist()

    def _take(self, row: Row, patch: list[int]) -> None:
        num_before, row.hidden_D, row.unread = len(row.tokens), None, patch
        try:
            reason = row.take(patch)
        except Exception as error:  # of `on_piece`
            self._fail(row, error)
            return
        self._count(patches=1, new_tokens=len(row.tokens) - num_before)
        if reason is not None:
            self._leave(row)
            if row.future.set_running_or_notify_cancel():
                self._count(finished=1)
                row.future.set_result(row.written(reason))
            else:
                self._count(cancelled=1)


def check_model(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: it is no CALM, or its attention or rotations depend on the other rows of a pass.
    """
    if not hasattr(model, "next_patches") or not hasattr(model, "pack_for_generation"):
        raise ValueError(f"{type(model).__name__} can't be batched: a Batcher takes a CALMForCausalLM.")
    attention = model.config._attn_implementation
    if attention not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation={attention!r}: rows of different lengths need one of {MASKED_ATTENTION}; load the "
            "model with it."
        )
    rotation = model.model.rotary_emb.rope_type
    if rotation not in FIXED_ROTATIONS:
        raise ValueError(
            f"rope_type={rotation!r}: its rotations depend on the longest row of a batch, so a text would change with "
            f"its company; a Batcher takes {FIXED_ROTATIONS}."
        )
