"""The server: its answers to the official client, disconnecting clients, its shutdown and its command."""

import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import commands
import openai
import pytest
import torch
from commands import ROOT
from evaluation_folder import tiny_llama
from openai import OpenAI
from server_process import HEAD, SECONDS, in_process, running, running_server
from starlette.testclient import TestClient
from tiny import tiny_model, tiny_tokenizer

import calm_transformers
from calm_transformers.command_line import InputError
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.serving import serve
from calm_transformers.serving.app import ServerOptions, create_app
from calm_transformers.serving.openai_api import CountPenalty

PROMPT = "Once upon a time"
LONG = {"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(api):
    return OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=api)


@pytest.fixture
def completions(client):
    return partial(client.completions.create, model="tiny", prompt=PROMPT, max_tokens=24, seed=0)


@pytest.fixture
def chat(client):
    def ask(*texts, **fields):
        messages = [{"role": "user", "content": text} for text in texts]
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, seed=0, **fields)

    return ask


def streamed(chunks):
    texts = {}
    for chunk in chunks:
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    return [texts[index] for index in sorted(texts)]


@pytest.fixture(scope="module")
def generated(tiny_folder):
    """A function that returns the completion of the prompt by `generate` with seed 3."""
    model, tokenizer = CALMForCausalLM.from_pretrained(tiny_folder), tiny_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def generate(**settings):
        output = model.generate(ids, generator=[torch.Generator().manual_seed(3)], max_new_tokens=24, **settings)
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    return generate


@pytest.fixture(scope="module")
def expected(generated):
    """The completion without sampling; both endpoints have the same prompt ids."""
    return generated(do_sample=False)


# With the official client


def test_completions_are_those_of_generate(completions, expected):
    answer = completions(temperature=0)
    assert answer.choices[0].text == expected
    assert answer.usage.prompt_tokens == 1 + len(PROMPT) and answer.usage.total_tokens == 1 + len(PROMPT) + 24
    assert answer.object == "text_completion" and answer.choices[0].finish_reason == "length"


def test_chat_completions_are_those_of_generate(chat, expected):
    answer = chat(PROMPT, temperature=0)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    parts = [{"type": "text", "text": PROMPT[:4]}, {"type": "text", "text": PROMPT[4:8]}]
    assert chat(parts, PROMPT[8:], temperature=0, max_completion_tokens=24).choices[0].message.content == expected


def test_a_stream_adds_up_to_the_answer(completions, chat, expected):
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = completions(temperature=0, **usage)
    deltas = [chunk.choices[0].text for chunk in chunks]
    assert "".join(deltas) == expected and len([delta for delta in deltas if delta]) > 4
    assert chunks[-1].choices[0].finish_reason == "length" and {chunk.id for chunk in chunks} == {last.id}
    assert last.choices == [] and last.usage.completion_tokens == 24
    *chunks, last = chat(PROMPT, temperature=0, **usage)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length" and last.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in completions(stream=True))


def test_log_probabilities_are_those_of_the_logits(tmp_path):
    """After BOS alone patches begin where those of `logits` do. Streamed ones are the same, and chat's."""
    model, tokenizer = tiny_model("token_chain"), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    with in_process(tmp_path) as api:
        client = OpenAI(base_url="http://testserver/v1", api_key="none", http_client=api)
        request = {"model": "tiny", "prompt": "", "max_tokens": 10, "temperature": 0.5, "logprobs": 2}
        request |= {"seed": 0, "extra_body": {"ignore_eos": True}}
        found = client.completions.create(**request).choices[0].logprobs
        chunks = list(client.completions.create(**request, stream=True))
        fields = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 3}
        chat = client.chat.completions.create(model="tiny", max_tokens=6, seed=0, **fields).choices[0].logprobs.content
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [value for part in parts for value in part.token_logprobs] == found.token_logprobs
    ids = tokenizer.convert_tokens_to_ids(found.tokens)
    log_p = model(torch.tensor([[1, *ids]])).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(torch.tensor(found.token_logprobs), log_p[range(10), ids], rtol=1e-4, atol=1e-4)
    for at, top in zip(log_p, found.top_logprobs, strict=True):
        assert list(top) == tokenizer.convert_ids_to_tokens(at.topk(2).indices.tolist())
    assert 0 < len(chat) <= 6 and all(len(entry.top_logprobs) == 3 for entry in chat)
    assert bytes(chat[0].bytes).decode() == chat[0].token


