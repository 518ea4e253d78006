"""OpenAI's API over a `Batcher`, as an ASGI application.

    batcher = Batcher(model, tokenizer)
    uvicorn.run(create_app(batcher, ServerOptions(model_name="my-calm")))

Streamed and whole answers are built from the same events: the deltas of each text, and its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive

from calm_transformers import __version__
from calm_transformers.serving.batcher import Batcher
from calm_transformers.serving.middleware import (
    CHAT,
    COMPLETIONS,
    EXCEPTION_HANDLERS,
    HEALTH,
    METRICS,
    MODELS,
    READY,
    Metrics,
    RequestGuard,
    ServerOptions,
    internal_error,
)
from calm_transformers.serving.openai_api import (
    ApiError,
    BadRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Prompt,
    ReadLogprobs,
    RequestT,
    TokenizeRequest,
    describe_api,
    to_event,
)
from calm_transformers.serving.sequence import GenerationResult, SequenceState, TextDelta

SEED_RANGE = 2**63  # seeds are signed 64-bit integers; the sum in `_prepare` wraps around
RECEIVE_TIMEOUT_SECONDS = 60  # for a request's headers, and again for its body; nginx's default

logger = logging.getLogger(__name__)


@dataclass
class PendingRequest:
    """A request and its sequences: `num_choices` of the first prompt, then of the next."""

    request: CompletionRequest | ChatRequest
    id: str
    started: float  # perf_counter at its arrival
    prompts: list[Prompt] = field(default_factory=list)
    sequences: list[SequenceState] = field(default_factory=list)
    # (index of a text, delta), or (index, None) when the text has ended
    events: asyncio.Queue[tuple[int, TextDelta | None]] = field(default_factory=asyncio.Queue)

    @property
    def futures(self) -> list[Future[GenerationResult]]:
        return [sequence.future for sequence in self.sequences]

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()

    def echo(self, index: int) -> str:
        """Returns the text that is put before the text of this index."""
        return self.prompts[index // self.request.num_choices].echo

    def usage(self) -> dict[str, int]:
        """Returns OpenAI's token counts of the request so far."""
        num_prompt = sum(len(prompt.ids) for prompt in self.prompts)
        num_new = sum(len(sequence.tokens) for sequence in self.sequences)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}


