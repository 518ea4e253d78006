"""Around the endpoints: the API key, Prometheus metrics, and the answers to errors."""

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

COMPLETIONS, CHAT, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"
PATHS_WITHOUT_KEY = HEALTH, METRICS = "/health", "/metrics"
PATHS = (COMPLETIONS, CHAT, MODELS, HEALTH, METRICS)
RETRY_AFTER_SECONDS = "1"
CLIENT_CLOSED_REQUEST = 499  # nginx's status, for the metrics; the client has disconnected
HISTOGRAM_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 600)
STATS_METRICS = {
    "running": (GaugeMetricFamily, "Running texts."),
    "waiting": (GaugeMetricFamily, "Waiting texts."),
    "finished": (CounterMetricFamily, "Finished texts."),
    "cancelled": (CounterMetricFamily, "Texts whose client disconnected."),
    "failed": (CounterMetricFamily, "Texts that ended with an error."),
    "steps": (CounterMetricFamily, "Steps of the batcher."),
    "patches": (CounterMetricFamily, "Generated patches."),
    "prompt_tokens": (CounterMetricFamily, "Prefilled prompt tokens."),
    "new_tokens": (CounterMetricFamily, "Generated tokens."),
    "busy_seconds": (CounterMetricFamily, "Seconds spent in steps."),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """Options of the HTTP server.

    Args:
        model_name: the model's id in the API.
        api_key: if set, requests need `Authorization: Bearer KEY`, except to /health and /metrics.
        max_request_bytes: larger bodies get a 413.
        timeout_s: seconds for a request, including its time in the queue; `None` for no limit.
        allowed_origins: origins of web pages that may send requests (CORS); "*" for any.
    """

    model_name: str
    api_key: str | None = None
    max_request_bytes: int = 2**20
    timeout_s: float | None = 600
    allowed_origins: tuple[str, ...] = ()


class Metrics(Collector):
    """Prometheus metrics of one server; collecting them reads the batcher's stats."""

    def __init__(self, batcher: Batcher):
        self.batcher, registry = batcher, CollectorRegistry()
        registry.register(self)
        self.registry = registry
        self.requests = Counter("calm_requests", "Requests answered.", ("path", "status"), registry=registry)
        help_text, settings = "Time to a request's first token.", {"buckets": HISTOGRAM_BUCKETS, "registry": registry}
        self.first_token_seconds = Histogram("calm_first_token_seconds", help_text, **settings)
        self.request_seconds = Histogram("calm_request_seconds", "Time to the end of a request.", **settings)

    def collect(self) -> Iterator[Metric]:
        """Yields the batcher's stats as metrics; called by `generate_latest`."""
        stats = self.batcher.stats()
        for name, (family, help_text) in STATS_METRICS.items():
            yield family(f"calm_{name}", help_text, getattr(stats, name))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class RequestGuard:
    """ASGI middleware that checks the API key, counts answers, and answers unexpected exceptions with a 500.

    Args:
        app: the wrapped application.
        options: see `ServerOptions`.
        metrics: counts answers by path and status.
    """

    def __init__(self, app: Callable, options: ServerOptions, metrics: Metrics):
        self.app, self.options, self.metrics = app, options, metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_CLOSED_REQUEST  # until an answer starts

        async def send_and_note_status(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_key(scope["path"], Request(scope).headers)
            await self.app(scope, receive, send_and_note_status)
        except ApiError as error:
            await error.response()(scope, receive, send_and_note_status)
        except Exception as error:  # answered here, so that it is counted and has CORS headers
            logger.exception("A request failed.")
            if status == CLIENT_CLOSED_REQUEST:  # no answer has started
                internal_error = ApiError(500, f"Internal server error: {type(error).__name__}.")
                await internal_error.response()(scope, receive, send_and_note_status)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests.labels(path, str(status)).inc()

    def _check_key(self, path: str, headers: Headers) -> None:
        """Raises a 401 if the path needs the API key and the headers lack it."""
        if self.options.api_key is None or path in PATHS_WITHOUT_KEY:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Bytes are compared: the environment's, and those of headers, which are decoded as latin-1.
        key = self.options.api_key.encode(errors="surrogateescape")
        is_valid = secrets.compare_digest(token.strip().encode("latin-1"), key)
        if scheme.lower() != "bearer" or not is_valid:
            message = "The request needs the API key: Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def format_error(error: BaseException) -> str:
    """Returns the error's type and message, ended by a full stop."""
    return f"{type(error).__name__}: {error}".rstrip(".") + "."


async def handle_exception(request: Request, error: Exception) -> Response:
    """Returns the answer to an exception of `HANDLED`."""
    match error:
        case ApiError():
            api_error = error
        case HTTPException():
            message = f"{request.method} {request.scope['path']}: {error.detail}."
            api_error = ApiError(error.status_code, message, headers=error.headers)
        case QueueFull():
            api_error = ApiError(429, str(error), code="queue_full", headers={"Retry-After": RETRY_AFTER_SECONDS})
        case BatcherClosed():
            cause = error.__cause__
            message = "The server is stopping." if cause is None else f"Generation has stopped: {format_error(cause)}"
            api_error = ApiError(503, message)
        case _:  # ClientDisconnect
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    return api_error.response()


HANDLED = (ApiError, HTTPException, QueueFull, BatcherClosed, ClientDisconnect)
EXCEPTION_HANDLERS = dict.fromkeys(HANDLED, handle_exception)
