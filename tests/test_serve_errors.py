"""The server's answers to invalid requests and to internal errors, in this process."""

import json
import math
from operator import attrgetter
from unittest.mock import Mock

import pytest
import torch
from server_process import in_process

from calm_transformers.serving.openai_api import UNSUPPORTED_FIELDS


def post(api, path, body):
    answer = api.post(path, content=body if isinstance(body, bytes) else json.dumps(body))
    return answer.status_code, answer.json()


# Invalid requests: a 4xx in OpenAI's shape that names the field

HALF, INFINITE = "a lone surrogate", "a number that is not finite"
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {}}}
INVALID_FIELDS = [  # name, value, part of the message
    ("max_tokens", 10**6, "the prompt has 2 tokens and max_tokens"),
    ("prompt", "x" * 17_000, "the prompt has 17001 tokens"),
    ("prompt", [5, 4000], "holds 4000: token ids are integers in 0 … 95"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "\ud800"}}, HALF),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"minimum": math.inf}}}, INFINITE),
    ("temperature", 2.5, "sampling needs a temperature in (0, 2]"),
    ("temperature", 1e-4, "is too few for temperature=0.0001"),
    ("temperature", 1e-320, "temperature=1e-320"),
    ("stop", ["a", ""], "holds an empty string"),
    ("stop", ["b"] * 257, "stop: must be at most 256 strings of 256 characters"),
    ("n", 9, "a request may have at most 8 texts, not 9"),
    ("num_candidates", 10**6, "candidates per step: at most 1000 are allowed here"),
    ("repetition_penalty", 1e-39, "greater than or equal to 0.01"),  # infinite logits
    ("logit_bias", {"96": 1}, "is not a token id in 0 … 95"),
    ("logit_bias", {"9" * 5000: 1}, "is not a token id in"),
    ("logprobs", 1, "CALM has no logits"),
]
ACTIVE = {"best_of": 3, "suffix": "end", "modalities": ["audio"]}
ACTIVE |= {"tools": [{"type": "function"}], "tool_choice": "required", "functions": [{}], "function_call": {}}
assert set(ACTIVE) == set(UNSUPPORTED_FIELDS)
INVALID_BODIES = [  # body, field that the answer names, part of the message
    (b"{", None, "The body is not JSON"),
    (b'{"prompt": "a", "max_tokens": 1%s}' % (b"0" * 5000), None, "The body is not JSON"),
    (b"[" * 19_000, None, "The body is nested too deeply"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature", INFINITE),
    (b'{"prompt": "\xed\xa0\x80"}', "prompt", HALF),
    ({}, "prompt", "prompt: is missing"),
    ({"prompt": "a", "min_tokens": 3, "response_format": SCHEMA}, "min_tokens", "not supported with a response_for"),
    ({"prompt": "a", "num_candidates": 101, "sampling_method": "exact"}, "num_candidates", "may need 1010 candidates"),
    ({"prompt": "a", "logprobs": 1, "echo": True}, "logprobs", "not supported with echo"),
    *(({"prompt": "a", name: value}, name, sentence) for name, value, sentence in INVALID_FIELDS),
    *(({"prompt": "a", name: value}, name, f"{name}: ") for name, value in ACTIVE.items()),
]
INVALID_CHATS = [
    ({}, "messages: is missing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x" * 17_000}]}, "messages: the prompt has 17001 tokens"),
    ({"messages": [{"role": "user", "content": "a", "name": "\ud800"}]}, "messages: holds a lone surrogate"),
]
INVALID = [
    *(("completions", *case) for case in INVALID_BODIES),
    *(("chat/completions", body, "messages", sentence) for body, sentence in INVALID_CHATS),
]


@pytest.mark.parametrize("path, body, param, sentence", INVALID)
def test_an_invalid_request_is_a_400_that_names_the_field(api, path, body, param, sentence):
    status, answer = post(api, f"/v1/{path}", body)
    assert status == 400 and answer["error"]["param"] == param and sentence in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_no_nesting_depth_is_an_internal_error(api):
    """Python's recursion limit is reached in different places at different depths."""
    for depth in (300, 970, 3000):
        nested = b"[" * depth + b"]" * depth
        message = b'{"messages": [{"role": "user", "content": "a", "more": %s}], "max_tokens": 1}'
        for path, body in (("completions", b'{"prompt": %s}'), ("chat/completions", message)):
            status, answer = post(api, f"/v1/{path}", body % nested)
            assert status in (200, 400), answer


