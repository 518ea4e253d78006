"""What the server refuses, in which words, and what a fault becomes. All in this process."""

import asyncio
import json

import pytest
from server_process import in_process
from tiny import tiny_tokenizer

from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.serving.app import ServerOptions, create_app
from calm_transformers.serving.batcher import Batcher
from calm_transformers.serving.engine import Engine
from calm_transformers.serving.openai_api import WITHOUT_EFFECT, BadRequest, ChatRequest, CompletionRequest


def post(api, path, body):
    """Status and JSON of an answer; a body that is no bytes is sent as JSON."""
    answer = api.post(path, content=body if isinstance(body, bytes) else json.dumps(body))
    return answer.status_code, answer.json()


# Bad input: a 4xx in OpenAI's shape that names the field

BAD = {
    "no JSON": (b"{", None, "The body is no JSON"),
    "nested too deep": (b"[" * 19_000, None, "The body is nested too deep"),
    "no object": ([], None, "The body must be a JSON object"),
    "no prompt": ({}, "prompt", "prompt: is missing"),
    "unknown field": ({"prompt": "a", "foo": 1}, "foo", "foo: there is no such field"),
    "unknown in options": ({"prompt": "a", "stream_options": {"x": 1}}, "stream_options", "stream_options.x"),
    "max_tokens 0": ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "max_tokens too many": (
        {"prompt": "a", "max_tokens": 10**6},
        "max_tokens",
        "the prompt has 2 tokens and max_tokens",
    ),
    "max_tokens as text": ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "valid integer"),
    "prompt too long": ({"prompt": "x" * 17_000}, "prompt", "the prompt has 17001 tokens"),
    "prompt a number": ({"prompt": 5}, "prompt", "must be a text, a list of texts, or token ids"),
    "prompt nested": ({"prompt": [["a"]]}, "prompt", "holds 'a': ids are whole numbers"),
    "prompt an empty list": ({"prompt": []}, "prompt", "is an empty list"),
    "ids outside": ({"prompt": [5, 4000]}, "prompt", "holds 4000: ids are whole numbers in 0 … 95"),
    "half a character": (b'{"prompt": "\\ud800"}', "prompt", "half a surrogate pair"),
    "temperature negative": ({"prompt": "a", "temperature": -1}, "temperature", "sampling needs a temperature in"),
    "half a character to stop at": (b'{"prompt": "a", "stop": ["\\ud800"]}', "stop", "half a surrogate pair"),
    "half a character as a field": (b'{"prompt": "a", "\\ud800": 1}', "\\ud800", "half a surrogate pair"),
    "half a character in bytes": (b'{"prompt": "\xed\xa0\x80"}', "prompt", "half a surrogate pair"),
    "half a character in a schema": (
        b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "\\ud800"}}}',
        "response_format",
        "half a surrogate pair",
    ),
    "an infinite number in a schema": (
        b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"minimum": 1e999}}}}',
        "response_format",
        "a number that is not finite",
    ),
    "temperature NaN": (b'{"prompt": "a", "temperature": NaN}', "temperature", "a number that is not finite"),
    "temperature infinite": (b'{"prompt": "a", "temperature": 1e999}', "temperature", "a number that is not finite"),
    "a whole number of 5000 digits": (
        b'{"prompt": "a", "max_tokens": 1%s}' % (b"0" * 5000),
        None,
        "The body is no JSON",
    ),
    "temperature tiny": ({"prompt": "a", "temperature": 1e-4}, "temperature", "is too few for temperature=0.0001"),
    "temperature all but 0": ({"prompt": "a", "temperature": 1e-320}, "temperature", "temperature=1e-320"),
    "seed too large": ({"prompt": "a", "seed": 2**63}, "seed", "less than"),
    "stop a number": ({"prompt": "a", "stop": 5}, "stop", "must be a text or a list of texts"),
    "stop empty": ({"prompt": "a", "stop": ["a", ""]}, "stop", "holds an empty string"),
    "stop too many": ({"prompt": "a", "stop": ["b"] * 257}, "stop", "stop: may hold 256 strings of 256 characters"),
    "n 0": ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
    "n more than fit": ({"prompt": "a", "n": 9}, "n", "9 texts are asked for at once, and 8 may be"),
    "num_candidates": (
        {"prompt": "a", "num_candidates": 10**6},
        "num_candidates",
        "patches in a step: 1000 are allowed here",
    ),
    "num_candidates of a tenth": (
        {"prompt": "a", "num_candidates": 101, "sampling_method": "exact"},
        "num_candidates",
        "may draw 1010 patches in a step: 1000 are allowed here",
    ),
    "top_p": ({"prompt": "a", "top_p": 1.1}, "top_p", "less than or equal to 1"),
    "min_p": ({"prompt": "a", "min_p": -1}, "min_p", "greater than or equal to 0"),
    "temperature 2.5": ({"prompt": "a", "temperature": 2.5}, "temperature", "in (0, 2]"),
    "frequency_penalty": ({"prompt": "a", "frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
    "repetition_penalty": ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    "logit_bias": ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "'x' is no token id in 0 … "),
    "logit_bias outside": ({"prompt": "a", "logit_bias": {"96": 1}}, "logit_bias", "is no token id in 0 … 95"),
    "logit_bias of digits": ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "logit_bias", "is no token id in"),
    "logit_bias infinite": (
        b'{"prompt": "a", "logit_bias": {"5": Infinity}}',
        "logit_bias",
        "a number that is not finite",
    ),
    "penalty infinite": (b'{"prompt": "a", "repetition_penalty": Infinity}', "repetition_penalty", "not finite"),
    "format": ({"prompt": "a", "response_format": {"type": "json"}}, "response_format", "'json_schema'"),
    "no schema": ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format", '{"schema": ...}'),
    "schema and min_tokens": (
        {"prompt": "a", "min_tokens": 3, "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "min_tokens",
        "min_tokens: a text of a response_format ends where its schema does; leave it out",
    ),
    "sampling_method": ({"prompt": "a", "sampling_method": "best"}, "sampling_method", "'batch'"),
}
ACTIVE = {
    "logprobs": True,
    "top_logprobs": 2,
    "best_of": 3,
    "suffix": "end",
    "modalities": ["audio"],
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "functions": [{}],
    "function_call": {"name": "f"},
}
BAD |= {name: ({"prompt": "a", name: value}, name, f"{name}: ") for name, value in ACTIVE.items()}
assert set(ACTIVE) == set(WITHOUT_EFFECT)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_4xx_that_names_the_field(api, case):
    body, param, sentence = BAD[case]
    status, answer = post(api, "/v1/completions", body)
    assert status == 400 and answer["error"]["param"] == param and sentence in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_a_stream_s_bad_input_is_no_event_and_the_next_request_is_served(api):
    status, answer = post(api, "/v1/completions", {"prompt": "a", "top_p": 1.1, "stream": True})
    assert status == 400 and answer["error"]["param"] == "top_p"
    assert post(api, "/v1/completions", {"prompt": "a", "max_tokens": 4})[0] == 200


