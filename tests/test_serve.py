"""`python -m calm.serve`: a real server asked with the official client and curl, how it ends, and its command."""

import concurrent.futures
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import commands
import openai
import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file, save_file
from server_process import START_SECONDS, running_server, save_tiny_model
from tiny import tiny_tokenizer

from calm import serve
from calm.command_line import InputError
from calm.modeling_calm import CALMForCausalLM
from calm.serving.openai_api import CountPenalty

ROOT = Path(__file__).parents[1]
PROMPT = "Once upon a time"
LONG = {"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    options = ("--model_name", "tiny", "--max_rows", "4", "--max_waiting", "4")
    with running_server(tiny_folder, home, *options, "--allow_origin", "http://page.example") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def completions(client):
    return lambda **fields: client.completions.create(
        **{"model": "tiny", "prompt": PROMPT, "max_tokens": 24, **fields}
    )


@pytest.fixture
def chat(client):
    def ask(*texts, **fields):
        messages = [{"role": "user", "content": text} for text in texts]
        return client.chat.completions.create(**{"model": "tiny", "messages": messages, "max_tokens": 24, **fields})

    return ask


@pytest.fixture(scope="module")
def expected(tiny_folder):
    """What `generate` writes without sampling, called here: 24 tokens, after the same ids in both endpoints."""
    tokenizer, model = tiny_tokenizer(), CALMForCausalLM.from_pretrained(tiny_folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


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
    parts = [{"type": "text", "text": PROMPT[:4]}, {"type": "text", "text": PROMPT[4:]}]
    assert chat(parts, temperature=0).choices[0].message.content == expected
    assert chat(PROMPT[:4], PROMPT[4:], temperature=0, max_completion_tokens=24).choices[0].message.content == expected


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


def test_no_character_of_a_text_ends_a_line_of_a_stream(server):
    prompt = "a\x85b\u2028c\u2029d"
    answer = server.connect({"prompt": prompt, "max_tokens": 4, "echo": True, "stream": True}).getresponse()
    *events, done = [line.removeprefix("data: ") for line in answer.read().decode().splitlines() if line]
    texts = [json.loads(event)["choices"][0]["text"] for event in events]
    assert texts[0] == prompt and done == "[DONE]"


def test_requests_at_a_clients_defaults_work(client, chat, completions):
    assert client.completions.create(model="tiny", prompt=PROMPT).usage.completion_tokens <= 16
    assert client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}]).usage
    neutral = {"temperature": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "logit_bias": {}}
    assert completions(**neutral, user="me", best_of=1, suffix="").choices[0].text
    ignored = {"user": "me", "store": False, "metadata": {"a": "b"}, "tools": [], "response_format": {"type": "text"}}
    assert chat("a", **neutral, **ignored, logprobs=False).choices[0].message.content


def test_a_seed_gives_the_same_text_streamed_or_not_and_beside_others(completions):
    first, other = (completions(seed=seed, max_tokens=32).choices[0].text for seed in (7, 8))
    stream = completions(seed=7, max_tokens=32, stream=True)
    assert first == "".join(chunk.choices[0].text for chunk in stream) != other
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        texts = list(threads.map(lambda seed: completions(seed=seed, max_tokens=32).choices[0].text, (7, 9, 8, 7)))
    assert texts[0] == texts[3] == first and texts[2] == other