def test_extra_fields_of_messages_are_accepted(api):
    message = {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": None}], "metadata": None}
    assert post(api, "/v1/chat/completions", {"messages": [message], "max_tokens": 4})[0] == 200


def test_other_paths_methods_and_sizes(api):
    assert post(api, "/v1/embeddings", {})[0] == 404
    assert post(api, "/v1/models", {})[1]["error"]["message"].startswith("POST /v1/models: Method Not Allowed")
    status, answer = post(api, "/v1/completions", b'{"prompt": "' + b"x" * 20_000 + b'"}')
    assert status == 413 and "larger than 20000 bytes" in answer["error"]["message"]
    parts = (b"x" * 1000 for _ in range(30))  # a body without Content-Length
    assert api.post("/v1/completions", content=parts).status_code == 413


@pytest.fixture
def app_client(tiny_folder):
    """A client of a server of its own, whose batcher a test may break."""
    with in_process(tiny_folder) as client:
        yield client


BODY = {"prompt": "a"}


def test_an_internal_error_tells_the_request_s_id_and_is_counted(app_client, monkeypatch, caplog):
    monkeypatch.setattr(app_client.batcher, "prepare", Mock(side_effect=LookupError("a secret")))
    headers = {"Origin": "http://page.example", "X-Request-Id": "my-id.1"}
    answer = app_client.post("/v1/completions", json=BODY, headers=headers)
    message = "Internal error; the server's log has it under the request id my-id.1."
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, message)
    assert answer.headers["x-request-id"] == "my-id.1" and "Request my-id.1 failed" in caplog.text
    assert "a secret" in caplog.text and answer.headers["access-control-allow-origin"] == "http://page.example"
    assert 'calm_requests_total{path="/v1/completions",status="500"} 1.0' in app_client.get("/metrics").text
    answer = app_client.get("/health", headers={"X-Request-Id": "not an id"})
    assert len(answer.headers["x-request-id"]) == 32


def test_failed_steps_are_500s_and_after_three_in_a_row_the_server_is_unhealthy(app_client, monkeypatch, caplog):
    def answer(path="v1/completions"):
        got = app_client.post(f"/{path}", json=BODY) if path.startswith("v1") else app_client.get(f"/{path}")
        return got.status_code, got.json().get("error", {}).get("message", "")

    with monkeypatch.context() as patch:
        patch.setattr(app_client.batcher.model, "sample_patches", Mock(side_effect=RuntimeError("out of memory")))
        for _ in range(2):
            status, message = answer()
            assert status == 500 and message.startswith("Internal error; ") and "out of memory" in caplog.text
        assert answer("health")[0] == answer("ready")[0] == 200
        assert answer()[0] == 500
        failing = (503, "The last 3 steps have failed; see the log.")
        assert answer("health") == answer("ready") == failing
    assert answer()[0] == answer("health")[0] == answer("ready")[0] == 200


def test_a_request_s_own_errors_leave_the_server_healthy(app_client, monkeypatch):
    monkeypatch.setattr(app_client.batcher.model, "sample_patches", Mock(side_effect=ValueError("no token is left")))
    assert [app_client.post("/v1/completions", json=BODY).status_code for _ in range(4)] == [500] * 4
    assert app_client.get("/ready").status_code == 200


@pytest.mark.parametrize("place", ["sample_patches", "model.forward"])
def test_an_error_of_the_accelerator_ends_generation_at_once(app_client, monkeypatch, place):
    owner, _, method = f"batcher.model.{place}".rpartition(".")
    failing = Mock(side_effect=torch.AcceleratorError("an illegal memory access"))
    monkeypatch.setattr(attrgetter(owner)(app_client), method, failing)
    assert app_client.post("/v1/completions", json=BODY).status_code == 500
    for path in ("health", "ready"):
        assert app_client.get(f"/{path}").status_code == 503
    answer = app_client.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "Generation has stopped; see the log.")


def test_a_stopping_server_is_alive_and_not_ready(app_client):
    future = app_client.batcher.submit("a", max_new_tokens=8000, ignore_eos=True)
    app_client.batcher.close(wait=False)
    assert [app_client.get(f"/{path}").status_code for path in ("health", "ready")] == [200, 503]
    answer = app_client.post("/v1/completions", json=BODY)
    assert answer.status_code == 503 and answer.json()["error"]["message"] == "The server is stopping."
    future.cancel()


@pytest.mark.parametrize("message", [{"role": "robot"}, {"role": "user", "content": [{"type": "text"}] * 40}])
def test_one_of_many_errors_is_named(api, message):
    status, answer = post(api, "/v1/chat/completions", {"messages": [message] * 15})
    assert status == 400 and len(answer["error"]["message"]) < 200
