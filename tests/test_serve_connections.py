"""Slow and idle clients of `calm serve`: they are disconnected, and others are served."""

import contextlib
import http.client
import socket
import threading
import time

import pytest
from server_process import HEAD
from tiny import tiny_model, tiny_tokenizer

from calm_transformers.serving import app, connections, serve
from calm_transformers.serving.app import ServerOptions, create_app
from calm_transformers.serving.batcher import Batcher


@pytest.fixture
def address(monkeypatch):
    """The address of a server with timeouts of half a second for head and body, and at most 4 idle connections."""
    monkeypatch.setattr(connections, "RECEIVE_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(app, "RECEIVE_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(connections, "MAX_IDLE_CONNECTIONS", 4)
    with (
        Batcher(tiny_model(), tiny_tokenizer(), max_rows=1, max_waiting=1) as batcher,
        serve.bind_socket("127.0.0.1", 0) as listening,
    ):
        address = listening.getsockname()
        server = connections.GracefulServer(create_app(batcher, ServerOptions(model_name="tiny")), batcher, grace=1)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield address
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def connected(address, sent=b""):
    with socket.create_connection(address, timeout=30) as client:
        client.sendall(sent)
        yield client


def read_answer(client):
    text = b""
    while b"}" not in text:
        text += client.recv(1000)
    return text


def health(address):
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("GET", "/health")
    return connection.getresponse().status


def is_closed(client, trickle=b""):
    """Returns whether the server closes the connection within 10 s, while the client keeps sending `trickle`."""
    deadline = time.monotonic() + 10
    client.settimeout(0.1)
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < deadline:
            try:
                if not client.recv(1000):
                    return True
            except TimeoutError:
                client.sendall(trickle)
        return False
    return True


HEALTH = b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n"


@pytest.mark.parametrize("sent, trickle", [(b"", b""), (HEAD[:9], b"a")])
def test_a_slow_head_times_out(address, sent, trickle):
    with connected(address, sent) as client:
        assert is_closed(client, trickle)


def test_a_connection_is_kept_until_the_next_head_times_out(address):
    with connected(address) as client:
        for pause in (0, 1):
            time.sleep(pause)
            client.sendall(HEALTH)
            assert read_answer(client).startswith(b"HTTP/1.1 200")
        assert is_closed(client, b"a")


def test_a_slow_body_gets_a_408_and_its_connection_is_closed(address):
    with connected(address, HEAD + b"{") as client:
        answer = read_answer(client)
        assert answer.startswith(b"HTTP/1.1 408") and b"The body took more than 0.5 seconds to arrive." in answer
        assert is_closed(client, b" ")


def test_too_many_connections_close_the_longest_idle_ones_and_busy_ones_give_a_503(address, monkeypatch):
    for module in (connections, app):
        monkeypatch.setattr(module, "RECEIVE_TIMEOUT_SECONDS", 60)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(address, part)) for part in (HEAD[:20], HEAD + b"{") * 8]
        assert health(address) == 200
        assert all(is_closed(client) for client in clients[:2])
        monkeypatch.setattr(connections.Connection, "is_idle", False)
        for _ in range(6):
            stack.enter_context(connected(address))
        assert health(address) == 503
