"""Clients that keep `calm serve` waiting, at their head or body, alone or many: they are left, others served."""

import contextlib
import http.client
import socket
import threading
import time

import pytest
from tiny import tiny_model, tiny_tokenizer

from calm_transformers.serving import app, connections, serve
from calm_transformers.serving.app import ServerOptions, create_app
from calm_transformers.serving.batcher import Batcher

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 50\r\n\r\n"


@pytest.fixture
def address(monkeypatch):
    """Of a server in this process that gives a head, and then a body, half a second, and holds 4 idle connections."""
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 0.5)
    monkeypatch.setattr(app, "CLIENT_SECONDS", 0.5)
    monkeypatch.setattr(connections, "MOST_IDLE_CONNECTIONS", 4)
    with (
        Batcher(tiny_model(), tiny_tokenizer(), max_rows=1, max_waiting=1) as batcher,
        serve.bind_socket("127.0.0.1", 0) as listening,
    ):
        address = listening.getsockname()
        server = connections.Server(create_app(batcher, ServerOptions(model_name="tiny")), batcher, grace=1)
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


def answer(client):
    """What comes until a JSON body has."""
    text = b""
    while b"}" not in text:
        text += client.recv(1000)
    return text


def health(address):
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("GET", "/health")
    return connection.getresponse().status


def is_closed(client, trickle=b""):
    """Whether a client that sends a byte now and then is left, which has 10 seconds to happen."""
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
def test_a_head_has_its_time_however_it_comes(address, sent, trickle):
    with connected(address, sent) as client:
        assert is_closed(client, trickle)


def test_so_has_the_next_one_of_a_connection_which_is_kept_until_then(address):
    with connected(address) as client:
        for pause in (0, 1):
            time.sleep(pause)
            client.sendall(HEALTH)
            assert answer(client).startswith(b"HTTP/1.1 200")
        assert is_closed(client, b"a")


def test_a_body_has_its_time_and_is_told_so_and_a_refused_one_has_no_more(address):
    with connected(address, HEAD + b"{") as client:
        said = answer(client)
        assert said.startswith(b"HTTP/1.1 408") and b"The body took more than 0.5 seconds to arrive." in said
        assert is_closed(client, b" ")


def test_of_too_many_connections_those_that_wait_longest_make_room_and_busy_ones_are_a_503(address, monkeypatch):
    for module in (connections, app):
        monkeypatch.setattr(module, "CLIENT_SECONDS", 60)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(address, part)) for part in (HEAD[:20], HEAD + b"{") * 8]
        assert health(address) == 200
        assert all(is_closed(client) for client in clients[:2])
        monkeypatch.setattr(connections.Connection, "is_idle", False)
        for _ in range(6):
            stack.enter_context(connected(address))
        assert health(address) == 503