def test_n_choices_of_each_prompt(completions):
    answer = completions(prompt=[PROMPT, "a"], n=2, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = [completions(prompt=p, seed=s).choices[0].text for p in (PROMPT, "a") for s in (7, 8)]
    assert [choice.text for choice in answer.choices] == alone
    assert answer.usage.prompt_tokens == 1 + len(PROMPT) + 2
    texts = {}
    for chunk in completions(prompt=[PROMPT, "a"], n=2, seed=7, stream=True):
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert [texts[i] for i in range(4)] == alone


def test_ids_in_place_of_text_and_echo(completions):
    ids = tiny_tokenizer()(PROMPT)["input_ids"]
    text = completions(seed=1).choices[0].text
    assert completions(prompt=ids, seed=1).choices[0].text == text
    assert completions(prompt=[ids], seed=1, echo=True).choices[0].text == PROMPT + text
    stream = completions(seed=1, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == PROMPT + text


def test_stop_lists(completions):
    whole = completions(seed=2, max_tokens=60, extra_body={"ignore_eos": True}).choices[0].text
    stop = whole[20:22]
    hundred = [f"never {i}" for i in range(99)] + [stop]
    for given in (stop, [stop], hundred):
        answer = completions(seed=2, max_tokens=60, stop=given, extra_body={"ignore_eos": True}).choices[0]
        assert answer.text == whole[: whole.index(stop)] and answer.finish_reason == "stop"
    stream = completions(seed=2, max_tokens=60, stop=stop, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].text for chunk in stream) == whole[: whole.index(stop)]


def test_own_fields_reach_the_sampler(completions, tiny_folder):
    model, ids = CALMForCausalLM.from_pretrained(tiny_folder), tiny_tokenizer()(PROMPT, return_tensors="pt")
    own = {"num_candidates": 7, "sampling_method": "batch"}
    generator = [torch.Generator().manual_seed(3)]
    text = model.generate(**ids, generator=generator, max_new_tokens=24, min_new_tokens=20, temperature=0.4, **own)
    text = tiny_tokenizer().decode(text[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = completions(seed=3, temperature=0.4, extra_body={**own, "min_tokens": 20})
    assert answer.choices[0].text == text and answer.usage.completion_tokens >= 20


SHAPED = {
    "top_p": ({"top_p": 0.3, "temperature": 1}, {"top_p": 0.3, "temperature": 1.0}),
    "top_k": ({"top_k": 3, "temperature": 1}, {"top_k": 3, "temperature": 1.0}),
    "min_p": ({"min_p": 0.5, "temperature": 1}, {"min_p": 0.5, "temperature": 1.0}),
    "temperature": ({"temperature": 1.5}, {"temperature": 1.5}),
    "repetition_penalty": ({"repetition_penalty": 4.0}, {"repetition_penalty": 4.0}),
    "logit_bias": ({"logit_bias": {"40": 100, "50": -100}}, {"sequence_bias": {(40,): 100.0, (50,): -100.0}}),
    "penalties": (
        {"frequency_penalty": 2, "presence_penalty": 1.5},
        {"logits_processor": [CountPenalty(2.0, 1.5)]},
    ),
}


@pytest.mark.parametrize("name", SHAPED)
def test_fields_that_shape_a_text_do_what_generate_does(completions, tiny_folder, name):
    fields, settings = SHAPED[name]
    model, ids = CALMForCausalLM.from_pretrained(tiny_folder), tiny_tokenizer()(PROMPT, return_tensors="pt")
    model.generation_config.do_sample = True
    generator = [torch.Generator().manual_seed(3)]
    text = model.generate(**ids, generator=generator, max_new_tokens=24, min_new_tokens=24, **settings)
    text = tiny_tokenizer().decode(text[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    ask = {"seed": 3, "extra_body": {"min_tokens": 24}}
    assert completions(**ask | {"extra_body": {"min_tokens": 24, **fields}}).choices[0].text == text
    assert completions(**ask).choices[0].text != text
    if name == "logit_bias":
        assert set(text) == {tiny_tokenizer().decode([40])}


def test_a_top_k_of_minus_1_is_all(completions):
    ask = {"seed": 3, "temperature": 1}
    everything = completions(**ask).choices[0].text
    assert completions(**ask, extra_body={"top_k": -1, "min_p": 0}).choices[0].text == everything


def test_count_penalties_by_hand():
    """Prompt [5, 5]; of what follows, 7 stands twice and 5 once."""
    penalty = CountPenalty(frequency=0.5, presence=0.25).after_prompt(2)
    scores = penalty(torch.tensor([[5, 5, 7, 5, 7], [5, 5, 6, 6, 6]]), torch.ones(2, 9))
    assert scores[0].tolist() == [1, 1, 1, 1, 1, 1 - 0.75, 1, 1 - 1.25, 1]
    assert scores[1].tolist() == [1, 1, 1, 1, 1, 1, 1 - 1.75, 1, 1]
    assert torch.equal(CountPenalty(-1.0, 0.0, 2)(torch.tensor([[5, 5, 7]]), torch.zeros(1, 9))[0, 7:8], torch.ones(1))
    assert torch.equal(penalty(torch.tensor([[5, 5]]), torch.ones(1, 9)), torch.ones(1, 9))


def test_a_bias_for_all_tokens_is_none(completions):
    ask, everywhere = {"seed": 3, "temperature": 0}, {str(token): 64 for token in range(96)}
    assert completions(**ask, logit_bias=everywhere).choices[0].text == completions(**ask).choices[0].text


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="There is no model 'another' here: ask for 'tiny'"):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="another", prompt=PROMPT)
    assert refused.value.code == "model_not_found" and refused.value.param == "model"


def test_an_empty_prompt_begins_a_text(completions):
    assert completions(prompt="", seed=1).choices[0].text == completions(prompt=[1], seed=1).choices[0].text


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server):
    def curl(*arguments):
        return subprocess.run(
            ["curl", "-sS", *arguments], capture_output=True, text=True, timeout=60, check=True
        ).stdout

    body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "seed": 0})
    text = json.loads(curl(server.url + "/v1/completions", "-d", body))["choices"][0]["text"]
    stream = curl("-N", server.url + "/v1/completions", "-d", body.replace("}", ', "stream": true}'))
    *events, done = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert done == "[DONE]" and "".join(json.loads(event)["choices"][0]["text"] for event in events) == text
    assert json.loads(curl(server.url + "/health")) == {"status": "ok"}
    headers = curl(
        "-D", "-", "-o", os.devnull, "-N", server.url + "/v1/completions", "-d", '{"prompt":"a","stream":true}'
    )
    assert "content-type: text/event-stream" in headers.lower() and "no-cache" in headers.lower()


