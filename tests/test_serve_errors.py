"""What the server refuses, in which words, and what a fault becomes. All in this process."""

import json
import math

import pytest
from server_process import in_process

from calm_transformers.serving.openai_api import WITHOUT_EFFECT


def post(api, path, body):
    """Status and JSON of an answer; a body that is no bytes is sent as JSON."""
    answer = api.post(path, content=body if isinstance(body, bytes) else json.dumps(body))
    return answer.status_code, answer.json()


# Bad input: a 4xx in OpenAI's shape that names the field

HALF, INFINITE = "half a surrogate pair", "a number that is not finite"
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {}}}
FIELDS = [  # beside a prompt, and what is said of it
    ("foo", 1, "foo: there is no such field"),
    ("stream_options", {"x": 1}, "stream_options.x"),
    ("max_tokens", 0, "greater than or equal to 1"),
    ("max_tokens", 10**6, "the prompt has 2 tokens and max_tokens"),
    ("max_tokens", "5", "valid integer"),
    ("prompt", "x" * 17_000, "the prompt has 17001 tokens"),
    ("prompt", [["a"]], "holds 'a': ids are whole numbers"),
    ("prompt", [], "is an empty list"),
    ("prompt", [5, 4000], "holds 4000: ids are whole numbers in 0 … 95"),
    ("prompt", "\ud800", HALF),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "\ud800"}}, HALF),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"minimum": math.inf}}}, INFINITE),
    ("response_format", {"type": "json_schema"}, '{"schema": ...}'),
    ("temperature", math.nan, INFINITE),
    ("temperature", 2.5, "sampling needs a temperature in (0, 2]"),
    ("temperature", 1e-4, "is too few for temperature=0.0001"),
    ("temperature", 1e-320, "temperature=1e-320"),
    ("seed", 2**63, "less than"),
    ("stop", 5, "must be a text or a list of texts"),
    ("stop", ["a", ""], "holds an empty string"),
    ("stop", ["b"] * 257, "stop: may hold 256 strings of 256 characters"),
    ("n", 9, "9 texts are asked for at once, and 8 may be"),
    ("num_candidates", 10**6, "patches in a step: 1000 are allowed here"),
    ("frequency_penalty", 3, "less than or equal to 2"),
    ("repetition_penalty", 0, "greater than 0"),
    ("logit_bias", {"96": 1}, "is no token id in 0 … 95"),
    ("logit_bias", {"9" * 5000: 1}, "is no token id in"),
    ("logit_bias", {"5": math.inf}, INFINITE),
    ("sampling_method", "best", "'batch'"),
]
ACTIVE = {"logprobs": True, "top_logprobs": 2, "best_of": 3, "suffix": "end", "modalities": ["audio"]}
ACTIVE |= {"tools": [{"type": "function"}], "tool_choice": "required", "functions": [{}], "function_call": {}}
assert set(ACTIVE) == set(WITHOUT_EFFECT)
BODIES = [  # the field named, and what is said of it
    (b"{", None, "The body is no JSON"),
    (b'{"prompt": "a", "max_tokens": 1%s}' % (b"0" * 5000), None, "The body is no JSON"),
    (b"[" * 19_000, None, "The body is nested too deep"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature", INFINITE),
    (b'{"prompt": "\xed\xa0\x80"}', "prompt", HALF),
    (b'{"prompt": "a", "\\ud800": 1}', "\\ud800", HALF),
    ([], None, "The body must be a JSON object"),
    ({}, "prompt", "prompt: is missing"),
    ({"prompt": "a", "min_tokens": 3, "response_format": SCHEMA}, "min_tokens", "ends where its schema does"),
    ({"prompt": "a", "num_candidates": 101, "sampling_method": "exact"}, "num_candidates", "may draw 1010 patches"),
    ({"prompt": "a", "top_p": 1.1, "stream": True}, "top_p", "less than or equal to 1"),  # is no event
    *(({"prompt": "a", name: value}, name, sentence) for name, value, sentence in FIELDS),
    *(({"prompt": "a", name: value}, name, f"{name}: ") for name, value in ACTIVE.items()),
]
OF_CHATS = [
    ({}, "messages: is missing"),
    ({"messages": []}, "messages: "),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role: "),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x" * 17_000}]}, "messages: the prompt has 17001 tokens"),
    ({"messages": [{"role": "user", "content": "a", "name": "\ud800"}]}, "messages: holds half a surrogate pair"),
]
BAD = [
    *(("completions", *case) for case in BODIES),
    *(("chat/completions", body, "messages", sentence) for body, sentence in OF_CHATS),
]


