"""Servers for tests: `calm serve` in a process of its own, its API in this process, and any other server process."""

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

SECONDS = 120  # the longest wait for anything
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_tiny_model(folder, **overrides):
    """Saves a tiny model and a tokenizer with a chat template in a folder, and returns the folder."""
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
    """A client of the application in this process, with options of `ServerOptions` and limits of `Batcher`."""
    from starlette.testclient import TestClient
    from tiny import tiny_tokenizer

    from calm_transformers import CALMForCausalLM
    from calm_transformers.serving.app import ServerOptions, create_app
    from calm_transformers.serving.batcher import Batcher

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    fields = {"max_request_bytes": 20_000, "allowed_origins": ("http://page.example",), **(options or {})}
    with Batcher(CALMForCausalLM.from_pretrained(folder), tokenizer, **limits) as batcher:
        app, headers = create_app(batcher, ServerOptions("tiny", **fields)), {"Content-Type": "application/json"}
        with TestClient(app, headers=headers) as client:
            client.batcher = batcher
            yield client


def wait_for(what, condition, seconds=SECONDS):
    """Calls `condition` until its result is true, and returns the result; `what` is for the error message."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not after {seconds} s: {what}"
        time.sleep(0.02)
    return result


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def running(words, log, cwd, **environment):
    """Starts an offline process whose output goes to the file `log`, and ends it at the end of the block."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with open(log, "w") as output:
        process = subprocess.Popen([str(word) for word in words], env=environment, cwd=cwd, stdout=output, **pipes)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()  # if it still runs
        process.wait()


def wait_until_healthy(process, log, url):
    """Waits until a GET of `url()` is answered with 200; `url` may return None at first."""

    def is_up():
        assert process.poll() is None, f"it ended with {process.returncode}:\n{log.read_text()}"
        with contextlib.suppress(OSError):
            return url() and urllib.request.urlopen(url(), timeout=30).status == 200

    wait_for(f"an answer; see {log}", is_up)


class ServerProcess:
    """A running server: `url` (http://127.0.0.1:PORT), `process`, and `log`, the file with its output."""

    def __init__(self, process, log):
        self.process, self.log, self.url = process, log, None
        wait_until_healthy(process, log, self._health)

    def _health(self):
        if match := re.search(r"Serving .* at (http://\S+)/v1", self.log.read_text()):
            self.url = match[1]
            return f"{self.url}/health"

    @property
    def address(self):
        return self.url.removeprefix("http://")

    def get(self, path):
        return urllib.request.urlopen(self.url + path, timeout=30)

    def post(self, path, body):
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def connect(self, body):
        """Sends a completion request, and returns the connection before anything of the answer is read."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def metric(self, name):
        page = self.get("/metrics").read().decode()
        return float(re.search(rf"^{name} (\S+)$", page, re.M)[1])

    def wait_for_metric(self, name, value):
        wait_for(f"{name} is {value}", lambda: self.metric(name) == value)

    def stop(self, sign=signal.SIGTERM):
        self.process.send_signal(sign)
        return self.process.wait(timeout=30)


@contextlib.contextmanager
def running_server(model, home, *options, **environment):
    """Starts `calm serve` for a model; `home` is its HF_HOME and working directory, and holds its log."""
    home.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "calm_transformers.serving.serve", model, "--port", "0", *options]
    with running(words, home / "log", home, HF_HOME=str(home), **environment) as process:
        yield ServerProcess(process, home / "log")