# Batches, and clients that leave


def test_requests_are_written_together_and_the_queue_is_bounded(server):
    cancelled = server.metric("calm_cancelled_total")
    connections = [server.connect(LONG) for _ in range(8)]
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


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row_within_a_patch(server, stream):
    connection = server.connect({**LONG, "stream": stream, "n": 2})
    if stream:
        assert connection.getresponse().readline().startswith(b"data: ")
    server.wait_for_metric("calm_running", 2)
    left = time.monotonic()
    connection.close()
    if stream:
        connection.sock = None
    server.wait_for_metric("calm_running", 0)
    assert time.monotonic() - left < 2


def test_metrics_count_requests_and_times(server):
    before = server.metric("calm_first_token_seconds_count")
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 4})[0] == 200
    assert server.metric("calm_first_token_seconds_count") == before + 1
    assert server.post("/v1/embeddings", {})[0] == 404
    page = server.get("/metrics").read().decode()
    assert 'calm_requests_total{path="/v1/completions",status="200"}' in page
    assert 'calm_requests_total{path="other",status="404"}' in page


def test_no_line_of_the_log_is_as_long_as_a_client_wants(server):
    for header in ({}, {"X-Forwarded-For": "b" * 5000}):
        connection = http.client.HTTPConnection(server.address, timeout=30)
        connection.request("GET", "/" + "a" * 8000, headers=header)
        assert connection.getresponse().status == 404
    server.get("/health")
    lines = server.log.read_text().splitlines()
    assert any("aaaa" in line for line in lines) and any("bbbb" in line for line in lines)
    assert max(map(len, lines)) < 1200


