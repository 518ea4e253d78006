"""CALM's continuous batching: texts that are asked for at different times are written together, a patch a step.

    with Batcher(model, tokenizer) as batcher:
        future = batcher.submit("Once upon a time", max_new_tokens=60, temperature=0.5, seed=0)
        print(future.result().text)

One thread owns the model (engine.py). Between its steps rows whose client has left go, and rows that wait come in. A
row has its own length, law of sampling, seed and stop rules, and its text is the one that it would have alone:
`model.generate(ids, generator=[torch.Generator().manual_seed(seed)], …)` writes the same, up to rounding, which
differs between shapes.

Axes: L tokens of a prompt.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calm_transformers.model.generation_calm_rules import Processors
from calm_transformers.model.generation_calm_samplers import PatchSampling
from calm_transformers.model.generation_calm_upstream import PROCESSOR_SETTINGS
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.serving.engine import Engine
from calm_transformers.serving.rows import FinishReason, Piece, Row, TextAssembler, Written
from calm_transformers.serving.rules import processors_of_text

SEED_BITS = 63

logger = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """As many texts wait as may wait."""


class BatcherClosed(RuntimeError):
    """No more texts are taken; its cause, if any, is what ended the batcher's thread."""


@dataclass(frozen=True)
class Stats:
    """What a batcher is doing, and what it has done."""

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


