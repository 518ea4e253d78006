"""CALM's continuous batching: requests that arrive at different times are generated in one batch, a patch per step.

    with Batcher(model, tokenizer) as batcher:
        future = batcher.submit("Once upon a time", max_new_tokens=60, temperature=0.5, seed=0)
        print(future.result().text)

One thread owns the model (engine.py). Between its steps it removes cancelled sequences and adds waiting ones. Each
sequence has its own length, sampling settings, seed and stop criteria, and its tokens are those that
`model.generate(ids, generator=[torch.Generator().manual_seed(seed)], …)` gives for it alone, up to rounding, which
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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calm_transformers.model.generation_calm_samplers import OptionError, PatchSampling
from calm_transformers.model.generation_calm_sequences import Processors
from calm_transformers.model.generation_calm_upstream import PROCESSOR_SETTINGS, check_settings
from calm_transformers.model.modeling_calm import NO_LOGITS, CALMForCausalLM
from calm_transformers.serving.engine import ACCELERATOR_ERROR, Engine
from calm_transformers.serving.sequence import (
    FinishReason,
    GenerationResult,
    SequenceState,
    TextAssembler,
    TextDelta,
    make_logits_processors,
)

SEED_BITS = 63
MAX_FAILED_STEPS = 3  # in a row, until the batcher counts as unhealthy

logger = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """The queue of waiting sequences is full."""


class Unhealthy(RuntimeError):
    """Steps fail, or the batcher's thread has ended."""


class BatcherClosed(RuntimeError):
    """The batcher is closed; `__cause__` is the error that ended its thread, if one did."""


