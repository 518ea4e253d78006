"""uvicorn with timeouts for slow clients, a limit on idle connections, and a graceful shutdown."""

from __future__ import annotations

import asyncio
import copy
from contextlib import suppress

import h11
import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import H11Protocol

from calm_transformers.serving.app import RECEIVE_TIMEOUT_SECONDS
from calm_transformers.serving.batcher import Batcher

KEEP_ALIVE_SECONDS = 75  # longer than the proxies' 60, so that a proxy never uses a connection as it is closed
MAX_IDLE_CONNECTIONS = 512  # with the busy ones and the backlog, below the usual limit of 1,024 open files
BACKLOG = 128
CANCEL_NOTICE_SECONDS = 5  # to send clients the error of their cancelled requests
ACCESS_LINE = '%(levelprefix)s %(client_addr).100s - "%(request_line).1000s" %(status_code)s'  # clients choose both


class Connection(H11Protocol):
    """A connection with a timeout for a request's headers; if there are too many, the one idle longest is closed."""

    header_timer: asyncio.TimerHandle | None = None
    idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        idle = [each for each in self.connections if isinstance(each, Connection) and each.is_idle]
        if idle and self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency - 1:
            # uvicorn refuses requests once the limit is reached
            min(idle, key=lambda each: each.idle_since).transport.abort()
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        self._update_header_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_header_timer()

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_header_timer()

    @property
    def is_idle(self) -> bool:
        """Whether the server waits for a request or for the rest of one."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing()

    def _update_header_timer(self) -> None:
        """Starts the timeout for the next request's headers, or cancels it once they have arrived."""
        if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
            self._cancel_header_timer()
        elif self.header_timer is None:
            self.header_timer = self.loop.call_later(RECEIVE_TIMEOUT_SECONDS, self.transport.abort)

    def _cancel_header_timer(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None


class GracefulServer(uvicorn.Server):
    """A uvicorn server that finishes running requests after SIGINT or SIGTERM, and takes no more.

    After `grace` seconds, or at a second signal, the remaining requests are cancelled, and their clients get an error.

    Args:
        app: the ASGI application.
        batcher: the batcher that the application uses.
        grace: seconds.
    """

    def __init__(self, app, batcher: Batcher, grace: int):
        logs = copy.deepcopy(LOGGING_CONFIG)
        logs["formatters"]["access"]["fmt"] = ACCESS_LINE
        config = uvicorn.Config(
            app,
            http=Connection,
            log_config=logs,
            log_level="info",
            limit_concurrency=MAX_IDLE_CONNECTIONS + batcher.max_rows + batcher.max_waiting,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            # never reached: `_cancel_after_grace` ends first
            timeout_graceful_shutdown=grace + 2 * CANCEL_NOTICE_SECONDS,
        )
        super().__init__(config)
        self.batcher, self.grace = batcher, grace
        self._second_signal = asyncio.Event()

    def handle_exit(self, sig, frame) -> None:
        """Handles a signal: the first one starts the shutdown, a second one ends the grace period."""
        if self.should_exit:
            self._second_signal.set()
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets=None) -> None:
        """Waits for running requests as uvicorn does, but cancels them after the grace period."""
        cancellation = asyncio.create_task(self._cancel_after_grace())
        await super().shutdown(sockets)
        cancellation.cancel()

    async def _cancel_after_grace(self) -> None:
        """Waits for the end of the grace period, cancels all requests, and then aborts what connections are left."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._second_signal.wait(), self.grace)
        self.batcher.close(cancel=True, wait=False)
        await asyncio.sleep(CANCEL_NOTICE_SECONDS)
        for connection in list(self.server_state.connections):  # whose clients neither send nor read
            connection.transport.abort()
