"""The HTTP side: OpenAI's API over a `Batcher`, as an ASGI application.

    batcher = Batcher(model, tokenizer)
    uvicorn.run(create_app(batcher, ServerOptions(model_name="my-calm")))

An answer and a stream are made of the same events: a text's pieces, and its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future, wait
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

from calm_transformers.serving.batcher import Batcher, BatcherClosed, QueueFull
from calm_transformers.serving.gate import (
    CHAT,
    COMPLETIONS,
    HANDLERS,
    HEALTH,
    METRICS,
    MODELS,
    Gate,
    Metrics,
    ServerOptions,
    named,
)
from calm_transformers.serving.openai_api import ApiError, BadRequest, ChatRequest, CompletionRequest, Prompt, event
from calm_transformers.serving.rows import Piece, Written

SEED_RANGE = 2**63
TRIAL_SECONDS = 10
CLIENT_SECONDS = 60  # for a request to arrive: its head, then its body, as nginx gives


@dataclass
class Job:
    """The texts of one request: `num_choices` of each prompt, in this order."""

    request: CompletionRequest | ChatRequest
    prompts: list[Prompt]
    started: float  # perf_counter when the request came
    rules: dict[str, Any]  # the options of its texts that act on logits
    futures: list[Future[Written]] = field(default_factory=list)
    # (text, what happened to it): a piece, or None when it has ended
    events: asyncio.Queue[tuple[int, Piece | None]] = field(default_factory=asyncio.Queue)

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()

    def echo(self, choice: int) -> str:
        return self.prompts[choice // self.request.num_choices].echo

    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self.prompts)
        new = sum(len(future.result().tokens) for future in self.futures)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class JobStream(StreamingResponse):
    """A stream of server-sent events; when its client leaves, so do the texts."""

    def __init__(self, job: Job, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job

    async def __call__(self, scope, receive, send) -> None:
        # Starlette leaves this to the server from ASGI 2.4 on, which not all that say so do.
        try:
            await client_stays(self.stream_response(send), receive)
        finally:
            self.job.cancel()


async def client_stays(work: Coroutine, receive: Receive) -> bool:
    """Lets the work go on until it ends (True), or the client of the request has left."""

    async def until_client_leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = done, _ = asyncio.create_task(work), asyncio.create_task(until_client_leaves())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    if done.done():
        done.result()
    return done.done()


class Server:
    """Requests in, events of a batcher out.

    Args:
        batcher: with a tokenizer.
        options: see `ServerOptions`.
    """

    def __init__(self, batcher: Batcher, options: ServerOptions):
        if batcher.tokenizer is None:
            raise ValueError("A server needs text: Batcher(model, tokenizer).")
        self.batcher, self.options = batcher, options
        self.metrics = Metrics(batcher)
        self.created = int(time.time())

    # endpoints

    async def completions(self, request: Request) -> Response:
        return await self.generate(request, CompletionRequest)

    async def chat(self, request: Request) -> Response:
        return await self.generate(request, ChatRequest)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        self.batcher.check_open()
        if self.batcher.last_error is not None:
            await run_in_threadpool(self._try_a_text)
        if (error := self.batcher.last_error) is not None:
            raise ApiError(503, f"The last text failed, and so did another since: {named(error)}")
        return JSONResponse({"status": "ok"})

    def _try_a_text(self) -> None:
        """Sees whether texts can be written: a failure may have been the client's, or over."""
        with contextlib.suppress(QueueFull, BatcherClosed):
            future = self.batcher.submit([0], max_new_tokens=1)
            wait([future], TRIAL_SECONDS)
            future.cancel()

    async def metrics_page(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.options.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "calm",
            "max_model_len": self.batcher.max_length,
        }

    # a request

    async def generate(self, http: Request, kind: type[CompletionRequest | ChatRequest]) -> Response:
        started = time.perf_counter()
        request = kind.parse(await self._body(http))
        self._check_model(request.model)
        self._check_number(request)
        job = await run_in_threadpool(self._prepare, request, started)
        self._submit(job)
        head = {
            "id": f"{kind.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.options.model_name,
        }
        if request.stream:
            return JobStream(job, self._stream(job, head | {"object": kind.chunk_object}))
        try:
            if not await client_stays(self._finish(job), http.receive):
                raise ClientDisconnect
        finally:
            job.cancel()
        choices = []
        for index, future in enumerate(job.futures):
            written = future.result()
            text = request.choice(job.echo(index) + (written.text or ""))
            choices.append({"index": index, **text, "finish_reason": written.finish_reason})
        return JSONResponse(head | {"object": kind.answer_object, "choices": choices, "usage": job.usage()})

    async def _body(self, http: Request) -> bytes:
        most, limit = self.options.max_request_bytes, min(CLIENT_SECONDS, self.options.timeout_s or CLIENT_SECONDS)
        body = bytearray()
        try:
            async with asyncio.timeout(limit):
                async for part in http.stream():
                    body += part
                    if len(body) > most:
                        raise ApiError(413, f"The body is larger than {most} bytes, the most that is taken.")
        except TimeoutError:
            raise ApiError(408, f"The body took more than {limit:g} seconds to arrive.") from None
        return bytes(body)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.options.model_name:
            raise ApiError(
                404,
                f"There is no model {name!r} here: ask for {self.options.model_name!r}.",
                "model",
                "model_not_found",
            )

    def _check_number(self, request: CompletionRequest | ChatRequest) -> None:
        num_texts, most = request.num_prompts * request.num_choices, self.batcher.max_rows + self.batcher.max_waiting
        if num_texts > most:
            name = "n" if request.num_choices > 1 else "prompt"
            raise BadRequest(f"{name}: {num_texts} texts are asked for at once, and {most} may be.", name)

    def _prepare(self, request: CompletionRequest | ChatRequest, started: float) -> Job:
        assert self.batcher.tokenizer is not None, "see create_app"
        rules = request.rules(self.batcher.tokenizer, self.batcher.model.config.vocab_size)
        job = Job(request, request.prompts(self.batcher), started, rules)
        room = min(self.batcher.max_length - len(prompt.ids) for prompt in job.prompts)
        wanted = request.max_tokens
        if room < 1 or (wanted or 0) > room:
            asked = f" and {request.length_field} is {wanted}" if wanted else ""
            name, context = (request.length_field if room > 0 else request.prompt_field), self.batcher.max_length
            raise BadRequest(
                f"{name}: the prompt has {context - room} tokens{asked}, but the context holds {context} of both.",
                name,
                "context_length_exceeded",
            )
        job.request.max_tokens = wanted or min(request.default_max_tokens or room, room)
        return job

    def _submit(self, job: Job) -> None:
        """Submits all texts, or cancels those submitted. The seed of a prompt's choice i is the request's + i."""
        request, loop = job.request, asyncio.get_running_loop()
        num_texts = len(job.prompts) * request.num_choices
        seed = secrets.randbelow(SEED_RANGE) if request.seed is None else request.seed

        def tell(index: int, event: Piece | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(job.events.put_nowait, (index, event))

        try:
            for index in range(num_texts):
                future = self.batcher.submit(
                    job.prompts[index // request.num_choices].ids,
                    max_new_tokens=request.max_tokens,
                    min_new_tokens=request.min_tokens or 0,
                    stop=request.stop or (),
                    ignore_eos=bool(request.ignore_eos),
                    seed=(seed + index % request.num_choices + SEED_RANGE) % (2 * SEED_RANGE) - SEED_RANGE,
                    on_piece=partial(tell, index),
                    **request.sampling(),
                    **job.rules,
                )
                job.futures.append(future)
                future.add_done_callback(lambda _, index=index: tell(index, None))
        except (ValueError, QueueFull, BatcherClosed) as error:
            job.cancel()
            if isinstance(error, ValueError):
                raise BadRequest.of(error, request) from None
            raise

    async def _events(self, job: Job) -> AsyncIterator[tuple[int, Piece | None]]:
        """What happens to the texts until all have ended.

        Raises:
            ApiError: a text ended with an error, or the time is over.
        """
        num_open, is_first = len(job.futures), True
        deadline = None if self.options.timeout_s is None else job.started + self.options.timeout_s
        while num_open:
            left = None if deadline is None else deadline - time.perf_counter()
            try:
                index, event = await asyncio.wait_for(job.events.get(), left)
            except TimeoutError:
                sentence = f"The request took more than {self.options.timeout_s:g} seconds."
                raise ApiError(504, sentence) from None
            if is_first and event is not None:
                self.metrics.first_piece.observe(time.perf_counter() - job.started)
                is_first = False
            if event is None:
                num_open -= 1
                self._check_end(job.futures[index])
            yield index, event
        self.metrics.whole.observe(time.perf_counter() - job.started)

    async def _finish(self, job: Job) -> None:
        async for _ in self._events(job):
            pass

    @staticmethod
    def _check_end(future: Future[Written]) -> None:
        if future.cancelled():
            raise ApiError(503, "The server is stopping.")
        error = future.exception()
        if error is not None:
            raise ApiError(500, f"The text could not be written: {named(error)}")

    async def _stream(self, job: Job, head: dict[str, Any]) -> AsyncIterator[str]:
        """Server-sent events, ended by [DONE]. What goes wrong now that the status is sent is an event, too."""
        request = job.request
        usage = {"usage": None} if request.includes_usage else {}

        def chunk(index: int, text: dict[str, Any], reason: str | None = None) -> str:
            return event(head | {"choices": [{"index": index, **text, "finish_reason": reason}]} | usage)

        try:
            for index in range(len(job.futures)):
                opening = request.opening(job.echo(index))
                if opening is not None:
                    yield chunk(index, opening)
            async for index, piece in self._events(job):
                if piece is None:
                    yield chunk(index, request.delta(""), job.futures[index].result().finish_reason)
                elif piece.text:
                    yield chunk(index, request.delta(piece.text))
            if request.includes_usage:
                yield event(head | {"choices": [], "usage": job.usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield event(error.body())


def create_app(batcher: Batcher, options: ServerOptions) -> Starlette:
    """The application. It closes the batcher when it is shut down; texts that are still being written are cancelled.

    Raises:
        ValueError: a batcher without a tokenizer.
    """
    server = Server(batcher, options)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.close, cancel=True)

    middleware = [Middleware(Gate, options=options, metrics=server.metrics)]
    if options.allowed_origins:
        cors: Any = CORSMiddleware  # pyright: ignore[reportAssignmentType]
        allowed = {"allow_methods": ["*"], "allow_headers": ["*"], "allow_private_network": True}
        middleware.insert(0, Middleware(cors, allow_origins=options.allowed_origins, **allowed))
    return Starlette(
        routes=[
            Route(COMPLETIONS, server.completions, methods=["POST"]),
            Route(CHAT, server.chat, methods=["POST"]),
            Route(MODELS, server.models),
            Route(MODELS + "/{model:path}", server.model),
            Route(HEALTH, server.health),
            Route(METRICS, server.metrics_page),
        ],
        middleware=middleware,
        exception_handlers=HANDLERS,
        lifespan=lifespan,
    )