def test_pages_of_allowed_origins_may_ask_errors_included(server):
    connection = http.client.HTTPConnection(server.address, timeout=30)
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    connection.request("OPTIONS", "/v1/completions", headers={"Origin": "http://page.example", **wanted})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "http://page.example"
    assert "authorization" in answer.headers["access-control-allow-headers"]
    answer.read()
    wanted["Access-Control-Request-Private-Network"] = "true"  # of a public page that asks this machine
    connection.request("OPTIONS", "/v1/completions", headers={"Origin": "http://page.example", **wanted})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers["access-control-allow-private-network"] == "true"
    answer.read()
    connection.request("POST", "/v1/completions", "{}", {"Origin": "http://page.example"})
    answer = connection.getresponse()
    assert answer.status == 400 and answer.headers["access-control-allow-origin"] == "http://page.example"
    answer.read()
    connection.request("POST", "/v1/completions", "{}", {"Origin": "http://elsewhere.example"})
    assert "access-control-allow-origin" not in connection.getresponse().headers


# Its life


def test_key_time_out_template_and_graceful_stop(tiny_folder, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ raise_exception('only users here') if messages[0].role != 'user' else messages[0].content }}"
    )
    options = ("--timeout", "3", "--chat_template", str(template), "--prefill_chunk_size", "8")
    with running_server(tiny_folder, tmp_path / "home", *options, CALM_API_KEY="secret") as server:
        assert server.post("/v1/completions", {"prompt": "a"})[0] == 401
        assert server.post("/v1/completions", {"prompt": "a"}, Authorization="Bearer wrong")[0] == 401
        assert server.post("/v1/completions", {"prompt": "a"}, Authorization="Basic secret")[0] == 401
        for scheme in ("bearer", "BEARER"):
            assert server.post("/v1/completions", {}, Authorization=f"{scheme} secret")[0] == 400
        connection = http.client.HTTPConnection(server.address, timeout=30)
        connection.request("GET", "/v1/models", headers={"Host": "a/health?"})  # no path but the request's own counts
        assert connection.getresponse().status == 401 and server.get("/health").status == 200
        key = {"Authorization": "Bearer secret"}
        assert server.post("/v1/completions", {"prompt": "a", "model": str(tiny_folder)}, **key)[0] == 200
        status, answer = server.post("/v1/chat/completions", {"messages": [{"role": "system", "content": "a"}]}, **key)
        assert status == 400 and "the chat template refuses them: only users here" in answer["error"]["message"]
        status, answer = server.post("/v1/completions", LONG, **key)
        assert status == 504 and "took more than 3 seconds" in answer["error"]["message"]
        server.wait_for_metric("calm_running", 0)

        answers = []
        client = threading.Thread(
            target=lambda: answers.append(server.post("/v1/completions", {**LONG, "max_tokens": 120}, **key))
        )
        client.start()
        server.wait_for_metric("calm_running", 1)
        assert server.stop() == 0
        client.join()
        assert answers[0][0] == 200 and answers[0][1]["usage"]["completion_tokens"] == 120
    assert "Traceback" not in server.log.read_text()


def test_a_server_may_be_stopped_while_it_loads(tiny_folder, tmp_path):
    template = tmp_path / "template.jinja"
    os.mkfifo(template)
    arguments = (str(tiny_folder), "--port", "0", "--chat_template", str(template))
    process = subprocess.Popen([sys.executable, "-m", "calm.serve", *arguments])
    with open(template, "w"):  # waits until the server reads it, which then waits for a template
        process.terminate()
        assert process.wait(timeout=60) == 0


def test_a_stream_that_takes_too_long_ends_with_an_error_event(tiny_folder, tmp_path):
    with running_server(
        tiny_folder, tmp_path / "home", "--timeout", "3", "--grace", "1", CALM_API_KEY=""
    ) as server:  # an empty key is none
        client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="took more than 3 seconds"):
            fields = {"max_tokens": 8000, "extra_body": {"ignore_eos": True}}
            list(client.completions.create(model=str(tiny_folder), prompt=PROMPT, stream=True, **fields))
        answer, stream = server.connect(LONG), server.connect({**LONG, "stream": True})
        server.wait_for_metric("calm_running", 2)
        assert server.stop(signal.SIGINT) == 0  # a second later, with the texts cancelled
        assert (answer := answer.getresponse()).status == 503 and b"The server is stopping" in answer.read()
        assert b"The server is stopping" in stream.getresponse().read().splitlines()[-2]
    assert "Traceback" not in server.log.read_text()


