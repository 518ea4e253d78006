"""uvicorn with what it lacks: an end to clients that keep it waiting, room for others beside them, a stop in order."""

from __future__ import annotations

import asyncio
import copy
from contextlib import suppress

import h11
import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import H11Protocol

from calm_transformers.serving.app import CLIENT_SECONDS
from calm_transformers.serving.batcher import Batcher

KEEP_ALIVE_SECONDS = 75  # longer than proxies keep theirs, which is 60 by default: they must be first to close one
MOST_IDLE_CONNECTIONS = 512  # with the busy ones and a backlog, below the 1,024 files that a process may open
BACKLOG = 128
SECONDS_TO_TELL = 5  # clients that their texts are cancelled
ACCESS_LINE = '%(levelprefix)s %(client_addr).100s - "%(request_line).1000s" %(status_code)s'  # both are the client's


class Connection(H11Protocol):
    """A connection that is closed when a request's head takes long, or when it's the one idle longest of too many."""

    head_timer: asyncio.TimerHandle | None = None
    idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        idle = [each for each in self.connections if isinstance(each, Connection) and each.is_idle]
        if idle and self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency - 1:
            min(idle, key=lambda each: each.idle_since).transport.abort()
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        self._limit_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_head()

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_limit()

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request, or for the rest of one."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing()

    def _limit_head(self) -> None:
        """Gives a head its time, from the connection's beginning or its own first byte on."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_limit()
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(CLIENT_SECONDS, self.transport.abort)

    def _end_limit(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None


class Server(uvicorn.Server):
    """Takes no more requests once it's told to stop, and ends when those begun have ended.

    What isn't written `grace` seconds later, or when it's told again, is cancelled: its clients are told so.

    Args:
        app: the application.
        batcher: what it writes with.
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
            limit_concurrency=MOST_IDLE_CONNECTIONS + batcher.max_rows + batcher.max_waiting,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=grace + 2 * SECONDS_TO_TELL,  # never, as `_end` takes less
        )
        super().__init__(config)
        self.batcher, self.grace = batcher, grace
        self._is_told_again = asyncio.Event()

    def handle_exit(self, sig, frame) -> None:
        if self.should_exit:
            self._is_told_again.set()
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets=None) -> None:
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_told_again.wait(), self.grace)
        self.batcher.close(cancel=True, wait=False)
        await asyncio.sleep(SECONDS_TO_TELL)
        for connection in list(self.server_state.connections):  # of clients that don't send or don't read
            connection.transport.abort()