def test_unicode_line_separators_do_not_split_events(api):
    prompt = "a\x85b\u2028c\u2029d"
    answer = api.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, "echo": True, "stream": True})
    *events, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    texts = [json.loads(event)["choices"][0]["text"] for event in events]
    assert texts[0] == prompt and done == "[DONE]"
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "no-cache" in answer.headers["cache-control"]


def test_the_defaults_of_clients_are_accepted(client, chat, completions):
    assert client.completions.create(model="tiny", prompt=PROMPT).usage.completion_tokens <= 16
    assert client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}]).usage
    unfiltered = completions(seed=3, temperature=1).choices[0].text
    assert completions(seed=3, temperature=1, extra_body={"top_k": -1, "min_p": 0}).choices[0].text == unfiltered
    neutral = {"temperature": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "logit_bias": {}}
    assert completions(**neutral, best_of=1, suffix="").choices[0].text
    ignored = {"user": "me", "store": False, "metadata": {"a": "b"}, "tools": [], "response_format": {"type": "text"}}
    assert chat("a", **neutral, **ignored, logprobs=False).choices[0].message.content


def test_n_choices_of_each_prompt(completions):
    answer = completions(prompt=[PROMPT, "a"], n=2, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = [completions(prompt=p, seed=s).choices[0].text for p in (PROMPT, "a") for s in (7, 8)]
    assert [choice.text for choice in answer.choices] == alone
    assert answer.usage.prompt_tokens == 1 + len(PROMPT) + 2
    assert streamed(completions(prompt=[PROMPT, "a"], n=2, seed=7, stream=True)) == alone


def test_prompts_as_ids_echo_and_an_empty_prompt(completions):
    ids = tiny_tokenizer()(PROMPT)["input_ids"]
    text = completions(prompt=ids, seed=1).choices[0].text
    assert completions(prompt=[ids], seed=1, echo=True).choices[0].text == PROMPT + text
    assert streamed(completions(seed=1, echo=True, stream=True)) == [PROMPT + text]
    assert completions(prompt="", seed=1).choices[0].text == completions(prompt=[1], seed=1).choices[0].text


def test_stop_lists(completions):
    fields = {"seed": 2, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    whole = completions(**fields).choices[0].text
    stop = whole[20:22]
    answer = completions(**fields, stop=[f"never {i}" for i in range(99)] + [stop]).choices[0]
    assert answer.text == whole[: whole.index(stop)] and answer.finish_reason == "stop"
    assert streamed(completions(**fields, stop=stop, stream=True)) == [whole[: whole.index(stop)]]


GENERATION_FIELDS = [  # fields of a request, settings of `generate` if they differ
    ({"num_candidates": 7, "sampling_method": "batch"}, {}),
    *(({name: value, "temperature": 1.0}, {}) for name, value in (("top_p", 0.3), ("top_k", 3), ("min_p", 0.5))),
    ({"repetition_penalty": 4.0}, {}),
    ({"logit_bias": {"40": 100, "50": -100}}, {"sequence_bias": {(40,): 100.0, (50,): -100.0}}),
    ({"frequency_penalty": 2, "presence_penalty": 1.5}, {"logits_processor": [CountPenalty(2.0, 1.5)]}),
]


@pytest.mark.parametrize("fields, settings", GENERATION_FIELDS)
def test_generation_fields_do_what_generate_does(completions, generated, fields, settings):
    text = generated(min_new_tokens=24, **settings or fields)
    bodies = [{"seed": 3, "extra_body": {"min_tokens": 24, **more}} for more in ({}, fields)]
    default, changed = (completions(**body).choices[0].text for body in bodies)
    assert changed == text != default
    if "logit_bias" in fields:
        assert set(text) == {tiny_tokenizer().decode([40])}


def test_count_penalties_by_hand():
    """Prompt [5, 5]; after it, 7 occurs twice and 5 once in the first row, 6 three times in the second."""
    penalty = CountPenalty(frequency=0.5, presence=0.25).after_prompt(2)
    scores = penalty(torch.tensor([[5, 5, 7, 5, 7], [5, 5, 6, 6, 6]]), torch.ones(2, 9))
    assert scores[0].tolist() == [1, 1, 1, 1, 1, 1 - 0.75, 1, 1 - 1.25, 1]
    assert scores[1].tolist() == [1, 1, 1, 1, 1, 1, 1 - 1.75, 1, 1]


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="There is no model 'another' here: ask for 'tiny'"):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="another", prompt=PROMPT)
    assert raised.value.code == "model_not_found" and raised.value.param == "model"