@pytest.mark.parametrize("depth", [300, 970, 3000])
def test_no_depth_is_a_fault(api, depth):
    """Python's recursion limit is met in other places at other depths."""
    nested = b"[" * depth + b"]" * depth
    message = b'{"messages": [{"role": "user", "content": "a", "more": %s}], "max_tokens": 1}'
    for path, body in (("completions", b'{"prompt": %s}'), ("chat/completions", message)):
        status, answer = post(api, f"/v1/{path}", body % nested)
        assert status in (200, 400), answer


BAD_CHATS = [
    ({}, "messages: is missing"),
    ({"messages": []}, "messages: "),
    ({"messages": "hello"}, "messages: "),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role: "),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x" * 17_000}]}, "messages: the prompt has 17001 tokens"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages: holds half a surrogate pair"),
    ({"messages": [{"role": "user", "content": "a", "name": "\ud800"}]}, "messages: holds half a surrogate pair"),
]


@pytest.mark.parametrize("fields, sentence", BAD_CHATS, ids=[sentence for _, sentence in BAD_CHATS])
def test_bad_conversations(api, fields, sentence):
    status, answer = post(api, "/v1/chat/completions", fields)
    assert status == 400 and sentence in answer["error"]["message"] and answer["error"]["param"] == "messages"


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