@pytest.mark.parametrize("path, body, param, sentence", BAD)
def test_bad_input_is_a_4xx_that_names_the_field(api, path, body, param, sentence):
    status, answer = post(api, f"/v1/{path}", body)
    assert status == 400 and answer["error"]["param"] == param and sentence in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_no_depth_is_a_fault(api):
    """Python's recursion limit is met in other places at other depths."""
    for depth in (300, 970, 3000):
        nested = b"[" * depth + b"]" * depth
        message = b'{"messages": [{"role": "user", "content": "a", "more": %s}], "max_tokens": 1}'
        for path, body in (("completions", b'{"prompt": %s}'), ("chat/completions", message)):
            status, answer = post(api, f"/v1/{path}", body % nested)
            assert status in (200, 400), answer


def test_what_clients_add_to_messages_is_no_error(api):
    message = {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": None}], "metadata": None}
    assert post(api, "/v1/chat/completions", {"messages": [message], "max_tokens": 4})[0] == 200


def test_other_paths_methods_and_sizes(api):
    assert post(api, "/v1/embeddings", {})[0] == 404
    assert post(api, "/v1/models", {})[1]["error"]["message"].startswith("POST /v1/models: Method Not Allowed")
    status, answer = post(api, "/v1/completions", b'{"prompt": "' + b"x" * 20_000 + b'"}')
    assert status == 413 and "larger than 20000 bytes" in answer["error"]["message"]
    parts = (b"x" * 1000 for _ in range(30))  # a body that doesn't say its size
    assert api.post("/v1/completions", content=parts).status_code == 413


# Faults


@pytest.fixture
def app_client(tiny_folder):
    """A client of its own, for what breaks a batcher."""
    with in_process(tiny_folder) as client:
        yield client


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_fault_is_an_answer_that_is_counted_and_that_pages_can_read(app_client, monkeypatch):
    monkeypatch.setattr(app_client.batcher, "submit", failing(LookupError("a fault")))
    answer = app_client.post("/v1/completions", json={"prompt": "a"}, headers={"Origin": "http://page.example"})
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "The server failed: LookupError."
    assert answer.headers["access-control-allow-origin"] == "http://page.example"
    assert 'calm_requests_total{path="/v1/completions",status="500"} 1.0' in app_client.get("/metrics").text


def test_a_text_that_fails_is_a_500_that_says_why_and_health_tells_when_no_more_are_written(app_client, monkeypatch):
    def answer(path="completions"):
        """Status and sentence, if it is an error."""
        body = {"prompt": "a"}
        got = app_client.get("/health") if path == "health" else app_client.post("/v1/completions", json=body)
        return got.status_code, got.json().get("error", {}).get("message", "")

    with monkeypatch.context() as patch:
        patch.setattr(app_client.batcher.model, "sample_patches", failing(RuntimeError("out of memory")))
        assert answer() == (500, "The text could not be written: RuntimeError: out of memory.")
        said = "The last text failed, and so did another since: RuntimeError: out of memory."
        assert answer("health") == (503, said)
    assert answer("health")[0] == 200  # it tries anew: the fault may have been that text's alone
    assert answer()[0] == 200
    with monkeypatch.context() as patch:
        patch.setattr(app_client.batcher, "_let_waiting_in", failing(RuntimeError("the device is gone")))
        assert answer()[0] == 500
        for path in ("health", "completions"):
            assert answer(path) == (503, "No more texts can be written: RuntimeError: the device is gone.")


def test_a_server_that_stops_says_so(app_client):
    app_client.batcher.close()
    assert app_client.get("/health").status_code == 503
    answer = app_client.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 503 and answer.json()["error"]["message"] == "The server is stopping."


@pytest.mark.parametrize("message", [{"role": "robot"}, {"role": "user", "content": [{"type": "text"}] * 40}])
def test_of_a_long_list_of_mistakes_one_is_named(api, message):
    status, answer = post(api, "/v1/chat/completions", {"messages": [message] * 15})
    assert status == 400 and len(answer["error"]["message"]) < 200