def test_answers_and_errors_have_cors_headers_for_allowed_origins(api):
    origin = {"Origin": "http://page.example"}
    request = {"Method": "POST", "Headers": "authorization,content-type", "Private-Network": "true"}
    preflight = {f"Access-Control-Request-{name}": value for name, value in request.items()}
    answer = api.options("/v1/completions", headers={**origin, **preflight})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://page.example"
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert answer.headers["access-control-allow-private-network"] == "true"
    answer = api.post("/v1/completions", content="{}", headers=origin)
    assert answer.status_code == 400 and answer.headers["access-control-allow-origin"] == "http://page.example"
    answer = api.post("/v1/completions", content="{}", headers={"Origin": "http://elsewhere.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_an_api_key_a_chat_template_and_a_timeout(tiny_folder):
    with in_process(tiny_folder, {"api_keys": ("first", "secret"), "timeout_s": 1}) as api:
        api.batcher.tokenizer.chat_template = "{{ raise_exception('only users here') }}"

        def ask(body, path="completions", key="Bearer secret", **headers):
            answer = api.post(f"/v1/{path}", json=body, headers={"Authorization": key, **headers})
            return answer.status_code, answer.text

        assert [ask({}, key=key)[0] for key in ("", "Bearer wrong", "Basic secret")] == [401] * 3
        assert ask({}, key="Bearer first")[0] == 400
        assert ask({}, key="bearer secret")[0] == 400
        assert ask({}, key="", Host="a/health?")[0] == 401  # only the request's own path counts
        assert [api.get(path).status_code for path in ("/health", "/openapi.json")] == [200, 401]
        status, text = ask({"messages": [{"role": "user", "content": "a"}]}, "chat/completions")
        assert status == 400 and "the chat template raised an error: only users here" in text
        status, text = ask(LONG)
        assert status == 504 and "took more than 1 seconds" in text
        status, text = ask({**LONG, "stream": True})
        error, _, done, _ = text.splitlines()[-4:]
        assert status == 200 and "took more than 1 seconds" in error and done == "data: [DONE]"


def test_tokenize_detokenize_and_version(api):
    ids = tiny_tokenizer()(PROMPT)["input_ids"]
    answer = api.post("/tokenize", json={"prompt": PROMPT}).json()
    assert answer == {"count": len(ids), "max_model_len": api.batcher.max_length, "tokens": ids}
    assert api.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False}).json()["tokens"] == ids[1:]
    chat = api.post("/tokenize", json={"messages": [{"role": "user", "content": PROMPT}]}).json()
    assert chat["tokens"] == ids
    assert api.post("/detokenize", json={"tokens": ids[1:]}).json() == {"prompt": PROMPT}
    assert api.get("/version").json() == {"version": calm_transformers.__version__}


def test_usage_in_every_chunk(completions):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = completions(temperature=0, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] == last.usage.completion_tokens == 24
    nulls = {"include_usage": None, "continuous_usage_stats": None}
    assert all(chunk.usage is None for chunk in completions(stream=True, stream_options=nulls))


def test_unknown_fields_are_ignored_if_the_server_says_so(tiny_folder):
    body = {"prompt": "a", "max_tokens": 4, "seed": 0, "dry_multiplier": 0.8}
    with in_process(tiny_folder, {"ignore_unknown_fields": True}) as api:
        answer = api.post("/v1/completions", json=body)
        assert answer.status_code == 200
        known = api.post("/v1/completions", json={**body, "dry_multiplier": None})
        assert answer.json()["choices"] == known.json()["choices"]
        assert api.post("/v1/completions", json={**body, "tools": [{}]}).status_code == 400  # known, not supported


# A server in a process of its own