def test_a_fault_is_an_answer_that_is_counted_and_that_pages_can_read(app_client, monkeypatch):
    def fail(*_, **__):
        raise LookupError("a fault")

    monkeypatch.setattr(app_client.batcher, "submit", fail)
    answer = app_client.post("/v1/completions", json={"prompt": "a"}, headers={"Origin": "http://page.example"})
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "The server failed: LookupError."
    assert answer.headers["access-control-allow-origin"] == "http://page.example"
    assert 'calm_requests_total{path="/v1/completions",status="500"} 1.0' in app_client.get("/metrics").text


def test_a_text_that_fails_is_a_500_that_says_why_and_health_tells_when_no_more_are_written(app_client, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_read_patches", fail)
        answer = app_client.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 500 and "RuntimeError: out of memory" in answer.json()["error"]["message"]
        answer = app_client.get("/health")
        assert (
            answer.status_code == 503
            and "failed, and so did another since: RuntimeError: out of memory." in (answer.json()["error"]["message"])
        )
    assert app_client.get("/health").status_code == 200  # it tries anew
    assert app_client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    app_client.batcher.close()
    assert app_client.get("/health").status_code == 503
    answer = app_client.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 503 and answer.json()["error"]["message"] == "The server is stopping."


def test_health_tells_that_the_thread_that_writes_is_dead_and_so_do_requests(app_client, monkeypatch):
    def fail(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(app_client.batcher, "_let_waiting_in", fail)
    assert app_client.post("/v1/completions", json={"prompt": "a"}).status_code == 500
    for answer in (app_client.get("/health"), app_client.post("/v1/completions", json={"prompt": "a"})):
        said = "No more texts can be written: RuntimeError: the device is gone."
        assert answer.status_code == 503 and answer.json()["error"]["message"] == said


def test_health_is_not_what_one_client_s_request_does(app_client, monkeypatch):
    """A text that fails by its own fault, as of its sampling."""
    next_patches = app_client.batcher.model.next_patches

    def fail(hidden, sampling, *others):
        if sampling.temperature == 1:
            raise RuntimeError("no such patch")
        return next_patches(hidden, sampling, *others)

    monkeypatch.setattr(app_client.batcher.model, "next_patches", fail)
    assert app_client.post("/v1/completions", json={"prompt": "a", "temperature": 1}).status_code == 500
    assert app_client.get("/health").status_code == 200


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_a_client_that_leaves_is_noticed_whatever_its_server_says_of_itself(tiny_folder, spec_version):
    body = json.dumps({"prompt": "a", "max_tokens": 8000, "ignore_eos": True, "stream": True}).encode()

    async def ask(app):
        has_begun, messages = asyncio.Event(), [{"type": "http.request", "body": body}]

        async def receive():
            if messages:
                return messages.pop()
            await has_begun.wait()
            return {"type": "http.disconnect"}

        async def send(message):  # goes nowhere, without an error, when the client has left
            if message.get("body"):
                has_begun.set()

        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": spec_version}, "http_version": "1.1"}
        scope |= {"method": "POST", "path": "/v1/completions", "query_string": b"", "headers": [], "scheme": "http"}
        await app(scope, receive, send)

    with Batcher(CALMForCausalLM.from_pretrained(tiny_folder), tiny_tokenizer()) as batcher:
        asyncio.run(ask(create_app(batcher, ServerOptions(model_name="tiny"))))
    assert batcher.stats().cancelled == 1


@pytest.mark.parametrize(
    "request_type, fields",
    [
        (CompletionRequest, {"prompt": [1] * 200_000 + ["a"]}),
        (ChatRequest, {"messages": [{"role": "robot"}] * 50_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text"}] * 50_000}]}),
    ],
)
def test_of_a_long_list_of_mistakes_one_is_named(request_type, fields):
    with pytest.raises(BadRequest) as refused:
        request_type.parse(json.dumps(fields).encode())
    assert len(str(refused.value)) < 200