def test_a_second_ctrl_c_ends_at_once_and_as_the_first(tiny_folder, tmp_path):
    with running_server(tiny_folder, tmp_path / "home", "--grace", "600") as server:
        answer, stream = server.connect(LONG), server.connect({**LONG, "stream": True})
        half = http.client.HTTPConnection(server.address, timeout=60)
        half.putrequest("POST", "/v1/completions")
        half.putheader("Content-Length", "100")
        half.endheaders(b"{")  # and no more
        server.wait_for_metric("calm_running", 2)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.stop(signal.SIGINT) == 0
        assert (answer := answer.getresponse()).status == 503 and b"The server is stopping" in answer.read()
        assert b"The server is stopping" in stream.getresponse().read().splitlines()[-2]
    assert "Traceback" not in server.log.read_text()


def test_ctrl_c_while_the_model_loads(tiny_folder, tmp_path):
    template = tmp_path / "template.jinja"
    os.mkfifo(template)
    arguments = (str(tiny_folder), "--port", "0", "--chat_template", str(template))
    process = subprocess.Popen([sys.executable, "-m", "calm.serve", *arguments], stderr=subprocess.PIPE, text=True)
    with open(template, "w"):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130 and "Traceback" not in process.stderr.read()


def check_formats(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "pet": {"enum": ["cat", "dog"]}},
        "required": ["name", "pet"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "child", "strict": True, "schema": schema}}
    ask = {"model": ".", "prompt": PROMPT, "max_tokens": 80, "n": 3, "seed": 0}
    for choice in client.completions.create(**ask, extra_body={"response_format": asked}).choices:
        answer = json.loads(choice.text)
        assert len(answer["name"]) <= 9 and answer["pet"] in ("cat", "dog") and choice.finish_reason == "stop"
    any_object = client.completions.create(**ask, extra_body={"response_format": {"type": "json_object"}})
    ended = [json.loads(choice.text) for choice in any_object.choices if choice.finish_reason == "stop"]
    assert all(choice.text.startswith("{") for choice in any_object.choices) and all(type(it) is dict for it in ended)
    asked["json_schema"]["schema"] = {"type": "array", "uniqueItems": True}
    with pytest.raises(openai.BadRequestError, match="response_format: .*uniqueItems") as refused:
        client.completions.create(**ask, extra_body={"response_format": asked})
    assert refused.value.param == "response_format"


@pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the root holds no trained model yet")
def test_the_demo_model_is_served(tmp_path):
    with running_server(".", tmp_path / "home", cwd=ROOT) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["."]
        answer = client.completions.create(model=".", prompt=PROMPT, max_tokens=40, seed=0)
        assert answer.choices[0].text.strip() and answer.usage.completion_tokens == 40
        check_formats(client)
        with pytest.raises(openai.BadRequestError, match="this model has no chat template; use /v1/completions"):
            client.chat.completions.create(model=".", messages=[{"role": "user", "content": "Hello"}])


@pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the root holds no trained model yet")
def test_the_example_of_the_documents_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\w.* (stop|length)\n.*\w", done.stdout, re.DOTALL)


# The command