def test_requests_run_in_one_batch_and_the_queue_is_bounded(server):
    cancelled = server.metric("calm_cancelled_total")
    started = server.metric("calm_first_token_seconds_count")
    connections = [server.connect({**LONG, "stream": i % 2 == 0}) for i in range(8)]
    server.wait_for_metric("calm_waiting", 4)
    assert server.metric("calm_running") == 4
    status, answer = server.post("/v1/completions", LONG)
    assert status == 429 and answer["error"]["type"] == "rate_limit_error"
    assert server.post("/v1/completions", {**LONG, "n": 2})[0] == 429
    for connection in connections:
        connection.close()
    server.wait_for_metric("calm_running", 0)
    assert server.metric("calm_waiting") == 0 and server.metric("calm_cancelled_total") == cancelled + 8
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 4})[0] == 200
    assert server.metric("calm_first_token_seconds_count") > started
    page = server.get("/metrics").read().decode()
    assert all(f'calm_requests_total{{path="/v1/completions",status="{status}"}}' in page for status in (200, 429))


def test_lines_of_the_log_are_truncated(server):
    for header in ({}, {"X-Forwarded-For": "b" * 5000}):
        connection = http.client.HTTPConnection(server.address, timeout=30)
        connection.request("GET", "/" + "a" * 8000, headers=header)
        assert connection.getresponse().status == 404
    assert 'calm_requests_total{path="other",status="404"}' in server.get("/metrics").read().decode()
    lines = server.log.read_text().splitlines()
    assert any("aaaa" in line for line in lines) and any("bbbb" in line for line in lines)
    assert max(map(len, lines)) < 1200


@pytest.mark.slow
def test_running_requests_are_finished_after_a_signal(tiny_folder, tmp_path):
    with running_server(tiny_folder, tmp_path / "home") as server:
        connection = server.connect({**LONG, "max_tokens": 120})
        server.wait_for_metric("calm_running", 1)
        assert server.stop() == 0
        answer = connection.getresponse()
        assert answer.status == 200 and json.load(answer)["usage"]["completion_tokens"] == 120
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("signals, grace", [(1, "1"), (2, "600")])
def test_requests_are_cancelled_after_the_grace_period_or_a_second_ctrl_c(tiny_folder, tmp_path, signals, grace):
    with running_server(tiny_folder, tmp_path / "home", "--grace", grace) as server:
        answer, stream = server.connect(LONG), server.connect({**LONG, "stream": True})
        half = socket.create_connection(server.address.split(":"))
        half.sendall(HEAD + b"{")  # the rest of the body is never sent
        server.wait_for_metric("calm_running", 2)
        for _ in range(signals - 1):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert server.stop(signal.SIGINT) == 0
        assert (answer := answer.getresponse()).status == 503 and b"The server is stopping" in answer.read()
        assert b"The server is stopping" in stream.getresponse().read().splitlines()[-4]
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sign, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_server_that_is_still_loading(tiny_folder, tmp_path, sign, code):
    template, log = tmp_path / "template.jinja", tmp_path / "log"
    os.mkfifo(template)
    words = [sys.executable, "-m", "calm_transformers.serving.serve", tiny_folder, "--port", "0"]
    with running([*words, "--chat_template", template], log, tmp_path) as process:
        with open(template, "w"):  # blocks until the server opens it to read the template
            process.send_signal(sign)
            time.sleep(0.05)
            process.send_signal(sign)
            assert process.wait(timeout=60) == code and "Traceback" not in log.read_text()


def test_the_demo_model_is_served_with_response_formats():
    schema = {"type": "object", "required": ["pet"], "additionalProperties": False}
    schema["properties"] = {"pet": {"enum": ["cat", "dog"]}}
    options = serve.parse([str(ROOT), "--device", "cpu"])
    with serve.load_batcher(options) as batcher, TestClient(create_app(batcher, ServerOptions("."))) as api:
        client = OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=api)

        def ask(**response_format):
            extra = {"response_format": response_format} if response_format else {}
            return client.completions.create(model=".", prompt=PROMPT, max_tokens=60, n=2, seed=0, extra_body=extra)

        assert ask().usage.completion_tokens == 120
        for choice in ask(type="json_schema", json_schema={"name": "child", "strict": True, "schema": schema}).choices:
            assert json.loads(choice.text)["pet"] in ("cat", "dog") and choice.finish_reason == "stop"
        assert all(choice.text.startswith("{") for choice in ask(type="json_object").choices)
        with pytest.raises(openai.BadRequestError, match="response_format: .*uniqueItems") as raised:
            ask(type="json_schema", json_schema={"schema": {"type": "array", "uniqueItems": True}})
        assert raised.value.param == "response_format"
        with pytest.raises(openai.BadRequestError, match="this model has no chat template; use /v1/completions"):
            client.chat.completions.create(model=".", messages=[{"role": "user", "content": "Hello"}])


