"""Around the endpoints: who may ask, how much, what is counted, and what each fault is answered with."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from calm.serving.answers import ApiError
from calm.serving.batcher import BatcherClosed, QueueFull
from calm.serving.metrics import Metrics
from calm.serving.openai_api import BadRequest

if TYPE_CHECKING:
    from calm.serving.app import ServerOptions

RETRY_AFTER_SECONDS = "1"
CLIENT_LEFT = 499  # nginx's number; nobody reads it

logger = logging.getLogger(__name__)


class Gate:
    """Middleware: the API key, the size of bodies, the count of answers.

    Args:
        app: the application within.
        options: see `ServerOptions`.
        metrics: where answers are counted.
        paths: by which they are counted; others count as one.
        keyless: paths that need no API key.
    """

    def __init__(
        self,
        app: Callable,
        options: ServerOptions,
        metrics: Metrics,
        paths: Collection[str],
        keyless: Collection[str],
    ):
        self.app, self.options, self.metrics, self.paths, self.keyless = app, options, metrics, paths, keyless

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
            self._check(scope["path"], Request(scope).headers)
            await self.app(scope, self._limited(receive), send_and_note)
        except ApiError as error:
            await error.response()(scope, receive, send_and_note)
        except Exception as error:  # a fault of ours; answered here, where it is counted and has CORS headers
            logger.exception("A request failed.")
            if status == CLIENT_LEFT:
                failed = ApiError(500, f"The server failed: {type(error).__name__}.")
                await failed.response()(scope, receive, send_and_note)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()

    def _check(self, path: str, headers: Headers) -> None:
        key = self.options.api_key
        if key is not None and path not in self.keyless:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = key.encode(
                errors="surrogateescape"
            )  # the bytes that it was given as; those of headers are latin-1
            is_right = secrets.compare_digest(given.strip().encode("latin-1"), right)
            if scheme.lower() != "bearer" or not is_right:
                sentence = "The request needs the API key: Authorization: Bearer KEY."
                raise ApiError(401, sentence, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.options.max_request_bytes:
            raise self._too_large()

    def _limited(self, receive: Callable) -> Callable:
        num_bytes = 0

        async def limited():
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.options.max_request_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is larger than {self.options.max_request_bytes} bytes, the most that is taken."
        )


def named(error: BaseException) -> str:
    """An error of the model's, as the end of a sentence."""
    return f"{type(error).__name__}: {error}".rstrip(".") + "."


async def on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def on_bad_request(_: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return ApiError(400, str(error), error.param, error.code).response()


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = f"{request.method} {request.scope['path']}: {error.detail}."
    return ApiError(error.status_code, sentence, headers=error.headers).response()


async def on_full_queue(_: Request, error: Exception) -> Response:
    return ApiError(429, str(error), code="queue_full", headers={"Retry-After": RETRY_AFTER_SECONDS}).response()


async def on_closed(_: Request, error: Exception) -> Response:
    cause = error.__cause__
    stops = "The server is stopping."
    return ApiError(503, stops if cause is None else f"No more texts can be written: {named(cause)}").response()


async def on_client_left(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


HANDLERS = {
    ApiError: on_api_error,
    BadRequest: on_bad_request,
    HTTPException: on_http_error,
    QueueFull: on_full_queue,
    BatcherClosed: on_closed,
    ClientDisconnect: on_client_left,
}