def run_module(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "calm.serve", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        **options,
    )


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs `main` in this process; it must end with code 2 and one line before it serves anything."""

    def too_late(*_):
        raise AssertionError("went on in place of refusing")

    monkeypatch.setattr(serve, "run", too_late)
    return lambda *arguments: commands.refusal(capsys, serve.main, *arguments, "--port", "0")


@pytest.mark.parametrize("package", serve.SERVING_PACKAGES)
def test_a_missing_package_is_named(monkeypatch, refusal, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert f'needs {package}: pip install "calm-transformers[serve]"' in refusal(ROOT)


def test_a_port_in_use_is_known_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(serve, "load_batcher", lambda _: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = commands.refusal(capsys, serve.main, ROOT, "--port", str(port))
    assert f"127.0.0.1:{port} can't be listened on" in message


def test_a_port_that_another_server_took_while_the_model_was_loaded(monkeypatch):
    with serve.listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with serve.listen("127.0.0.1", port) as second:
            first.listen()
            with pytest.raises(InputError, match=f"127.0.0.1:{port} can't be listened on .Address already in use"):
                serve.run(None, None, second, serve.parse([str(ROOT)]))


@pytest.mark.parametrize("place", [("--host", "203.0.113.1"), ("--host", "é" * 80), ("--port", 70000)])
def test_an_address_that_no_one_can_listen_on(monkeypatch, capsys, place):
    monkeypatch.setattr(serve, "load_batcher", lambda _: pytest.fail("loaded"))
    assert "can't be listened on" in commands.refusal(capsys, serve.main, ROOT, *place)


def test_folders_devices_types_and_templates_that_are_wrong_are_refused(refusal, tmp_path, tiny_folder):
    assert str(tmp_path / "missing") in refusal(tmp_path / "missing")
    CALMForCausalLM.from_pretrained(tiny_folder).autoencoder.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "is an autoencoder, not a language model" in refusal(tmp_path)
    assert "--dtype float33: must be auto or a type of torch" in refusal(tiny_folder, "--dtype", "float33")
    assert "nowhere" in refusal(tiny_folder, "--device", "nowhere")
    if not torch.cuda.is_available():
        assert "--device cuda: " in refusal(tiny_folder, "--device", "cuda")
    for timeout in ("-1", "nan", "inf"):
        assert f"{timeout}: must be a number of seconds that is not negative" in refusal(
            tiny_folder, "--timeout", timeout
        )
    assert "none.jinja" in refusal(tiny_folder, "--chat_template", tmp_path / "none.jinja")
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    assert "bad.jinja: is no text in UTF-8" in refusal(tiny_folder, "--chat_template", tmp_path / "bad.jinja")
    (tmp_path / "bad.jinja").write_text("{{ messages\n{% if %}")
    assert "the chat template is no Jinja, in line 2" in refusal(
        tiny_folder, "--chat_template", tmp_path / "bad.jinja"
    )


def test_a_model_that_no_request_could_be_written_with_is_refused(refusal, tmp_path, tiny_folder):
    """Of its weights, and of the settings that it was saved with."""

    def save(folder, **tensors):
        shutil.copytree(tiny_folder, folder)
        file = folder / "model.safetensors"
        weights = {**load_file(file), **tensors}
        save_file({name: weight for name, weight in weights.items() if weight is not None}, file, {"format": "pt"})
        return folder

    name = "model.layers.0.mlp.up_proj.weight"
    nan = torch.full_like(load_file(tiny_folder / "model.safetensors")[name], torch.nan)
    assert f"{name} holds NaN" in refusal(save(tmp_path / "nan", **{name: nan}))
    done = run_module(save(tmp_path / "missing", **{name: None}), "--port", "0")  # upstream reports it first
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"its weights lack {name}." in done.stderr.splitlines()[-1]
    assert "patches in a step: 20 are allowed here" in refusal(tiny_folder, "--max_draws", "20")


def test_another_model_is_refused(refusal, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=96)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "is no CALM: its model_type is 'llama'" in refusal(tmp_path)


def test_a_hub_id_out_of_reach_is_refused_by_the_command(tmp_path):
    done = run_module("nobody/nothing", "--port", "0", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.splitlines()[-1].startswith("error: ")
    assert "nobody/nothing" in done.stderr


def test_help_is_quick_and_complete():
    done = run_module("--help")
    assert done.returncode == 0 and "--max_waiting" in done.stdout and "--api_key" in done.stdout
