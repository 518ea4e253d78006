"""The server, asked with the official client in this process; one of its own: curl, clients that leave, its end."""

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
from pathlib import Path

import commands
import openai
import pytest
import torch
from openai import OpenAI
from server_process import SECONDS, in_process, running, running_server
from starlette.testclient import TestClient
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from calm_transformers.command_line import InputError
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.serving import serve
from calm_transformers.serving.app import ServerOptions, create_app
from calm_transformers.serving.openai_api import CountPenalty

ROOT = Path(__file__).parents[1]
PROMPT = "Once upon a time"
LONG = {"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(api):
    return OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=api)


@pytest.fixture
def completions(client):
    ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24}
    return lambda **fields: client.completions.create(**{**ask, **fields})


@pytest.fixture
def chat(client):
    def ask(*texts, **fields):
        messages = [{"role": "user", "content": text} for text in texts]
        return client.chat.completions.create(**{"model": "tiny", "messages": messages, "max_tokens": 24, **fields})

    return ask


def streamed(chunks):
    """The text of each choice of a stream."""
    texts = {}
    for chunk in chunks:
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    return [texts[index] for index in sorted(texts)]


@pytest.fixture(scope="module")
def generated(tiny_folder):
    """What `generate` writes after the prompt, of the seed 3: the text."""
    model, tokenizer = CALMForCausalLM.from_pretrained(tiny_folder), tiny_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def write(**settings):
        texts = model.generate(ids, generator=[torch.Generator().manual_seed(3)], max_new_tokens=24, **settings)
        return tokenizer.decode(texts[0, ids.shape[1] :], skip_special_tokens=True)

    return write


@pytest.fixture(scope="module")
def expected(generated):
    """Without sampling; after the same ids in both endpoints."""
    return generated(do_sample=False)


# With the official client


def test_completions_are_what_generate_writes(completions, expected):
    answer = completions(temperature=0)
    assert answer.choices[0].text == expected
    assert answer.usage.prompt_tokens == 1 + len(PROMPT) and answer.usage.total_tokens == 1 + len(PROMPT) + 24
    assert answer.object == "text_completion" and answer.choices[0].finish_reason == "length"


def test_chat_completions_are_what_generate_writes(chat, expected):
    answer = chat(PROMPT, temperature=0)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    parts = [{"type": "text", "text": PROMPT[:4]}, {"type": "text", "text": PROMPT[4:8]}]
    assert chat(parts, PROMPT[8:], temperature=0, max_completion_tokens=24).choices[0].message.content == expected


def test_a_stream_is_the_answer_in_pieces(completions, chat, expected):
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = completions(temperature=0, **usage)
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 4
    assert chunks[-1].choices[0].finish_reason == "length" and {chunk.id for chunk in chunks} == {last.id}
    assert last.choices == [] and last.usage.completion_tokens == 24
    *chunks, last = chat(PROMPT, temperature=0, **usage)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length" and last.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in completions(stream=True))


def test_no_character_of_a_text_ends_a_line_of_a_stream(api):
    prompt = "a\x85b\u2028c\u2029d"
    answer = api.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, "echo": True, "stream": True})
    *events, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    texts = [json.loads(event)["choices"][0]["text"] for event in events]
    assert texts[0] == prompt and done == "[DONE]"
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "no-cache" in answer.headers["cache-control"]


def test_requests_at_a_clients_defaults_work(client, chat, completions):
    assert client.completions.create(model="tiny", prompt=PROMPT).usage.completion_tokens <= 16
    assert client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}]).usage
    everything = completions(seed=3, temperature=1).choices[0].text
    assert completions(seed=3, temperature=1, extra_body={"top_k": -1, "min_p": 0}).choices[0].text == everything
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