class Batcher:
    """Writes texts together. Ends with its `with` block, or with `close`.

    Its model must not be changed or trained while it is open; `model.generate` in other threads is harmless.

    Args:
        model: a `CALMForCausalLM`, on any devices; a PEFT model around one, too.
        tokenizer (*optional*): needed for prompts as text, stop strings and `Written.text`; a fast one.
        max_rows: texts written at a time; others wait. Memory for their keys and values grows with them.
        max_waiting: texts that may wait; a further one is refused.
        max_length: tokens of prompt and text together, at most; by default what the model's positions allow.
        max_draws: candidates that a row may ask for in one step; `None`: any number. A step ends for all rows at once.
        prefill_chunk_size: prompt tokens read in one step, so that a long prompt doesn't keep other rows waiting.

    Raises:
        ValueError: a model that can't be batched so; the sentence says why.
    """

    def __init__(
        self,
        model: CALMForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_rows: int = 16,
        max_waiting: int = 64,
        max_length: int | None = None,
        max_draws: int | None = None,
        prefill_chunk_size: int = 512,
    ):
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            if any(config.is_prompt_learning for config in model.peft_config.values()):  # pyright: ignore
                raise ValueError("A Batcher would leave out virtual tokens, as of prompt tuning: use LoRA instead.")
            model = model.get_base_model()  # pyright: ignore[reportCallIssue]  # whose layers are PEFT's now
        limits = {"max_rows": max_rows, "prefill_chunk_size": prefill_chunk_size, "max_length": max_length or 1}
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1.")
        if max_waiting < 0:
            raise ValueError(f"max_waiting={max_waiting}: must not be negative.")
        config = model.config
        self.model, self.tokenizer, self.patch_size = model.eval(), tokenizer, getattr(config, "patch_size", 1)
        self.max_rows, self.max_waiting, self.max_draws = max_rows, max_waiting, max_draws
        self._engine = Engine(model, max(1, prefill_chunk_size // self.patch_size))
        longest = config.max_position_embeddings * self.patch_size
        self.max_length = min(max_length or longest, longest)
        self._waiting: deque[Row] = deque()
        self._tokenizing = threading.Lock()
        self._changed = threading.Condition()  # guards what waits, the engine's list of rows, and the stats
        self._closing = False
        self._died_of: BaseException | None = None
        self.last_error: BaseException | None = None  # of a text; None again when a patch is written
        self._stats = Stats()
        self._thread = threading.Thread(target=self._run, name="calm-batcher", daemon=True)
        self._thread.start()

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
        logits_processor: Sequence[Processors] = (),
        **options,
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
            logits_processor: upstream's or one's own, each a function of ids and logits alone, as a `Grammar` is.
            **options: the fields of `PatchSampling`, and `PROCESSOR_SETTINGS` as penalties and bans of tokens; by default
                the generation configuration's. A temperature asks for sampling.

        Raises:
            ValueError: something makes no sense, or the prompt is too long.
            QueueFull: as many texts wait as may.
            BatcherClosed: it is closed.
        """
        stated = self.model.generation_config
        assert stated is not None, "a model that generates has one"
        rules = {name: options.pop(name) for name in PROCESSOR_SETTINGS if name in options}
        sampling, unknown = options, set(options) - set(PatchSampling.option_names())
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: no option of a text; see Batcher.submit.")
        if sampling.get("temperature") is not None and sampling.get("do_sample") is None:
            sampling["do_sample"] = True
        if generator is not None and seed is not None:
            raise ValueError("A text has a seed or a generator, not both.")
        if generator is None:
            seed = secrets.randbits(SEED_BITS) if seed is None else seed
            if not isinstance(seed, int) or not -(2**SEED_BITS) <= seed < 2**SEED_BITS:
                raise ValueError(f"seed={seed}: must be a whole number of 64 bits.")
            generator = torch.Generator().manual_seed(seed)
        if not isinstance(min_new_tokens, int) or min_new_tokens < 0:
            raise ValueError(f"min_new_tokens={min_new_tokens!r}: must be a whole number, and not negative.")
        law = self.model.patch_sampling(**sampling)  # of the model's own code, wherever that is
        if self.max_draws is not None and law.max_samples > self.max_draws:
            raise ValueError(
                f"num_candidates={law.num_candidates} with sampling_method={law.sampling_method!r} may draw "
                f"{law.max_samples} patches in a step: {self.max_draws} are allowed here."
            )
        ids = self.encode(prompt)
        packed = self.model.pack_for_generation(
            torch.tensor([ids], dtype=torch.long), pad_token=stated.pad_token_id, bos_token=stated.bos_token_id
        )
        num_new_tokens = self._num_new_tokens(len(ids), max_new_tokens, stated.max_new_tokens)
        own_ids = torch.tensor(ids or [stated.bos_token_id], dtype=torch.long)
        eos = [] if ignore_eos or stated.eos_token_id is None else stated.eos_token_id
        row = Row(
            prompt_PK=packed["input_ids"].view(-1, self.patch_size),
            prompt_L=own_ids,
            num_prompt_tokens=len(ids),
            sampling=law,
            max_new_tokens=num_new_tokens,
            min_new_tokens=min_new_tokens,
            eos_tokens=frozenset([eos] if isinstance(eos, int) else eos),
            generator=generator,
            seed=seed,
            processors=processors_of_text(self.model, len(own_ids), num_new_tokens, logits_processor, **rules),
            assembler=self._new_assembler(stop, ids),
            on_piece=on_piece,
        )
        with self._changed:
            self.check_open()
            if self._num_open() >= self.max_rows + self.max_waiting:
                raise QueueFull(
                    f"{self.max_rows} texts are being written and {self.max_waiting} wait: try again later."
                )
            self._waiting.append(row)
            self._changed.notify_all()
        return row.future

    def stream(self, prompt: str | Sequence[int] | Tensor, **options) -> Iterator[Piece]:
        """The pieces of a text as they are written; leaving the loop cancels it. Options as in `submit`.

        As of any generator, nothing happens before the first piece is asked for, refusals included.
        """
        pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        future = self.submit(prompt, on_piece=pieces.put, **options)
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            future.result()
        finally:
            future.cancel()

    def encode(self, prompt: str | Sequence[int] | Tensor, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt, as `submit` takes them.

        Raises:
            ValueError: text without a tokenizer, half of a surrogate pair, or ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("A prompt as text needs a tokenizer: Batcher(model, tokenizer).")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"The prompt is no text at character {error.start}: half a surrogate pair.") from None
            with self._tokenizing:  # a fast tokenizer is changed by calls with other settings
                prompt = self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]  # pyright: ignore[reportAssignmentType]
        if not isinstance(prompt, Sequence | Tensor):
            raise ValueError(f"prompt={prompt!r}: must be a text, or its ids.")
        ids: list[int] = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)  # pyright: ignore
        last = self.model.config.vocab_size - 1
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= last:
                raise ValueError(f"The prompt holds {token!r}: ids are whole numbers in 0 … {last}.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Their text, without special tokens."""
        assert self.tokenizer is not None, "there is a tokenizer where there is text"
        return self.tokenizer.decode(ids, skip_special_tokens=True)  # pyright: ignore[reportReturnType, reportArgumentType]

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of a conversation, ready for the assistant's answer, by the tokenizer's chat template.

        Raises:
            ValueError: there is no template; or whatever the template raises.
        """
        if self.tokenizer is None:
            raise ValueError("A conversation needs a tokenizer: Batcher(model, tokenizer).")
        text: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.encode(text, add_special_tokens=False)  # the template writes those that it wants

    def stats(self) -> Stats:
        with self._changed:
            return replace(self._stats, running=len(self._engine.rows), waiting=len(self._waiting))

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def check_open(self) -> None:
        """
        Raises:
            BatcherClosed: it is closed.
        """
        if not self.is_open:
            raise BatcherClosed("The batcher is closed: no more texts are taken.") from self._died_of

    def close(self, cancel: bool = False, wait: bool = True) -> None:
        """Takes no more texts; returns when those that were taken are written, or have been cancelled.

        Args:
            cancel: in place of writing them.
            wait: False returns at once.
        """
        with self._changed:
            self._closing = True
            taken = [*self._waiting, *self._engine.rows] if cancel else []
            self._changed.notify_all()
        for row in taken:
            row.future.cancel()
        if wait:
            self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, error_type, *_) -> None:
        self.close(cancel=error_type is not None)

    # checks of what is submitted

    def _num_new_tokens(self, num_prompt_tokens: int, asked: int | None, stated: int | None) -> int:
        room = self.max_length - num_prompt_tokens
        num = max(room, 1) if asked is None and stated is None else stated if asked is None else asked
        assert num is not None
        if not isinstance(num, int) or num < 1:
            raise ValueError(f"max_new_tokens={num!r}: must be a whole number of at least 1.")
        if num > room:
            raise ValueError(
                f"The prompt has {num_prompt_tokens} tokens, and max_new_tokens={num}: together they may be "
                f"{self.max_length}."
            )
        return num

    def _new_assembler(self, stop: str | Sequence[str], prompt: list[int]) -> TextAssembler | None:
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, Sequence) or not all(isinstance(each, str) for each in stop):
            raise ValueError(f"stop={stop!r}: must be a text, or a list of texts.")
        if self.tokenizer is not None:
            return TextAssembler(self.tokenizer, stop, prompt)
        if stop:
            raise ValueError("Stop strings need a tokenizer: Batcher(model, tokenizer).")
        return None

    # the thread

    def _num_open(self) -> int:
        return len(self._engine.rows) + len(self._waiting)

    def _run(self) -> None:
        try:
            while self._prepare_step():
                started = time.perf_counter()
                try:
                    self._step()
                except Exception as error:  # of the model: whatever it was, the next texts may fare better
                    logger.exception("A step failed; its texts end with this error.")
                    self._fail(self._engine.rows, error)
                self._count(steps=1, busy_seconds=time.perf_counter() - started)
        except BaseException as error:
            logger.exception("The batcher ends with this error, and so do all texts.")
            with self._changed:
                self._closing, self._died_of = True, error
            self._fail([*self._engine.rows, *self._waiting], error)

    def _prepare_step(self) -> bool:
        """Lets rows go and come, and waits until there is one; False when there never will be."""
        with self._changed:
            while True:
                self._let_cancelled_go()
                self._let_waiting_in()
                if self._engine.rows or self._closing:
                    return bool(self._engine.rows)
                self._changed.wait()

    def _let_cancelled_go(self) -> None:
        for row in [row for row in [*self._engine.rows, *self._waiting] if row.future.cancelled()]:
            if row in self._engine.rows:
                self._engine.remove(row)
            else:
                self._waiting.remove(row)
            self._end(row, None)

    def _let_waiting_in(self) -> None:
        while self._waiting and len(self._engine.rows) < self.max_rows:
            self._engine.add(self._waiting.popleft())

    def _step(self) -> None:
        rows = list(self._engine.rows)
        before = [(len(row.tokens), row.is_prompt_read) for row in rows]
        ended = self._engine.step()
        num_new = [len(row.tokens) - num for row, (num, _) in zip(rows, before, strict=True)]
        just_read = [
            row for row, (_, was_read) in zip(rows, before, strict=True) if row.is_prompt_read and not was_read
        ]
        if any(num_new):
            self.last_error = None
        self._count(
            patches=sum(num > 0 for num in num_new),
            new_tokens=sum(num_new),
            prompt_tokens=sum(row.num_prompt_tokens for row in just_read),
        )
        for row, reason in ended:
            with self._changed:
                self._engine.remove(row)
            self._end(row, reason)

    def _end(self, row: Row, reason: FinishReason | BaseException | None) -> None:
        """Tells those who wait; without a reason, its client has left."""
        if not row.future.set_running_or_notify_cancel() or reason is None:
            self._count(cancelled=1)
        elif isinstance(reason, BaseException):
            self._count(failed=1)
            self.last_error = reason
            row.future.set_exception(reason)
        else:
            self._count(finished=1)
            row.future.set_result(row.written(reason))

    def _fail(self, rows: Iterable[Row], error: BaseException) -> None:
        rows = list(rows)
        with self._changed:
            self._engine.clear()
            self._waiting = deque(row for row in self._waiting if row not in rows)
        for row in rows:
            self._end(row, error)

    def _count(self, **more: float) -> None:
        with self._changed:
            new = {name: getattr(self._stats, name) + value for name, value in more.items()}
            self._stats = replace(self._stats, **new)
