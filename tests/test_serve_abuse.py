"""A running server under hostile clients keeps answering others; that nothing of it grows shows test_serve_soak.py."""

import contextlib
import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from server_process import running_server

JSON = {"Content-Type": "application/json"}
SMALL = {"prompt": "a", "max_tokens": 4, "seed": 0}
HEAVIEST = {  # at every limit
    **{"prompt": "a" * 2000, "max_tokens": 2, "n": 80, "stop": [f"{i:03}" + "s" * 253 for i in range(256)]},
    **{"logit_bias": {str(i % 96): 1 for i in range(96)}, "temperature": 0.5},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    with running_server(tiny_folder, tmp_path_factory.mktemp("abused"), "--model_name", "tiny") as server:
        yield server


def send(server, body, headers=JSON, method="POST", path="/v1/completions"):
    """Sends a request as it is, and returns the status and body of the answer."""
    with contextlib.closing(http.client.HTTPConnection(server.address, timeout=60)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def raw(server, sent):
    """Sends bytes and returns the first of the answer; b"" if the connection is closed without one."""
    with socket.create_connection(server.address.split(":"), timeout=60) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
            return client.recv(1000)
    return b""


def test_web_pages_of_other_origins_cannot_use_a_local_server(server):
    for headers, status in (  # what a page of another origin can send without asking
        ({"Content-Type": "text/plain"}, 415),
        ({**JSON, "Host": "rebound.example:8000"}, 403),
        ({**JSON, "Host": "127.0.0.1.evil.example"}, 403),
        ({**JSON, "Host": "["}, 403),
        ({"Content-Type": "application/json; charset=utf-8", "Host": "localhost"}, 200),
        ({**JSON, "Host": "[::1]:8000"}, 200),
    ):
        assert send(server, json.dumps(SMALL), headers)[0] == status


def test_broken_bodies_are_errors_of_the_client(server):
    schema = {"type": "json_schema", "json_schema": {"schema": {"description": "d" * 70_000, "type": "object"}}}
    fields = {"logit_bias": {str(i): 1 for i in range(1025)}, "n": 129, "response_format": schema}
    bodies = [json.dumps({**SMALL, name: value}).encode() for name, value in fields.items()]
    for body in (b"\xff", b"[" * 100_000, *bodies):
        status, answer = send(server, body)
        assert status == 400 and json.loads(answer)["error"]["type"] == "invalid_request_error", (body[:50], answer)
    assert send(server, b" " * (2**20 + 1))[0] == 413
    assert "Traceback" not in server.log.read_text()


HEAVY = [  # path, body, status
    ("/v1/completions", HEAVIEST, 200),
    ("/detokenize", {"tokens": [""] * 200_000}, 400),
    ("/v1/completions", {**SMALL, "logit_bias": {str(i): 1000 for i in range(60_000)}}, 400),
    ("/v1/completions", {**SMALL, **{f"unknown{i}": 1 for i in range(40_000)}}, 400),
]


@pytest.mark.parametrize("path, body, status", HEAVY)
def test_the_heaviest_requests_do_not_hold_up_others(server, path, body, status):
    """80 texts with 256 stop strings each are prepared in a thread; of many errors only the first is made."""
    with ThreadPoolExecutor(1) as pool:
        heavy, waits = pool.submit(send, server, json.dumps(body), path=path), []
        while not heavy.done():
            start = time.monotonic()
            assert send(server, None, {}, "GET", "/health")[0] == 200
            waits.append(time.monotonic() - start)
        assert heavy.result()[0] == status
    assert max(waits) < 0.5, max(waits)


def test_a_full_queue_refuses_before_any_work(server):
    long = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "n": 80}
    with contextlib.closing(server.connect(long)):
        server.wait_for_metric("calm_running", 16)
        assert send(server, b"[" * 1000)[0] == 429  # not even read
    server.wait_for_metric("calm_running", 0)


def test_pipelined_and_oversized_heads(server):
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw(server, health * 100).startswith(b"HTTP/1.1 200")
    assert raw(server, b"GET / HTTP/1.1\r\nX: " + b"x" * 2**20).split(b" ")[1:2] in ([b"400"], [b"431"], [])
    many = b"a: b\r\n" * 20_000
    assert raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n")[:12] != b"HTTP/1.1 200"
    assert raw(server, b"\x16\x03\x01\x00").split(b" ")[1:2] in ([b"400"], [])