class EventStreamResponse(StreamingResponse):
    """A response of server-sent events that cancels the request's texts when the client disconnects."""

    def __init__(self, pending: PendingRequest, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.pending = pending

    async def __call__(self, scope, receive, send) -> None:
        # From ASGI 2.4 on Starlette expects `send` to raise when the client has disconnected; not all servers do.
        try:
            await run_until_disconnect(self.stream_response(send), receive)
        finally:
            self.pending.cancel()  # has no effect on texts that have ended


async def run_until_disconnect(coroutine: Coroutine, receive: Receive) -> bool:
    """Runs a coroutine until it ends (returns True) or the client disconnects (cancels it and returns False)."""

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    main_task, disconnect_task = asyncio.create_task(coroutine), asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait((main_task, disconnect_task), return_when=asyncio.FIRST_COMPLETED)
    finally:
        main_task.cancel()
        disconnect_task.cancel()
    if main_task.done():
        main_task.result()  # raises the coroutine's exception, if there was one
    return main_task.done()


class Endpoints:
    """The API's endpoints.

    Args:
        batcher: a batcher with a tokenizer.
        options: see `ServerOptions`.
    """

    def __init__(self, batcher: Batcher, options: ServerOptions):
        if batcher.tokenizer is None:
            raise ValueError("A server needs a tokenizer: Batcher(model, tokenizer).")
        self.batcher, self.options = batcher, options
        self.metrics = Metrics(batcher)
        self.created = int(time.time())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_fields()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model_fields())

    async def health(self, request: Request) -> Response:
        """Answers whether the server is alive: with a 503 if it must be started again."""
        self.batcher.check_healthy()
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Answers whether the server takes requests: with a 503 also while it stops."""
        self.batcher.check_open()
        return await self.health(request)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def tokenize(self, http_request: Request) -> Response:
        """Returns the tokens of a prompt or of chat messages, as vLLM does."""
        request = await self._parse(http_request, TokenizeRequest)
        tokens = await run_in_threadpool(request.tokens, self.batcher)
        return JSONResponse({"count": len(tokens), "max_model_len": self.batcher.max_length, "tokens": tokens})

    async def detokenize(self, http_request: Request) -> Response:
        request = await self._parse(http_request, DetokenizeRequest)
        return JSONResponse({"prompt": await run_in_threadpool(request.text, self.batcher)})

    async def metrics_page(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    def _model_fields(self) -> dict[str, Any]:
        return {
            "id": self.options.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "calm",
            "max_model_len": self.batcher.max_length,
        }

    async def generate(self, http_request: Request, request_class: type[CompletionRequest | ChatRequest]) -> Response:
        """Answers a completion or chat request."""
        started = time.perf_counter()
        with self.batcher.reserve(1):  # a full queue is told before any work
            pass
        request = await self._parse(http_request, request_class)
        self._check_num_texts(request)
        pending = PendingRequest(request, http_request.state.request_id, started)
        with self.batcher.reserve(request.num_prompts * request.num_choices) as enqueue:
            await run_in_threadpool(self._prepare, pending, asyncio.get_running_loop())
            if self.options.timeout_s is not None and time.perf_counter() - started > self.options.timeout_s:
                raise self._timeout_error()
            enqueue(pending.sequences)
        common_fields = {
            "id": f"{request.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.options.model_name,
        }
        if request.stream:
            events = self._stream(pending, common_fields | {"object": request.chunk_object})
            return EventStreamResponse(pending, events)
        try:
            if not await run_until_disconnect(self._wait_for_all(pending), http_request.receive):
                raise ClientDisconnect
        finally:
            pending.cancel()  # has no effect on texts that have ended
        choices = []
        for index, future in enumerate(pending.futures):
            result = future.result()
            logprobs = self._read_logprobs(request, result)
            fields = request.choice_fields(pending.echo(index) + (result.text or ""), logprobs)
            choices.append({"index": index, **fields, "finish_reason": result.finish_reason})
        fields = {"object": request.response_object, "choices": choices, "usage": pending.usage()}
        return JSONResponse(common_fields | fields)

    def _read_logprobs(
        self, request: CompletionRequest | ChatRequest, result: GenerationResult | TextDelta
    ) -> list[ReadLogprobs] | None:
        """Returns the log-probabilities with tokens as text, if the request asks for them."""
        if request.num_logprobs is None:
            return None
        text = self.batcher.token_text
        return [
            (text(each.token), each.logprob, {text(token): value for token, value in each.top.items()})
            for each in result.logprobs
        ]

    async def _parse(self, http_request: Request, request_class: type[RequestT]) -> RequestT:
        """Returns the request in the body; raises `ApiError` if it is no JSON, invalid or for another model."""
        content_type = http_request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":  # which web pages of other origins can't send unasked
            raise ApiError(415, "The request needs the header Content-Type: application/json.")
        body = await self._read_body(http_request)
        request = await run_in_threadpool(request_class.parse, body, self.options.ignore_unknown_fields)
        self._check_model(request.model)
        return request

    async def _read_body(self, http_request: Request) -> bytes:
        """Returns the request's body; raises `ApiError` if it is too large or arrives too slowly."""
        max_bytes = self.options.max_request_bytes
        timeout = min(RECEIVE_TIMEOUT_SECONDS, self.options.timeout_s or RECEIVE_TIMEOUT_SECONDS)
        body = bytearray()
        try:
            async with asyncio.timeout(timeout):
                async for part in http_request.stream():
                    body += part
                    if len(body) > max_bytes:
                        raise ApiError(413, f"The body is larger than {max_bytes} bytes.")
        except TimeoutError:
            raise ApiError(408, f"The body took more than {timeout:g} seconds to arrive.") from None
        return bytes(body)

    def _check_model(self, name: str | None) -> None:
        """Raises a 404 if a request names another model."""
        if name is not None and name != self.options.model_name:
            message = f"There is no model {name!r} here: ask for {self.options.model_name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    def _check_num_texts(self, request: CompletionRequest | ChatRequest) -> None:
        """Raises `BadRequest` for more texts than can ever run and wait together."""
        num_texts = request.num_prompts * request.num_choices
        max_texts = self.batcher.max_rows + self.batcher.max_waiting
        if num_texts > max_texts:
            param = "n" if request.num_choices > 1 else "prompt"
            raise BadRequest(f"{param}: a request may have at most {max_texts} texts, not {num_texts}.", param)

    def _prepare(self, pending: PendingRequest, loop: asyncio.AbstractEventLoop) -> None:
        """Prepares the sequences of a request, in a thread; choice i of a prompt has the request's seed + i.

        Raises:
            BadRequest: the prompts or settings are invalid, or don't fit the context.
        """
        assert self.batcher.tokenizer is not None, "see __init__"
        request = pending.request
        processor_options = request.processor_options(self.batcher.tokenizer, self.batcher.model.config.vocab_size)
        pending.prompts = request.prompts(self.batcher)
        max_tokens = self._max_tokens(request, max(len(prompt.ids) for prompt in pending.prompts))
        seed = secrets.randbelow(SEED_RANGE) if request.seed is None else request.seed

        def put_event(index: int, delta: TextDelta | None) -> None:  # called in the batcher's thread
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(pending.events.put_nowait, (index, delta))

        for index in range(len(pending.prompts) * request.num_choices):
            try:
                sequence = self.batcher.prepare(
                    pending.prompts[index // request.num_choices].ids,
                    max_new_tokens=max_tokens,
                    min_new_tokens=request.min_tokens or 0,
                    stop=request.stop or (),
                    ignore_eos=bool(request.ignore_eos),
                    seed=(seed + index % request.num_choices + SEED_RANGE) % (2 * SEED_RANGE) - SEED_RANGE,
                    on_piece=partial(put_event, index),
                    num_logprobs=request.num_logprobs,
                    **request.sampling_options(),
                    **processor_options,
                )
            except ValueError as error:
                raise BadRequest.from_value_error(error, request) from None
            sequence.future.add_done_callback(lambda _, index=index: put_event(index, None))
            pending.sequences.append(sequence)

    def _max_tokens(self, request: CompletionRequest | ChatRequest, prompt_length: int) -> int:
        """Returns the number of new tokens that a request wants, by default at most what the context leaves."""
        context, requested = self.batcher.max_length, request.max_tokens
        room = context - prompt_length
        if room < 1 or (requested or 0) > room:
            wanted = f" and {request.length_field} is {requested}" if requested else ""
            param = request.prompt_field if room < 1 else request.length_field
            message = f"{param}: the prompt has {prompt_length} tokens{wanted}, but the context has {context}."
            raise BadRequest(message, param, "context_length_exceeded")
        return requested or min(request.default_max_tokens or room, room)

    def _timeout_error(self) -> ApiError:
        return ApiError(504, f"The request took more than {self.options.timeout_s:g} seconds.")

    async def _events(self, pending: PendingRequest) -> AsyncIterator[tuple[int, TextDelta | None]]:
        """Yields the request's events until all texts have ended.

        Raises:
            ApiError: a text ended with an error, or the request timed out.
        """
        num_unfinished, is_first = len(pending.futures), True
        deadline = None if self.options.timeout_s is None else pending.started + self.options.timeout_s
        while num_unfinished:
            timeout = None if deadline is None else deadline - time.perf_counter()
            try:
                async with asyncio.timeout(timeout):
                    index, delta = await pending.events.get()
            except TimeoutError:
                raise self._timeout_error() from None
            if is_first and delta is not None:
                self.metrics.first_token_seconds.observe(time.perf_counter() - pending.started)
                is_first = False
            if delta is None:
                num_unfinished -= 1
                self._raise_if_failed(pending, index)
            yield index, delta
        self.metrics.request_seconds.observe(time.perf_counter() - pending.started)

    async def _wait_for_all(self, pending: PendingRequest) -> None:
        """Waits until all texts have ended; raises the errors of `_events`."""
        async for _ in self._events(pending):
            pass

    @staticmethod
    def _raise_if_failed(pending: PendingRequest, index: int) -> None:
        """Raises an `ApiError` if the text was cancelled or failed."""
        future = pending.sequences[index].future
        if future.cancelled():
            raise ApiError(503, "The server is stopping.")
        if (error := future.exception()) is not None:
            logger.error("A text of request %s failed.", pending.id, exc_info=error)
            raise internal_error(pending.id)

    async def _stream(self, pending: PendingRequest, common_fields: dict[str, Any]) -> AsyncIterator[str]:
        """Yields server-sent events, the last being [DONE]; errors are events, too, as the status is already sent."""
        request = pending.request
        usage: dict[str, Any] = {"usage": None} if request.includes_usage else {}

        def chunk_event(index: int, fields: dict[str, Any], finish_reason: str | None = None) -> str:
            choice = {"index": index, **fields, "finish_reason": finish_reason}
            if request.has_continuous_usage:
                usage["usage"] = pending.usage()
            return to_event(common_fields | {"choices": [choice]} | usage)

        try:
            for index in range(len(pending.futures)):
                if (fields := request.first_chunk_fields(pending.echo(index))) is not None:
                    yield chunk_event(index, fields)
            async for index, delta in self._events(pending):
                if delta is None:
                    yield chunk_event(index, request.chunk_fields(""), pending.futures[index].result().finish_reason)
                elif delta.text or delta.logprobs:
                    logprobs = self._read_logprobs(request, delta)
                    yield chunk_event(index, request.chunk_fields(delta.text or "", logprobs))
            if request.includes_usage:
                yield to_event(common_fields | {"choices": [], "usage": pending.usage()})
        except ApiError as error:
            yield to_event(error.body())
        yield "data: [DONE]\n\n"


def create_app(batcher: Batcher, options: ServerOptions) -> Starlette:
    """Returns the ASGI application; its shutdown cancels running texts and closes the batcher.

    Raises:
        ValueError: the batcher has no tokenizer.
    """
    endpoints = Endpoints(batcher, options)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.close, cancel=True)

    middleware = [Middleware(RequestGuard, options=options, metrics=endpoints.metrics)]
    if options.allowed_origins:
        cors: Any = CORSMiddleware  # pyright: ignore[reportAssignmentType]
        allowed = {"allow_methods": ["*"], "allow_headers": ["*"], "allow_private_network": True}
        allowed["expose_headers"] = ["x-request-id", "retry-after"]
        middleware.insert(0, Middleware(cors, allow_origins=options.allowed_origins, **allowed))
    routes = [
        Route(COMPLETIONS, partial(endpoints.generate, request_class=CompletionRequest), methods=["POST"]),
        Route(CHAT, partial(endpoints.generate, request_class=ChatRequest), methods=["POST"]),
        Route(MODELS, endpoints.models),
        Route(MODELS + "/{model:path}", endpoints.model),
        Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        Route("/detokenize", endpoints.detokenize, methods=["POST"]),
        Route("/version", endpoints.version),
        Route(HEALTH, endpoints.health),
        Route(READY, endpoints.ready),
        Route(METRICS, endpoints.metrics_page),
    ]
    classes = {COMPLETIONS: CompletionRequest, CHAT: ChatRequest}
    classes |= {"/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest}
    description = JSONResponse(describe_api(routes, classes))
    return Starlette(
        routes=[*routes, Route("/openapi.json", lambda _: description)],
        middleware=middleware,
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