def test_ids_in_place_of_text_echo_and_an_empty_prompt(completions):
    ids = tiny_tokenizer()(PROMPT)["input_ids"]
    text = completions(prompt=ids, seed=1).choices[0].text
    assert completions(prompt=[ids], seed=1, echo=True).choices[0].text == PROMPT + text
    assert streamed(completions(seed=1, echo=True, stream=True)) == [PROMPT + text]
    assert completions(prompt="", seed=1).choices[0].text == completions(prompt=[1], seed=1).choices[0].text


def test_stop_lists(completions):
    ask = {"seed": 2, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    whole = completions(**ask).choices[0].text
    stop = whole[20:22]
    answer = completions(**ask, stop=[f"never {i}" for i in range(99)] + [stop]).choices[0]
    assert answer.text == whole[: whole.index(stop)] and answer.finish_reason == "stop"
    assert streamed(completions(**ask, stop=stop, stream=True)) == [whole[: whole.index(stop)]]


SHAPED = [  # fields, and what generate calls them
    ({"num_candidates": 7, "sampling_method": "batch"}, {}),
    *(({name: value, "temperature": 1.0}, {}) for name, value in (("top_p", 0.3), ("top_k", 3), ("min_p", 0.5))),
    ({"repetition_penalty": 4.0}, {}),
    ({"logit_bias": {"40": 100, "50": -100}}, {"sequence_bias": {(40,): 100.0, (50,): -100.0}}),
    ({"frequency_penalty": 2, "presence_penalty": 1.5}, {"logits_processor": [CountPenalty(2.0, 1.5)]}),
]


@pytest.mark.parametrize("fields, settings", SHAPED)
def test_fields_that_shape_a_text_do_what_generate_does(completions, generated, fields, settings):
    text = generated(min_new_tokens=24, **settings or fields)
    asked = [{"seed": 3, "extra_body": {"min_tokens": 24, **more}} for more in ({}, fields)]
    plain, shaped = (completions(**ask).choices[0].text for ask in asked)
    assert shaped == text != plain
    if "logit_bias" in fields:
        assert set(text) == {tiny_tokenizer().decode([40])}


def test_count_penalties_by_hand():
    """Prompt [5, 5]; of what follows, 7 stands twice and 5 once."""
    penalty = CountPenalty(frequency=0.5, presence=0.25).after_prompt(2)
    scores = penalty(torch.tensor([[5, 5, 7, 5, 7], [5, 5, 6, 6, 6]]), torch.ones(2, 9))
    assert scores[0].tolist() == [1, 1, 1, 1, 1, 1 - 0.75, 1, 1 - 1.25, 1]
    assert scores[1].tolist() == [1, 1, 1, 1, 1, 1, 1 - 1.75, 1, 1]


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="There is no model 'another' here: ask for 'tiny'"):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="another", prompt=PROMPT)
    assert refused.value.code == "model_not_found" and refused.value.param == "model"


