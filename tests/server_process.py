"""Processes that serve, `calm serve` among them, for tests that talk to it over HTTP; and its API in this process."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

SECONDS = 120  # for whatever should happen at all
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_tiny_model(folder, **overrides):
    """A tiny model with a tokenizer that has a chat template, saved in a folder."""
    from tiny import tiny_model, tiny_tokenizer

    model, tokenizer = tiny_model(**overrides), tiny_tokenizer()
    model.generation_config.update(do_sample=True, temperature=0.5)
    model.generation_config.num_candidates = 50
    tokenizer.chat_template = CHAT_TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def in_process(folder, options=None, **limits):
    """A client of the application (`options` of `ServerOptions`) in this process; its `batcher` has the `limits`."""
    from starlette.testclient import TestClient
    from tiny import tiny_tokenizer

    from calm_transformers import Batcher, CALMForCausalLM
    from calm_transformers.serving.app import ServerOptions, create_app

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    fields = {"max_request_bytes": 20_000, "allowed_origins": ("http://page.example",), **(options or {})}
    with Batcher(CALMForCausalLM.from_pretrained(folder), tokenizer, **limits) as batcher:
        with TestClient(create_app(batcher, ServerOptions("tiny", **fields))) as client:
            client.batcher = batcher
            yield client


def wait_for(what, is_so, seconds=SECONDS):
    """Returns what `is_so` returns when that is true."""
    deadline = time.monotonic() + seconds
    while not (result := is_so()):
        assert time.monotonic() < deadline, f"not after {seconds} s: {what}"
        time.sleep(0.02)
    return result


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def running(words, log, cwd, **environment):
    """An offline process, which is ended whatever happens; what it prints goes to the file `log`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with open(log, "w") as output:
        process = subprocess.Popen([str(word) for word in words], env=environment, cwd=cwd, stdout=output, **pipes)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(process, log, url):
    """Until a GET of `url()`, where it is known, is answered."""

    def is_up():
        assert process.poll() is None, f"it ended with {process.returncode}:\n{log.read_text()}"
        with contextlib.suppress(OSError):
            return url() and urllib.request.urlopen(url(), timeout=30).status == 200

    wait_for(f"an answer; see {log}", is_up)


class ServerProcess:
    """A server that runs: `url` (http://127.0.0.1:PORT), `process`, and `log`, the file of what it prints."""

    def __init__(self, process, log):
        self.process, self.log, self.url = process, log, None
        wait_until_healthy(process, log, self._health)

    def _health(self):
        if said := re.search(r"Serving .* at (http://\S+)/v1", self.log.read_text()):
            self.url = said[1]
            return f"{self.url}/health"

    @property
    def address(self):
        return self.url.removeprefix("http://")

    def get(self, path):
        return urllib.request.urlopen(self.url + path, timeout=30)

    def post(self, path, body):
        """Status and JSON of an answer."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def connect(self, body):
        """A connection that has asked for a completion and read nothing of the answer."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def metric(self, name):
        """The value of a metric without labels."""
        page = self.get("/metrics").read().decode()
        return float(re.search(rf"^{name} (\S+)$", page, re.M)[1])

    def wait_for_metric(self, name, value):
        wait_for(f"{name} is {value}", lambda: self.metric(name) == value)

    def stop(self, sign=signal.SIGTERM):
        self.process.send_signal(sign)
        return self.process.wait(timeout=30)


@contextlib.contextmanager
def running_server(model, home, *options, **environment):
    """A server process of a model; `home` becomes HF_HOME and the working directory, and its file log the log."""
    home.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "calm_transformers.serving.serve", model, "--port", "0", *options]
    with running(words, home / "log", home, HF_HOME=str(home), **environment) as process:
        yield ServerProcess(process, home / "log")