@pytest.mark.slow
def test_the_example_in_the_documents_runs():
    _, example = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/serve.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\w.* (stop|length)\n.*\w", done.stdout, re.DOTALL)


def test_a_port_taken_while_the_model_loads_is_an_input_error():
    with serve.bind_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with serve.bind_socket("127.0.0.1", port) as second:
            first.listen()
            with pytest.raises(InputError, match="Address already in use"):
                serve.run(None, None, second, serve.parse([str(ROOT)]))


@pytest.mark.parametrize("host, key", [("0.0.0.0", None), ("0.0.0.0", "k"), ("127.0.0.1", None)])
def test_a_server_without_a_key_warns_or_checks_hosts(monkeypatch, capsys, tiny_folder, host, key):
    apps = []
    monkeypatch.setattr(serve, "run", lambda app, *_: apps.append(app))
    words = [str(tiny_folder), "--host", host, "--port", "0", *(["--api_key", key] if key else [])]
    assert not serve.main(words)
    warns = "anyone who reaches 0.0.0.0 can use this server" in capsys.readouterr().err
    assert warns == (host == "0.0.0.0" and key is None)
    with TestClient(apps[0]) as api:
        foreign, own = (api.get("/health", headers={"Host": name}).status_code for name in ("page.example", host))
    assert (foreign == 403, own == 403) == (host == "127.0.0.1", False)


@pytest.mark.parametrize("host, port", [("127.0.0.1", None), ("203.0.113.1", 0), ("é" * 80, 0), ("", 70000)])
def test_an_invalid_address_is_an_error_before_the_model_is_loaded(monkeypatch, capsys, host, port):
    monkeypatch.setattr(serve, "load_batcher", lambda _: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if port is None else port
        message = commands.refusal(capsys, serve.main, ROOT, "--host", host, "--port", port)
    assert message.startswith(f"{host}:{port} can't be listened on")


def test_invalid_options_raise_before_serving(monkeypatch, capsys, tiny_folder, tmp_path):
    monkeypatch.setattr(serve, "run", lambda *_: pytest.fail("no error"))
    for name, model in (("autoencoder", tiny_model().autoencoder), ("llama", tiny_llama())):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "keys").write_text("one\n\ntwo\n")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    (tmp_path / "bad.jinja").write_text("{{ messages\n{% if %}")
    for words, sentence in (
        ([tiny_folder, "--dtype", "float33"], "--dtype float33: must be auto or a dtype of torch"),
        ([tiny_folder, "--api_key", ""], "an API key is empty"),
        ([tiny_folder, "--api_key_file", tmp_path / "keys"], "an API key is empty"),
        ([tiny_folder, "--api_key_file", tmp_path / "bad.jinja"], "an API key has spaces or begins with #"),
        ([tiny_folder, "--timeout", "nan"], "nan: must be a number of seconds that is not negative"),
        ([tiny_folder, "--chat_template", tmp_path / "bytes.jinja"], "bytes.jinja: is not text in UTF-8"),
        ([tiny_folder, "--chat_template", tmp_path / "bad.jinja"], "the chat template is not valid Jinja, in line 2"),
        ([tiny_folder, "--max_draws", "20"], "at most 20 are allowed here"),  # its generation configuration has 50
        ([tmp_path / "autoencoder"], "is an autoencoder, not a language model"),
        ([tmp_path / "llama"], "is no CALM: its model_type is 'llama'"),
    ):
        assert sentence in commands.refusal(capsys, serve.main, *words, "--port", "0")


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = commands.refusal(capsys, serve.main, ROOT)
    assert f'needs {", ".join(serve.SERVING_PACKAGES)}: pip install "calm-transformers[serve]"' in message