def test_pages_of_allowed_origins_may_ask_errors_included(api):
    page = {"Origin": "http://page.example"}
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    wanted["Access-Control-Request-Private-Network"] = "true"  # of a public page that asks this machine
    answer = api.options("/v1/completions", headers={**page, **wanted})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://page.example"
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert answer.headers["access-control-allow-private-network"] == "true"
    answer = api.post("/v1/completions", content="{}", headers=page)
    assert answer.status_code == 400 and answer.headers["access-control-allow-origin"] == "http://page.example"
    answer = api.post("/v1/completions", content="{}", headers={"Origin": "http://elsewhere.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_a_key_a_template_and_a_time_limit(tiny_folder):
    with in_process(tiny_folder, {"api_key": "secret", "timeout_s": 1}) as api:
        api.batcher.tokenizer.chat_template = "{{ raise_exception('only users here') }}"

        def ask(body, path="completions", key="Bearer secret", **headers):
            answer = api.post(f"/v1/{path}", json=body, headers={"Authorization": key, **headers})
            return answer.status_code, answer.text

        assert [ask({}, key=key)[0] for key in ("", "Bearer wrong", "Basic secret")] == [401] * 3
        assert ask({}, key="bearer secret")[0] == 400
        assert ask({}, key="", Host="a/health?")[0] == 401  # no path but the request's own counts
        assert api.get("/health").status_code == 200
        status, said = ask({"messages": [{"role": "user", "content": "a"}]}, "chat/completions")
        assert status == 400 and "the chat template refuses them: only users here" in said
        status, said = ask(LONG)
        assert status == 504 and "took more than 1 seconds" in said
        status, said = ask({**LONG, "stream": True})
        assert status == 200 and "took more than 1 seconds" in said.splitlines()[-2]


# A server of its own process


def test_requests_are_written_together_and_the_queue_is_bounded(server):
    cancelled = server.metric("calm_cancelled_total")
    begun = server.metric("calm_first_token_seconds_count")
    connections = [server.connect({**LONG, "stream": i % 2 == 0}) for i in range(8)]
    server.wait_for_metric("calm_waiting", 4)
    assert server.metric("calm_running") == 4
    status, answer = server.post("/v1/completions", LONG)
    assert status == 429 and answer["error"]["type"] == "rate_limit_error"
    status, _ = server.post("/v1/completions", {**LONG, "n": 2})
    assert status == 429
    for connection in connections:
        connection.close()
    server.wait_for_metric("calm_running", 0)
    assert server.metric("calm_waiting") == 0 and server.metric("calm_cancelled_total") == cancelled + 8
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 4})[0] == 200
    assert server.metric("calm_first_token_seconds_count") > begun
    page = server.get("/metrics").read().decode()
    assert all(f'calm_requests_total{{path="/v1/completions",status="{status}"}}' in page for status in (200, 429))


def test_no_line_of_the_log_is_as_long_as_a_client_wants(server):
    for header in ({}, {"X-Forwarded-For": "b" * 5000}):
        connection = http.client.HTTPConnection(server.address, timeout=30)
        connection.request("GET", "/" + "a" * 8000, headers=header)
        assert connection.getresponse().status == 404
    assert 'calm_requests_total{path="other",status="404"}' in server.get("/metrics").read().decode()
    lines = server.log.read_text().splitlines()
    assert any("aaaa" in line for line in lines) and any("bbbb" in line for line in lines)
    assert max(map(len, lines)) < 1200


# Its end


@pytest.mark.slow
def test_what_has_begun_is_written_when_it_is_stopped(tiny_folder, tmp_path):
    with running_server(tiny_folder, tmp_path / "home", CALM_API_KEY="") as server:  # an empty key is none
        connection = server.connect({**LONG, "max_tokens": 120})
        server.wait_for_metric("calm_running", 1)
        assert server.stop() == 0
        answer = connection.getresponse()
        assert answer.status == 200 and json.load(answer)["usage"]["completion_tokens"] == 120
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("signals, grace", [(1, "1"), (2, "600")])
def test_what_is_not_written_in_time_or_until_a_second_ctrl_c_is_cancelled(tiny_folder, tmp_path, signals, grace):
    with running_server(tiny_folder, tmp_path / "home", "--grace", grace) as server:
        answer, stream = server.connect(LONG), server.connect({**LONG, "stream": True})
        half = http.client.HTTPConnection(server.address, timeout=60)
        half.putrequest("POST", "/v1/completions")
        half.putheader("Content-Length", "100")
        half.endheaders(b"{")  # and no more
        server.wait_for_metric("calm_running", 2)
        for _ in range(signals - 1):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert server.stop(signal.SIGINT) == 0
        assert (answer := answer.getresponse()).status == 503 and b"The server is stopping" in answer.read()
        assert b"The server is stopping" in stream.getresponse().read().splitlines()[-2]
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sign, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_may_be_stopped_while_it_loads(tiny_folder, tmp_path, sign, code):
    template, log = tmp_path / "template.jinja", tmp_path / "log"
    os.mkfifo(template)
    words = [sys.executable, "-m", "calm_transformers.serving.serve", tiny_folder, "--port", "0"]
    with running([*words, "--chat_template", template], log, tmp_path) as process:
        with open(template, "w"):  # waits until the server reads it, which then waits for a template
            process.send_signal(sign)
            time.sleep(0.05)
            process.send_signal(sign)
            assert process.wait(timeout=60) == code and "Traceback" not in log.read_text()


