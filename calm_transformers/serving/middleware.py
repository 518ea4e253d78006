"""Around the endpoints: the API key, Prometheus metrics, and the answers to errors."""

from __future__ import annotations

import logging
import re
import secrets
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from calm_transformers.serving.batcher import Batcher, BatcherClosed, QueueFull, Unhealthy
from calm_transformers.serving.openai_api import ApiError

COMPLETIONS, CHAT, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"
PATHS_WITHOUT_KEY = HEALTH, READY, METRICS = "/health", "/ready", "/metrics"
PATHS = (COMPLETIONS, CHAT, MODELS, HEALTH, READY, METRICS)
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
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
        api_keys: if there are any, requests need `Authorization: Bearer KEY`, except to `PATHS_WITHOUT_KEY`.
        allowed_hosts: names in the Host header that are answered, any by default; without the others a web page whose
            name is made to resolve to this server could use it.
        max_request_bytes: larger bodies get a 413.
        timeout_s: seconds for a request, including its time in the queue; `None` for no limit.
        allowed_origins: origins of web pages that may send requests (CORS); "*" for any.
        ignore_unknown_fields: of requests, instead of answering with a 400.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_request_bytes: int = 2**20
    timeout_s: float | None = 600
    allowed_origins: tuple[str, ...] = ()
    ignore_unknown_fields: bool = False


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
    """ASGI middleware that checks host and API key, counts answers, and answers unexpected exceptions with a 500.

    Each request has an id, its x-request-id or a new one, in its answer's header and in the log of its errors.

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
        status, headers = CLIENT_CLOSED_REQUEST, Request(scope).headers  # until an answer starts
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_and_note_status(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check_host(headers.get("host", ""))
            self._check_key(scope["path"], headers)
            await self.app(scope, receive, send_and_note_status)
        except ApiError as error:
            await error.response()(scope, receive, send_and_note_status)
        except Exception:  # answered here, so that it is counted and has CORS headers
            logger.exception("Request %s failed.", request_id)
            if status == CLIENT_CLOSED_REQUEST:  # no answer has started
                await internal_error(request_id).response()(scope, receive, send_and_note_status)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests.labels(path, str(status)).inc()

    def _check_host(self, host: str) -> None:
        """Raises a 403 if only other hosts are allowed."""
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if self.options.allowed_hosts and name not in self.options.allowed_hosts:
            raise ApiError(403, f"Without an API key this server only answers to {self.options.allowed_hosts[0]}.")

    def _check_key(self, path: str, headers: Headers) -> None:
        """Raises a 401 if the path needs the API key and the headers lack it."""
        if not self.options.api_keys or path in PATHS_WITHOUT_KEY:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Bytes are compared: the environment's, and those of headers, which are decoded as latin-1.
        sent = token.strip().encode("latin-1")
        keys = [key.encode(errors="surrogateescape") for key in self.options.api_keys]
        if scheme.lower() != "bearer" or not any([secrets.compare_digest(sent, key) for key in keys]):
            message = "The request needs the API key: Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def internal_error(request_id: str) -> ApiError:
    return ApiError(500, f"Internal error; the server's log has it under the request id {request_id}.")


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
            message = "The server is stopping." if error.__cause__ is None else "Generation has stopped; see the log."
            api_error = ApiError(503, message)
        case Unhealthy():
            api_error = ApiError(503, str(error))
        case _:  # ClientDisconnect
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    return api_error.response()


HANDLED = (ApiError, HTTPException, QueueFull, BatcherClosed, Unhealthy, ClientDisconnect)
EXCEPTION_HANDLERS = dict.fromkeys(HANDLED, handle_exception)
