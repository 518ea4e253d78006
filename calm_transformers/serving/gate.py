"""Around the endpoints: who may ask, what is counted, and what each fault is answered with."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from calm_transformers.serving.batcher import Batcher, BatcherClosed, QueueFull
from calm_transformers.serving.openai_api import ApiError

PATHS = COMPLETIONS, CHAT, MODELS, HEALTH, METRICS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/health",
    "/metrics",
)
KEYLESS = (HEALTH, METRICS)
RETRY_AFTER_SECONDS = "1"
CLIENT_LEFT = 499  # nginx's number; nobody reads it
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 600)
STATS = {
    "running": (GaugeMetricFamily, "Texts that are being written."),
    "waiting": (GaugeMetricFamily, "Texts that wait for a row."),
    "finished": (CounterMetricFamily, "Texts written to their end."),
    "cancelled": (CounterMetricFamily, "Texts whose client left."),
    "failed": (CounterMetricFamily, "Texts that ended with an error."),
    "steps": (CounterMetricFamily, "Steps of the batcher."),
    "patches": (CounterMetricFamily, "Patches written."),
    "prompt_tokens": (CounterMetricFamily, "Prompt tokens read."),
    "new_tokens": (CounterMetricFamily, "Tokens written."),
    "busy_seconds": (CounterMetricFamily, "Seconds in which there was a text to write."),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """
    Args:
        model_name: the id that clients ask for.
        api_key: when set, requests need `Authorization: Bearer KEY`, but those for /health and /metrics.
        max_request_bytes: larger bodies are refused.
        timeout_s: a request that takes longer, waiting included, is ended; `None`: none is.
        allowed_origins: of web pages that may ask (CORS); "*" for any.
    """

    model_name: str
    api_key: str | None = None
    max_request_bytes: int = 2**20
    timeout_s: float | None = 600
    allowed_origins: tuple[str, ...] = ()


class Metrics(Collector):
    """The counts of one server, in the format of Prometheus; the batcher's own are read when they are asked for."""

    def __init__(self, batcher: Batcher):
        self.batcher, registry = batcher, CollectorRegistry()
        registry.register(self)
        self.registry = registry
        self.requests = Counter("calm_requests", "Requests answered.", ("path", "status"), registry=registry)
        meaning = "From a request to the first tokens of a text."
        self.first_piece = Histogram("calm_first_token_seconds", meaning, buckets=SECONDS, registry=registry)
        meaning = "From a request to its last text's end."
        self.whole = Histogram("calm_request_seconds", meaning, buckets=SECONDS, registry=registry)

    def collect(self) -> Iterator[Metric]:
        stats = self.batcher.stats()
        for name, (family, meaning) in STATS.items():
            yield family(f"calm_{name}", meaning, getattr(stats, name))

    def page(self) -> bytes:
        return generate_latest(self.registry)


class Gate:
    """Middleware: the API key, the count of answers, and an answer to faults of ours.

    Args:
        app: the application within.
        options: see `ServerOptions`.
        metrics: where answers are counted, by their paths.
    """

    def __init__(self, app: Callable, options: ServerOptions, metrics: Metrics):
        self.app, self.options, self.metrics = app, options, metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_LEFT  # until an answer has begun

        async def send_and_note(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_key(scope["path"], Request(scope).headers)
            await self.app(scope, receive, send_and_note)
        except ApiError as error:
            await error.response()(scope, receive, send_and_note)
        except Exception as error:  # answered here, where it is counted and has CORS headers
            logger.exception("A request failed.")
            if status == CLIENT_LEFT:
                failed = ApiError(500, f"The server failed: {type(error).__name__}.")
                await failed.response()(scope, receive, send_and_note)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests.labels(path, str(status)).inc()

    def _check_key(self, path: str, headers: Headers) -> None:
        if self.options.api_key is None or path in KEYLESS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = self.options.api_key.encode(errors="surrogateescape")  # as it was given; headers are latin-1
        is_right = secrets.compare_digest(given.strip().encode("latin-1"), key)
        if scheme.lower() != "bearer" or not is_right:
            sentence = "The request needs the API key: Authorization: Bearer KEY."
            raise ApiError(401, sentence, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def named(error: BaseException) -> str:
    """An error of the model's, as the end of a sentence."""
    return f"{type(error).__name__}: {error}".rstrip(".") + "."


async def answer_to(request: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            answer = error
        case HTTPException():
            sentence = f"{request.method} {request.scope['path']}: {error.detail}."
            answer = ApiError(error.status_code, sentence, headers=error.headers)
        case QueueFull():
            answer = ApiError(429, str(error), code="queue_full", headers={"Retry-After": RETRY_AFTER_SECONDS})
        case BatcherClosed():
            cause = error.__cause__
            stops = "The server is stopping."
            answer = ApiError(503, stops if cause is None else f"No more texts can be written: {named(cause)}")
        case _:  # the client has left
            return Response(status_code=CLIENT_LEFT)
    return answer.response()


HANDLERS = dict.fromkeys((ApiError, HTTPException, QueueFull, BatcherClosed, ClientDisconnect), answer_to)