@dataclass(frozen=True)
class Stats:
    """Current and cumulative counts of a batcher."""

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
    """Generates sequences in one batch, in a thread of its own, until its `with` block ends or `close` is called.

    Don't change or train the model meanwhile; `model.generate` in other threads is harmless.

    Args:
        model: a `CALMForCausalLM` on any devices, or a PEFT model around one.
        tokenizer (*optional*): a fast tokenizer; needed for prompts as text, stop strings and `GenerationResult.text`.
        max_rows: most running sequences; others wait. The memory of the key-value cache grows with it.
        max_waiting: most waiting sequences; `submit` raises `QueueFull` beyond that.
        max_length: most tokens of prompt and new text together; by default what the model's positions allow.
        max_draws: most candidates per step that a request may ask for; `None` for no limit.
        prefill_chunk_size: most prompt tokens per step, so that a long prompt doesn't hold up other sequences.

    Raises:
        ValueError: a limit or a default setting is invalid, or the model is not supported (`check_supports_batching`).
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
                raise ValueError("A Batcher doesn't support virtual tokens, as of prompt tuning: use LoRA instead.")
            model = model.get_base_model()  # pyright: ignore[reportCallIssue]  # with PEFT's layers inside
        limits = {"max_rows": max_rows, "prefill_chunk_size": prefill_chunk_size, "max_length": max_length or 1}
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1.")
        if max_waiting < 0:
            raise ValueError(f"max_waiting={max_waiting}: must not be negative.")
        config = model.config
        check_settings(vars(model.generation_config), config.vocab_size, model.device)
        self.model, self.tokenizer, self.patch_size = model.eval(), tokenizer, getattr(config, "patch_size", 1)
        self.max_rows, self.max_waiting, self.max_draws = max_rows, max_waiting, max_draws
        self._engine = Engine(model, prefill_patches=max(1, prefill_chunk_size // self.patch_size))
        model_max_length = config.max_position_embeddings * self.patch_size
        self.max_length = min(max_length or model_max_length, model_max_length)
        self._waiting: deque[SequenceState] = deque()
        self._num_reserved = 0  # places in the queue of sequences that are being prepared
        self._tokenizer_lock = threading.Lock()
        self._condition = threading.Condition()  # guards the waiting and running sequences and the stats
        self._closing = False
        self._thread_error: BaseException | None = None
        self._num_failed_steps = 0  # since the last step that generated a patch
        self._stats = Stats()
        self._thread = threading.Thread(target=self._run, name="calm-batcher", daemon=True)
        self._thread.start()

    def submit(self, prompt: str | Sequence[int] | Tensor, **options) -> Future[GenerationResult]:
        """Queues a prompt, and returns the future of its result; `cancel()` removes its sequence within a patch.

        Raises:
            ValueError, QueueFull, BatcherClosed: see `prepare`, whose options these are, and `reserve`.
        """
        with self.reserve(1) as enqueue:
            enqueue([sequence := self.prepare(prompt, **options)])
        return sequence.future

    @contextmanager
    def reserve(self, num_sequences: int) -> Iterator[Callable[[list[SequenceState]], None]]:
        """Keeps places in the queue; yields the function that takes them, for all the sequences or none.

        Raises:
            QueueFull: more than `max_rows` + `max_waiting` sequences would run, wait or be prepared.
            BatcherClosed: the batcher is closed, then or by the time of the yielded function's call.
        """
        with self._condition:
            self.check_open()
            num_taken = len(self._engine.sequences) + len(self._waiting) + self._num_reserved
            if num_taken + num_sequences > (limit := self.max_rows + self.max_waiting):
                places = f"{num_taken} of {limit} places are taken, {num_sequences} more are needed"
                raise QueueFull(f"{places}: try again later.")
            self._num_reserved += num_sequences

        def enqueue(sequences: list[SequenceState]) -> None:
            nonlocal num_sequences
            with self._condition:
                self.check_open()
                self._waiting += sequences
                self._num_reserved -= len(sequences)
                num_sequences -= len(sequences)
                self._condition.notify_all()

        try:
            yield enqueue
        finally:
            with self._condition:
                self._num_reserved -= num_sequences

    def prepare(
        self,
        prompt: str | Sequence[int] | Tensor,
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        on_piece: Callable[[TextDelta], None] | None = None,
        logits_processor: Sequence[Processors] = (),
        num_logprobs: int | None = None,
        **options,
    ) -> SequenceState:
        """Returns a sequence that can be queued: all the work that a request needs before its first step.

        Args:
            prompt: text, or ids (L,) of any length.
            max_new_tokens: by default the generation configuration's, or else what `max_length` leaves.
            min_new_tokens: the first `min_new_tokens` new tokens can't be EOS.
            stop: strings that end the text.
            ignore_eos: continue after an EOS.
            seed: seed of the sequence; a random one by default.
            generator: used instead of a seed, on any device.
            on_piece: called in the batcher's thread after each patch, so be quick. Its exceptions end the sequence.
            logits_processor: transformers' or your own, such as a `Grammar`; functions of ids and logits alone.
            num_logprobs: returns each token's log-probability, and those of that many most probable ones beside it.
            **options: fields of `PatchSampling`, and `PROCESSOR_SETTINGS` (penalties, banned tokens); by default the
                generation configuration's. A temperature turns sampling on.

        Raises:
            ValueError: an argument is invalid, or the prompt is too long.
        """
        defaults = self.model.generation_config
        assert defaults is not None, "a model that generates has one"
        processor_settings = {name: options.pop(name) for name in PROCESSOR_SETTINGS if name in options}
        unknown = set(options) - set(PatchSampling.option_names())
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: unknown option; see Batcher.prepare.")
        if options.get("temperature") is not None and options.get("do_sample") is None:
            options["do_sample"] = True
        if generator is not None and seed is not None:
            raise ValueError("Pass a seed or a generator, not both.")
        if generator is None:
            seed = secrets.randbits(SEED_BITS) if seed is None else seed
            if not isinstance(seed, int) or not -(2**SEED_BITS) <= seed < 2**SEED_BITS:
                raise ValueError(f"seed={seed}: must be a 64-bit integer.")
            generator = torch.Generator().manual_seed(seed)
        if not isinstance(min_new_tokens, int) or min_new_tokens < 0:
            message = f"min_new_tokens={min_new_tokens!r}: must be an integer of at least 0."
            raise OptionError(message, "min_new_tokens")
        if num_logprobs is not None and not self.model.head.samples_tokens:
            raise OptionError(f"num_logprobs: {NO_LOGITS}", "num_logprobs")
        sampling = self.model.patch_sampling(**options)  # made by the model, whose code may be remote
        if self.max_draws is not None and sampling.max_samples > self.max_draws:
            raise OptionError(
                f"num_candidates={sampling.num_candidates} with sampling_method={sampling.sampling_method!r} may need "
                f"{sampling.max_samples} candidates per step: at most {self.max_draws} are allowed here.",
                *("num_candidates", "sampling_method"),
            )
        ids = self.encode(prompt)
        packed = self.model.pack_for_generation(
            torch.tensor([ids], dtype=torch.long), pad_token=defaults.pad_token_id, bos_token=defaults.bos_token_id
        )
        max_new_tokens = self._resolve_max_new_tokens(len(ids), max_new_tokens, defaults.max_new_tokens)
        prompt_L = torch.tensor(ids or [defaults.bos_token_id], dtype=torch.long)
        eos = [] if ignore_eos or defaults.eos_token_id is None else defaults.eos_token_id
        return SequenceState(
            prompt_PK=packed["input_ids"].view(-1, self.patch_size),
            prompt_L=prompt_L,
            num_prompt_tokens=len(ids),
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            eos_tokens=frozenset([eos] if isinstance(eos, int) else eos),
            generator=generator,
            seed=seed,
            logits_processors=make_logits_processors(
                self.model, len(prompt_L), max_new_tokens, logits_processor, **processor_settings
            ),
            assembler=self._make_assembler(stop, ids),
            on_piece=on_piece,
            num_logprobs=num_logprobs,
        )

    def stream(self, prompt: str | Sequence[int] | Tensor, **options) -> Iterator[TextDelta]:
        """Yields a sequence's tokens and text step by step; leaving the loop cancels it. Options as in `submit`.

        This is a generator: `submit` is called, and raises its errors, when the first delta is requested.
        """
        deltas: queue.SimpleQueue[TextDelta | None] = queue.SimpleQueue()
        future = self.submit(prompt, on_piece=deltas.put, **options)
        future.add_done_callback(lambda _: deltas.put(None))
        try:
            while (delta := deltas.get()) is not None:
                yield delta
            future.result()  # raises the sequence's error, if it has one
        finally:
            future.cancel()

    def encode(self, prompt: str | Sequence[int] | Tensor, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a prompt.

        Raises:
            ValueError: text without a tokenizer or with a lone surrogate, or ids outside the vocabulary.
        """
        ids: Any = prompt
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("A prompt as text needs a tokenizer: Batcher(model, tokenizer).")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"The prompt holds a lone surrogate at character {error.start}.") from None
            with self._tokenizer_lock:  # a call with other settings changes a fast tokenizer
                ids = self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
        if not isinstance(ids, Sequence | Tensor):
            raise ValueError(f"prompt={prompt!r}: must be a string or token ids.")
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        last_id = self.model.config.vocab_size - 1
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= last_id:
                raise ValueError(f"The prompt holds {token!r}: token ids are integers in 0 … {last_id}.")
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids."""
        assert self.tokenizer is not None, "only called with a tokenizer"
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)  # pyright: ignore[reportReturnType, reportArgumentType]

    def token_text(self, token: int) -> str:
        """Returns one token as text; of a part of a character U+FFFD."""
        return self.decode([token], skip_special_tokens=False)

    def encode_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Returns the ids of a conversation, by default up to the assistant's answer, by the chat template.

        Raises:
            ValueError: there is no chat template. A template may raise any other exception.
        """
        if self.tokenizer is None:
            raise ValueError("A conversation needs a tokenizer: Batcher(model, tokenizer).")
        text: Any = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return self.encode(text, add_special_tokens=False)  # the template adds them itself

    def stats(self) -> Stats:
        with self._condition:
            return replace(self._stats, running=len(self._engine.sequences), waiting=len(self._waiting))

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def check_open(self) -> None:
        """Raises `BatcherClosed` if the batcher is closed."""
        if not self.is_open:
            raise BatcherClosed("The batcher is closed: it takes no more requests.") from self._thread_error

    def check_healthy(self) -> None:
        """Raises `Unhealthy` if the thread has ended, or `MAX_FAILED_STEPS` steps in a row have failed."""
        if self._thread_error is not None or not self._thread.is_alive():
            raise Unhealthy("Generation has stopped; see the log.") from self._thread_error
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise Unhealthy(f"The last {self._num_failed_steps} steps have failed; see the log.")

    def close(self, cancel: bool = False, wait: bool = True) -> None:
        """Stops taking requests, finishes or cancels those taken, and waits for the thread to end.

        Args:
            cancel: cancel waiting and running sequences instead of finishing them.
            wait: False returns at once.
        """
        with self._condition:
            self._closing = True
            cancelled = [*self._waiting, *self._engine.sequences] if cancel else []
            self._condition.notify_all()
        for sequence in cancelled:
            sequence.future.cancel()
        if wait:
            self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, error_type, *_) -> None:
        self.close(cancel=error_type is not None)

    def _resolve_max_new_tokens(self, num_prompt_tokens: int, requested: int | None, default: int | None) -> int:
        """Returns the requested number of new tokens, or the default, or else what `max_length` leaves."""
        room = self.max_length - num_prompt_tokens
        max_new_tokens = default if requested is None else requested
        max_new_tokens = max(room, 1) if max_new_tokens is None else max_new_tokens
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: must be an integer of at least 1.")
        if max_new_tokens > room:
            raise ValueError(
                f"The prompt has {num_prompt_tokens} tokens and max_new_tokens={max_new_tokens}: their sum may be at "
                f"most {self.max_length}."
            )
        return max_new_tokens

    def _make_assembler(self, stop: str | Sequence[str], prompt: list[int]) -> TextAssembler | None:
        """Returns what decodes the new tokens up to a stop string, or None without a tokenizer."""
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, Sequence) or not all(isinstance(each, str) for each in stop):
            raise OptionError(f"stop={stop!r}: must be a string or a list of strings.", "stop")
        if self.tokenizer is not None:
            return TextAssembler(self.tokenizer, stop, prompt)
        if stop:
            raise ValueError("Stop strings need a tokenizer: Batcher(model, tokenizer).")
        return None

    # Methods of the batcher's thread

    def _run(self) -> None:
        """Runs steps until the batcher is closed and no sequence is left."""
        try:
            while self._wait_for_work():
                started = time.perf_counter()
                try:
                    self._step()
                except Exception as error:  # an error of the model: later requests may succeed
                    if isinstance(error, ACCELERATOR_ERROR):
                        raise
                    self._num_failed_steps += 1
                    logger.exception("A step failed; its sequences end with this error.")
                    self._fail(self._engine.sequences, error)
                self._add_to_stats(steps=1, busy_seconds=time.perf_counter() - started)
        except BaseException as error:
            logger.exception("The batcher's thread ends with this error, and so do all sequences.")
            with self._condition:
                self._closing, self._thread_error = True, error
            self._fail([*self._engine.sequences, *self._waiting], error)

    def _wait_for_work(self) -> bool:
        """Updates the running sequences, and waits until there is one; returns False if the batcher closes first."""
        with self._condition:
            while True:
                self._remove_cancelled()
                self._admit_waiting()
                if self._engine.sequences or self._closing:
                    return bool(self._engine.sequences)
                self._condition.wait()

    def _remove_cancelled(self) -> None:
        for sequence in [*self._engine.sequences, *self._waiting]:
            if sequence.future.cancelled():
                if sequence in self._engine.sequences:
                    self._engine.remove(sequence)
                else:
                    self._waiting.remove(sequence)
                self._finish(sequence, None)

    def _admit_waiting(self) -> None:
        while self._waiting and len(self._engine.sequences) < self.max_rows:
            self._engine.add(self._waiting.popleft())

    def _step(self) -> None:
        """Runs a step, counts what it did, and finishes the sequences that it ended."""
        before = [(sequence, len(sequence.tokens), sequence.is_prefilled) for sequence in self._engine.sequences]
        ended = self._engine.step()
        num_new = [len(sequence.tokens) - num_before for sequence, num_before, _ in before]
        prefilled = [sequence for sequence, _, was_prefilled in before if sequence.is_prefilled and not was_prefilled]
        # A ValueError is of the request's own processors.
        has_failed = any(isinstance(reason, Exception) and not isinstance(reason, ValueError) for _, reason in ended)
        self._num_failed_steps = 0 if any(num_new) else self._num_failed_steps + has_failed
        self._add_to_stats(
            patches=sum(num > 0 for num in num_new),
            new_tokens=sum(num_new),
            prompt_tokens=sum(sequence.num_prompt_tokens for sequence in prefilled),
        )
        for sequence, reason in ended:
            with self._condition:
                self._engine.remove(sequence)
            self._finish(sequence, reason)

    def _finish(self, sequence: SequenceState, reason: FinishReason | BaseException | None) -> None:
        """Sets the future's result, or the exception that ended the sequence; no reason means it was cancelled."""
        if not sequence.future.set_running_or_notify_cancel() or reason is None:
            self._add_to_stats(cancelled=1)
        elif isinstance(reason, BaseException):
            self._add_to_stats(failed=1)
            sequence.future.set_exception(reason)
        else:
            self._add_to_stats(finished=1)
            sequence.future.set_result(sequence.result(reason))

    def _fail(self, sequences: Iterable[SequenceState], error: BaseException) -> None:
        """Removes these sequences, which include all running ones, and ends them with an error."""
        sequences = list(sequences)
        with self._condition:
            self._engine.sequences.clear()
            self._waiting = deque(each for each in self._waiting if each not in sequences)
        for sequence in sequences:
            self._finish(sequence, error)

    def _add_to_stats(self, **counts: float) -> None:
        with self._condition:
            new = {name: getattr(self._stats, name) + value for name, value in counts.items()}
            self._stats = replace(self._stats, **new)