def test_the_demo_model_is_served_and_writes_in_formats():
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
        with pytest.raises(openai.BadRequestError, match="response_format: .*uniqueItems") as refused:
            ask(type="json_schema", json_schema={"schema": {"type": "array", "uniqueItems": True}})
        assert refused.value.param == "response_format"
        with pytest.raises(openai.BadRequestError, match="this model has no chat template; use /v1/completions"):
            client.chat.completions.create(model=".", messages=[{"role": "user", "content": "Hello"}])


@pytest.mark.slow
def test_the_example_of_the_documents_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\w.* (stop|length)\n.*\w", done.stdout, re.DOTALL)


# The command


def test_a_port_that_another_server_took_while_the_model_was_loaded():
    with serve.bind_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with serve.bind_socket("127.0.0.1", port) as second:
            first.listen()
            with pytest.raises(InputError, match="Address already in use"):
                serve.run(None, None, second, serve.parse([str(ROOT)]))


@pytest.mark.parametrize("host, port", [("127.0.0.1", None), ("203.0.113.1", 0), ("é" * 80, 0), ("", 70000)])
def test_an_address_that_no_one_can_listen_on_is_known_before_the_model_is_loaded(monkeypatch, capsys, host, port):
    monkeypatch.setattr(serve, "load_batcher", lambda _: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if port is None else port
        said = commands.refusal(capsys, serve.main, ROOT, "--host", host, "--port", port)
    assert said.startswith(f"{host}:{port} can't be listened on")


REFUSALS = [
    (["{tiny}", "--dtype", "float33"], "--dtype float33: must be auto or a type of torch"),
    (["{tiny}", "--timeout", "nan"], "nan: must be a number of seconds that is not negative"),
    (["{tiny}", "--chat_template", "{tmp}/bytes.jinja"], "bytes.jinja: is no text in UTF-8"),
    (["{tiny}", "--chat_template", "{tmp}/bad.jinja"], "the chat template is no Jinja, in line 2"),
    (["{tiny}", "--max_draws", "20"], "patches in a step: 20 are allowed here"),  # of the settings it was saved with
    (["{tmp}/autoencoder"], "is an autoencoder, not a language model"),
    (["{tmp}/llama"], "is no CALM: its model_type is 'llama'"),
]


@pytest.fixture(scope="module")
def refused_folder(tmp_path_factory):
    folder, sizes = tmp_path_factory.mktemp("refused"), {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 96}
    config = LlamaConfig(intermediate_size=8, num_attention_heads=1, **sizes)
    for name, model in (("autoencoder", tiny_model().autoencoder), ("llama", LlamaForCausalLM(config))):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "bytes.jinja").write_bytes(b"\xff")
    (folder / "bad.jinja").write_text("{{ messages\n{% if %}")
    return folder


@pytest.mark.parametrize("words, sentence", REFUSALS)
def test_it_refuses_before_it_serves_anything(monkeypatch, capsys, tiny_folder, refused_folder, words, sentence):
    monkeypatch.setattr(serve, "run", lambda *_: pytest.fail("went on in place of refusing"))
    words = [word.format(tiny=tiny_folder, tmp=refused_folder) for word in words]
    assert sentence in commands.refusal(capsys, serve.main, *words, "--port", "0")


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = commands.refusal(capsys, serve.main, ROOT)
    assert f'needs {", ".join(serve.SERVING_PACKAGES)}: pip install "calm-transformers[serve]"' in said
